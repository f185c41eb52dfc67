"""`tritwise bench kernels`: every kernel against the least time its bytes and operations can take, and against torch.

A kernel is checked first: its integers must be the reference's, its floats within TOLERANCE of them. Then it is timed
by itself, with the caches flushed before every call, so that each reads its inputs from memory as it does in training.
"""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tritwise.bench.hardware import measure_hardware
from tritwise.bench.kernel_cases import Case, Inputs, make_cases
from tritwise.bench.phases import Clock
from tritwise.errors import UserError
from tritwise.files import finite, write_json
from tritwise.ops import backend, backend_table
from tritwise.train.run import surroundings

TOLERANCE = 1e-2  # of floats: the norm of the difference over the norm
FLUSH = {"cuda": 1 << 30, "cpu": 1 << 25}  # bytes written between calls: more than the caches hold
REFERENCE_CALLS = 3


def measure_kernels(
    *,
    device: torch.device | str = "cpu",
    widths: tuple[int, ...] = (),
    rows: int = 0,
    blocks: int = 0,
    calls: int = 20,
    seconds: float = 600.0,
    short: bool = False,
    only: str = "",
    out: Path | None = None,
    tell: Callable[[dict[str, Any]], None] = lambda row: None,
) -> dict[str, Any]:
    """Check and time every kernel; plain JSON, written to `out` as well.

    widths, rows, blocks  of bench/kernel_cases.py; 0 or () take what suits the device
    calls                 timed calls of a kernel, after two that do not count
    seconds               no further case begins after so many
    only                  cases whose operation or kernel holds this word
    short                 the hardware is measured in little time, for a test

    A row says: backend, exact (integers equal), error (of floats, relative), correct, ms, host_ms (until the call came
    back), limit_ms and by what it is bound, gap (ms over limit_ms), reference_ms, speedup over it, plain_ms (torch's
    own product of floats). Raises UserError if `only` leaves no case.
    """
    device = torch.device(device)
    if device.index is not None:
        torch.cuda.set_device(device)
    cuda = device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    if calls < 1:
        raise UserError(f"calls is {calls}; it must be at least 1")
    sizes = list(widths or ((768, 2048) if cuda else (128,)))
    cases = make_cases(device, dtype, sizes, rows or (16384 if cuda else 256), blocks or (2 if cuda else 1))
    chosen = [case for case in cases if only in case.kernel or only in case.operation]
    if not chosen:
        raise UserError(f"no kernel's name holds {only!r}; try linear, embedding, update, nibble or direction")
    until = time.monotonic() + seconds
    hardware, found = measure_hardware(device, dtype, short=short), []
    flush = torch.empty((1 << 20) if short else FLUSH["cuda" if cuda else "cpu"], dtype=torch.int8, device=device)
    for case in chosen:
        if found and time.monotonic() > until:
            break
        found.append(_measure(case, device, hardware, flush, calls))
        tell(found[-1])
    result = finite(
        {
            "bench": "kernels",
            "hardware": hardware,
            "rows": found,
            "left_out": len(chosen) - len(found),
            "tolerance": TOLERANCE,
            "backends": {row["operation"]: row["backend"] for row in found},  # of its last kernel
            **surroundings(device),
        }
    )
    if out is not None:
        write_json(out, result)
    return result


def _measure(case: Case, device: torch.device, hardware: dict[str, Any], flush: Tensor, calls: int) -> dict[str, Any]:
    exact, error = _compare(case, device)
    inputs = _inputs(case, device)
    with _asked(case):
        seconds, host = _time(lambda: case.run(inputs), device, flush, calls)
    name = backend_table()[case.operation]
    with backend("reference"):
        reference, _ = _time(lambda: case.run(inputs), device, flush, min(calls, REFERENCE_CALLS))
    plain = None
    if case.plain is not None:
        run = case.plain
        plain, _ = _time(lambda: run(inputs), device, flush, calls)
    by_memory = case.moved / hardware["copy_bytes_per_s"]
    by_products = case.flops / hardware["matmul_flops_per_s"]
    limit = max(by_memory, by_products)
    return {
        "operation": case.operation,
        "kernel": case.kernel,
        "shape": case.shape,
        "backend": name,
        "exact": exact,
        "error": error,
        "correct": exact is not False and (error is None or error <= TOLERANCE),
        "ms": 1000 * seconds,
        "host_ms": 1000 * host,
        "limit_ms": 1000 * limit,
        "bound": "memory" if by_memory >= by_products else "products",
        "gap": seconds / limit,
        "reference_ms": 1000 * reference,
        "speedup": reference / seconds,
        "plain_ms": None if plain is None else 1000 * plain,
        "bytes": case.moved,
        "flops": case.flops,
    }


def _asked(case: Case) -> contextlib.AbstractContextManager[None]:
    return backend(case.backend) if case.backend else contextlib.nullcontext()


def _inputs(case: Case, device: torch.device) -> Inputs:
    return case.make(torch.Generator(device).manual_seed(0))


def _compare(case: Case, device: torch.device) -> tuple[bool | None, float | None]:
    """Whether all integers that a call gives or leaves are the reference's (None: it makes none), and
    the largest error of its floats."""
    with _asked(case):
        ours = _results(case, device)
    with backend("reference"):
        theirs = _results(case, device)
    exact: bool | None = None
    error: float | None = None
    for one, two in zip(ours, theirs, strict=True):
        if two.is_floating_point():
            error = max(error or 0.0, _error(one, two))
        else:
            exact = exact is not False and torch.equal(one, two)
    return exact, error


def _results(case: Case, device: torch.device) -> list[Tensor]:
    inputs = _inputs(case, device)
    given = case.run(inputs)
    return list(_tensors([given, [inputs[name] for name in case.changes]]))


def _error(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|, infinite where either holds what is no number."""
    size = expected.float().norm()
    error = float((found.float() - expected.float()).norm() / size.clamp(min=1e-30))
    return error if error == error else float("inf")


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested lists, in order."""
    if isinstance(value, Tensor):
        yield value
    else:
        for part in value:
            yield from _tensors(part)


def _time(run: Callable[[], Any], device: torch.device, flush: Tensor, calls: int) -> tuple[float, float]:
    """Median seconds of a call on the device, and until it came back to the host.

    The flush also keeps a GPU busy while the host prepares the call, so that what is timed is the device.
    """
    clock = Clock(device)
    for _ in range(2):
        run()
    spans, hosts = [], []
    for _ in range(calls):
        flush.zero_()
        began, started = clock.mark(), time.perf_counter()
        run()
        hosts.append(time.perf_counter() - started)
        spans.append((began, clock.mark()))
    clock.wait()
    return statistics.median(clock.seconds(*span) for span in spans), statistics.median(hosts)
