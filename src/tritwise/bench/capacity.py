"""`tritwise bench capacity`: the largest model that takes real steps in a given memory, ours against float rivals.

A size is tried in a process of its own, so that one that runs out of memory leaves nothing behind. It is tried with a
few whole optimizer steps on one batch of text; a size counts if they pass and the loss falls. Sizes double until one
fails, and then the gap is halved until it is narrow. All contenders have the same shapes, width about 64 times the
depth, and compute the activations inside a block again in backward.
"""

import math
import multiprocessing
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from tritwise.bench.memory import device_bytes, free_bytes, resident_bytes, restart_peak
from tritwise.bench.phases import Clock
from tritwise.bench.runner import Batches, Entry, Runner, entries_called
from tritwise.bench.sizes import Size, shape_of, weights_of
from tritwise.errors import UserError, is_out_of_memory
from tritwise.files import finite, write_json
from tritwise.models import ModelConfig
from tritwise.train.audit import audit, peak_bytes
from tritwise.train.run import surroundings

FILL = 0.75  # of the memory, that the first guess would take
LEAST = 50_000  # weights, below which no smaller model is tried
LEAVE = 0.8  # of a CPU's free memory that is used where no limit is given
FIRST_SHARE = 0.6  # of the time that is left, for each contender but the last
STEPS = 8  # the loss of a new model often rises for a few, and then falls
SLOWER = 0.1  # of a contender's rate elsewhere, for steps here come without a warm-up
WIDTH = 512  # above which the rate falls as the width grows: the same step of every weight changes a wider model more


@dataclass(frozen=True)
class Probe:
    """One size to try. `limit`: bytes of memory that may be used, None: all that the device has."""

    entry: Entry
    weights: float
    ctx: int
    batch: int
    limit: int | None
    device: str
    steps: int = STEPS
    threads: int = 1
    seed: int = 0
    data: str = "shakespeare"

    def size(self) -> Size:
        """The model and the batch."""
        return Size("probe", shape_of(self.weights, self.ctx), self.batch, mode="eager", checkpoint=True)


def take_probe(probe: Probe) -> dict[str, Any]:
    """Build the model and take the steps, in this process; what came of it, as plain JSON.

    fits: the steps passed and the loss of the batch fell. reason: why not. losses: before each step.
    """
    device, size = torch.device(probe.device), probe.size()
    shape = size.config
    told: dict[str, Any] = {"weights": weights_of(shape), "width": shape.width, "depth": shape.depth}
    told |= {"fits": False, "reason": None, "losses": None}
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    entry = probe.entry._replace(rate=SLOWER * probe.entry.rate * min(1.0, WIDTH / shape.width))
    _load_code(entry, size, device, dtype)
    try:
        _limit(device, probe.limit)
        restartable, before = restart_peak(device), resident_bytes(device)
        batches = Batches(size, device, probe.data, probe.seed, count=1)
        began = time.perf_counter()
        runner = Runner(entry, size, batches, device, dtype, probe.seed)
        built = time.perf_counter()
        for _ in range(probe.steps):
            runner.step()
        losses = [float(loss) for loss in runner.losses]
        passed = time.perf_counter()
    except (RuntimeError, MemoryError) as error:
        reason = "out of memory" if is_out_of_memory(error) else " ".join(str(error).split())[:300]
        return told | {"reason": reason}
    fell = math.isfinite(losses[-1]) and losses[-1] < losses[0]
    peak, report = peak_bytes(), audit(runner.model, runner.optimizers)
    return told | {
        "fits": fell,
        "reason": None if fell else "the loss did not fall",
        "losses": losses,
        "peak_bytes": peak - before if restartable and before is not None else None,
        "device_bytes": device_bytes(device),
        "state_bytes": report["state_bytes"],
        "build_seconds": built - began,
        "step_seconds": (passed - built) / probe.steps,
    }


def _load_code(entry: Entry, size: Size, device: torch.device, dtype: torch.dtype) -> None:
    """Take steps with a small model: code that is loaded at its first use is no part of what is measured."""
    small = replace(size, config=ModelConfig(width=64, depth=1, ctx=size.config.ctx), batch=1)
    runner = Runner(entry, small, Batches(small, device, count=1), device, dtype)
    for _ in range(2):
        runner.step()
    Clock(device).wait()


def _limit(device: torch.device, limit: int | None) -> None:
    """Let this process take no more than `limit` bytes: on a GPU with its context and what others hold counted in; on a
    CPU of address space beyond what the interpreter has. UserError where the system has no such limit."""
    if limit is None:
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
        free, total = torch.cuda.mem_get_info(device)
        share = (limit - (total - free)) / total
        if share <= 0:
            raise UserError(f"{(total - free) / 1e9:.2f} GB of the GPU are in use before a model is; raise the limit")
        torch.cuda.set_per_process_memory_fraction(min(share, 1.0), device)
        return
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    except (ImportError, OSError):
        raise UserError("a memory limit for a CPU needs Linux; leave out --memory-limit-gb") from None
    most = pages * resource.getpagesize() + limit
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _child(pipe: Connection, probe: Probe) -> None:
    torch.set_num_threads(probe.threads)
    try:
        pipe.send(take_probe(probe))
    except UserError as error:
        pipe.send(str(error))


