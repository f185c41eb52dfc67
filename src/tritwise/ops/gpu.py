"""Where Triton's kernels can run, and how they are launched: what native.py is to the "cpu" backend.

Triton is not a dependency of its own: torch for CUDA brings it. Without it, or where it cannot compile, the "triton"
backends refuse with a reason and the reference runs. With TRITON_INTERPRET=1 set before the first use, and asked for
by name, they run on CPU tensors in Triton's interpreter: slow, and meant for tests.
"""

import contextlib
import ctypes
import functools
import gc
import importlib
import os
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from tritwise.registers import LEAD, Key

OLDEST = (7, 0)  # compute capability that Triton still compiles for
BFLOAT16 = (8, 0)  # compute capability with matrix units for bfloat16
INTERPRET = "TRITON_INTERPRET"
ELEMENTS = 2048  # of a program of the update kernels
FLOATS = (torch.float32, torch.bfloat16, torch.float16)  # what kernels read as float32, and write from it
SMALL = 1 << 21  # numbers of a matrix that the threads of a GPU decode at once, each eight: 132 times 2048 threads
LINES = 256  # of a table that a program fills
SIDES = 3  # streams beside the one that records
ALIGNED = 16  # numbers of a table in a shelf: where others begin


@functools.cache
def kernels() -> ModuleType:
    """The kernels, `triton_kernels.py`. Only to be called once `refuses` has said None."""
    return importlib.import_module("tritwise.ops.triton_kernels")


@functools.cache
def _table_kernels() -> ModuleType:
    return importlib.import_module("tritwise.ops.table_kernels")


@functools.cache
def refuses(device: torch.device) -> str | None:
    """Why the "triton" backend cannot run on `device`, or None. The first call compiles and runs a small kernel."""
    interprets = os.environ.get(INTERPRET) == "1"
    if device.type not in ("cuda", "cpu"):
        return "it runs on CUDA devices only"
    if device.type == "cpu" and not interprets:
        return f"it runs on CUDA devices; {INTERPRET}=1 runs it on a CPU in Triton's interpreter, for tests"
    if device.type == "cuda" and interprets:
        return f"{INTERPRET}=1 is set, which is for CPU tensors; unset it"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < OLDEST:
        return f"{torch.cuda.get_device_name(device)} is older than compute capability {OLDEST[0]}.{OLDEST[1]}"
    try:
        kernels()
    except ImportError:
        return "triton is not installed; run pip install triton"
    try:
        right = _self_test(device)
    except Exception as error:  # no C compiler, no cache folder, a driver that is too old: whatever it is
        return f"Triton cannot compile or run: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return None if right else "Triton's kernels give wrong results on this machine; report this as a bug"


def _self_test(device: torch.device) -> bool:
    register = torch.tensor([[121, 41, 40, 0, -40, -41, -121]], dtype=torch.int8, device=device)
    exponent = torch.tensor([[8]], dtype=torch.int8, device=device)
    return decode(register, exponent, 256, torch.float32).tolist() == [[2.0, 2.0, 0.0, 0.0, 0.0, -2.0, -2.0]]


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Makes `device` the current GPU, which kernels are launched on, if it is one."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def launch(kernel: Any, programs: int, device: torch.device, *arguments: Any, **constants: Any) -> None:
    """Run `programs` programs of a kernel on `device`, with no product and sum fused into one operation."""
    with on(device):
        kernel[(programs,)](*arguments, **constants, enable_fp_fusion=False)


_shelf: "Shelf | None" = None


