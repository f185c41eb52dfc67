"""What the score command does: finds its models and its text, scores one or compares two, and prints what came out."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from tritwise.cli import output
from tritwise.data.corpus import open_parts, tokens_of
from tritwise.data.shards import looks_like_shards
from tritwise.data.source import describe, locate
from tritwise.data.split import NAMED, named_part
from tritwise.data.split import split as split_data
from tritwise.data.tokenizer import Tokenizer
from tritwise.errors import UserError
from tritwise.loading import load
from tritwise.score import LADDER_BYTES, Score, ladder, score
from tritwise.score.compare import Comparison, compare
from tritwise.score.hf import HFTokens, load_hf
from tritwise.score.learning import Learning, score_learning
from tritwise.score.ngram import ngram_predictor
from tritwise.score.protocol import device_of
from tritwise.score.scorer import spread
from tritwise.train.device import device_called


@dataclasses.dataclass(frozen=True)
class Reading:
    """How the text is read: the options of the same names."""

    mode: str | None
    window: int
    stride: int
    separator: str
    how: Learning
    mix_train: bool

    @property
    def learns(self) -> bool:
        return self.how.mix or self.how.adapt != "none"


class Text(NamedTuple):
    """What is scored, which part of what, and the train part of the same text (empty where there is none).

    data: uint8 [bytes], or the tokens of shards, uint16 [tokens]. bytes: that the part has; size: that all parts have,
    0 where that is not known.
    """

    data: np.ndarray
    source: str
    part: str
    train: np.ndarray
    size: int
    bytes: int


class Entrant(NamedTuple):
    """A model by the word that names it. about: its "train" section or {}. predictor: made once the text is known.
    tokenizer: of a model of tokens."""

    name: str
    about: dict[str, Any]
    predictor: Callable[[Text], Any]
    tokenizer: Tokenizer | None = None


def entrant(name: str, device: torch.device, loops: int = 0) -> Entrant:
    """hf:FOLDER-OR-NAME, ngram:ORDER, or the path of a run or artifact. UserError as their loaders raise it.

    device: where it computes; an n-gram stays on the CPU. loops: repeats of a recurrent model; 0: as trained.
    """
    kind, colon, rest = name.partition(":")
    if loops and colon and kind in ("hf", "ngram"):
        raise UserError(f"{name} does not repeat; leave --loops out")
    if colon and kind == "hf":
        model = load_hf(rest, device)
        return Entrant(name, {}, lambda _: model)
    if colon and kind == "ngram":
        if not rest.isdigit():
            raise UserError(f"{name} names no n-gram; write for example ngram:5")
        return Entrant(name, {}, lambda text: _counted(name, int(rest), text))
    loaded = load(Path(name)).to(device)
    if loops:
        loaded.at(loops)
    return Entrant(name, loaded.about.get("train", {}), lambda _: loaded.reader, loaded.tokenizer)


def _counted(name: str, order: int, text: Text) -> Any:
    if not len(text.train):
        raise UserError(f"{name} counts the train part of the text, and there is none; choose a part with --split val")
    return ngram_predictor(text.train, order)


def text_for(entrants: list[Entrant], data: str | None, part: str | None, rule: str | None) -> Text:
    """The text asked for, else the val part of what the first model that says so was trained on."""
    trained = next((e.about for e in entrants if "data" in e.about), {})
    if data is None and not trained:
        raise UserError(f"{entrants[0].name} does not say what it was trained on; name a text with --data")
    if data is None:
        part = part or "val"
    where = data or trained["data"]
    sharded = looks_like_shards(where)
    own = [e.about.get("split") for e in entrants]
    # A model of shards that were cut by name can be scored on a text, which cannot.
    cut = rule or next((r for r in own if r and (sharded or r != NAMED)), "90/10")
    if sharded:
        tokenizer = _common_tokenizer(entrants, where)
        tokens = named_part(open_parts(where, cut if part else "all", tokenizer), part or "val")
        size = int(tokenizer.sizes(tokens).sum(dtype=np.int64))
        return Text(tokens, locate(where).name, part or "all", np.empty(0, np.uint8), 0, size)
    source = describe(where)
    parts = split_data(source.data, cut) if part else {"all": source.data}
    part = part or "all"
    scored = named_part(parts, part)
    train = parts["train"] if part in ("val", "test") and "train" in parts else np.empty(0, np.uint8)
    return Text(scored, source.name, part, train, len(source.data), len(scored))


def _common_tokenizer(entrants: list[Entrant], where: str) -> Tokenizer:
    """The tokenizer of all of them. Raises UserError if there is none."""
    tokenizers = [e.tokenizer for e in entrants if e.tokenizer is not None]
    if len(tokenizers) < len(entrants) or len({tokenizer.digest for tokenizer in tokenizers}) > 1:
        raise UserError(f"{where} holds tokens, and not all models have their tokenizer; name a text with --data")
    return tokenizers[0]


def scored(entrant: Entrant, text: Text, reading: Reading, into: np.ndarray | None = None) -> Score:
    """The score of one model. into: float array that takes the nats of each byte."""
    model = entrant.predictor(text)
    settings: dict[str, Any] = {"window": reading.window, "stride": reading.stride, "into": into}
    mode: Any = reading.mode or "sliding"  # score refuses other words itself
    if isinstance(model, HFTokens):
        if reading.separator or reading.learns:
            raise UserError(f"{entrant.name} reads tokens: leave --separator, --adapt and --mix out")
        return model.score(text.data, mode=mode, **settings)
    if entrant.tokenizer is not None:
        return _scored_tokens(model, entrant, text, reading, into)
    separator = unescaped(reading.separator)
    if not reading.learns:
        return score(model, text.data, mode=mode, separator=separator, device=device_of(model), **settings)
    if reading.mode not in (None, "stream"):
        raise UserError(f"--adapt and --mix read a text as a stream; leave --mode {reading.mode} out")
    train = text.train if reading.mix_train else None
    return score_learning(model, text.data, reading.how, train=train, separator=separator, **settings)


def _scored_tokens(model: Any, entrant: Entrant, text: Text, reading: Reading, into: np.ndarray | None) -> Score:
    if reading.separator or reading.learns:
        raise UserError(f"{entrant.name} reads tokens: leave --separator, --adapt and --mix out")
    alphabet = entrant.tokenizer
    assert alphabet is not None
    ids = text.data if text.data.dtype == np.uint16 else tokens_of(text.data, alphabet)
    costs, mode = np.empty(len(ids)), reading.mode or "sliding"
    result = score(
        model,
        ids,
        mode=mode,  # pyright: ignore[reportArgumentType]  # score refuses other words itself
        window=reading.window,
        stride=reading.stride,
        into=costs,
        device=device_of(model),
        alphabet=alphabet,
    )
    if into is not None:
        spread(costs, np.cumsum(alphabet.sizes(ids), dtype=np.int64), into)
    return result


def unescaped(separator: str) -> bytes:
    r"""The bytes of --separator, in which \n, \t, \0 and \xff stand for what they do in Python."""
    try:
        raw = separator.encode("utf-8", errors="surrogateescape")
        return raw.decode("unicode_escape").encode("latin-1")
    except UnicodeError as error:
        raise UserError(f"--separator {separator} is not readable ({error}); write a backslash twice") from None


def print_score(name: str, result: Score, text: Text, rungs: list[Any], as_json: bool) -> None:
    """One model's score, beside the ladder where there is one."""
    console = output.console(as_json)
    if rungs:
        console.print(output.score_table(name, result.nats, rungs))
    console.print(f"{text.source} {text.part}: {_told(result)}")
    if as_json:
        output.print_json({**result._asdict(), "data": text.source, "split": text.part, "ladder": rungs})


