"""`tritwise bench step`, `bench kernels` and `bench capacity`: how fast the engine is, and how little memory it takes.

Heavy imports stand inside the commands, so that --help and errors in options are quick.
"""

from pathlib import Path
from typing import Annotated, Any

import typer

from tritwise.cli import output
from tritwise.cli.commands import Json, option
from tritwise.errors import UserError

Device = Annotated[str, typer.Option(help="auto, cpu, cuda, or one GPU like cuda:1.")]
Out = Annotated[Path | None, option("JSON file to write.")]
Seconds = Annotated[float, typer.Option(min=0, help="Nothing further begins after so many.")]
Data = Annotated[str, typer.Option(help="Text to learn: a file, a folder, or shakespeare.")]


def step(
    size: Annotated[str | None, option("Preset: tiny, 19m, 124m, 1.3b, 3b [19m; tiny on a CPU].")] = None,
    contenders: Annotated[
        str, typer.Option(help="Who takes part, a,b,c.")
    ] = "ours,ours-compact,adamw,adamw-bf16,muon,bitnet",
    width: Annotated[int | None, option("Channels [the preset's].")] = None,
    depth: Annotated[int | None, option("Blocks [the preset's].")] = None,
    ctx: Annotated[int | None, option("Bytes of context [the preset's].")] = None,
    batch: Annotated[int | None, option("Sequences a micro-batch [the preset's].")] = None,
    accum: Annotated[int | None, option("Micro-batches a step [the preset's].")] = None,
    mode: Annotated[str | None, option("eager, blocks, whole, graph or blocks-graph [the preset's].")] = None,
    checkpoint: Annotated[bool, option("Compute activations again in backward.", "--checkpoint")] = False,
    rounds: Annotated[int, typer.Option(help="Turns of each contender.")] = 5,
    steps: Annotated[int, typer.Option(help="Timed steps of a turn.")] = 5,
    together: Annotated[
        bool | None, option("All models in memory at once [as there is room].", "--together/--one-by-one")
    ] = None,
    seconds: Seconds = 600.0,
    data: Data = "shakespeare",
    device: Device = "auto",
    out: Out = None,
    json: Json = False,
) -> None:
    """Time and memory of a training step: ours, AdamW, Muon and BitNet on the same model, in turns, in one run."""
    from dataclasses import replace

    from tritwise.bench.sizes import size_called
    from tritwise.bench.step import measure_steps

    place, console = _device(device), output.console(json)
    chosen = size_called(size or ("tiny" if place == "cpu" else "19m"))
    given = {"width": width, "depth": depth, "ctx": ctx}
    changed: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    if changed:
        chosen = replace(chosen, name="given", config=replace(chosen.config, heads=0, kv_heads=0, **changed))
    steps_given = {"batch": batch, "accum": accum, "mode": mode or ("eager" if place == "cpu" else None)}
    chosen = replace(
        chosen, checkpoint=checkpoint, **{key: value for key, value in steps_given.items() if value is not None}
    )
    result = measure_steps(
        chosen,
        _names(contenders),
        device=place,
        rounds=rounds,
        steps=steps,
        together=together,
        seconds=seconds,
        data=data,
        out=out,
        tell=lambda line: console.print(line, markup=False),
    )
    rows = result["rows"]
    weights = next((row["weights"] for row in rows if "weights" in row), 0)
    _hardware(console, result)
    console.print(
        f"{weights:,} weights, {chosen.bytes_a_step:,} bytes a step, {chosen.mode}, {result['dtype']} activations, "
        + ("all in memory at once" if result["side_by_side"] else "one in memory at a time, built anew for every turn")
    )
    head = ["", "ms/step", "kB/s", "ratio", "MFU", "fwd/bwd ms", "update"]
    console.print(output.table("", head, [_speed_line(row) for row in rows]))
    head = ["", "B/weight", "state GB", "peak GB", "first loss", "last loss"]
    console.print(output.table("", head, [_memory_line(row) for row in rows]))
    if json:
        output.print_json(result)
    if failed := [row for row in rows if row["error"]]:
        told = ", ".join(f"{row['contender']}: {row['error']}" for row in failed)
        if len(failed) == len(rows):
            raise UserError(f"no contender could take steps ({told}); choose a smaller --size, --batch or --ctx")
        console.print(f"not measured: {told}", markup=False)


def kernels(
    widths: Annotated[str, typer.Option(help="Widths of the models whose matrices are used, a,b [by device].")] = "",
    rows: Annotated[int, typer.Option(min=0, help="Rows of activations; 0: by device.")] = 0,
    blocks: Annotated[int, typer.Option(min=0, help="Blocks that an update moves; 0: by device.")] = 0,
    calls: Annotated[int, typer.Option(help="Timed calls of a kernel.")] = 20,
    only: Annotated[str, typer.Option(help="Kernels or operations whose name holds this.")] = "",
    seconds: Seconds = 600.0,
    device: Device = "auto",
    out: Out = None,
    json: Json = False,
) -> None:
    """Every kernel: checked against the reference, then timed against its limit and against torch."""
    from tritwise.bench.kernel_bench import measure_kernels

    try:
        sizes = tuple(int(width) for width in widths.split(",") if width.strip())
    except ValueError:
        raise UserError(f"widths {widths} are no whole numbers; write for example 768,2048") from None
    console = output.console(json)
    result = measure_kernels(
        device=_device(device),
        widths=sizes,
        rows=rows,
        blocks=blocks,
        calls=calls,
        seconds=seconds,
        only=only,
        out=out,
        tell=lambda row: console.print(f"{row['kernel']} {row['shape']}: {row['ms']:.3f} ms", markup=False),
    )
    _hardware(console, result)
    backends = ", ".join(f"{operation} {name}" for operation, name in result["backends"].items())
    console.print(f"{backends}; torch: the reference backend; float: torch's own, of float weights", markup=False)
    head = ["", "ms", "limit", "gap", "torch", "float"]
    console.print(output.table("", head, [_kernel_line(row) for row in result["rows"]]))
    if result["left_out"]:
        console.print(f"{result['left_out']} cases were left out: the time was up")
    if json:
        output.print_json(result)
    if wrong := [f"{row['kernel']} {row['shape']}" for row in result["rows"] if not row["correct"]]:
        raise UserError(f"{len(wrong)} kernels are not right, {wrong[0]} for one; report this as a bug")


