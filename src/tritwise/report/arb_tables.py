"""Tables of docs/ARB.md, made from the rows of `benchmarks/arb_study.py` and `layers_study.py`, of every machine."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from statistics import mean
from typing import Any

from tritwise.report.machine import machine_name

Row = dict[str, Any]
ITEMS = {
    "digits": "spoken digits",
    "emoji": "emoji captions",
    "prompts": "voice prompts",
    "names": "names of Fashion-MNIST",
    "drawn": "Fashion-MNIST drawn",
}


def arb_table(name: str, rows: Sequence[Row]) -> str:
    """The table called `name`, one of TABLES, over the rows that have something for it."""
    tell, head, marks = TABLES[name]
    lines = list(tell(rows))
    if not lines:
        return "Nothing has been recorded for this yet; `benchmarks/arb_study.py` measures it."
    marked = ["--:" if mark == ">" else "---" for mark in marks]
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, marked, *lines])


def grouped(rows: Iterable[Row]) -> dict[tuple[str, str], list[Row]]:
    """(name without its seed, machine) -> the rows that differ in nothing but their seed."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["name"].rsplit("_seed", 1)[0], _machine(row)), []).append(row)
    return found


def _machine(row: Row) -> str:
    return machine_name(row["surroundings"])


def _spread(values: Sequence[float], percent: bool) -> str:
    """A mean, and behind it the least and the most where there is more than one."""
    tell = (lambda x: f"{100 * x:.1f} %") if percent else (lambda x: f"{x:.3f}")
    if len(values) == 1:
        return tell(values[0])
    return f"{tell(mean(values))} ({tell(min(values))} … {tell(max(values))})"


def _kind(row: Row) -> str:
    if row["settings"]["weights"] == "float":
        return f"float, {row['settings']['optimizer']} {row['settings']['rate']:g}"
    return f"**ternary**, rate {row['settings']['rate']:g}"


def _common(rows: Sequence[Row], machine: str) -> list[str]:
    """Steps, weights, trained floats and machine of rows that differ in their seed."""
    steps = sorted({row["steps"] for row in rows})
    told = f"{steps[0]:,}" if len(steps) == 1 else f"{steps[0]:,} … {steps[-1]:,}"
    return [told, f"{rows[0]['weights']:,}", f"{rows[0]['float_trainable']:,}", machine]


def _told(rows: Sequence[Row]) -> Iterator[list[str]]:
    by_item = sorted(rows, key=lambda row: [*ITEMS, row["name"].split("_")[0]].index(row["name"].split("_")[0]))
    for (name, machine), own in grouped(by_item).items():
        item, kind = name.split("_")[0], own[0]["settings"]["task"]
        if item in ITEMS and kind in ("vision", "audio"):
            vals = [row["val"][kind] for row in own]
            near = vals[0]["nearest"]
            yield [
                ITEMS[item],
                _kind(own[0]) + _spoiled(own[0]),
                str(len(own)),
                _spread([val["exact"] for val in vals], True),
                _spread([val["cer"] for val in vals], False),
                f"{100 * near['exact']:.1f} %, {near['cer']:.3f}",
                *_common(own, machine),
            ]
            if helped := [val["with_neighbours"] for val in vals if "with_neighbours" in val]:
                yield [
                    ITEMS[item],
                    f"{_kind(own[0])}{_spoiled(own[0])}; {helped[0]['neighbours']} neighbours vote too",
                    str(len(helped)),
                    _spread([val["exact"] for val in helped], True),
                    _spread([val["cer"] for val in helped], False),
                    f"{100 * near['exact']:.1f} %, {near['cer']:.3f}",
                    *_common(own, machine),
                ]


def _spoiled(row: Row) -> str:
    """How features and letters were spoiled while it learned, where it matters for what is compared."""
    told = row["settings"]
    words = [f"{name} {told[name]:g}" for name in ("noise", "hide", "dropout") if told.get(name)]
    return f"; {', '.join(words) or 'nothing spoiled'}" if row["name"].startswith("emoji") else ""


def _drawn(rows: Sequence[Row]) -> Iterator[list[str]]:
    for (_, machine), own in grouped(rows).items():
        vals = [row["val"]["diffusion"] for row in own if "recognised" in row["val"].get("diffusion", {})]
        if vals:
            yield [
                _kind(own[0]),
                str(len(vals)),
                _spread([val["recognised"] for val in vals], True),
                f"{vals[0]['pictures']:,}",
                _spread([val["classifier_accuracy"] for val in vals], True),
                _spread([val["loss"] for val in vals], False),
                f"{vals[0]['draw_steps']}, {vals[0]['guidance']:g}",
                *_common(own, machine),
            ]


