"""The end of an ARB run: figures over all of val, the audit, the artifact read back from the disk."""

import time
from typing import Any

import torch

from tritwise.models import Arb, ByteLM
from tritwise.train.audit import audit
from tritwise.train.config import Config
from tritwise.train.finish import register_histogram, ship_and_read
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

    The figures of what ships are those of its artifact, read back from the disk. Raises UserError if that differs from
    a ternary model in one trit or exponent, or does not fit the budget.
    """
    began = time.perf_counter()
    folder.write("audit", audit(model, optimizers) | {"memory": memory})
    result: dict[str, Any] = {"recipe": config.recipe, "run": str(folder.path), "task": config.media.task, **done}
    judged: ByteLM | Arb = model
    ternary = config.model.weights == "trit"
    if ternary:
        folder.write("histogram", {"step": done["steps"], "layers": register_histogram(model)})
    if ternary or config.train.ship_as != "none":
        info, way, judged = ship_and_read(model, folder.artifact, config, done, device)
        assert isinstance(judged, Arb)
        result["artifact"] = {"path": str(info.path), "bytes": info.bytes, "way": way, "streams": info.streams}
        result["weights"] = info.weights
    result["val"] = judge.final(judged, folder, device)
    result["seconds_after"] = round(time.perf_counter() - began, 3)
    folder.write("result", result)
    return result
