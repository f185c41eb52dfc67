"""The contestants of `bench budget`: what each trains and how it ships, made as wide as the budget allows.

flat-float          the challenge's baseline recipe: one pass, Muon, int8 rows and zlib
recurrent-float     prelude, core, coda; the core repeats more often by and by; Muon with decay and clipping; the last
                    weights or the mean of the last part, whichever score better, ship as int8, int7 or int6 rows and
                    zstd, whichever fits first
flat-ternary        one pass, registers, the parts of a block that were worth their time; what is trained is what ships
flat-ternary-half   the same, made for half of the bytes: narrower, so that more steps fit into the time
recurrent-ternary   registers, and the core repeats more often by and by
recurrent-ternary-constant   the same at full depth from the first step
recurrent-ternary-half       the one that grows, made for half of the bytes
recurrent-ternary-lean, recurrent-float-lean   the ones that grow, without the parts that cost time and were worth
                    little when taken away
flat-ternary-ngrams, recurrent-ternary-ngrams, recurrent-ternary-lean-ngrams, recurrent-float-ngrams,
recurrent-float-lean-ngrams   made for a part of the bytes, whose rest are hashed tables of 2- to 5-grams and of words:
                    they cost next to no time, ternary ones a fifth of the bytes; in training a quarter of the
                    lookups find nothing
recurrent-ternary-lean-2-trits-ngrams, recurrent-ternary-lean-3-trits-ngrams   with two or three trits a weight: less
                    time for the same bytes, as a matrix of the same bytes is smaller; the last weights or the mean of
                    the last part ship, whichever score better
flat-ternary-experts   with eight experts of which a byte meets two: bytes that cost no time, as tables do
flat-ternary-experts-ngrams   with both

Float rates of recurrent models are about a third of a flat one's, as shared weights get the sum of all gradients;
directions of ternary ones have a fixed size. Those here are starting points: tune them with --set NAME:rate=….
So is the part of the bytes that tables get: a run that reads its text many times wants wider matrices, fewer entries:
--set NAME:width=… (docs/LOG.md).
"""

import difflib
import functools
import math
from pathlib import Path
from typing import Any

from tritwise.errors import UserError
from tritwise.models import ModelConfig, skeleton
from tritwise.ship import estimate
from tritwise.train import Config, TrainConfig, override
from tritwise.train.config import for_tokens, parsed, tokenizer_of

_FLOAT = {
    "weights": "float",
    "optimizer": "muon",
    "momentum": 0.95,
    "momentum_start": 0.85,
    "momentum_warmup": 500,
    "decay": 0.5,
}
_TERNARY = {"direction": "balanced", "scale_rate": 0.005, "rate": 0.03, "decay": 1.0, "column_scales": True}
PARTS: dict[str, Any] = {
    "loop_embedding": True,
    "value_tables": 2,
    "repeat_skip": True,
    "input_mix": True,
    "gains": True,
    "exclusive": 4,
    "leak": 0.5,
}
"""Every part of the recurrent model, as it is switched on."""

_RECURRENT = {
    "depth": 6,
    "prelude": 2,
    "coda": 2,
    "loops": 3,
    "depth_plan": "0.4:1,0.65:2,1:3",
    "softcap": 30.0,
    **PARTS,
}
_SPARED = dict.fromkeys(("loop_embedding", "repeat_skip", "input_mix", "gains"), False) | {"value_tables": 0}
_WORTH = {part: PARTS[part] for part in ("exclusive", "leak")}
_TABLES = {"ngrams": 5, "word_tables": 1, "ngram_rows": 0, "ngram_width": 0, "ngram_dropout": 0.25}
_AVERAGED = {"average_every": 50, "average_from": 0.8}
ENTRIES: dict[str, dict[str, Any]] = {
    "flat-float": {**_FLOAT, "depth": 8, "rate": 0.02, "ship_as": "int8+zlib"},
    "recurrent-float": {
        **_FLOAT,
        **_RECURRENT,
        **_AVERAGED,
        "rate": 0.008,
        "weight_decay": 0.04,
        "clip": 0.3,
        "ship_as": "auto",
        "ship_small": 16_384,  # else matrices of narrow models would ship in 16 bits
        "ship_average": True,
    },
    "flat-ternary": {**_TERNARY, **_WORTH, "depth": 8},
    "recurrent-ternary": {**_TERNARY, **_RECURRENT, **_AVERAGED},
    "recurrent-ternary-constant": {**_TERNARY, **_RECURRENT, **_AVERAGED, "depth_plan": ""},
    "flat-ternary-half": {**_TERNARY, **_WORTH, "depth": 8},
    "recurrent-ternary-half": {**_TERNARY, **_RECURRENT, **_AVERAGED},
}
ENTRIES |= {f"{name}-lean": {**ENTRIES[name], **_SPARED} for name in ("recurrent-ternary", "recurrent-float")}
ENTRIES["flat-ternary-experts"] = {**ENTRIES["flat-ternary"], "experts": 8}
ENTRIES |= {
    f"{name}-ngrams": {**ENTRIES[name], **_TABLES}
    for name in (
        *("flat-ternary", "flat-ternary-experts"),
        *("recurrent-ternary", "recurrent-ternary-lean", "recurrent-float", "recurrent-float-lean"),
    )
}

for _trits, _rate in ((2, 0.01), (3, 0.007)):  # more trits, slower: docs/LOG.md
    _own = {"weight_trits": _trits, "rate": _rate, "ngram_dropout": 0.3, "ship_average": True}  # the last as float ones
    ENTRIES[f"recurrent-ternary-lean-{_trits}-trits-ngrams"] = {**ENTRIES["recurrent-ternary-lean-ngrams"], **_own}

