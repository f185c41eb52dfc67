"""What the machine can do at most, measured: how fast it copies memory, and how fast it multiplies matrices."""

import statistics
from collections.abc import Callable
from typing import Any

import torch

from tritwise.bench.phases import Clock


def measure_hardware(device: torch.device, dtype: torch.dtype, *, short: bool = False) -> dict[str, Any]:
    """Medians over rounds, as plain JSON.

    copy_bytes_per_s   bytes read and written in a second by a copy too large for any cache
    matmul_flops_per_s a square product of normal numbers in `dtype` (zeros would run faster than anything real)
    copy_bytes, matmul_side: of which sizes. short: small ones, for a test.
    """
    cuda = device.type == "cuda"
    size = (1 << 20) if short else (1 << 30) if cuda else (1 << 27)
    side = 128 if short else 8192 if cuda else 1024
    rounds, clock = 3 if short else 9, Clock(device)
    return {
        "copy_bytes_per_s": 2 * size / _copy_seconds(clock, size, rounds),
        "copy_bytes": size,
        "matmul_flops_per_s": 2.0 * side**3 / _matmul_seconds(clock, side, dtype, rounds),
        "matmul_side": side,
        "matmul_dtype": str(dtype).removeprefix("torch."),
    }


def _copy_seconds(clock: Clock, size: int, rounds: int) -> float:
    source = torch.zeros(size, dtype=torch.int8, device=clock.device)
    target = torch.empty_like(source)
    return _median(clock, lambda: target.copy_(source), rounds)


def _matmul_seconds(clock: Clock, side: int, dtype: torch.dtype, rounds: int) -> float:
    a, b = (torch.randn(side, side, device=clock.device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return _median(clock, lambda: torch.mm(a, b, out=out), rounds, repeats=4 if clock.device.type == "cuda" else 1)


def _median(clock: Clock, run: Callable[[], object], rounds: int, repeats: int = 1) -> float:
    """Median seconds of a call, after two that do not count."""
    run()
    run()
    spans = []
    for _ in range(rounds):
        began = clock.mark()
        for _ in range(repeats):
            run()
        spans.append((began, clock.mark()))
    clock.wait()
    return statistics.median(clock.seconds(*span) for span in spans) / repeats
