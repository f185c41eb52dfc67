"""`tritwise bench budget`: the best model that fits into a number of bytes.

Heavy imports stand inside the command, so that --help and errors in options are quick.
"""

from pathlib import Path
from typing import Annotated, Any

import typer

from tritwise.cli import output
from tritwise.cli.commands import Json, option, settings_given
from tritwise.errors import UserError

SHOWN = ("recipe", "steps", "bytes", "as", "before", "re-read", "n")  # what fits a terminal; table.md has all columns
OF_ALL = {"budget": "budget", "seconds": "seconds", "steps": "steps", "split": "split", "seed": "seeds"}


def budget(
    budget: Annotated[int, typer.Option(min=1, help="Bytes that a shipped file may have.")] = 16_000_000,
    seconds: Annotated[float, typer.Option(min=0, help="Seconds of training each; 0: by --steps.")] = 0.0,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Optimizer steps each [1000; any number with --seconds].")
    ] = None,
    recipes: Annotated[str, option("Contestants a,b,c [all].")] = "",
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each.")] = 1,
    data: Annotated[str, typer.Option(help="Text to learn: a file, a folder, or shakespeare.")] = "shakespeare",
    split: Annotated[str, typer.Option(help="How train, val and test are cut.")] = "90/10",
    ctx: Annotated[int, typer.Option(help="Bytes of context.")] = 64,
    batch: Annotated[int, typer.Option(help="Sequences a micro-batch.")] = 32,
    set_: Annotated[
        list[str] | None, option("Setting KEY=VALUE of all, or NAME:KEY=VALUE of one; may be repeated.", "--set")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of records and table; what it holds is not run again.")] = Path(
        "runs/bench-budget"
    ),
    json: Json = False,
) -> None:
    """Contestants under one budget of bytes and one of time or steps: trained, shipped, read back, scored."""
    from tritwise.bench.budget import run_budget
    from tritwise.bench.entries import ENTRIES, base_config, entry
    from tritwise.data.source import BUNDLED_NAMES
    from tritwise.files import atomic_write
    from tritwise.report.bench_markdown import markdown
    from tritwise.report.budget_tables import HEAD, table_of
    from tritwise.ship.container import OverBudgetError
    from tritwise.train.crew import Crew
    from tritwise.train.progress import make_display

    if Crew.size_asked() > 1:
        raise UserError("bench budget trains in one process; start it without torchrun, or train a contestant with it")
    names = [name for name in map(str.strip, recipes.split(",")) if name] or list(ENTRIES)
    own: dict[str, dict[str, Any]] = {name: {} for name in names}
    for text in set_ or []:
        name, colon, rest = text.partition(":")
        alone = "=" in name or not colon
        key = (text if alone else rest).partition("=")[0].strip()
        if key in OF_ALL:
            raise UserError(f"--set {text}: {key} is the same for all contestants; give --{OF_ALL[key]}")
        if not alone and name not in own:
            raise UserError(f"--set {text} names no contestant; choose one of {', '.join(names)}")
        for chosen in names if alone else [name]:
            own[chosen] |= settings_given([text if alone else rest])
    if data not in BUNDLED_NAMES and Path(data).exists():
        data = str(Path(data).resolve())
    limit = steps or (10**9 if seconds else 1000)
    configs = []
    for seed in range(seeds):
        for name, more in own.items():
            base = base_config(data, split, ctx=ctx, batch=batch, steps=limit, seconds=seconds, seed=seed)
            try:
                configs.append(entry(name, base, budget, more))
            except UserError as error:
                raise UserError(f"{name}: {error}") from error
    console = output.console(json)
    records: list[dict[str, Any]] = []
    refused: OverBudgetError | None = None
    try:
        for records in run_budget(configs, out, make_display(console)):
            atomic_write(out / "table.md", f"{markdown(HEAD, table_of(records))}\n".encode())
    except OverBudgetError as error:
        refused = error
    if records:
        console.print(output.narrow_table("", SHOWN, HEAD, table_of(records)))
        console.print(f"{out / 'records'} and {out / 'table.md'}")
    if refused is not None:
        raise refused
    if json:
        output.print_json({"records": records, "table": str(out / "table.md")})