def print_comparison(
    entrants: list[Entrant], results: list[Score], found: Comparison, text: Text, as_json: bool
) -> None:
    """Two models' scores, and which is better."""
    console = output.console(as_json)
    for letter, entrant, result in zip("AB", entrants, results, strict=True):
        console.print(f"{letter}  {entrant.name}\n   {text.source} {text.part}: {_told(result)}")
    more = "more" if found.difference > 0 else "less"
    verdict = f"{found.better} is better" if found.better else "this text does not tell which is better"
    console.print(
        f"A needs {abs(found.difference):.4f} bits per byte {more} than B; A − B lies in {found.low:+.4f} … "
        f"{found.high:+.4f} ({found.level:.0%} interval): {verdict}\n"
        f"({found.method}; {found.blocks} blocks of {found.block:,} bytes)"
    )
    if found.blocks_too_short:
        console.print(
            f"Neighbouring blocks are alike (autocorrelation {found.autocorrelation:.2f}): the interval is too narrow; "
            f"score a longer text"
        )
    if as_json:
        named = zip("ab", entrants, results, strict=True)
        sides = {letter: {"model": entrant.name, **result._asdict()} for letter, entrant, result in named}
        rest = {**found._asdict(), "better": found.better, "data": text.source, "split": text.part}
        output.print_json({**sides, **rest})


