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


def option(text: str, *names: str) -> Any:
    """An option whose help names its default in square brackets, where it has one."""
    return typer.Option(*names, help=text, show_default=False)


# Options that several commands which train have in common.
Steps = Annotated[int | None, option("Optimizer steps.")]
Batch = Annotated[int | None, option("Sequences per step and micro-batch.")]
Context = Annotated[int | None, option("Bytes, or positions of the stream, that a row has.")]
Accum = Annotated[int | None, option("Micro-batches per step.")]
Data = Annotated[str | None, option("What to learn: a text, or a collection of images or sounds.")]
Encoder = Annotated[str | None, option("Frozen encoder of images or sounds: a folder, or a name on the hub.")]
Out = Annotated[Path | None, option("Run folder [runs/NAME].")]
Name = Annotated[str | None, option("Name of the run when --out is not given [the recipe's].")]
Resume = Annotated[bool, option("Go on from the run's newest checkpoint.", "--resume")]
Log = Annotated[int | None, option("Steps between log lines.")]
Evaluate = Annotated[int | None, option("Steps between evaluations.")]
Save = Annotated[int | None, option("Steps between checkpoints.")]
NoSave = Annotated[bool, option("Write no checkpoint.", "--no-save")]
Loops = Annotated[int, typer.Option(min=0, help="Repeats of a recurrent model's core; 0: as trained.")]
Set = Annotated[list[str] | None, option("Any other setting, KEY=VALUE; may be repeated.", "--set")]


def train(
    what: Annotated[
        str | None, typer.Argument(help="Of an ARB model: text, vision, audio or diffusion.", show_default=False)
    ] = None,
    recipe: Annotated[str | None, option("Named run to start from [shakespeare].")] = None,
    data: Data = None,
    encoder: Encoder = None,
    tokenizer: Annotated[str | None, option("SentencePiece model whose tokens are learned, of text or shards.")] = None,
    steps: Steps = None,
    batch: Batch = None,
    ctx: Context = None,
    width: Annotated[int | None, option("Channels; the rest follows from it.")] = None,
    depth: Annotated[int | None, option("Blocks.")] = None,
    rate: Annotated[float | None, option("Step of a register, in leading-trit units.")] = None,
    accum: Accum = None,
    seed: Annotated[int | None, option("Seed of registers, batches and rounding.")] = None,
    out: Out = None,
    run: Name = None,
    preserve_state: Annotated[
        bool, option("Rows read on from step to step, with a state that goes on.", "--preserve-state")
    ] = False,
    max_moe_iters: Annotated[int | None, option("Passes through the experts of --set experts=N, at the most.")] = None,
    resume: Resume = False,
    log_interval: Log = None,
    eval_interval: Evaluate = None,
    save_interval: Save = None,
    no_save: NoSave = False,
    set_: Set = None,
    json: Json = False,
) -> None:
    """Train a model, score it, ship it. Without WHAT a byte model; with it an ARB model of 288 symbols."""
    flags = {
        "steps": steps,
        "batch": batch,
        "ctx": ctx,
        "width": width,
        "depth": depth,
        "rate": rate,
        "accum": accum,
        "seed": seed,
        "max_moe_iters": max_moe_iters,
        "preserve_state": preserve_state or None,
        "tokenizer": tokenizer,
        "log_interval": log_interval,
        "eval_interval": eval_interval,
        "save_interval": save_interval,
    }
    changes = changes_of(flags, no_save, set_)
    changes |= collection_given(what, data, encoder)
    if what and recipe:
        raise UserError("WHAT names a recipe, and so does --recipe; give one of them")
    start_run(recipe or what, changes, out=out, run=run, resume=resume, as_json=json)


def changes_of(flags: dict[str, Any], no_save: bool, pairs: list[str] | None) -> dict[str, Any]:
    """Settings to change: the flags that were given, --no-save and the words of --set."""
    changes: dict[str, Any] = {key: value for key, value in flags.items() if value is not None}
    if no_save:
        changes["save"] = False
    return changes | settings_given(pairs or [])


def start_run(
    recipe: str | None,
    changes: dict[str, Any],
    *,
    out: Path | None,
    run: str | None,
    resume: bool,
    as_json: bool,
    base: Any = None,
) -> None:
    """Train `recipe` [shakespeare], or the config `base`, with changed settings, and print what came of it."""
    from tritwise.data.source import BUNDLED_NAMES
    from tritwise.recipes import recipe as recipe_called
    from tritwise.train import RunFolder, override
    from tritwise.train import train as run_training
    from tritwise.train.progress import make_display

    for key in ("data", "images", "sounds", "pictures", "vision_encoder", "audio_encoder", "start", "tokenizer"):
        if changes.get(key) and changes[key] not in BUNDLED_NAMES and Path(changes[key]).exists():
            changes[key] = str(Path(changes[key]).resolve())  # so that resume and ship find it from any folder
    if out is not None and run is not None:
        raise UserError("both --out and --run name the run folder; give one of them")
    folder = RunFolder(out or Path("runs") / (run or recipe or "shakespeare"))
    if resume:
        config = folder.resumed(recipe, changes)
    else:
        config = override(base or recipe_called(recipe or "shakespeare"), changes)
    console = output.console(as_json)
    result = run_training(config, folder.path, resume=resume, display=make_display(console))
    if "rank" in result:
        return  # one of several processes, and not the one that tells
    if not result.get("interrupted"):
        _print_result(console, folder, result)
    if as_json:
        output.print_json(result)
    if result.get("interrupted"):
        raise typer.Exit(130)


