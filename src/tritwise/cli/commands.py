"""The commands. Each reads its options, calls one function of a lower room, and prints what came back.

Heavy imports stand inside the commands, so that --help and errors in options are quick.
"""

from pathlib import Path
from typing import Annotated, Any

import typer

from tritwise.cli import output
from tritwise.errors import UserError

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of stdout.")]
Where = Annotated[Path, typer.Argument(help="A run folder or an artifact file.", show_default=False)]
RunArgument = Annotated[Path, typer.Argument(help="A run folder.", show_default=False)]


def _option(text: str, *names: str) -> Any:
    return typer.Option(*names, help=text, show_default=False)


def train(
    recipe: Annotated[str | None, _option("Named run to start from [shakespeare].")] = None,
    data: Annotated[str | None, _option("Text to learn: a file, a folder, or shakespeare.")] = None,
    steps: Annotated[int | None, _option("Optimizer steps.")] = None,
    batch: Annotated[int | None, _option("Sequences per step and micro-batch.")] = None,
    ctx: Annotated[int | None, _option("Bytes of context.")] = None,
    width: Annotated[int | None, _option("Channels; the rest follows from it.")] = None,
    depth: Annotated[int | None, _option("Blocks.")] = None,
    rate: Annotated[float | None, _option("Step of a register, in leading-trit units.")] = None,
    accum: Annotated[int | None, _option("Micro-batches per step.")] = None,
    seed: Annotated[int | None, _option("Seed of registers, batches and rounding.")] = None,
    out: Annotated[Path | None, _option("Run folder [runs/NAME].")] = None,
    run: Annotated[str | None, _option("Name of the run when --out is not given [the recipe's].")] = None,
    resume: Annotated[bool, _option("Go on from the run's newest checkpoint.", "--resume")] = False,
    log_interval: Annotated[int | None, _option("Steps between log lines.")] = None,
    eval_interval: Annotated[int | None, _option("Steps between evaluations.")] = None,
    save_interval: Annotated[int | None, _option("Steps between checkpoints.")] = None,
    no_save: Annotated[bool, _option("Write no checkpoint.", "--no-save")] = False,
    set_: Annotated[list[str] | None, _option("Any other setting, KEY=VALUE; may be repeated.", "--set")] = None,
    json: Json = False,
) -> int:
    """Train a model, score it, ship it."""
    flags = {
        "data": data,
        "steps": steps,
        "batch": batch,
        "ctx": ctx,
        "width": width,
        "depth": depth,
        "rate": rate,
        "accum": accum,
        "seed": seed,
        "log_interval": log_interval,
        "eval_interval": eval_interval,
        "save_interval": save_interval,
    }
    changes: dict[str, Any] = {key: value for key, value in flags.items() if value is not None}
    if no_save:
        changes["save"] = False
    changes |= _settings(set_ or [])

    from tritwise.data.source import BUNDLED_NAMES
    from tritwise.recipes import recipe as recipe_called
    from tritwise.train import RunFolder, override
    from tritwise.train import train as run_training
    from tritwise.train.progress import make_display

    if changes.get("data") and changes["data"] not in BUNDLED_NAMES and Path(changes["data"]).exists():
        changes["data"] = str(Path(changes["data"]).resolve())  # so that resume and ship find it from any folder
    if out is not None and run is not None:
        raise UserError("both --out and --run name the run folder; give one of them")
    folder = RunFolder(out or Path("runs") / (run or recipe or "shakespeare"))
    if resume:
        config = folder.resumed(recipe, changes)
    else:
        config = override(recipe_called(recipe or "shakespeare"), changes)
    console = output.console(json)
    result = run_training(config, folder.path, resume=resume, display=make_display(console))
    if not result.get("interrupted"):
        _print_result(console, folder.path, result, folder.read("ladder")["rows"], folder.read("audit"))
    if json:
        output.print_json(result)
    return 130 if result.get("interrupted") else 0


def _settings(pairs: list[str]) -> dict[str, str]:
    changes = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            raise UserError(f"--set {pair} is not KEY=VALUE; write for example --set softcap=30")
        changes[key.strip()] = value
    return changes


def _print_result(
    console: Any, folder: Path, result: dict[str, Any], ladder: list[dict[str, Any]], audit: dict[str, Any]
) -> None:
    console.print(output.score_table("this model", result["val"]["nats"], ladder))
    rows = [
        ["trained for", f"{result['seconds']:.1f} s, {result['steps']} steps, {result['bytes_seen']:,} bytes"],
        ["weights", f"{audit['weights']:,} ({'ternary' if 'artifact' in result else 'float'})"],
        ["state while training", f"{audit['state_bytes_per_weight']:.3f} bytes a weight"],
        ["trainable floats", f"{audit['float_trainable']:,}"],
    ]
    if "artifact" in result:
        rows.append(["artifact", f"{result['artifact']['path']}, {result['artifact']['bytes']:,} bytes"])
        rows.append(["bits per byte, re-read", f"{result['artifact']['bpb_reread']:.4f}"])
    console.print(output.table("", ["result", str(folder)], rows))