def capacity(
    contenders: Annotated[str, typer.Option(help="Who takes part, a,b,c.")] = "ours,ours-compact,adamw-bf16,adamw",
    memory_limit_gb: Annotated[float | None, option("Memory that may be used, in 10^9 bytes [all there is].")] = None,
    ctx: Annotated[int, typer.Option(min=0, help="Bytes of context; 0: by device.")] = 0,
    batch: Annotated[int, typer.Option(help="Sequences a step.")] = 1,
    tolerance: Annotated[float, typer.Option(help="How near to the largest size the search goes.")] = 0.05,
    first: Annotated[float | None, option("Weights of the first size tried [by memory].")] = None,
    seconds: Annotated[float, typer.Option(help="For the whole search; no size is tried after that.")] = 1800.0,
    data: Data = "shakespeare",
    device: Device = "auto",
    out: Out = None,
    json: Json = False,
) -> None:
    """The largest model that takes real steps with a falling loss in a given memory: ours against AdamW."""
    from tritwise.bench.capacity import measure_capacity

    console = output.console(json)

    def tell(name: str, probe: dict[str, Any]) -> None:
        outcome = "steps taken" if probe["fits"] else probe["reason"]
        console.print(f"{name}: {probe['weights']:,} weights, {outcome}  {probe['seconds']:.0f} s", markup=False)

    result = measure_capacity(
        _names(contenders),
        memory_limit=None if memory_limit_gb is None else 1e9 * memory_limit_gb,
        device=_device(device),
        ctx=ctx,
        batch=batch,
        tolerance=tolerance,
        seconds=seconds,
        first=first,
        data=data,
        out=out,
        tell=tell,
    )
    console.print(f"{result['room'] / 1e9:.2f} GB; limited by {result['limited_by']}", markup=False)
    head = ["", "weights", "width x depth", "fails at", "peak GB", "s/step"]
    console.print(output.table("", head, [_capacity_line(row) for row in result["rows"]]))
    if json:
        output.print_json(result)
    if not any(row["largest"] for row in result["rows"]):
        raise UserError("no size could be trained in that memory and time; raise --memory-limit-gb or --seconds")


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _device(text: str) -> str:
    """One device: these measure by themselves."""
    from tritwise.bench.sweep import devices_called

    return devices_called(text)[0]


def _hardware(console: Any, result: dict[str, Any]) -> None:
    found = result["hardware"]
    name = result["cpu"] if result["device"] == "cpu" else result["device"]
    console.print(
        f"{name}: copies {found['copy_bytes_per_s'] / 1e9:,.1f} GB/s (read and written), multiplies "
        f"{found['matmul_flops_per_s'] / 1e12:,.2f} TFLOP/s in {found['matmul_dtype']}, measured in this run",
        markup=False,
    )


def _number(value: float | None, form: str, factor: float = 1.0) -> str:
    return "–" if value is None else format(value * factor, form)


def _speed_line(row: dict[str, Any]) -> list[str]:
    phases = row["phases_ms"] or {}
    both = [_number(phases[name], ",.1f") for name in ("forward", "backward", "forward_backward") if name in phases]
    return [
        row["contender"],
        _number(row["step_ms"], ",.2f"),
        _number(row["tokens_per_s"], ",.1f", 1e-3),
        _number(row["ratio"], ".2f"),
        _number(row["mfu"], ".1%"),
        "/".join(both) or "–",
        _number(row["update_share"], ".1%"),
    ]


def _memory_line(row: dict[str, Any]) -> list[str]:
    return [
        row["contender"],
        _number(row.get("bytes_per_weight"), ".2f"),
        _number(row.get("state_bytes"), ".3f", 1e-9),
        _number(row.get("peak_bytes"), ".3f", 1e-9),
        _number(row.get("first_loss"), ".3f"),
        _number(row.get("last_loss"), ".3f"),
    ]


def _kernel_line(row: dict[str, Any]) -> list[str]:
    wrong = "" if row["correct"] else "\nWRONG"
    return [
        f"{row['kernel']}\n{row['shape']}{wrong}",
        *(_number(row[key], ".3f") for key in ("ms", "limit_ms")),
        f"{row['gap']:.2f}",
        *(_number(row[key], ".3f") for key in ("reference_ms", "plain_ms")),
    ]


def _capacity_line(row: dict[str, Any]) -> list[str]:
    best = row["largest"]
    fails = _millions(row["fails"]) + ("" if row["complete"] else " ?")  # not all sizes between were tried
    if best is None:
        return [row["contender"], "none", "–", fails, "–", "–"]
    return [
        row["contender"],
        _millions(best["weights"]),
        f"{best['width']} x {best['depth']}",
        fails,
        _number(best["peak_bytes"], ".2f", 1e-9),
        f"{best['step_seconds']:.2f}",
    ]


def _millions(weights: int | None) -> str:
    return _number(weights, ",.1f", 1e-6) + ("" if weights is None else "M")