def collection_given(what: str | None, data: str | None, encoder: str | None) -> dict[str, Any]:
    """The settings that --data and --encoder stand for. UserError for an unknown WHAT."""
    kinds = {None: "data", "text": "data", "vision": "images", "audio": "sounds", "diffusion": "pictures"}
    if what not in kinds:
        raise UserError(f"cannot train {what!r}; choose text, vision, audio or diffusion, or leave it out")
    changes: dict[str, Any] = {} if data is None else {kinds[what]: data}
    if encoder is not None:
        if what not in ("vision", "audio"):
            raise UserError("--encoder is for vision and audio; leave it out")
        changes[f"{what}_encoder"] = encoder
    return changes


def settings_given(pairs: list[str]) -> dict[str, str]:
    """The KEY=VALUE words of --set. Raises UserError for a word that is none."""
    changes = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            raise UserError(f"--set {pair} is not KEY=VALUE; write for example --set softcap=30")
        changes[key.strip()] = value
    return changes


def _print_result(console: Any, folder: Any, result: dict[str, Any]) -> None:
    audit, trits = folder.read("audit"), folder.config().model.weight_trits
    kind = "float" if audit["float_trainable"] else "ternary" if trits == 1 else f"{trits} trits each in matrices"
    if "nats" in result["val"]:
        console.print(output.score_table("this model", result["val"]["nats"], folder.read("ladder")["rows"]))
    else:
        console.print(output.media_table(result["val"]))
    rows = [
        ["trained for", f"{result['seconds']:.1f} s, {result['steps']} steps, {result['bytes_seen']:,} bytes"],
        ["weights", f"{audit['weights']:,} ({kind})"],
        ["state while training", f"{audit['state_bytes_per_weight']:.3f} bytes a weight"],
        ["floats that training keeps", f"{audit['float_trainable']:,}"],
    ]
    if "artifact" in result:
        rows.append(["artifact", f"{result['artifact']['path']}, {result['artifact']['bytes']:,} bytes"])
        if "bpb_reread" in result["artifact"]:
            rows.append(["bits per byte, re-read", f"{result['artifact']['bpb_reread']:.4f}"])
    rows += output.averaged_rows(result.get("averaged"))
    console.print(output.table("", ["result", str(folder.path)], rows))


def score(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="A run folder, an artifact, hf:FOLDER-OR-NAME (transformers), or ngram:ORDER (counted in train).",
            show_default=False,
        ),
    ],
    data: Annotated[str | None, option("Text to score: a file, a folder, or shakespeare [the run's].")] = None,
    split: Annotated[str | None, option("Part to score: train, val or test [val of the run's data, else all].")] = None,
    rule: Annotated[str | None, option("How parts are cut [the run's, else 90/10].")] = None,
    mode: Annotated[str | None, option("How it is read: sliding, chunked, stream or endless [sliding].")] = None,
    window: Annotated[int, typer.Option(help="Bytes of context (tokens, where a model reads them); 0: all.")] = 0,
    stride: Annotated[int, option("Bytes by which the window moves [half of it; all when chunked].")] = 0,
    separator: Annotated[str, option(r"Start anew after these bytes, for example \n\n [never].")] = "",
    adapt: Annotated[str, option("Learn from what was scored: none, all or scales [none].")] = "none",
    adapt_rate: Annotated[float, option("Step of --adapt [by what learns].")] = 0.0,
    adapt_piece: Annotated[int, option("Bytes between two steps of --adapt [the stride].")] = 0,
    no_guard: Annotated[bool, option("--adapt in half the time, and without a bound on harm.", "--no-guard")] = False,
    mix: Annotated[bool, option("Mix with counts of orders 0 to 5 of what was scored.", "--mix")] = False,
    mix_train: Annotated[bool, option("Count the train part first.", "--mix-train")] = False,
    compare: Annotated[bool, option("Score two models: the paired difference and its interval.", "--compare")] = False,
    ladder: Annotated[bool | None, typer.Option(help="Beside simple baselines [texts up to 16 MB].")] = None,
    loops: Loops = 0,
    device: Annotated[str, option("Where models compute: auto, cpu or cuda.")] = "auto",
    json: Json = False,
) -> None:
    """Bits per byte of a text, every byte scored exactly once."""
    from tritwise.cli.scoring import Reading, run_score
    from tritwise.score.learning import Learning

    how = Learning(adapt, adapt_piece, adapt_rate, not no_guard, mix)  # pyright: ignore[reportArgumentType]
    reading = Reading(mode, window, stride, separator, how, mix_train)
    run_score(
        models,
        reading,
        compared=compare,
        data=data,
        part=split,
        rule=rule,
        ladder_wanted=ladder,
        loops=loops,
        device=device,
        as_json=json,
    )


