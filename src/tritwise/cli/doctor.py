"""`tritwise doctor`: versions, hardware, backends, and a few checks that really run something."""

import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tritwise._version import __version__
from tritwise.data.source import describe
from tritwise.models import ByteLM, ModelConfig
from tritwise.ops import backend_table
from tritwise.optim import TritOptimizer
from tritwise.ship import read_artifact, write_artifact
from tritwise.train.run import cpu_name


def examine() -> dict[str, Any]:
    """Facts about this machine as plain JSON; "checks" maps a check to "ok" or to what went wrong."""
    checks = {
        "a ternary layer learns": _attempt(_learns),
        "an artifact survives the disk": _attempt(_ships),
        "the bundled text is whole": _attempt(_text),
        "matplotlib for the report": _attempt(_plots),
    }
    cuda = torch.cuda.is_available()
    return {
        "tritwise": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "matmul_gflops": round(_matmul_rate(), 1),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "compiler": shutil.which("cc") or shutil.which("gcc") or shutil.which("clang"),
        "backends": backend_table(),
        "checks": checks,
    }


def _attempt(check: Callable[[], None]) -> str:
    try:
        check()
    except Exception as error:  # a doctor reports what is ill, whatever it is
        return f"{type(error).__name__}: {error}"
    return "ok"


def _learns() -> None:
    torch.manual_seed(0)
    model = ByteLM(ModelConfig(width=32, depth=1, ctx=16))
    optimizer = TritOptimizer(model, rate=0.05)
    ids = torch.randint(0, 256, (4, 17))
    losses = []
    for _ in range(12):
        loss = model.loss(ids[:, :-1], ids[:, 1:])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    if not losses[-1] < losses[0] - 0.1:
        raise RuntimeError(f"the loss went from {losses[0]:.3f} to {losses[-1]:.3f}; report this as a bug")


def _ships() -> None:
    torch.manual_seed(0)
    model = ByteLM(ModelConfig(width=32, depth=1, ctx=16))
    with tempfile.TemporaryDirectory() as folder:
        write_artifact(model, Path(folder) / "model.tritwise")
        reread, _ = read_artifact(Path(folder) / "model.tritwise")
    ids = torch.randint(0, 256, (2, 16))
    if not torch.equal(model(ids), reread(ids)):
        raise RuntimeError("logits changed on the way; report this as a bug")


def _text() -> None:
    expected = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
    if describe("shakespeare").digest != expected:
        raise RuntimeError("tinyshakespeare.txt is not the text it should be; install tritwise again")


def _plots() -> None:
    import matplotlib  # noqa: F401


def _matmul_rate() -> float:
    """GFLOP/s of a float32 product of 1024 x 1024 matrices on the CPU, the best of five."""
    a, best = torch.randn(1024, 1024), float("inf")
    for _ in range(5):
        began = time.perf_counter()
        torch.mm(a, a)
        best = min(best, time.perf_counter() - began)
    return 2 * 1024**3 / best / 1e9