def score(
    model: Where,
    data: Annotated[str | None, _option("Text to score: a file, a folder, or shakespeare [the run's].")] = None,
    split: Annotated[
        str | None, _option("Part to score: train, val or test [val of the run's data, else all].")
    ] = None,
    rule: Annotated[str | None, _option("How parts are cut [the run's, else 90/10].")] = None,
    window: Annotated[int, typer.Option(help="Bytes of context; 0: all the model has.")] = 0,
    stride: Annotated[int, typer.Option(help="Bytes by which the window moves; 0: half of it.")] = 0,
    ladder: Annotated[bool | None, typer.Option(help="Beside simple baselines [texts up to 16 MB].")] = None,
    json: Json = False,
) -> None:
    """Bits per byte of a text, every byte scored exactly once."""
    import numpy as np

    from tritwise.data.source import describe
    from tritwise.data.split import named_part
    from tritwise.data.split import split as split_data
    from tritwise.loading import load
    from tritwise.score import ladder as ladder_of

    loaded = load(model)
    trained = loaded.about.get("train", {})
    if data is None and "data" not in trained:
        raise UserError(f"{model} does not say what it was trained on; name a text with --data")
    if data is None:
        split = split or "val"
    source = describe(data or trained["data"])
    parts = split_data(source.data, rule or trained.get("split", "90/10")) if split else {"all": source.data}
    part = split or "all"
    scored = named_part(parts, part)
    result = loaded.score(scored, window=window, stride=stride)
    rows: list[Any] = []
    if ladder or (ladder is None and len(source.data) <= 16_000_000):
        context = parts["train"] if part in ("val", "test") and "train" in parts else np.empty(0, np.uint8)
        rows = list(ladder_of(context, scored))
    console = output.console(json)
    if rows:
        console.print(output.score_table("this model", result.nats, rows))
    console.print(
        f"{source.name} {part}: {result.bpb:.4f} bits per byte, {result.nats:.4f} nats, {result.bytes:,} bytes "
        f"(window {result.window}, stride {result.stride}, {result.seconds:.1f} s)"
    )
    if json:
        output.print_json({**result._asdict(), "data": source.name, "split": part, "ladder": rows})


def sample(
    model: Where,
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "\n",
    bytes: Annotated[int, typer.Option(help="How many bytes to write.")] = 300,
    seed: Annotated[int, typer.Option(min=0, max=2**64 - 1, help="The same seed gives the same text.")] = 0,
    temperature: Annotated[float, typer.Option(help="0: the likeliest byte; 1: as the model says.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="Only the k likeliest bytes; 0: all.")] = 0,
    json: Json = False,
) -> None:
    """Continue a text."""
    from tritwise.loading import load

    written = load(model).generate(prompt, bytes, seed=seed, temperature=temperature, top_k=top_k)
    text = written.decode("utf-8", errors="replace")
    if json:
        output.print_json({"prompt": prompt, "text": text, "bytes": len(written), "seed": seed})
    else:
        print(f"{prompt}{text}")


def ship(
    run: RunArgument,
    out: Annotated[Path, _option("The artifact to write.")],
    json: Json = False,
) -> None:
    """Write a run's newest model as one file, read it back, and score what was read."""
    from tritwise.train.finish import ship_run

    result = ship_run(run, out)
    console = output.console(json)
    rows = [[name, f"{count:,} bytes"] for name, count in result["streams"].items()]
    rows.append(["file", f"{result['bytes']:,} bytes, {result['bits_per_weight']:.3f} bits a weight"])
    rows.append(["bits per byte, re-read", f"{result['bpb_reread']:.4f}"])
    console.print(output.table("", ["artifact", str(out)], rows))
    if json:
        output.print_json(result)


def audit(run: RunArgument, json: Json = False) -> None:
    """List every tensor that a run trains with: role, type and bytes."""
    from tritwise.train import audit as audit_of
    from tritwise.train import load_run

    _, model, optimizers, _ = load_run(run, with_optimizers=True)
    result = audit_of(model, optimizers)
    console = output.console(json)
    rows = [[row["name"], row["role"], row["dtype"], f"{row['bytes']:,}"] for row in result["tensors"]]
    console.print(output.table("", ["tensor", "role", "type", "bytes"], rows))
    roles = [[role, f"{count:,}"] for role, count in result["bytes_by_role"].items()]
    console.print(output.table("", ["what lasts from step to step", "bytes"], roles))
    console.print(
        f"{result['weights']:,} weights, {result['state_bytes_per_weight']:.4f} bytes of state a weight; "
        f"{result['float_trainable']:,} trainable floats, {result['float_state_bytes']:,} bytes of float state"
    )
    if json:
        output.print_json(result)


def report(
    run: RunArgument,
    out: Annotated[Path | None, _option("Folder to write into [RUN/report].")] = None,
    json: Json = False,
) -> None:
    """Draw a run: one HTML page and its plots as PNG."""
    from tritwise.report import write_report

    result = write_report(run, out)
    output.console(json).print(f"{result.page} and {len(result.plots)} plots")
    if json:
        output.print_json({"page": str(result.page), "plots": [str(path) for path in result.plots]})


def doctor(json: Json = False) -> None:
    """Say what this machine has and whether everything works."""
    from tritwise.cli.doctor import examine

    found = examine()
    console = output.console(json)
    rows = [[name, str(value)] for name, value in found.items() if name != "checks"]
    console.print(output.table("", ["what", "found"], rows))
    for name, verdict in found["checks"].items():
        console.print(f"{'ok  ' if verdict == 'ok' else 'BAD '} {name}{'' if verdict == 'ok' else ': ' + verdict}")
    if json:
        output.print_json(found)
    if any(verdict != "ok" for verdict in found["checks"].values()):
        raise typer.Exit(2)