class Shelf:
    """Holds, on a device, the tables that are asked for while a CUDA graph is recorded: every replay reads them again.

    As a context manager it catches the uploads of its thread. No copy becomes part of the recording: once that is made,
    `fill` copies all tables, on the stream that replays. Memory for them is taken before, because none can be taken
    during a recording.
    """

    def __init__(self, device: torch.device, numbers: int = 1 << 18) -> None:
        self.device = device
        self._numbers = torch.empty(numbers, dtype=torch.int64, device=device)
        self._told: list[tuple[int, Tensor]] = []  # where each table begins, and what it will be
        self._used = 0

    def keep(self, table: Tensor) -> Tensor:
        """Where int64 `table` will lie: as much memory, which `fill` writes."""
        first, last = self._used, self._used + table.numel()
        assert last <= self._numbers.numel(), "the model has too many tensors for one recording"
        self._told.append((first, table))
        self._used = -(-last // ALIGNED) * ALIGNED  # kernels are compiled for tables that begin at such places
        return self._numbers[first:last].view(table.shape)

    def fill(self) -> None:
        """Copy the tables to where `keep` said; the host does not wait."""
        flat = torch.zeros(self._used, dtype=torch.int64, pin_memory=self._numbers.is_cuda)
        for first, table in self._told:
            flat[first : first + table.numel()] = table.view(-1)
        self._numbers[: self._used].copy_(flat, non_blocking=True)
        self._told.clear()

    def __enter__(self) -> "Shelf":
        global _shelf
        assert _shelf is None
        _shelf = self
        return self

    def __exit__(self, *_: object) -> None:
        global _shelf
        _shelf = None


@contextlib.contextmanager
def recorded(graph: torch.cuda.CUDAGraph, pool: Any, stream: torch.cuda.Stream) -> Iterator[None]:
    """Inside, `graph` is recorded on `stream`, with memory of `pool`. Garbage is collected before and not meanwhile:
    what it lets go of, such as older recordings, would end this one with an error of whatever runs next."""
    gc.collect()
    collects = gc.isenabled()
    gc.disable()
    try:
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            yield
    finally:
        if collects:
            gc.enable()


@functools.cache
def _side_streams(main: torch.cuda.Stream) -> list[torch.cuda.Stream]:
    found: list[torch.cuda.Stream] = []
    while len(found) < SIDES:  # torch hands out a few streams in turn, and at last the same again
        side = torch.cuda.Stream(main.device)
        if side not in (main, *found):
            found.append(side)
    return found


class Branches:
    """Lets a recording run what does not depend on each other side by side: many small kernels then take as long as the
    longest chain of them, not as all.

    As a context manager, with `branch()` within it around each part; all parts have ended behind it. Outside of
    recordings parts run one after the other, as ever: there the host asks for small kernels more slowly than they run.
    Parts share nothing but what they read, and that outlives the whole; what they leave is for what follows the whole.
    Parts at once hold their memory at once. No branches within branches: memory that a stream lets go of is its own
    again at once, and others may still read there.
    """

    def __init__(self, device: torch.device) -> None:
        self._main = None
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            self._main = torch.cuda.current_stream(device)
        self._parts = 0

    def __enter__(self) -> "Branches":
        if self._main is not None:
            self._fork = self._main.record_event()
        return self

    def branch(self) -> contextlib.AbstractContextManager[Any]:
        """Around one part. The first, and every fourth, runs on the stream that records."""
        place, self._parts = self._parts % (SIDES + 1), self._parts + 1
        if self._main is None or place == 0:
            return contextlib.nullcontext()
        side = _side_streams(self._main)[place - 1]
        side.wait_event(self._fork)
        return torch.cuda.stream(side)

    def __exit__(self, *_: object) -> None:
        if self._main is not None:
            for side in _side_streams(self._main)[: max(0, self._parts - 1)]:
                self._main.wait_stream(side)


def upload(lines: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """A table of integers as int64 on `device`; the host does not wait. During a recording: where it will be."""
    table = torch.tensor(lines, dtype=torch.int64)
    if _shelf is not None and _shelf.device.type == device.type:
        return _shelf.keep(table)
    if device.type == "cuda":  # pragma: no cover - on a GPU only
        return table.pin_memory().to(device, non_blocking=True)
    return table


def float_bits(value: float) -> int:
    """The bits of the float32 nearest to `value` (infinity above its range) as a signed integer."""
    return ctypes.c_int32.from_buffer(ctypes.c_float(value)).value


def power_of_two_above(count: int) -> int:
    """The least power of two that is `count` or more."""
    return 1 << max(count - 1, 0).bit_length()


def warps_for(numbers: int) -> int:
    """Warps of a program that holds so many numbers at once: 16 to a thread, and no more than 16 warps."""
    return min(16, max(1, numbers // 512))


def is_served(register: Tensor, exponent: Tensor, group: int) -> bool:
    """Whether a kernel can decode these: int8 [O, I] and int8 [O, ceil(I / group)] on one device, not empty."""
    return (
        register.dtype is torch.int8
        and exponent.dtype is torch.int8
        and register.device == exponent.device
        and register.numel() > 0
        and exponent.shape == (register.shape[0], -(-register.shape[1] // group))
    )


def decode(
    register: Tensor,
    exponent: Tensor,
    group: int,
    dtype: torch.dtype,
    ids: Tensor | None = None,
    lead: int = LEAD,
) -> Tensor:
    """W = round(R / lead) * scale as `dtype` [O, I], or its rows `ids` (int64 [N]) as [N, I], with the reference's
    bits."""
    r, e = register.contiguous(), exponent.contiguous()
    table_rows, columns = r.shape
    groups = e.shape[1]
    rows = table_rows if ids is None else ids.numel()
    weight = torch.empty(rows, columns, dtype=dtype, device=r.device)
    if ids is None and columns == groups * group and group % 32 == 0:  # groups lie as rows do, and need no division
        rows, table_rows, columns, groups = rows * groups, rows * groups, group, 1
    if groups == 1:
        group = power_of_two_above(columns)
    # The widest block that never straddles two groups; where groups are odd, blocks straddle.
    block, uniform = min(group & -group, 1024), True
    if block < min(32, group):
        block, uniform = min(power_of_two_above(columns), 256), False
    # A thread writes 16 bytes, which need no exchange between threads; of a large matrix more, to start fewer programs.
    numbers, warps = (4096 // weight.element_size(), 8) if weight.numel() <= SMALL else (4096, 4)
    block_rows, across = max(1, numbers // block), -(-columns // block)
    launch(
        kernels().decode,
        -(-rows // block_rows) * across,
        r.device,
        *(ids, r, e, weight, rows, table_rows, columns, groups, group, across),
        BLOCK_R=block_rows,
        BLOCK_C=block,
        UNIFORM=uniform,
        LEAD=lead,
        num_warps=warps,
    )
    return weight


def can_move(register: Tensor, direction: Tensor, device: torch.device) -> bool:
    """Whether a kernel can move `register`: int8, by as many float32, both on `device`, not empty."""
    return (
        register.dtype is torch.int8
        and direction.dtype is torch.float32
        and register.device == direction.device == device
        and register.numel() > 0
        and direction.shape == register.shape
    )


def move_all(
    kernel: Any,
    registers: Sequence[Tensor],
    directions: Sequence[Tensor],
    factors: Sequence[float],
    keys: Sequence[Key],
    go: Tensor | None,
    last: int | Tensor,
    live_rates: Tensor | None = None,
    live_keys: Tensor | None = None,
) -> Tensor:
    """Run a kernel that moves registers over all of them in one launch; returns the flips, int64 [tensors].

    factors: steps of a register for a direction of 1, in 1/65536ths. last: one int or tensor that the kernel takes
    besides.
    live_rates, live_keys: steps for a direction of -1, float64 [tensors], and keys, int64 [tensors, 2], on the device:
    they take the place of factors and keys.
    """
    device = registers[0].device
    flat = [(r.contiguous(), d.contiguous()) for r, d in zip(registers, directions, strict=True)]
    lines, programs, aligned = [], 0, True
    for (r, d), factor, key in zip(flat, factors, keys, strict=True):
        addresses, count = (r.data_ptr(), d.data_ptr()), r.numel()
        lines.append([programs, *key, *addresses, float_bits(factor), count, 0, 0, 0])  # zeros fill the line
        programs += -(-count // ELEMENTS)
        aligned = aligned and not (addresses[0] | addresses[1] | count) % 16
    tensors = len(lines)
    flips_T = torch.zeros(tensors, dtype=torch.int64, device=device)
    table = upload(lines, device)
    fill(table, live_keys, live_rates)
    launch(
        kernel,
        programs,
        device,
        *(table, go, flips_T, last, tensors),
        TENSORS=max(power_of_two_above(tensors), 16),
        BLOCK=ELEMENTS,
        ALIGNED=aligned,
    )
    for (r, _), register in zip(flat, registers, strict=True):
        put_back(r, register)
    return flips_T


def fill(table: Tensor, live_keys: Tensor | None, live_rates: Tensor | None = None) -> None:
    """What only the device knows into a table, in place of what the host put there: keys, int64 [tensors, 2], and the
    factors of steps for a direction of -1, float64 [tensors]. None: it stays."""
    if live_keys is None and live_rates is None:
        return
    keys = None if live_keys is None else live_keys.contiguous()
    stride = 0 if live_rates is None else live_rates.stride(0)
    programs = -(-len(table) // LINES)
    launch(_table_kernels().fill, programs, table.device, table, live_rates, keys, stride, len(table), BLOCK=LINES)


def keys_at(step: Tensor, places_N3: Tensor) -> Tensor:
    """`tritwise.registers.keys_at` in one launch: the same arguments, the same bits."""
    count, device = len(places_N3), places_N3.device
    keys_N2 = torch.empty(count, 2, dtype=torch.int64, device=device)
    programs = -(-count // LINES)
    launch(_table_kernels().keys_at, programs, device, step, places_N3, keys_N2, count, BLOCK=LINES)
    return keys_N2


def put_back(changed: Tensor, original: Tensor) -> None:
    """Copy what a kernel changed in a contiguous copy into the original, where it had to be copied at all."""
    if changed is not original:
        original.copy_(changed)
