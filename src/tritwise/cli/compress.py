"""`tritwise compress` and `tritwise decompress`. Heavy imports stand inside, so that --help is quick."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tritwise.cli import output
from tritwise.cli.commands import Json, option
from tritwise.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from tritwise.compress import Report

SUFFIX = ".twz"
Jobs = Annotated[int, typer.Option(min=0, help="Threads on a CPU, without influence on the result; 0: all.")]


def compress(
    file: Annotated[Path, typer.Argument(help="Any file.", show_default=False)],
    model: Annotated[Path, option("The artifact that predicts, or the folder of a finished run.")],
    out: Annotated[Path | None, option(f"The file to write [FILE{SUFFIX}].")] = None,
    embed: Annotated[bool, typer.Option("--embed/--reference", help="Put the model in, or only its checksum.")] = False,
    lanes: Annotated[int, typer.Option(min=0, help="Parts read side by side; 0: as many as cost little.")] = 0,
    window: Annotated[int, typer.Option(help="Bytes of context; 0: all the model has.")] = 0,
    stride: Annotated[int, typer.Option(help="Bytes by which the window moves; 0: half of it.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda; decompress needs the same.")] = "auto",
    jobs: Jobs = 0,
    json: Json = False,
) -> None:
    """Code a file with a model's predictions: its size on disk is the model's score."""
    from tritwise.compress import compress as run
    from tritwise.train.device import device_called

    target = out or file.with_name(file.name + SUFFIX)
    console = output.console(json)
    with _progress(console, "compress") as progress:
        report = run(
            file,
            target,
            _artifact(model),
            embed=embed,
            lanes=lanes,
            window=window,
            stride=stride,
            device=device_called(device, "--device cpu"),
            jobs=jobs,
            progress=progress,
        )
    _tell(console, target, report, json)


def decompress(
    file: Annotated[Path, typer.Argument(help="A file that compress made.", show_default=False)],
    model: Annotated[Path | None, option("The artifact it was made with [the embedded one].")] = None,
    out: Annotated[Path | None, option(f"The file to write [FILE without {SUFFIX}].")] = None,
    jobs: Jobs = 0,
    json: Json = False,
) -> None:
    """Give back the file that compress was given, to the last bit, or say why not."""
    from tritwise.compress import decompress as run

    if out is None and (file.suffix != SUFFIX or file.name == SUFFIX):
        raise UserError(f"{file} does not end in {SUFFIX}, so what it held has no name; give one with --out")
    target = out or file.with_suffix("")
    console = output.console(json)
    with _progress(console, "decompress") as progress:
        report = run(file, target, None if model is None else _artifact(model), jobs=jobs, progress=progress)
    _tell(console, target, report, json)


def _artifact(model: Path) -> Path:
    """The artifact of a run folder, or the path itself."""
    from tritwise.train import RunFolder

    if not model.is_dir():
        return model
    artifact = RunFolder(model).artifact
    if not artifact.exists():
        raise UserError(f"{model} holds no artifact; finish the run, or make one with tritwise ship {model} --out FILE")
    return artifact


@contextlib.contextmanager
def _progress(console: "Console", name: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, which goes away at the end; nothing elsewhere."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn(name), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(name)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _tell(console: "Console", path: Path, report: "Report", as_json: bool) -> None:
    rows = [["text", f"{report.text:,} bytes"], ["compressed", f"{report.file:,} bytes"]]
    rows.append(["model", f"{report.model:,} bytes, {'embedded' if report.embedded else 'not in the file'}"])
    if report.bpb is not None:
        rows.append(["bits per byte, whole file", f"{report.bpb:.4f}"])
    result: dict[str, Any] = {"path": str(path), **report._asdict()}
    if report.claimed_bits:
        body = 8 * (report.file - report.embedded * report.model)
        result["over_claim"] = body / report.claimed_bits - 1
        rows.append(["claimed by the model", f"{report.claimed_bits / report.text:.4f}"])
        rows.append(["file over claim, without the model", f"{result['over_claim']:+.4%}"])
        if report.lane_bits is not None:
            rows.append(["of it for lanes", f"{report.lanes}, about {report.lane_bits / 8:,.0f} bytes"])
    speed = report.text / max(report.seconds, 1e-9)
    rows.append(["time", f"{report.seconds:.1f} s, {speed:,.0f} bytes a second"])
    console.print(output.table("", ["result", str(path)], rows))
    if as_json:
        output.print_json(result)