def _told(result: Score) -> str:
    """The figure and all that it rests on, in one line."""
    about = result.declared
    unit = about.get("unit", "bytes")
    words = [f"window {result.window}", f"stride {result.stride}", *([unit] if unit != "bytes" else []), about["mode"]]
    words += [f"reset: {about['reset']}", f"adaptation: {about['adaptation']}"]
    words += [f"{about['extra_bytes']:,} extra bytes", f"{result.seconds:.1f} s"]
    return f"{result.bpb:.4f} bits per byte, {result.nats:.4f} nats, {result.bytes:,} bytes ({', '.join(words)})"


def run_score(
    names: list[str],
    reading: Reading,
    *,
    compared: bool,
    data: str | None,
    part: str | None,
    rule: str | None,
    ladder_wanted: bool | None,
    loops: int,
    device: str,
    as_json: bool,
) -> None:
    """The command: see `tritwise score --help`."""
    if len(names) != (2 if compared else 1):
        wanted = "two models to compare" if compared else "one model, or two with --compare"
        raise UserError(f"models named: {len(names)}; name {wanted}")
    if reading.mix_train and not reading.how.mix:
        raise UserError("--mix-train counts for the mixture; add --mix")
    if reading.how != Learning(mix=reading.how.mix) and reading.how.adapt == "none":
        raise UserError(
            "--adapt-rate, --adapt-piece and --no-guard are about --adapt; add --adapt all or --adapt scales"
        )
    on = device_called(device, "--device cpu")
    if loops and reading.how.adapt != "none":
        raise UserError("--adapt trains a model at the depth it was trained at; leave --loops out")
    entrants = [entrant(name, on, loops) for name in names]
    text = text_for(entrants, data, part, rule)
    if reading.mix_train and not len(text.train):
        raise UserError(
            "--mix-train counts the train part of the text, and there is none; choose a part with --split val"
        )
    if compared:
        costs = [np.empty(text.bytes) for _ in entrants]
        results = [scored(one, text, reading, into) for one, into in zip(entrants, costs, strict=True)]
        print_comparison(entrants, results, compare(*costs), text, as_json)
        return
    result = scored(entrants[0], text, reading)
    if ladder_wanted and not text.size:
        raise UserError("a ladder is made of bytes, and shards hold tokens; leave --ladder out")
    wanted = ladder_wanted or (ladder_wanted is None and 0 < text.size <= LADDER_BYTES)
    rungs: list[Any] = list(ladder(text.train, text.data)) if wanted else []
    print_score("this model", result, text, rungs, as_json)
