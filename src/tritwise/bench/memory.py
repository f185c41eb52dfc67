"""What memory a run really takes: its own peak, and the state of a three-billion-weight model, built and measured."""

import ctypes
import gc
import os
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tritwise.bench.sizes import deepen, weights_of
from tritwise.models import ByteLM, ModelConfig
from tritwise.nn import trit_modules
from tritwise.optim import TritOptimizer
from tritwise.train.audit import audit, peak_bytes

THREE_BILLION = ModelConfig(width=2560, depth=38, ctx=33, vocab=288)
"""2,989,916,160 weights, 0.3 % below three billion; a width of whole scale groups."""

NEEDED = 3.0  # bytes of free memory a weight: two of state, and what passes or lies in the allocator's free lists


def resident_bytes(device: torch.device) -> int | None:
    """What the process holds now: bytes of live tensors on a GPU, else its resident set; None where no one tells."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def hand_back() -> None:
    """Give memory that nothing uses any more back to the system, as far as the allocator will."""
    gc.collect()
    with suppress(AttributeError, OSError, TypeError):  # glibc only; elsewhere its free lists count as held
        ctypes.CDLL(None).malloc_trim(0)


def restart_peak(device: torch.device) -> bool:
    """Let `train.audit.peak_bytes` count from now on, not from the start of the process. False where it cannot be."""
    hand_back()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # Linux: 5 resets the resident set's peak
    except OSError:
        return False
    return True


def free_bytes(device: torch.device) -> int | None:
    """Memory that can be taken now without swapping; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def device_bytes(device: torch.device) -> int | None:
    """Memory of a GPU in use by anyone: this process with all that it reserves, its context, other processes. None on a
    CPU, where a process's own share is what counts."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return total - free


def measure_state(device: torch.device, shape: ModelConfig = THREE_BILLION, seed: int = 0) -> dict[str, Any]:
    """Build a ternary ByteLM of `shape`, take one whole training step, and measure what is held; plain JSON.

    The step reads eight bytes: it is there so that every momentum and register has been written, which an untouched
    page of zeros has not. On a CPU its direction is the sign, because orthogonalising matrices of this size takes many
    minutes; the direction is transient, so the state is the same.
    The first block draws its registers and the others are derived from it, as that is quicker.

    {"measured": False, "reason": …} where less than 3 bytes a weight are free. Else, in bytes: `state_bytes` by
    audit, `resident_growth` from before the model to after the step with nothing transient left, `peak_growth`: the
    most that was held at any moment of the step over what was there before the model (each None where the system does
    not tell).
    """
    weights = weights_of(shape)
    needed, free = int(NEEDED * weights), free_bytes(device)
    if free is None or free < needed:
        told = "the system does not say how much is free" if free is None else f"{free / 1e9:.1f} GB are free"
        return {"measured": False, "weights": weights, "reason": f"it needs {needed / 1e9:.1f} GB of memory; {told}"}
    restartable = restart_peak(device)
    before = resident_bytes(device)
    torch.manual_seed(seed)
    began = time.perf_counter()
    model = ByteLM(replace(shape, depth=1)).to(device)
    deepen(model, shape.depth)
    direction = "newton_schulz" if device.type == "cuda" else "sign"
    everywhere = {role: {"direction": direction} for role in ("embedding", "head")} if direction == "sign" else {}
    optimizer = TritOptimizer(model, direction=direction, roles=everywhere, seed=seed)
    built = time.perf_counter()
    ids = torch.randint(256, (1, 8), generator=torch.Generator().manual_seed(seed)).to(device)
    loss = model.loss(ids[:, :-1], ids[:, 1:])
    loss.backward()
    nats = loss.item()  # waits for a GPU
    passed = time.perf_counter()
    del loss
    optimizer.step()
    flips = optimizer.flips
    moved = time.perf_counter()
    hand_back()
    after, peak = resident_bytes(device), peak_bytes()
    report = audit(model, [optimizer])
    return {
        "measured": True,
        "shape": {"width": shape.width, "depth": shape.depth, "vocab": shape.vocab, "group": shape.group},
        "weights": report["weights"],
        "layers": len(list(trit_modules(model))),
        "state_bytes": report["state_bytes"],
        "bytes_per_weight": report["state_bytes"] / report["weights"],
        "bytes_by_role": report["bytes_by_role"],
        "float_state_bytes": report["float_state_bytes"],
        "resident_growth": None if after is None or before is None else after - before,
        "peak_growth": peak - before if restartable and before is not None else None,
        "loss": nats,
        "flips": flips,
        "direction": direction,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "seconds": {"build": built - began, "forward_backward": passed - built, "update": moved - passed},
    }