def sample(
    model: Where,
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "\n",
    bytes: Annotated[int, typer.Option(help="How many bytes to write.")] = 300,
    seed: Annotated[int, typer.Option(min=0, max=2**64 - 1, help="The same seed gives the same text.")] = 0,
    temperature: Annotated[float, typer.Option(help="0: the likeliest byte; 1: as the model says.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="Only the k likeliest bytes; 0: all.")] = 0,
    loops: Loops = 0,
    json: Json = False,
) -> None:
    """Continue a text."""
    from tritwise.loading import load

    loaded = load(model)
    if loops:
        loaded.at(loops)
    written = loaded.generate(prompt, bytes, seed=seed, temperature=temperature, top_k=top_k)
    text = written.decode("utf-8", errors="replace")
    if json:
        output.print_json({"prompt": prompt, "text": text, "bytes": len(written), "seed": seed})
    else:
        print(f"{prompt}{text}")


def ship(
    run: RunArgument,
    out: Annotated[Path, option("The artifact to write.")],
    budget: Annotated[
        int | None, typer.Option(min=0, help="Bytes that the file may have; 0: any number [the run's].")
    ] = None,
    ship_as: Annotated[
        str | None, option("How float weights ship: auto, int8, int7, int6, int8+zlib [the run's].")
    ] = None,
    ship_small: Annotated[
        int | None, typer.Option(min=0, help="Float tensors of up to so many numbers stay float16 [the run's].")
    ] = None,
    score_bytes: Annotated[
        int, typer.Option(min=0, help="Bytes of val that are scored, before and after; 0: all.")
    ] = 0,
    json: Json = False,
) -> None:
    """Write a run's newest model as one file, read it back, and score what was read, if it is a model of text."""
    from tritwise.train.finish import ship_run

    result = ship_run(run, out, budget=budget, ship_as=ship_as, ship_small=ship_small, count=score_bytes)
    console = output.console(json)
    rows = [[name, f"{count:,} bytes"] for name, count in result["streams"].items()]
    rows.append(["header", f"{result['bytes'] - sum(result['streams'].values()):,} bytes"])
    rows.append(["file", f"{result['bytes']:,} bytes, {result['bits_per_weight']:.3f} bits a weight, {result['way']}"])
    if result["budget"]:
        rows.append(["left of the budget", f"{result['budget'] - result['bytes']:,} of {result['budget']:,} bytes"])
    rows += output.averaged_rows(result.get("averaged"))
    for name, when in (("bpb_before", "before"), ("bpb_reread", "re-read")):
        if name in result:  # a model that has learned no text has no bits per byte
            rows.append([f"bits per byte, {when}", f"{result[name]:.4f}"])
    console.print(output.table("", ["artifact", str(out)], rows))
    if json:
        output.print_json(result)


def audit(run: RunArgument, json: Json = False) -> None:
    """List every tensor that a run trains with, and what memory its training took: role, type and bytes."""
    from tritwise.train import RunFolder, load_run
    from tritwise.train import audit as audit_of
    from tritwise.train.memory import memory_by_role

    _, model, optimizers, _ = load_run(run, with_optimizers=True)
    result = audit_of(model, optimizers)
    # Activations and the peak are those of the training process, which wrote them down; this one only has the rest.
    told = RunFolder(run).read("audit").get("memory") if (run / "audit.json").exists() else None
    result["memory"] = told or memory_by_role(model, optimizers) | {"activations": None, "peak": None}
    console = output.console(json)
    rows = [[row["name"], row["role"], row["dtype"], f"{row['bytes']:,}"] for row in result["tensors"]]
    console.print(output.table("", ["tensor", "role", "type", "bytes"], rows))
    roles = [[role, f"{count:,}"] for role, count in result["bytes_by_role"].items()]
    console.print(output.table("", ["what lasts from step to step", "bytes"], roles))
    memory = [[role, f"{count:,}"] for role, count in result["memory"].items() if count]
    console.print(output.table("", ["memory while training", "bytes"], memory))
    console.print(
        f"{result['weights']:,} weights, {result['state_bytes_per_weight']:.4f} bytes of state a weight; "
        f"{result['float_trainable']:,} trainable floats, {result['float_state_bytes']:,} bytes of float state"
    )
    if json:
        output.print_json(result)


def report(
    run: RunArgument,
    out: Annotated[Path | None, option("Folder to write into [RUN/report].")] = None,
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