SMALLER = {
    "flat-ternary-half": 0.5,
    "recurrent-ternary-half": 0.5,
    "flat-ternary-ngrams": 0.5,
    "flat-ternary-experts-ngrams": 0.75,
    "recurrent-ternary-ngrams": 0.5,
    "recurrent-ternary-lean-ngrams": 0.5,
    "recurrent-ternary-lean-2-trits-ngrams": 0.6,
    "recurrent-ternary-lean-3-trits-ngrams": 0.85,
    "recurrent-float-ngrams": 0.75,
    "recurrent-float-lean-ngrams": 0.75,
}
"""Share of the budget that an entry is made for; with 0 rows of n-grams, the rest is for these."""
EXTRA = 4  # widths come in steps of 64; blocks beyond an entry's own fill what such a step leaves
FEWER = 3  # blocks that the next width may lack, where less than ENOUGH of the room is used without it
ENOUGH = 0.75
ROWS = 64  # steps in which tables of n-grams grow
SPARE = 0.97  # share of the budget that the estimate may take: headers, and weights that compress badly


def entry(name: str, base: Config, budget: int, changes: dict[str, Any]) -> Config:
    """`base` as the contestant `name`, as wide as fits into `budget` bytes (or its share of them), and then as deep, up
    to EXTRA more blocks. In small budgets, where a step of width is a large one, the next width with up to FEWER blocks
    less is taken if it fills the room better. Tables of n-grams that are not told how many rows they have get as many
    as then fit, about a quarter as wide as the model unless told otherwise: a power of two, which suits kernels.

    A width given in `changes` stays, with the entry's own depth.
    changes: settings of models and training, over the entry's own. UserError for an unknown name, or if nothing fits.
    """
    if name not in ENTRIES:
        near = difflib.get_close_matches(name, ENTRIES, n=1)
        remedy = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(ENTRIES)}"
        raise UserError(f"there is no recipe {name!r}; {remedy}")
    changes = parsed(changes)
    if changes.get("tokenizer"):
        base = tokenizer_of(override(base, {"tokenizer": changes["tokenizer"]}))[0]  # the vocabulary takes room too
    own = {**ENTRIES[name], **changes, "budget": budget}
    if changes.get("tokenizer") and "word_tables" not in changes and own.get("word_tables"):
        own |= for_tokens(own["ngrams"], own["word_tables"])
    fills = own.get("ngram_rows") == 0
    if "width" not in changes:
        trunk = own | ({"ngrams": 1, "word_tables": 0, "ngram_rows": 1} if fills else {})
        own |= _shape(base, trunk, int(budget * SMALLER.get(name, 1.0)))
    if fills:
        if not own["ngram_width"]:
            own["ngram_width"] = 2 ** round(math.log2(own["width"] / 4))
        own["ngram_rows"] = _rows(base, own, budget)
    made = override(base, own)
    return Config(name, made.model, made.train)


def _fits(config: Config, budget: int) -> bool:
    return shape_bytes(config) <= SPARE * budget


def _shape(base: Config, own: dict[str, Any], room: int) -> dict[str, int]:
    """The width and depth of an entry with the settings `own`."""

    def deepest(width: int, depths: range) -> dict[str, int]:
        shapes = [{"width": width, "depth": depth} for depth in depths]
        return max((s for s in shapes if _fits(override(base, own | s), room)), key=lambda s: s["depth"], default={})

    depth, widths = own["depth"], (32, 64, 96, *range(128, 8193, 64))
    fits = 0
    while fits < len(widths) and _fits(override(base, own | {"width": widths[fits]}), room):
        fits += 1
    if not fits:
        narrow = override(base, own | {"width": widths[0]})
        smaller = ", or a smaller --set ship_small" if narrow.model.weights == "float" else ""
        raise UserError(
            f"not even {widths[0]} channels fit into {room:,} bytes, as they take about {shape_bytes(narrow):,}; "
            f"give a larger --budget{smaller}"
        )
    found = deepest(widths[fits - 1], range(depth, depth + EXTRA + 1))
    if shape_bytes(override(base, own | found)) < ENOUGH * room and fits < len(widths):
        least = max(depth - FEWER, own.get("prelude", 0) + own.get("coda", 0) + 1)
        found = deepest(widths[fits], range(least, depth)) or found
    return found


def _rows(base: Config, own: dict[str, Any], room: int) -> int:
    """The most rows that tables of n-grams can have, in steps of ROWS, at least one step."""
    least, most = 1, max(2, room // ROWS)
    while most - least > 1:
        middle = (least + most) // 2
        fits = _fits(override(base, own | {"ngram_rows": middle * ROWS}), room)
        least, most = (middle, most) if fits else (least, middle)
    return least * ROWS


def shape_bytes(config: Config) -> int:
    """About how many bytes a model of this shape takes when shipped, told without its numbers."""
    settings = config.train
    # auto is sized for the smallest of its ways, and a float that does not ship for nothing.
    way = "int8" if settings.ship_as == "none" else settings.ship_as
    tokenizer = Path(settings.tokenizer).stat().st_size if settings.tokenizer else 0
    return _model_bytes(config.model, way, settings.ship_small) + tokenizer


@functools.cache
def _model_bytes(config: ModelConfig, way: str, small: int) -> int:
    return estimate(skeleton(config), way, small)["total"]


def base_config(data: str, split: str, *, ctx: int, batch: int, steps: int, seconds: float, seed: int) -> Config:
    """What all contestants have in common."""
    settings = TrainConfig(
        data=data,
        split=split,
        batch=batch,
        steps=steps,
        seconds=seconds,
        seed=seed,
        warmup=min(100, steps // 10),
        eval_interval=0,
        save_interval=0,
        sample_bytes=0,
        log_interval=50,
    )
    return Config("budget", ModelConfig(ctx=ctx), settings)
