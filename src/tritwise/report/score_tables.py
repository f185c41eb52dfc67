"""Tables of docs/SCORING.md, made from records of `benchmarks/score_study.py`: one record for each text."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tritwise.report.machine import machine_name
from tritwise.report.numbers import human_bytes, significant

Record = dict[str, Any]
LEARNS = {
    "mix": "mixing with counts",
    "adapt": "test-time training, all weights",
    "scales": "test-time training, scales",
    "both": "both: all weights, and mixing",
}


def score_table(name: str, records: Sequence[Record]) -> str:
    """The table called `name`, one of TABLES, over the records that have something for it."""
    tell, head, marks = TABLES[name]
    rows = [row for record in records for row in tell(record)]
    if not rows:
        return "Nothing has been recorded for this yet; `benchmarks/score_study.py` measures it."
    lines = [head, ["--:" if mark == ">" else "---" for mark in marks], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def score_sources(records: Sequence[Record], links: Sequence[str]) -> str:
    """What each record is of: the text, the model, the machine, the commit, the file."""
    lines = []
    for record, link in zip(records, links, strict=True):
        about, made = record["artifact"], record["manifest"]
        shape = about["model"]
        trained = about["about"]
        whole = "" if record.get("bytes") else f" {_scored(record):,} bytes,"
        lines.append(
            f"- **{_text(record)}**:{whole} the `{record['part']}` part of {record['split']}. A "
            f"model of {about['weights']:,} ternary weights (width {shape['width']}, depth {shape['depth']}, context "
            f"{shape['ctx']}), {about['bytes']:,} bytes as a file, trained in {trained['steps']:,} steps and "
            f"{trained['seconds']:.0f} s. {machine_name(made)}, torch {made['torch']}, n = 1. {link}"
        )
    return "\n".join(lines)


def _where(record: Record, item: Record) -> Record:
    """The machine of an item, which may not be that of the others."""
    return item.get("where", record["manifest"])


def _text(record: Record) -> str:
    """tinyshakespeare or enwik8, and how much of the part if not all."""
    name = record["data"].split(".")[0]
    name = "tinyshakespeare" if name == "shakespeare" else name
    return f"{name}, first {record['bytes']:,} bytes" if record.get("bytes") else name


def _weights(record: Record) -> str:
    """Of the model: 3.6M, 19.1M, 26k."""
    count = record["artifact"]["weights"]
    return f"{count / 1e6:.1f}M" if count >= 1e6 else f"{count / 1e3:.0f}k"


def _scored(record: Record) -> int:
    items = record["items"]
    return items["windows"]["rows"][0]["bytes"] if "windows" in items else items["compress"]["bytes"]


def _proof(record: Record) -> Iterator[list[str]]:
    if item := record["items"].get("compress"):
        row = item["rows"][0]
        same = row["identical"] and item["sha256"] == item["sha256_back"]
        yield [
            _text(record),
            _weights(record),
            f"{item['bytes']:,}",
            f"{row['claimed_bits'] / 8:,.1f}",
            f"{row['bytes']:,}",
            f"{100 * row['over_claim']:+.4f} %",
            f"identical (SHA-256 {item['sha256'][:8]}…)" if same else "**changed**",
        ]


def _windows(record: Record) -> Iterator[list[str]]:
    if item := record["items"].get("windows"):
        first = item["rows"][0]["bpb"]
        for row in item["rows"]:
            about = row["declared"]
            gain = "" if about["mode"] == "chunked" else f"{first - row['bpb']:.4f}"
            settings = [about["mode"], str(about["window"]), str(about["stride"])]
            yield [_text(record), *settings, f"{row['bpb']:.4f}", gain, significant(row["seconds"])]


def _agree(record: Record) -> Iterator[list[str]]:
    if item := record["items"].get("agree"):
        for kind, words in (("pieces", "pieces that fit the window"), ("text", "one text, many windows")):
            found = item[kind]
            ways = "; ".join(f"{name} {bpb:.6f}" for name, bpb in found["bpb"].items())
            yield [_text(record), words, f"{found['bytes']:,}", ways, f"{found['spread']:.1e}"]


def _cheats(record: Record) -> Iterator[list[str]]:
    if item := record["items"].get("cheats"):
        for row in item["rows"]:
            told = (
                f"rejected: {row['said'].split(';')[0]} (condition {row['breaks']})"
                if row["rejected"]
                else "**passes**"
            )
            yield [_text(record), row["name"], f"{item['honest']:.3f}", f"{row['would_claim']:.3f}", told]


def _learn(record: Record) -> Iterator[list[str]]:
    for name, words in LEARNS.items():
        if item := record["items"].get(name):
            yield [
                _text(record),
                _weights(record),
                words,
                f"{item['bytes']:,}",
                f"{item['neural_bpb']:.4f}",
                f"{item['bpb']:.4f}",
                f"{item['gain']:+.4f}",
                f"{item['worst_prefix']:+.4f}",
                _both(item, "neural_", "", " → ", _where(record, item)["device"] == "cpu"),
            ]


def _decode(record: Record) -> Iterator[list[str]]:
    if item := record["items"].get("decode"):
        for name, row in item["rows"].items():
            claimed, same = row["claimed_bits"] / 8, "identical" if row["identical"] else "**changed**"
            yield [_text(record), LEARNS[name], f"{item['bytes']:,}", f"{claimed:,.1f}", f"{row['bytes']:,}", same]


def _peers(record: Record) -> Iterator[list[str]]:
    items = record["items"]
    for kind in ("compress", "peers"):
        for row in items.get(kind, {}).get("rows", []):
            own = kind == "compress"
            where = _where(record, items[kind])
            yield [
                _text(record),
                f"**{row['name']}, {_weights(record)} weights**" if own else f"`{row['name']}`",
                f"{row['bytes']:,}",
                f"{row['bytes_with_model']:,}" if own else "the same",
                f"{row['bpb']:.4f}",
                _both(row, "compress_", "decompress_", " / ", where["device"] == "cpu"),
                f"{human_bytes(row['compress_peak_bytes'])} / {human_bytes(row['decompress_peak_bytes'])}",
                "CPU" if where["device"] == "cpu" else "GPU",
            ]


def _both(found: Record, one: str, other: str, between: str, on_cpu: bool) -> str:
    """Two times by the clock, and on a CPU, in brackets, the seconds that it was busy."""
    clock = between.join(significant(found[f"{name}seconds"]) for name in (one, other))
    if not on_cpu or f"{one}cpu_seconds" not in found:
        return clock
    return f"{clock} ({between.join(significant(found[f'{name}cpu_seconds']) for name in (one, other))})"


def _bad(record: Record) -> Iterator[list[str]]:
    for row in record["items"].get("bad", {}).get("rows", []):
        counts = [str(row[key]) for key in ("cases", "identical", "refused", "wrong")]
        yield [_text(record), row["what"], *counts, row["said"] or ""]


def _repeat(record: Record) -> Iterator[list[str]]:
    if item := record["items"].get("repeat"):
        for how, (packed, _) in item["files"].items():
            yield [_text(record), how, f"{item['bytes']:,}", f"`{packed[:12]}`", "yes" if item["same"] else "**no**"]


def _compare(record: Record) -> Iterator[list[str]]:
    if item := record["items"].get("compare"):
        better = {"A": item["a"], "B": item["b"]}.get(item["better"] or "", "not known")
        yield [
            _text(record),
            f"{item['a']}, {item['a_bpb']:.4f}",
            f"{item['b']}, {item['b_bpb']:.4f}",
            f"{item['difference']:+.4f}",
            f"{item['low']:+.4f} … {item['high']:+.4f}",
            f"{item['blocks']} of {item['block']:,} bytes",
            better,
        ]


Tell = Callable[[Record], Iterator[list[str]]]
TABLES: dict[str, tuple[Tell, list[str], str]] = {
    "proof": (
        _proof,
        ["text", "weights", "bytes", "claimed, bytes", "on disk, bytes", "over the claim", "decompressed"],
        "<>>>>><",
    ),
    "windows": (_windows, ["text", "mode", "window", "stride", "bpb", "gain", "seconds"], "<<>>>>>"),
    "agree": (_agree, ["text", "what is read", "bytes", "bits per byte", "spread"], "<<><>"),
    "cheats": (_cheats, ["text", "cheat", "honest bpb", "it would claim", "what happens"], "<<>><"),
    "learn": (
        _learn,
        ["text", "weights", "reads", "bytes", "neural bpb", "bpb", "gain", "worst of all beginnings", "seconds"],
        "<><>>>>>>",
    ),
    "decode": (
        _decode,
        ["text", "reads", "first bytes", "claimed, bytes", "code, bytes", "decoded"],
        "<<>>><",
    ),
    "peers": (
        _peers,
        ["text", "program", "bytes", "with the model", "bpb", "seconds, there / back", "memory, there / back", "on"],
        "<<>>>>><",
    ),
    "bad": (
        _bad,
        ["text", "input", "cases", "came back", "refused", "wrong output", "the first refusal says"],
        "<<>>>><",
    ),
    "compare": (_compare, ["text", "A, bpb", "B, bpb", "A − B", "95 % interval", "blocks", "better"], "<<<>>><"),
    "repeat": (_repeat, ["text", "how", "bytes", "SHA-256 of the file", "all the same"], "<<><<"),
}