def ask(probe: Probe, patience: float) -> dict[str, Any]:
    """`take_probe` in a process of its own, ended after `patience` seconds: then "timed_out" is true.

    Raises UserError as `take_probe` does.
    """
    context = multiprocessing.get_context("spawn")
    pipe, other = context.Pipe()
    process = context.Process(target=_child, args=(other, probe), daemon=True)
    began = time.monotonic()
    process.start()
    other.close()
    shape = probe.size().config
    told: Any = {"weights": weights_of(shape), "width": shape.width, "depth": shape.depth, "fits": False}
    try:
        if pipe.poll(max(patience, 1.0)):
            try:
                told = pipe.recv()
            except (EOFError, OSError):
                process.join()
                told["reason"] = f"its process ended with code {process.exitcode} (killed for memory, perhaps)"
        else:
            told |= {"reason": f"not done after {patience:.0f} s", "timed_out": True}
    finally:
        pipe.close()
        with suppress(OSError):
            process.terminate()
        process.join()
    if isinstance(told, str):
        raise UserError(told)
    return told | {"seconds": time.monotonic() - began}


def search(
    first: float,
    weigh: Callable[[float], int],
    try_size: Callable[[float], dict[str, Any]],
    *,
    tolerance: float,
    until: float,
) -> dict[str, Any]:
    """Double from `first` weights until a size fails (halve until one fits), then bisect until the least that fails is
    within `tolerance` of the largest that fits. weigh: the weights that a shape near a number of weights really has.

    {"largest": that probe or None, "fails": the least weights that failed or None, "complete": whether time allowed it
    all, "probes": every one in order}. No probe begins after `until` (time.monotonic()).
    """
    low: dict[str, Any] | None = None
    high: int | None = None
    probes: list[dict[str, Any]] = []
    size, complete = max(first, LEAST), False
    while time.monotonic() < until or not probes:
        found = try_size(size)
        probes.append(found)
        if found.get("timed_out"):
            break
        if found["fits"]:
            low = found
        else:
            high = found["weights"]
        if low is None:
            size = found["weights"] / 2
            complete = size < LEAST or weigh(size) == found["weights"]
        elif high is None:
            size = 2 * low["weights"]
        else:
            size = math.sqrt(low["weights"] * high)
            # Shapes come in steps, so a size between the two may not exist.
            complete = high <= low["weights"] * (1 + tolerance) or not low["weights"] < weigh(size) < high
        if complete:
            break
    return {"largest": low, "fails": high, "complete": complete, "probes": probes}


def measure_capacity(
    names: Sequence[str] = ("ours", "ours-compact", "adamw-bf16", "adamw"),
    *,
    memory_limit: float | None = None,
    device: torch.device | str = "cpu",
    ctx: int = 0,
    batch: int = 1,
    tolerance: float = 0.05,
    seconds: float = 1800.0,
    first: float | None = None,
    seed: int = 0,
    data: str = "shakespeare",
    out: Path | None = None,
    tell: Callable[[str, dict[str, Any]], None] = lambda name, probe: None,
) -> dict[str, Any]:
    """The largest model of each contender; plain JSON, written to `out` after each of them.

    memory_limit  bytes that may be used; None: the whole of a GPU, or 80 % of what a CPU has free
    ctx, batch    of the steps; 0: 1024 on a GPU, 64 on a CPU
    tolerance     how near to the largest size the search goes, relative
    seconds       for all contenders: who is named first gets the most of it, and leaves the others what it spares
    first         weights of the first size tried [what would fill three quarters of the memory]

    Peak memory: of tensors on a GPU, of the resident set on a CPU, where the limit is one of address space. Raises
    UserError for a contender that is not there and a limit that cannot be.
    """
    entries = entries_called(names)
    device = torch.device(device)
    for name, value in (("memory limit", memory_limit), ("tolerance", tolerance), ("seconds", seconds)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise UserError(f"the {name} is {value}; it must be a finite number above 0")
    limit = memory_limit
    if limit is None and device.type != "cuda":
        free = free_bytes(device)
        if free is None:
            raise UserError("this system does not tell how much memory is free; give --memory-limit-gb")
        limit = LEAVE * free
    # Not by mem_get_info, which would give this process a context, and take its memory from the probes.
    room = limit if limit is not None else torch.cuda.get_device_properties(device).total_memory
    probe = Probe(
        entries[next(iter(entries))],
        LEAST,
        ctx or (1024 if device.type == "cuda" else 64),
        batch,
        None if limit is None else int(limit),
        str(device),
        threads=torch.get_num_threads(),
        seed=seed,
        data=data,
    )
    result: dict[str, Any] = {
        "bench": "capacity",
        "memory_limit": limit,
        "limited_by": _limited_by(device, limit),
        "room": room,
        "ctx": probe.ctx,
        "batch": batch,
        "steps": probe.steps,
        "tolerance": tolerance,
        "rows": [],
        **surroundings(device),
    }
    began = time.monotonic()
    for number, (name, entry) in enumerate(entries.items()):
        now, end = time.monotonic(), began + seconds
        until = now + (FIRST_SHARE if number + 1 < len(entries) else 1.0) * (end - now)

        def try_size(weights: float, name: str = name, entry: Entry = entry, until: float = until) -> dict[str, Any]:
            found = ask(replace(probe, entry=entry, weights=weights), until - time.monotonic())
            tell(name, found)
            return found

        found = search(
            first or FILL * room / entry.held,
            lambda weights: weights_of(shape_of(weights, probe.ctx)),
            try_size,
            tolerance=tolerance,
            until=until,
        )
        result["rows"].append({"contender": name, "rule": entry.rule, "settings": entry.settings, **found})
        if out is not None:
            write_json(out, finite(result))
    return finite(result)


def _limited_by(device: torch.device, limit: float | None) -> str:
    """How the limit is kept, in words."""
    if device.type == "cuda":
        return "nothing but the device" if limit is None else "the caching allocator's share, less context and others"
    return "address space beyond that of the interpreter with torch loaded (RLIMIT_AS)"