def _mixture(rows: Sequence[Row]) -> Iterator[list[str]]:
    """Losses of training: the mean of the last tenth of the lines that have the kind."""
    alone = {(row["settings"]["task"], _machine(row)): row for row in rows if row["name"].startswith("alone_")}
    for row in rows:
        if row["settings"]["task"] != "mixture":
            continue
        for kind in ("text", "vision", "audio"):
            if single := alone.get((kind, _machine(row))):
                ours = [line[2][kind] for line in row["losses"] if line[2] and line[2].get(kind) is not None]
                quarter = quarter_loss(single)
                now = mean(ours[-max(1, len(ours) // 10) :])
                end = mean(line[1] for line in single["losses"][-3:])
                holds = "yes" if now < quarter else "**no**"
                yield [
                    kind,
                    f"{quarter:.3f}",
                    f"{now:.3f}",
                    holds,
                    f"{end:.3f}",
                    f"{single['steps']:,}",
                    f"{row['steps']:,}",
                    f"{row['float_trainable']:,}",
                    _machine(row),
                ]


def quarter_loss(row: Row) -> float:
    """The loss of the last line within the first quarter of a run."""
    return next(line[1] for line in reversed(row["losses"]) if line[0] <= row["steps"] / 4)


BUNDLED = "tinyshakespeare"  # what all text is unless a row says otherwise
STUDIES = {"lstm": "LSTM", "vq": "codebook", "graph": "graph", "moe": "experts", "stream": "sliding window"}


def _layers(rows: Sequence[Row]) -> Iterator[list[str]]:
    """Rows of benchmarks/layers_study.py."""
    found: dict[tuple[str, str, str, int], list[Row]] = {}
    for row in rows:
        item = row["item"].split(", seed ")[0]
        if row.get("text", BUNDLED) != BUNDLED:
            item += f"; {row['text']}"
        found.setdefault((row["study"], item, _machine({"surroundings": row}), row.get("steps", 0)), []).append(row)
    for (study, item, machine, steps), own in sorted(found.items(), key=lambda pair: list(STUDIES).index(pair[0][0])):
        yield [
            STUDIES[study],
            item,
            str(len(own)),
            _figure(own),
            f"{steps:,}" if steps else "",
            f"{own[0]['weights']:,}" if "weights" in own[0] else "",
            f"{own[0]['float_trainable']:,}" if "weights" in own[0] else "",
            machine,
        ]


def _figure(rows: Sequence[Row]) -> str:
    def told(key: str, percent: bool = False) -> str:
        return _spread([row[key] for row in rows], percent)

    if "squared_error" in rows[0]:
        return f"squared error {told('squared_error')}; {told('used', True)} of the codes used"
    if "largest_difference" in rows[0]:
        return f"no byte differs by more than {max(row['largest_difference'] for row in rows):.1e} nats"
    loads = (
        f"; an expert's load {told('load_least')} to {told('load_most')} of its share" if "load_most" in rows[0] else ""
    )
    return f"{told('val_nats')} nats a byte{loads}"


def _recipes(rows: Sequence[Row]) -> Iterator[list[str]]:
    for row in rows:
        if "before_seconds" in row:
            command = f"`{row['name'].replace('-', ' ')}`"
            times = [f"{row[f'{part}seconds']:.0f}" for part in ("", "before_", "training_")]
            yield [command, *times, *_common([row], _machine(row))]


_COMMON = ["steps", "weights", "floats trained", "machine"]
TABLES: dict[str, tuple[Callable[[Sequence[Row]], Iterator[list[str]]], list[str], str]] = {
    "told": (
        _told,
        ["what", "how", "seeds", "exact", "character error rate", "nearest neighbour", *_COMMON],
        "<<>>>>>>><",
    ),
    "drawn": (
        _drawn,
        ["how", "seeds", "recognised", "of", "the classifier on real ones", "loss", "sampler, guidance", *_COMMON],
        "<>>>>>>>>><",
    ),
    "recipes": (
        _recipes,
        ["command", "seconds", "of them before the first step", "training", *_COMMON],
        "<>>>>>><",
    ),
    "layers": (_layers, ["layer", "item", "seeds", "figure", *_COMMON], "<<><>>><"),
    "mixture": (
        _mixture,
        [
            "kind",
            "alone, after a quarter",
            "in the mixture, at the end",
            "below",
            "alone, at its end",
            "steps alone",
            "steps of the mixture",
            "floats trained",
            "machine",
        ],
        "<>><>>>><",
    ),
}
