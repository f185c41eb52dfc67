"""The end of an ARB run: figures over all of val, the audit, the artifact read back from the disk."""

import time
from typing import Any

import torch

from tritwise.data.source import BUNDLED_NAMES
from tritwise.errors import UserError
from tritwise.models import Arb
from tritwise.ship import read_artifact, write_artifact
from tritwise.train.audit import audit
from tritwise.train.config import Config
from tritwise.train.finish import register_histogram
from tritwise.train.judge import Judge
from tritwise.train.run import RunFolder


def finish_arb(
    config: Config,
    folder: RunFolder,
    model: Arb,
    optimizers: list[torch.optim.Optimizer],
    judge: Judge,
    done: dict[str, Any],
    device: torch.device,
    memory: dict[str, int | None],
) -> dict[str, Any]:
    """Write audit, histogram, artifact and result into the run folder; returns the result.

    The figures of a ternary model are those of its artifact, read back from the disk. Raises UserError if that differs
    from the model in one trit or exponent.
    """
    began = time.perf_counter()
    folder.write("audit", audit(model, optimizers) | {"memory": memory})
    result: dict[str, Any] = {"recipe": config.recipe, "run": str(folder.path), "task": config.media.task, **done}
    judged = model
    if config.model.weights == "trit":
        folder.write("histogram", {"step": done["steps"], "layers": register_histogram(model)})
        info = write_artifact(model, folder.artifact, {"recipe": config.recipe, "train": _public(config), **done})
        reread, _ = read_artifact(folder.artifact)
        assert isinstance(reread, Arb)
        require_same_weights(model, reread)
        reread.to(device).dtype = model.dtype
        judged = reread
        result["artifact"] = {"path": str(info.path), "bytes": info.bytes}
        result["weights"] = info.weights
    result["val"] = judge.final(judged, folder, device)
    result["seconds_after"] = round(time.perf_counter() - began, 3)
    folder.write("result", result)
    return result


def require_same_weights(model: Arb, reread: Arb) -> None:
    """Raises UserError unless every layer of both has the same trits and exponents."""
    from tritwise.nn import trit_modules

    for (name, one), (_, two) in zip(trit_modules(model), trit_modules(reread), strict=True):
        if not torch.equal(one.trits().cpu(), two.trits()) or not torch.equal(one.exponent.cpu(), two.exponent):
            raise UserError(f"{name} of the artifact differs from the model's; do not use it, and report this as a bug")


def _public(config: Config) -> dict[str, Any]:
    """What may be said of the training to everybody: where private collections lie is nobody's business."""
    told: dict[str, Any] = {"task": config.media.task, "split": config.train.split}
    return told | ({"data": config.train.data} if config.train.data in BUNDLED_NAMES else {})
