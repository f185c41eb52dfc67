"""Commands of the ARB model: a mixture, finetuning, and what a trained one says, hears and draws."""

from pathlib import Path
from typing import Annotated, Any

import typer

from tritwise.cli import output
from tritwise.cli.commands import (
    Accum,
    Batch,
    Context,
    Data,
    Encoder,
    Evaluate,
    Json,
    Log,
    Name,
    NoSave,
    Out,
    Resume,
    Save,
    Set,
    Steps,
    changes_of,
    collection_given,
    option,
    start_run,
)
from tritwise.errors import UserError

ModelOption = Annotated[Path, typer.Option(help="A run folder or an artifact file.", show_default=False)]
EncoderOption = Annotated[str, option("The frozen encoder, if it lies elsewhere than in training.")]


def pretrain(
    mixture: Annotated[str | None, option("Weights of the kinds [text=1,vision=1,audio=1].")] = None,
    text: Annotated[str | None, option("Text to learn: a file, a folder, or shakespeare.")] = None,
    images: Annotated[str | None, option("A collection of images with captions.")] = None,
    sounds: Annotated[str | None, option("A collection of sounds with transcripts.")] = None,
    pictures: Annotated[str | None, option("A collection of pictures to draw like.")] = None,
    vision_encoder: Annotated[str | None, option("Frozen encoder of images.")] = None,
    audio_encoder: Annotated[str | None, option("Frozen encoder of sounds.")] = None,
    steps: Steps = None,
    batch: Batch = None,
    ctx: Context = None,
    accum: Accum = None,
    out: Out = None,
    run: Name = None,
    resume: Resume = False,
    log_interval: Log = None,
    eval_interval: Evaluate = None,
    save_interval: Save = None,
    no_save: NoSave = False,
    set_: Set = None,
    json: Json = False,
) -> None:
    """Train an ARB model on a mixture of text, images, sounds and pictures."""
    flags = {
        "mixture": mixture,
        "data": text,
        "images": images,
        "sounds": sounds,
        "pictures": pictures,
        "vision_encoder": vision_encoder,
        "audio_encoder": audio_encoder,
        "steps": steps,
        "batch": batch,
        "ctx": ctx,
        "accum": accum,
        "log_interval": log_interval,
        "eval_interval": eval_interval,
        "save_interval": save_interval,
    }
    changes = changes_of(flags, no_save, set_)
    start_run("mixture", changes, out=out, run=run, resume=resume, as_json=json)


def finetune(
    what: Annotated[str, typer.Argument(help="text, vision, audio or diffusion.", show_default=False)],
    start: Annotated[Path | None, option("The run whose newest checkpoint to start from.")] = None,
    data: Data = None,
    encoder: Encoder = None,
    steps: Steps = None,
    batch: Batch = None,
    ctx: Context = None,
    accum: Accum = None,
    out: Out = None,
    run: Name = None,
    resume: Resume = False,
    log_interval: Log = None,
    eval_interval: Evaluate = None,
    save_interval: Save = None,
    no_save: NoSave = False,
    set_: Set = None,
    json: Json = False,
) -> None:
    """Go on from an ARB run with one kind of data; a part that the run had not is new."""
    flags = {
        "steps": steps,
        "batch": batch,
        "ctx": ctx,
        "accum": accum,
        "log_interval": log_interval,
        "eval_interval": eval_interval,
        "save_interval": save_interval,
    }
    changes = collection_given(what, data, encoder) | changes_of(flags, no_save, set_)
    name = run or f"finetune-{what}"
    if resume:
        start_run(None, changes, out=out, run=None if out else name, resume=True, as_json=json)
        return
    if start is None:
        raise UserError("no --start was given; name the run whose checkpoint to start from")
    from tritwise.recipes.arb import finetuned
    from tritwise.train import RunFolder

    base = finetuned(RunFolder(start).config(), what, str(start.resolve()))
    start_run(what, changes, out=out, run=None if out else name, resume=False, as_json=json, base=base)


def caption(
    image: Annotated[Path, typer.Argument(help="An image file.", show_default=False)],
    model: ModelOption,
    encoder: EncoderOption = "",
    known: Annotated[Path | None, option("Images with captions, of which the most similar vote too.")] = None,
    json: Json = False,
) -> None:
    """Say what an image shows."""
    from tritwise.loading import load

    _tell({"image": str(image), "text": load(model).caption(image, encoder=encoder, known=known)}, json)


def transcribe(
    sound: Annotated[Path, typer.Argument(help="A sound file.", show_default=False)],
    model: ModelOption,
    encoder: EncoderOption = "",
    json: Json = False,
) -> None:
    """Write down what is said in a sound."""
    from tritwise.loading import load

    _tell({"sound": str(sound), "text": load(model).transcribe(sound, encoder=encoder)}, json)


def generate(
    what: Annotated[str, typer.Argument(help="A class, its number, or words that hold its name.", show_default=False)],
    model: ModelOption,
    out: Annotated[Path, typer.Option(help="The PNG to write.")] = Path("generated.png"),
    count: Annotated[int, typer.Option(min=1, help="How many pictures.")] = 16,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the sampler.")] = 20,
    guidance: Annotated[float, typer.Option(min=0.0, help="How far towards the class; 0: not at all.")] = 1.5,
    seed: Annotated[int, typer.Option(min=0, max=2**32, help="The same seed gives the same pictures.")] = 0,
    json: Json = False,
) -> None:
    """Draw pictures of a class, as one PNG."""
    from tritwise.data.media import save_image
    from tritwise.encoders.features import progress_bar
    from tritwise.loading import load
    from tritwise.train.judge import tiled

    loaded, console = load(model), output.console(json)
    with progress_bar(console, "drawing") as progress:
        name, drawn = loaded.draw(what, count, steps=steps, guidance=guidance, seed=seed, progress=progress)
    save_image(out, tiled(drawn, min(count, 4 if count <= 16 else 8)))
    console.print(f"{count} pictures of {name} in {out}", markup=False)
    if json:
        output.print_json({"class": name, "pictures": count, "path": str(out), "seed": seed})


def _tell(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        output.print_json(result)
    else:
        print(result["text"])
