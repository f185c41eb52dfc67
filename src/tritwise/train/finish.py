"""What happens after the last step: score, ship, read back, audit, and the files that the report draws."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tritwise.data.corpus import open_parts
from tritwise.data.source import BUNDLED_NAMES
from tritwise.data.tokenizer import Tokenizer
from tritwise.errors import UserError
from tritwise.models import Arb, ByteLM
from tritwise.nn import trit_modules
from tritwise.registers import REGISTER_LIMIT
from tritwise.score import LADDER_BYTES, Score, ladder, score
from tritwise.ship import ArtifactInfo, estimate, read_artifact, ship_within, shipped_bytes
from tritwise.ship.container import OverBudgetError
from tritwise.ship.floats import SEARCHED
from tritwise.train.audit import audit
from tritwise.train.average import Average, changed_trits
from tritwise.train.config import Config, TrainConfig, override, tokenizer_of
from tritwise.train.restore import averaged_of, load_run
from tritwise.train.run import RunFolder


def finish(
    config: Config,
    folder: RunFolder,
    model: ByteLM | Arb,
    optimizers: list[torch.optim.Optimizer],
    parts: dict[str, np.ndarray],
    done: dict[str, Any],
    device: torch.device,
    memory: dict[str, int | None],
    average: Average | None = None,
    tokenizer: Tokenizer | None = None,
) -> dict[str, Any]:
    """Write ladder, audit, histogram, artifact and result into the run folder; returns the result.

    `done` says what training did: steps, seconds, bytes_seen; `memory` what it took, by role. The score in the result
    is of the artifact, read back from disk. With an `average`, mean and last weights are both scored. A ternary model
    and its artifact must agree to the last bit or this raises UserError; OverBudgetError, which knows the
    score, if it has more bytes than it may.
    """
    began = time.perf_counter()
    val = parts["val"]
    short = tokenizer is None and len(parts["train"]) + len(val) <= LADDER_BYTES
    rows = ladder(parts["train"], val) if short else []
    folder.write("ladder", {"split": "val", "bytes": len(val), "rows": rows})
    folder.write("audit", audit(model, optimizers) | {"memory": memory})
    result: dict[str, Any] = {"recipe": config.recipe, "run": str(folder.path), **done}
    mean = average.of(model) if average is not None and average.count else None
    ternary = config.model.weights == "trit"
    if ternary:
        folder.write("histogram", {"step": done["steps"], "layers": register_histogram(model)})

    def scored(whose: ByteLM | Arb, stride: int = config.train.stride) -> Score:
        return score(whose, val, stride=stride, device=device, alphabet=tokenizer)

    going, before, other = model, None, None  # what ships, its score, and that of what does not
    if mean is not None and config.train.ship_average:
        going, before, other = chosen(model, mean, scored)
    elif not ternary:  # which lose nothing: their file has the same logits
        before = scored(model)
    if ternary or config.train.ship_as != "none":
        shipping = time.perf_counter()
        try:
            info, way, final = ship_and_reread(going, folder.artifact, config, val, done, device, tokenizer=tokenizer)
        except OverBudgetError as error:
            refused = before or scored(going)
            error.found = {"before": {"nats": refused.nats, "bpb": refused.bpb}}
            raise
        # Of packing, and of reading it back and comparing; without the score of it.
        result["seconds_shipping"] = round(time.perf_counter() - shipping - final.seconds, 3)
        result["artifact"] = {"path": str(info.path), "bytes": info.bytes, "bpb_reread": final.bpb, "way": way}
        result["artifact"]["streams"] = info.streams
        result["weights"] = info.weights
        if before is not None:
            result["before"] = {"nats": before.nats, "bpb": before.bpb}
    else:
        assert before is not None
        final = before
    result["val"] = {
        "nats": final.nats,
        "bpb": final.bpb,
        "bytes": final.bytes,
        "window": final.window,
        "stride": final.stride,
    }
    result["seconds_scoring"] = round(final.seconds, 3)  # this score alone; seconds_after is of all after the last step
    chunked = scored(going, model.context)
    result["val_chunked"] = {"nats": chunked.nats, "bpb": chunked.bpb, "bytes": chunked.bytes}
    if mean is not None and average is not None:
        known = before or final  # of what was shipped, before it was
        other = other or scored(mean)
        result["averaged"] = {"count": average.count, **_compared(known, other, going is mean)}
        if ternary:
            result["averaged"]["changed_trits"] = changed_trits(model, mean)
    result["seconds_after"] = round(time.perf_counter() - began, 3)
    folder.write("result", result)
    return result


def chosen(
    model: ByteLM | Arb, mean: ByteLM | Arb, scored: Callable[[ByteLM | Arb], Score]
) -> tuple[ByteLM | Arb, Score, Score]:
    """Of the last weights and their mean the one that ships, which is the one that scores better (the last ones if they
    are equal); its score, and that of the other."""
    of_last, of_mean = scored(model), scored(mean)
    return (mean, of_mean, of_last) if of_mean.bpb < of_last.bpb else (model, of_last, of_mean)


def _compared(shipped: Score, other: Score, mean_ships: bool) -> dict[str, Any]:
    """The scores of mean and last weights, of which one ships."""
    of_mean, of_last = (shipped, other) if mean_ships else (other, shipped)
    return {"bpb": of_mean.bpb, "bpb_unaveraged": of_last.bpb, "shipped": mean_ships}


def ship_and_reread(
    model: ByteLM | Arb,
    path: Path,
    config: Config,
    val: np.ndarray,
    about: dict[str, Any],
    device: torch.device,
    *,
    budget: int | None = None,
    ship_as: str | None = None,
    tokenizer: Tokenizer | None = None,
) -> tuple[ArtifactInfo, str, Score]:
    """Write the artifact, read it back, hold its logits against the model's if it is ternary, and score what was read.

    budget, ship_as: other than the config's. tokenizer: of the symbols of val; it ships too. Returns what was written,
    the way it was, and the score.
    """
    how: dict[str, Any] = {"budget": budget, "ship_as": ship_as, "tokenizer": tokenizer}
    info, way, reread = ship_and_read(model, path, config, about, device, **how)
    if config.model.weights == "trit":
        require_same_logits(model, reread, val, device)
    return info, way, score(reread, val, stride=config.train.stride, device=device, alphabet=tokenizer)


def ship_and_read(
    model: ByteLM | Arb,
    path: Path,
    config: Config,
    about: dict[str, Any],
    device: torch.device,
    *,
    budget: int | None = None,
    ship_as: str | None = None,
    tokenizer: Tokenizer | None = None,
) -> tuple[ArtifactInfo, str, ByteLM | Arb]:
    """As `ship_and_reread`, but the model that was read in the place of its score. Raises UserError unless a ternary
    one has the weights that were trained."""
    settings = config.train
    # Where private data lie is nobody's business; the bundled text can be named.
    trained = {"split": settings.split}
    if settings.data in BUNDLED_NAMES:
        trained["data"] = settings.data
    if config.media.task:
        trained["task"] = config.media.task
    told = {"recipe": config.recipe, "train": trained, **about}
    limit, way = settings.budget if budget is None else budget, ship_as or settings.ship_as
    info, way = ship_within(model, path, told, limit, way, settings.ship_small, raw_of(tokenizer))
    reread, _ = read_artifact(path)
    if config.model.weights == "trit":
        require_same_weights(model, reread)
    reread.to(device).dtype = model.dtype
    return info, way, reread


def raw_of(tokenizer: Tokenizer | None) -> bytes:
    """What of a tokenizer is part of the shipped file."""
    return b"" if tokenizer is None else tokenizer.raw


def size_now(model: ByteLM | Arb, settings: TrainConfig, tokenizer: Tokenizer | None = None) -> int:
    """Bytes that the model would ship in now, quickly compressed: a little more than it will be. Float weights that may
    ship in several ways: in the best that fits, of those whose estimate is near."""
    raw, small = raw_of(tokenizer), settings.ship_small
    if model.config.weights == "trit":
        return shipped_bytes(model, tokenizer=raw)
    ways = SEARCHED if settings.ship_as in ("none", "auto") else (settings.ship_as,)
    for way in ways[:-1]:
        near = estimate(model, way, small, raw)["total"] <= 1.1 * settings.budget
        if near and (size := shipped_bytes(model, way, small, tokenizer=raw)) <= settings.budget:
            return size
    return shipped_bytes(model, ways[-1], small, tokenizer=raw)


def told_sizes(sizes: dict[str, int]) -> str:
    """Bytes by stream, for people."""
    return ", ".join(f"{name} {size:,}" for name, size in sizes.items() if name != "total")


@torch.inference_mode()
def require_same_logits(model: ByteLM | Arb, reread: ByteLM | Arb, val: np.ndarray, device: torch.device) -> None:
    """Raises UserError unless both models give bit-equal logits on the first windows of `val`."""
    window = min(model.context, len(val))
    count = min(8, len(val) // window)
    ids = torch.from_numpy(val[: count * window].astype(np.int64).reshape(count, window)).to(device)
    if not torch.equal(model(ids), reread(ids)):
        raise UserError("the artifact's logits differ from the model's; do not use it, and report this as a bug")


def require_same_weights(model: ByteLM | Arb, reread: ByteLM | Arb) -> None:
    """Raises UserError unless every layer of both has the same trits and exponents."""
    for (name, one), (_, two) in zip(trit_modules(model), trit_modules(reread), strict=True):
        pairs = [(one.trits(), two.trits()), *zip(one.exponents(), two.exponents(), strict=True)]
        if not all(torch.equal(ours.cpu(), theirs) for ours, theirs in pairs):
            raise UserError(f"{name} of the artifact differs from the model's; do not use it, and report this as a bug")


def register_histogram(model: ByteLM | Arb) -> dict[str, list[int]]:
    """Layer name -> how many registers hold each value -121 … 121."""
    shift, size = REGISTER_LIMIT, 2 * REGISTER_LIMIT + 1
    return {
        name: torch.bincount(layer.register.reshape(-1).to(torch.int64) + shift, minlength=size).tolist()
        for name, layer in trit_modules(model)
    }


def ship_run(
    run: Path | str,
    out: Path,
    *,
    budget: int | None = None,
    ship_as: str | None = None,
    ship_small: int | None = None,
    count: int = 0,
) -> dict[str, Any]:
    """Ship the newest checkpoint of `run` to `out`: bytes, streams, and the scores before and after, as plain JSON;
    without scores if the model has learned no text.

    budget, ship_as, ship_small: other than the run's; count: bytes of val that are scored, 0: all.
    Raises UserError if the run or its text cannot be read, `out` cannot be written, or it does not fit the budget.
    """
    config, model, _, checkpoint = load_run(run)
    config = config if ship_small is None else override(config, {"ship_small": ship_small})
    about = {"steps": checkpoint.step, "seconds": checkpoint.meta["seconds"]}
    how: dict[str, Any] = {"about": about, "device": torch.device("cpu"), "budget": budget, "ship_as": ship_as}
    if "text" not in config.media.shares():
        info, way, _ = ship_and_read(model, Path(out), config, **how)
        return _told(info, way, config, budget)
    tokenizer = tokenizer_of(config)[1]
    val = open_parts(config.train.data, config.train.split, tokenizer)["val"][: count or None]

    def scored(whose: ByteLM | Arb) -> Score:
        return score(whose, val, stride=config.train.stride, alphabet=tokenizer)

    mean = averaged_of(checkpoint, model) if config.train.ship_average else None
    last = model
    model, before, other = (model, scored(model), None) if mean is None else chosen(model, mean, scored)
    info, way, final = ship_and_reread(model, Path(out), config, val, tokenizer=tokenizer, **how)
    scores: dict[str, Any] = {
        "bpb_before": before.bpb,
        "bpb_reread": final.bpb,
        "nats_reread": final.nats,
        "scored": final.bytes,
    }
    if other is not None:
        scores["averaged"] = _compared(before, other, model is not last)
    return _told(info, way, config, budget) | scores


def _told(info: ArtifactInfo, way: str, config: Config, budget: int | None) -> dict[str, Any]:
    """What was shipped, as plain JSON."""
    return {
        "path": str(info.path),
        "bytes": info.bytes,
        "budget": config.train.budget if budget is None else budget,
        "way": way,
        "weights": info.weights,
        "bits_per_weight": 8 * info.bytes / info.weights,
        "streams": info.streams,
    }
