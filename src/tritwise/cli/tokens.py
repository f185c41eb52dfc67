"""`tritwise tokenize`: a text as shards of tokens. Heavy imports stand inside, so that --help is quick."""

from pathlib import Path
from typing import Annotated

import typer

from tritwise.cli import output
from tritwise.cli.commands import Json, option
from tritwise.errors import UserError


def tokenize(
    text: Annotated[str, typer.Argument(help="A file, a folder, or shakespeare.", show_default=False)],
    out: Annotated[Path, option("Folder to write the shards into.")],
    tokenizer: Annotated[Path | None, option("SentencePiece model [OUT/tokenizer.model].")] = None,
    vocab: Annotated[
        int, typer.Option(min=0, help="Train a new tokenizer of so many tokens on the train part first; 0: none.")
    ] = 0,
    split: Annotated[str, typer.Option(help="How parts are cut; each has shards of its own.")] = "90/10",
    separator: Annotated[str, option(r"A document ends after these bytes, for example \n\n [never].")] = "",
    shard: Annotated[int, typer.Option(min=1, help="Tokens in a shard, at the most.")] = 100_000_000,
    json: Json = False,
) -> None:
    """Write a text as shards, a begin token before every document: 256 int32, then uint16 tokens."""
    import numpy as np

    from tritwise.cli.scoring import unescaped
    from tritwise.data.corpus import open_parts
    from tritwise.data.shards import write_shards
    from tritwise.data.tokenizer import Tokenizer, train_tokenizer
    from tritwise.files import atomic_write, make_folder

    parts = {name: part.tobytes() for name, part in open_parts(text, split).items()}
    place = tokenizer or out / "tokenizer.model"
    if vocab and place.exists():
        raise UserError(f"{place} is there already; leave --vocab out to use it")
    if not vocab and not place.exists():
        raise UserError(f"there is no tokenizer at {place}; name one, or make one with --vocab 1024")
    made = train_tokenizer(parts.get("train") or next(iter(parts.values())), vocab) if vocab else b""
    make_folder(out)
    if made:
        atomic_write(place, made)
    known, mark, rows, told = Tokenizer.open(place), unescaped(separator), [], {}
    for name, part in parts.items():
        documents = [d + mark for d in part.split(mark)[:-1]] + part.split(mark)[-1:] if mark else [part]
        ids = [piece for d in documents if d for piece in ([np.uint16(known.start)], known.encode(d))]
        tokens = np.concatenate(ids)
        files = write_shards(tokens, out, name, shard)
        told[name] = {"files": [str(file) for file in files], "tokens": len(tokens), "bytes": len(part)}
        rows.append([name, f"{len(files)}", f"{len(tokens):,}", f"{len(part):,}", f"{len(part) / len(tokens):.3f}"])
    console = output.console(json)
    console.print(output.table("", ["part", "shards", "tokens", "bytes", "bytes a token"], rows))
    console.print(f"tritwise train --data {out} --set split=named --tokenizer {place}", markup=False)
    if json:
        output.print_json({"tokenizer": str(place), "vocab": known.size, "parts": told})
