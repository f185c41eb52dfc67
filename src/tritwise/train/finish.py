"""What happens after the last step: score, ship, read back, audit, and the files that the report draws."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tritwise.data.source import BUNDLED_NAMES, describe
from tritwise.data.split import split
from tritwise.errors import UserError
from tritwise.models import Arb, ByteLM
from tritwise.nn import trit_modules
from tritwise.registers import REGISTER_LIMIT
from tritwise.score import Score, ladder, score
from tritwise.ship import ArtifactInfo, read_artifact, write_artifact
from tritwise.train.audit import audit
from tritwise.train.config import Config
from tritwise.train.restore import load_run
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
) -> dict[str, Any]:
    """Write ladder, audit, histogram, artifact and result into the run folder; returns the result.

    `done` says what training did: steps, seconds, bytes_seen; `memory` what it took, by role. The score in the result
    is of the artifact, read back from disk; a ternary model and its artifact must agree to the last bit or this raises
    UserError.
    """
    began = time.perf_counter()
    val = parts["val"]
    folder.write("ladder", {"split": "val", "bytes": len(val), "rows": ladder(parts["train"], val)})
    folder.write("audit", audit(model, optimizers) | {"memory": memory})
    result: dict[str, Any] = {"recipe": config.recipe, "run": str(folder.path), **done}
    if config.model.weights == "trit":
        folder.write("histogram", {"step": done["steps"], "layers": register_histogram(model)})
        info, final = ship_and_reread(model, folder.artifact, config, val, done, device)
        result["artifact"] = {"path": str(info.path), "bytes": info.bytes, "bpb_reread": final.bpb}
        result["weights"] = info.weights
    else:
        final = score(model, val, stride=config.train.stride, device=device)
    result["val"] = {
        "nats": final.nats,
        "bpb": final.bpb,
        "bytes": final.bytes,
        "window": final.window,
        "stride": final.stride,
    }
    chunked = score(model, val, stride=model.context, device=device)
    result["val_chunked"] = {"nats": chunked.nats, "bpb": chunked.bpb, "bytes": chunked.bytes}
    result["seconds_after"] = round(time.perf_counter() - began, 3)
    folder.write("result", result)
    return result


def ship_and_reread(
    model: ByteLM | Arb,
    path: Path,
    config: Config,
    val: np.ndarray,
    about: dict[str, Any],
    device: torch.device,
) -> tuple[ArtifactInfo, Score]:
    """Write the artifact, read it back, hold its logits against the model's, and score what was read."""
    # Where a private text lies is nobody's business; the bundled one can be named.
    trained = {"split": config.train.split}
    if config.train.data in BUNDLED_NAMES:
        trained["data"] = config.train.data
    info = write_artifact(model, path, {"recipe": config.recipe, "train": trained, **about})
    reread, _ = read_artifact(path)
    reread.to(device).dtype = model.dtype
    require_same_logits(model, reread, val, device)
    return info, score(reread, val, stride=config.train.stride, device=device)


@torch.inference_mode()
def require_same_logits(model: ByteLM | Arb, reread: ByteLM | Arb, val: np.ndarray, device: torch.device) -> None:
    """Raises UserError unless both models give bit-equal logits on the first windows of `val`."""
    window = min(model.context, len(val))
    count = min(8, len(val) // window)
    ids = torch.from_numpy(val[: count * window].astype(np.int64).reshape(count, window)).to(device)
    if not torch.equal(model(ids), reread(ids)):
        raise UserError("the artifact's logits differ from the model's; do not use it, and report this as a bug")


def register_histogram(model: ByteLM | Arb) -> dict[str, list[int]]:
    """Layer name -> how many registers hold each value -121 … 121."""
    shift, size = REGISTER_LIMIT, 2 * REGISTER_LIMIT + 1
    return {
        name: torch.bincount(layer.register.reshape(-1).to(torch.int64) + shift, minlength=size).tolist()
        for name, layer in trit_modules(model)
    }


def ship_run(run: Path | str, out: Path) -> dict[str, Any]:
    """Ship the newest checkpoint of `run` to `out`: bytes, streams and the score of the file read back, plain JSON.

    Raises UserError if the run or its text cannot be read, or `out` cannot be written.
    """
    config, model, _, checkpoint = load_run(run)
    val = split(describe(config.train.data).data, config.train.split)["val"]
    about = {"steps": checkpoint.step, "seconds": checkpoint.meta["seconds"]}
    info, final = ship_and_reread(model, Path(out), config, val, about, torch.device("cpu"))
    return {
        "path": str(info.path),
        "bytes": info.bytes,
        "weights": info.weights,
        "bits_per_weight": 8 * info.bytes / info.weights,
        "streams": info.streams,
        "bpb_reread": final.bpb,
        "nats_reread": final.nats,
        "scored": final.bytes,
    }
