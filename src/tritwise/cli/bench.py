"""`tritwise bench …`: update rules side by side, and the published benchmarks done again. bench_engine.py holds others.

Heavy imports stand inside the commands, so that --help and errors in options are quick.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tritwise.cli import bench_budget, bench_engine, output
from tritwise.cli.commands import Json, option, settings_given
from tritwise.errors import UserError

if TYPE_CHECKING:
    from tritwise.bench.harness import Cell
    from tritwise.bench.sweep import Sweep

app = typer.Typer(
    name="bench",
    help="Update rules side by side, published benchmarks done again, speed and memory of a step.",
    add_completion=False,
    rich_markup_mode=None,
    no_args_is_help=False,
    invoke_without_command=True,
)

for command in (bench_engine.step, bench_engine.kernels, bench_engine.capacity, bench_budget.budget):
    app.command()(command)

Rates = Annotated[str | None, option("Rates to tune over, a,b,c [each rule's own grid].")]
Seeds = Annotated[int, typer.Option(min=1, help="Runs at the best rate of each rule.")]
Steps = Annotated[int | None, option("Optimizer steps.")]
Batch = Annotated[int | None, option("Sequences a step.")]
Ctx = Annotated[int | None, option("Bytes of context.")]
Width = Annotated[int | None, option("Channels; the rest follows from it.")]
Depth = Annotated[int | None, option("Blocks.")]
Split = Annotated[str | None, option("How train and val are cut [90/10].")]
Set = Annotated[list[str] | None, option("Setting of the rule ours, KEY=VALUE; may be repeated.", "--set")]
Resume = Annotated[bool, option("Keep the rows that --out holds, run only what is missing.", "--resume")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda (every GPU), or a list like cuda:0,cuda:1.")]
Workers = Annotated[int, typer.Option(min=1, help="Processes a device.")]
Compile = Annotated[bool | None, typer.Option("--compile/--no-compile", help="Compiled steps [on a GPU].")]

FULL = {"width": 512, "depth": 6, "ctx": 512, "batch": 64, "steps": 3600, "warmup": 100}
FULL_SPLIT = "first:38000000,last:2000000"
UNTUNED_NOTE = (
    "The rates of the published rows are not known. These are the usual defaults, untuned: 1e-3 for Adam and SignSGD, "
    "1e-4 for Lion."
)
SHOWN = ("rule", "rate", "val bpb", "n", "spread", "B/weight", "zeros", "ms/step")


@app.callback()
def _root(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def rules(
    rules: Annotated[
        str,
        typer.Option(
            help="Rules a,b,c; after a colon settings, rates and schedule: ours:steps=5,rates=0.01/0.02,decay=1 [all].",
            show_default=False,
        ),
    ] = "",
    rates: Rates = None,
    seeds: Seeds = 1,
    steps: Steps = None,
    batch: Batch = None,
    ctx: Ctx = None,
    width: Width = None,
    depth: Depth = None,
    data: Annotated[str, typer.Option(help="Text to learn: a file, a folder, or shakespeare.")] = "shakespeare",
    split: Split = None,
    full: Annotated[
        bool, typer.Option("--full", help="The 18.9M-weight set-up for enwik8: 3600 steps of 64 x 512 bytes.")
    ] = False,
    set_: Set = None,
    out: Annotated[Path, typer.Option(help="Folder of rows, table and plots.")] = Path("runs/bench-rules"),
    resume: Resume = False,
    device: Device = "auto",
    workers: Workers = 1,
    compile: Compile = None,
    json: Json = False,
) -> None:
    """Train one model with every update rule, each at its own tuned rate, and compare."""
    from tritwise.bench.harness import Cell
    from tritwise.bench.rules import RULES, parse_rules
    from tritwise.bench.tuning import tune
    from tritwise.data.source import BUNDLED_NAMES

    if full and data in BUNDLED_NAMES:
        raise UserError("the full set-up reads 40,000,000 bytes; name enwik8 with --data")
    given = {"steps": steps, "batch": batch, "ctx": ctx, "width": width, "depth": depth}
    shape: dict[str, Any] = (FULL if full else {}) | {key: value for key, value in given.items() if value is not None}
    shape["warmup"] = min(shape.get("warmup", 100), shape.get("steps", Cell.steps) // 10)
    own = RULES["ours"].parse(settings_given(set_ or []))
    chosen = [(rule, {**own, **more} if rule == "ours" else more) for rule, more in parse_rules(rules)]
    devices = _devices(device)
    base = Cell(
        rule="ours",
        rate=1.0,
        data=data,
        split=split or (FULL_SPLIT if full else "90/10"),
        dtype=_dtype(devices),
        **shape,
    )
    cells = tune(base, chosen, _rates(rates))
    _measure(cells, seeds, out, devices, resume=resume, workers=workers, compile=compile, json=json)


@app.command("optimizer-grid")
def optimizer_grid(
    rates: Rates = None,
    seeds: Seeds = 1,
    steps: Steps = None,
    batch: Batch = None,
    ctx: Ctx = None,
    width: Width = None,
    depth: Depth = None,
    data: Annotated[
        list[str] | None, option("Text to learn: a file, a folder, or shakespeare; may be repeated [shakespeare].")
    ] = None,
    split: Split = None,
    set_: Set = None,
    out: Annotated[Path, typer.Option(help="Folder of rows, table and plots.")] = Path("runs/bench-optimizer-grid"),
    resume: Resume = False,
    device: Device = "auto",
    workers: Workers = 1,
    compile: Compile = None,
    json: Json = False,
) -> None:
    """SignSGD, Lion and Adam as published, untuned and tuned, beside ours and Muon: 1,668,128 weights, 2500 steps."""
    from dataclasses import replace

    from tritwise.bench.grid import GRID, grid_cells
    from tritwise.bench.rules import RULES

    given = {"steps": steps, "batch": batch, "ctx": ctx, "width": width, "depth": depth, "split": split}
    shape: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    shape["warmup"] = shape.get("steps", GRID.steps) // 10
    shape["stride"] = max(1, shape.get("ctx", GRID.ctx) // 2)
    devices = _devices(device)
    own = RULES["ours"].parse(settings_given(set_ or []))
    cells: list[Cell] = []
    for text in data or ["shakespeare"]:
        base = replace(GRID, data=text, dtype=_dtype(devices), **shape)
        cells += grid_cells(base, own, _rates(rates))
    _measure(cells, seeds, out, devices, resume=resume, workers=workers, compile=compile, json=json)


@app.command("true-ternary")
def true_ternary(
    configs: Annotated[str, typer.Option(help="What to train, a,b,c.")] = "true-ternary,adam-fp32,signsgd",
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 200,
    batch: Annotated[int, typer.Option(help="Sequences a step.")] = 4,
    ctx: Annotated[int, typer.Option(help="Bytes of context.")] = 33,
    update_backend: Annotated[str, typer.Option(help="Backend of the ternary operations; none: no updates.")] = "auto",
    scale_update_interval: Annotated[int, typer.Option(help="Scales learn every n-th turn; 0: never.")] = 0,
    accum_threshold: Annotated[int, typer.Option(help="Signs that flip a trit of sign-counter.")] = 32,
    print_every: Annotated[int, typer.Option(help="Steps between printed losses.")] = 20,
    reuse_base: Annotated[Path | None, option("An earlier --out, whose float rows are taken over.")] = None,
    rates: Annotated[str | None, option("Rates to try, NAME:rate/rate,… [the tuned one of each].")] = None,
    measure_3b: Annotated[
        bool, typer.Option("--measure-3b", help="Measure the state of 3 billion weights too: 9 GB of memory.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of weights, batches and rounding.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, or one like cuda:1.")] = "auto",
    out: Annotated[Path | None, option("JSON file to write.")] = None,
    json: Json = False,
) -> None:
    """Ternary weights against Adam and SignSGD in float: 14M weights, 200 short steps, what memory they take."""
    from tritwise.bench.true_ternary import run

    result = run(
        configs=[name.strip() for name in configs.split(",")],
        steps=steps,
        batch=batch,
        ctx=ctx,
        update_backend=update_backend,
        scale_update_interval=scale_update_interval,
        accum_threshold=accum_threshold,
        print_every=print_every,
        reuse_base=reuse_base,
        rates=_rates_by_name(rates),
        measure_3b=measure_3b,
        seed=seed,
        device=device,
        out=out,
        console=output.console(json),
    )
    if json:
        output.print_json(result)


def _rates(text: str | None) -> list[float] | None:
    from tritwise.bench.rules import parse_rates

    return None if text is None else parse_rates(text)


def _rates_by_name(text: str | None) -> dict[str, list[float]] | None:
    """ "adam-fp32:0.001/0.002,signsgd:1e-4" -> name -> rates."""
    from tritwise.bench.rules import parse_rates

    if text is None:
        return None
    found = {}
    for piece in text.split(","):
        name, colon, listed = piece.strip().partition(":")
        if not colon:
            raise UserError(
                f"{piece.strip()} in --rates is not NAME:rate/rate; write for example adam-fp32:0.001/0.002"
            )
        found[name] = parse_rates(listed, "/")
    return found


def _devices(text: str) -> list[str]:
    from tritwise.bench.sweep import devices_called

    return devices_called(text)


def _dtype(devices: list[str]) -> str:
    """bfloat16 is quick on a GPU and slow on most CPUs."""
    return "float32" if devices == ["cpu"] else "bfloat16"


def _measure(
    cells: "list[Cell]",
    seeds: int,
    out: Path,
    devices: list[str],
    *,
    resume: bool,
    workers: int,
    compile: bool | None,
    json: bool,
) -> None:
    """Run cells, then more seeds of the best; print the table, write it with the plots, say what failed."""
    from tritwise.bench.grid import add_ladder
    from tritwise.bench.harness import load_parts
    from tritwise.bench.sweep import SweepLines, run_cells
    from tritwise.bench.tuning import further_seeds
    from tritwise.score import LADDER_BYTES

    console, rows = output.console(json), out / "rows.jsonl"
    settings: dict[str, Any] = {
        "workers": workers,
        "compile": devices != ["cpu"] if compile is None else compile,
        "display": SweepLines(console),
    }
    found = run_cells(cells, rows, devices, resume=resume, **settings)
    if seeds > 1:
        more = run_cells(further_seeds(cells, found.rows, seeds), rows, devices, resume=True, **settings)
        found.rows += more.rows
        found.failures += more.failures
    if found.rows:
        for cell in {(cell.data, cell.split): cell for cell in cells}.values():
            parts = load_parts(cell.data, cell.split, cell.batch, cell.ctx)
            if cell.bench == "optimizer-grid" or sum(map(len, parts.values())) <= LADDER_BYTES:
                add_ladder(rows, cell)
        _show(console, out, found, json)
    if found.failures:
        cell, reason = found.failures[0]
        raise UserError(
            f"{len(found.failures)} of {len(found.failures) + len(found.rows)} runs failed, the first of them "
            f"{cell.rule} at rate {cell.rate:g}: {reason}; the rows of the others are in {rows}, --resume tries again"
        )


def _show(console: Any, out: Path, found: "Sweep", json: bool) -> None:
    """Print and write the tables, draw the plots."""
    from importlib.util import find_spec

    from tritwise.bench.grid import untuned_rows
    from tritwise.files import atomic_write
    from tritwise.report.bench_markdown import rules_markdown
    from tritwise.report.bench_plots import home_cells, write_bench_report
    from tritwise.report.bench_rows import read_bench, sort_rows
    from tritwise.report.bench_tables import summary

    bench, told = read_bench(out), sort_rows(found.rows)
    console.print(_narrow("", summary(told)))
    parts = ["# Each rule at its best rate", *(rules_markdown(bench, cell) for cell in home_cells(bench))]
    untuned = sort_rows(row for row in untuned_rows(found.rows) if row["bench"] == "optimizer-grid")
    if untuned.trials:
        console.print(_narrow("at untuned rates", summary(untuned)))
        parts += ["# The published rows at untuned rates", UNTUNED_NOTE]
        parts += [rules_markdown(untuned, cell) for cell in home_cells(untuned)]
    atomic_write(out / "table.md", ("\n\n".join(parts) + "\n").encode())
    plots = []
    if find_spec("matplotlib"):
        plots = write_bench_report(out)
    else:
        console.print("no plots: matplotlib is not installed; pip install 'tritwise[report]'", markup=False)
    console.print(f"{out / 'rows.jsonl'}, table.md and {len(plots)} files of plots and their page")
    if json and not found.failures:
        output.print_json(
            {
                "rows": str(out / "rows.jsonl"),
                "table": str(out / "table.md"),
                "plots": [str(path) for path in plots],
                "rules": [
                    {
                        "rule": entry.variant.rule,
                        "settings": entry.variant.values,
                        "data": entry.cell.data,
                        "rate": entry.best.rate,
                        "edge": entry.edge,
                        "val_bpb": entry.mean,
                        "n": len(entry.best.scores),
                        "sd": entry.sd,
                        "bytes_per_weight": entry.bytes_per_weight,
                    }
                    for entry in summary(told)
                ],
            }
        )


def _narrow(title: str, entries: Any) -> Any:
    """The table of the rules, as a terminal has room for it; table.md has all columns."""
    from tritwise.report.bench_tables import table

    return output.narrow_table(title, SHOWN, *table(entries))
