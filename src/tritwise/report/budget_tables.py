"""Tables of docs/RECURRENCE.md, and of the folders of a study: models under a budget of bytes, from their records."""

import statistics
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from tritwise.report.bench_markdown import markdown
from tritwise.report.budget_rows import (
    CONTESTS,
    STAGES,
    WHOLE,
    Record,
    Where,
    alike,
    bpb_of,
    contests,
    mean_bpb,
    places,
    trits_of,
    unpacked,
    where_of,
)
from tritwise.report.machine import machine_name
from tritwise.report.numbers import percent

NOTHING = "This has not been recorded yet; `benchmarks/budget_study.py` measures it."
NOT_ON_GPU = "On a GPU this has not been recorded yet; `benchmarks/budget_study.py` measures it."
HEAD = (
    "recipe",
    "rate",
    "weights",
    "shape",
    "steps",
    "seconds",
    "bytes",
    "as",
    "before",
    "re-read",
    "gap",
    "chunked",
    "n",
    "sd",
)
PART_HEAD = ("without", "bpb with it", "bpb without", "difference", "of each seed")
TERNARY, SEVERAL, FLOAT = "ternary", "several trits", "float"
KINDS = {TERNARY: (1,), SEVERAL: range(2, 6), FLOAT: (0,)}  # what models are called -> how many trits a weight has
BUSY = 1.5  # steps of one seed over another's from which on the machine was busy with other things


def budget_table(name: str, records: Sequence[Record]) -> str:
    """The block called `name`, one of TABLES, over the records that have something for it."""
    tell = TABLES[name]
    made = "\n\n".join(tell(records))
    if not made:
        return NOTHING
    on_gpu = [record for record in records if record["device"] != "cpu"]
    return made if any(tell(on_gpu)) else f"{made}\n\n{NOT_ON_GPU}"


def table_of(records: Iterable[Record]) -> list[list[str]]:
    """One row a recipe and setting, the best first: the columns of HEAD. A shape is width × blocks. Scores are means,
    bits per byte of val."""
    rows = []
    for group in alike(records):
        sliding, first = [bpb_of(record) for record in group], group[0]
        cells = [
            first["recipe"],
            f"{first['rate']:g}",
            f"{first['weights']:,}",
            _shape(first),
            f"{_mean(group, 'steps'):,.0f}",
            f"{_mean(group, 'seconds'):.1f}",
            f"{max(record['bytes'] for record in group):,}",
            first["way"],
            f"{_mean(group, 'bpb_before'):.4f}",
            f"{statistics.fmean(sliding):.4f}",
            f"{_mean(group, 'ship_gap'):.4f}",
            f"{_mean(group, 'scores', 'val_chunked', 'bpb'):.4f}",
            str(len(group)),
            f"{statistics.stdev(sliding):.4f}" if len(group) > 1 else "",
        ]
        rows.append((statistics.fmean(sliding), cells))
    return [cells for _, cells in sorted(rows, key=lambda row: row[0])]


def _shape(record: Record) -> str:
    """Width × blocks, and how many trits a weight has if it is not one."""
    trits, model = trits_of(record), record["config"]["model"]
    return f"{model['width']} × {model['depth']}" + (f" × {trits} trits" if trits > 1 else "")


def caption(records: Sequence[Record]) -> str:
    """What the rows of a table have in common, in words."""
    compiled = sum(record["compiled_in_clock"] or 0 for record in records)
    torches = " and ".join(sorted({record["torch"] for record in records}))
    commits = " and ".join(sorted({str(record["commit"])[:10] for record in records}))
    where, *others = sorted({where_of(record) for record in records})
    more = f" and {len(others)} other settings" if others else ""
    told = f"**{where.short} of training.** {where.place}{more}; torch {torches}, commit {commits}"
    return f"{told}; {compiled} graphs compiled inside the clock."


def contest(records: Sequence[Record]) -> Iterator[str]:
    """The contestants of every budget and time, and the best ternary one against the best float one."""
    for where, own in contests(records):
        yield caption(own)
        yield markdown(HEAD, table_of(own))
        if told := verdict(where, own):
            yield told


def short_budget(records: Sequence[Record]) -> str:
    """For README: of each contest of so many seconds on a GPU the best in float, with one trit and with several trits a
    weight, where there are the first two; "" without any."""
    head = ["budget", "seconds", "weights", "recipe", "steps", "file", "bits/byte, val", "test", "against float", "n"]
    told = []
    for place, held in places([record for record in records if record["device"] != "cpu"]).items():
        rows = []
        for where, own in held:
            best = _best_of_each(own)
            if not where.seconds or not best[TERNARY] or not best[FLOAT]:
                continue
            for called, group in sorted(best.items(), key=lambda pair: mean_bpb(pair[1]) if pair[1] else 0.0):
                if group:
                    gap = _signed(mean_bpb(group) - mean_bpb(best[FLOAT]))
                    length = [f"{where.budget:,}", f"{where.seconds:g}"]
                    rows.append([*length, *_in_short(called, group), gap, str(len(group))])
        if rows:
            told += [f"{place}.", markdown(head, rows)]
    return "\n\n".join(told)


def _in_short(called: str, group: Sequence[Record]) -> list[str]:
    """What runs of one recipe are, and what they reached."""
    first = group[0]
    weights = {TERNARY: "−1, 0, +1", SEVERAL: f"{trits_of(first)} trits", FLOAT: f"float, {first['way']}"}[called]
    size = f"{max(record['bytes'] for record in group):,}"
    tests = [record["scores"].get("test_sliding") for record in group]
    test = f"{statistics.fmean(one['bpb'] for one in tests):.4f}" if all(tests) else ""
    return [weights, f"`{first['recipe']}`", f"{_mean(group, 'steps'):,.0f}", size, f"{mean_bpb(group):.4f}", test]


def verdict(where: Where, records: Sequence[Record]) -> str:
    """The best ternary contestant against the best float one, in a sentence or two, and the best of those with several
    trits a weight; "" if one of the first two is missing."""
    trit, several, real = _best_of_each(records).values()
    if not trit or not real:
        return ""
    told = (
        f"Best ternary against best float under the same {where.budget:,} bytes and {where.length}: "
        f"{_against(trit, real, 'ternary is')}"
    )
    if several:
        told += f" Best of several trits a weight: {_against(several, real, 'several trits are')}"
    return f"{told} {_busy(records)}".rstrip()


def _against(trit: Sequence[Record], real: Sequence[Record], called: str) -> str:
    """The runs of one recipe against those of another, a float one: the difference, and what is known of its error.
    called: what the former is, and its verb."""
    gap = mean_bpb(trit) - mean_bpb(real)
    ahead = called if gap < 0 else "float is"
    told = f"{_named(trit)} against {_named(real)}, difference **{_signed(gap)}** bits per byte; {ahead} ahead."
    if len(trit) > 1 and len(real) > 1:
        error = sum(statistics.variance(map(bpb_of, group)) / len(group) for group in (trit, real)) ** 0.5
        told += f" The standard error of the difference is {error:.4f}."
    tests = [
        [r["scores"]["test_sliding"]["bpb"] for r in group if "test_sliding" in r["scores"]] for group in (trit, real)
    ]
    if all(tests):
        one, other = map(statistics.fmean, tests)
        told += f" On test, which nothing was chosen by: {one:.4f} against {other:.4f}, {_signed(one - other)}."
    return told


def _busy(records: Iterable[Record]) -> str:
    """A warning where seeds of one recipe got very different numbers of steps in the same time."""
    found = [[record["steps"] for record in group] for group in alike(records)]
    worst = max(found, key=lambda steps: max(steps) / min(steps))
    if max(worst) < BUSY * min(worst):
        return ""
    least, most = min(worst), max(worst)
    return (
        f"Seeds of one recipe took {least:,} to {most:,} steps in this time: the machine was busy, this ranks nothing."
    )


def depth(records: Sequence[Record]) -> Iterator[str]:
    """Recurrent models whose depth grows beside the same ones at full depth from the first step."""
    head = ["budget, time", "weights", "repeats", "n", "steps", "of constant", "seconds", "warm-up, s"]
    for place, held in places(records, (*CONTESTS, "small")).items():
        rows = [
            row for where, own in held for family in alike(own, "depth_plan") for row in _plans(where.short, family)
        ]
        if not rows:
            continue
        yield f"{place}:"
        yield markdown([*head, "graphs in the clock", "bpb", "against constant"], rows)
        if told := _busy(record for _, own in held for record in own):
            yield told


def _plans(where: str, family: Iterable[Record]) -> Iterator[list[str]]:
    """A row for each plan of one model, if one of them is to repeat as often as it can from the first step."""
    plans: dict[str, list[Record]] = {}
    for record in family:
        plans.setdefault(record["config"]["train"]["depth_plan"], []).append(record)
    if "" not in plans or len(plans) < 2:
        return
    always = plans[""]
    for plan, group in sorted(plans.items()):
        model = group[0]["config"]["model"]
        warm = [record["warm_seconds"] for record in group if record["warm_seconds"] is not None]
        steps = _mean(group, "steps")
        yield [
            where,
            model["weights"],
            plan.replace(",", ", ") or f"always {model['loops']}",
            str(len(group)),
            f"{steps:,.0f}",
            f"{steps / _mean(always, 'steps'):.2f}×" if plan else "",
            f"{_mean(group, 'seconds'):.1f}",
            f"{statistics.fmean(warm):.1f}" if warm else "",
            str(sum(record["compiled_in_clock"] or 0 for record in group)),
            f"{mean_bpb(group):.4f}",
            _signed(mean_bpb(group) - mean_bpb(always)) if plan else "",
        ]


def ship(records: Sequence[Record]) -> Iterator[str]:
    """What shipping cost: bytes, bits a weight, and bits per byte before and after."""
    head = ["budget, time", "recipe", "as", "n", "bytes", "of the budget", "bits a weight", "gap", "gap in chunks"]
    for place, held in places(records).items():
        yield f"{place}:"
        groups = [(where, group) for where, own in held for group in sorted(alike(own), key=mean_bpb)]
        yield markdown(head, [_shipped(where, group) for where, group in groups])
    if gaps := _chunked_gaps(record for record in records if trits_of(record) == 1):
        most = max(map(abs, gaps))
        told = "is the same to the last digit" if not most else f"differs by at most {most:.1e}"
        yield f"Of {len(gaps)} ternary models the score in chunks, before shipping and of the file, {told}."


def _shipped(where: Where, group: Sequence[Record]) -> list[str]:
    first, most = group[0], max(record["bytes"] for record in group)
    trits = first["config"]["model"]["weights"] == "trit"
    sizes = [f"{most:,}", percent(most / where.budget), f"{8 * most / first['weights']:.2f}"]
    gaps = ["same logits" if trits else _range([record["ship_gap"] for record in group]), _range(_chunked_gaps(group))]
    return [where.short, first["recipe"], first["way"], str(len(group)), *sizes, *gaps]


def _chunked_gaps(records: Iterable[Record]) -> list[float]:
    """Score in chunks of the file less that of the model before it shipped, where both are known."""
    known = [record for record in records if record.get("chunked_before") is not None]
    return [record["scores"]["val_chunked"]["bpb"] - record["chunked_before"] for record in known]


def average(records: Sequence[Record]) -> Iterator[str]:
    """The mean of the weights along the end of a run beside the last ones."""
    head = ["budget, time", "recipe", "n", "moments", "bpb of the mean", "of the last", "difference"]
    for place, held in places([record for record in records if record["averaged"]]).items():
        yield f"{place}:"
        groups = [(where, group) for where, own in held for group in alike(own)]
        yield markdown([*head, "trits that differ", "ships"], [_averaged(where, group) for where, group in groups])
    told = []
    for trits, word in zip(KINDS.values(), ("ternary", "several-trit", "float"), strict=True):
        own = [record["averaged"] for record in records if trits_of(record) in trits]
        gaps = [averaged["bpb"] - averaged["bpb_unaveraged"] for averaged in own if averaged]
        told += [f"{sum(gap < 0 for gap in gaps)} of {len(gaps)} {word} models"] if gaps else []
    if told:
        yield f"Of all runs of every stage the mean scores better than the last weights in {' and in '.join(told)}."


def _averaged(where: Where, group: Sequence[Record]) -> list[str]:
    told = [record["averaged"] for record in group]
    mean, last = (statistics.fmean(one[key] for one in told) for key in ("bpb", "bpb_unaveraged"))
    changed = [one["changed_trits"] for one in told if "changed_trits" in one]
    differ = percent(statistics.fmean(changed), 2) if changed else ""
    scores = [f"{mean:.4f}", f"{last:.4f}", _signed(mean - last), differ]
    counts = [str(len(group)), f"{statistics.fmean(one['count'] for one in told):.0f}"]
    return [where.short, group[0]["recipe"], *counts, *scores, "mean" if told[0]["shipped"] else "last"]


def parts(records: Sequence[Record]) -> Iterator[str]:
    """What every part of a recurrent model is worth, and beside it other forms of the same blocks."""
    for stage in ("ablate", "small"):
        for _, own in contests(records, (stage,)):
            yield caption(own)
            if rows := part_rows(own):
                yield markdown(PART_HEAD, rows)
            if stage == "small":
                yield markdown(HEAD, table_of(record for record in own if record.get("variant", WHOLE) == WHOLE))


def part_rows(records: Iterable[Record]) -> list[list[str]]:
    """One row a part, the most valuable first: scores with and without it, of the seeds that ran both ways. Runs are
    held against those of the same width, depth and rate."""
    found: dict[tuple[Any, ...], dict[str, dict[int, float]]] = {}
    settings: set[str] = set()
    for record in records:
        if "variant" in record:
            model = record["config"]["model"]
            settings |= model.keys()
            own = found.setdefault((model["width"], model["depth"], record["rate"]), {})
            own.setdefault(record["variant"], {})[record["seed"]] = bpb_of(record)
    rows = []
    for family in found.values():
        whole = family.pop(WHOLE, {})
        for variant, scores in family.items():
            if seeds := sorted(scores.keys() & whole.keys()):
                gaps = [scores[seed] - whole[seed] for seed in seeds]
                gap = statistics.fmean(gaps)
                means = [f"{statistics.fmean(own[seed] for seed in seeds):.4f}" for own in (whole, scores)]
                part = variant.removeprefix("no ")
                name = f"`{part}`" if part in settings else part
                rows.append((-gap, [name, *means, _signed(gap), ", ".join(map(_signed, gaps))]))
    return [cells for _, cells in sorted(rows, key=lambda row: row[0])]


def rates(records: Sequence[Record]) -> Iterator[str]:
    """Every rate that was tried, and whether the best lies between others."""
    for _, own in contests(records, ("tune",)):
        yield caption(own)
        tried: dict[str, dict[float, float]] = {}
        for group in alike(own):
            tried.setdefault(group[0]["recipe"], {})[group[0]["rate"]] = mean_bpb(group)
        rows = []
        for recipe, scores in tried.items():
            best, order = min(scores, key=lambda rate: scores[rate]), sorted(scores)
            told = ", ".join(f"{'**' * (r == best)}{r:g}: {scores[r]:.4f}{'**' * (r == best)}" for r in order)
            rows.append([recipe, told, "yes" if order[0] < best < order[-1] else "no"])
        yield markdown(["recipe", "rate: bpb", "best between others"], rows)


def course(records: Sequence[Record]) -> Iterator[str]:
    """Scores against the seconds of training, and how the difference of ternary and float moves with them."""
    found: dict[Where, dict[float, list[Record]]] = {}
    for where, own in contests(records):
        if where.seconds:
            found.setdefault(where._replace(seconds=0.0), {})[where.seconds] = own
    for where, by_time in found.items():
        if len(by_time) < 2:
            continue
        recipes = list(dict.fromkeys(record["recipe"] for own in by_time.values() for record in own))
        lead = {called: gaps for called in (TERNARY, SEVERAL) if (gaps := _gaps(by_time, called))}
        rows = []
        for seconds, own in sorted(by_time.items()):
            cells = [_best([record for record in own if record["recipe"] == recipe]) for recipe in recipes]
            told = [_signed(gaps[seconds]) if seconds in gaps else "" for gaps in lead.values()]
            rows.append([f"{seconds:g}", *(f"{mean_bpb(cell):.4f}" if cell else "" for cell in cells), *told])
        heads = [f"best {'of ' * (called == SEVERAL)}{called} − best float" for called in lead]
        yield f"**{where.budget:,} bytes.** {where.place}:"
        yield markdown(["seconds", *recipes, *heads], rows)
        if told := [_crossing(gaps, called) for called, gaps in lead.items() if len(gaps) > 1]:
            yield " ".join(told)


def _gaps(by_time: Mapping[float, Sequence[Record]], called: str) -> dict[float, float]:
    """Best of the kind that is `called` so less the best float one, by rising seconds, where there are both."""
    found = {}
    for seconds, own in sorted(by_time.items()):
        best = _best_of_each(own)
        if best[called] and best[FLOAT]:
            found[seconds] = mean_bpb(best[called]) - mean_bpb(best[FLOAT])
    return found


def _crossing(gaps: Mapping[float, float], called: str) -> str:
    """Where what is `called` so less float changes its sign, over rising seconds; or how it moves without."""

    def leads(gap: float, verb: str = "leads") -> str:
        several = verb.removesuffix("s") if called == SEVERAL else verb
        return f"{called} {several}" if gap < 0 else f"float {verb}"

    crossed = [(one, two) for one, two in pairwise(gaps) if (gaps[one] < 0) != (gaps[two] < 0)]
    if crossed:
        told = [f"between {one:g} s and {two:g} s {leads(gaps[two], 'takes')} the lead" for one, two in crossed]
        return f"The curves of {called} and float cross: {'; '.join(told)}."
    first, last = min(gaps), max(gaps)
    moves = "narrows" if abs(gaps[last]) < abs(gaps[first]) else "widens"
    told = f"{leads(gaps[last])} over {called if gaps[last] > 0 else 'float'} at every length"
    told = f"{told}; from {first:g} s to {last:g} s the difference {moves}."
    return told[0].upper() + told[1:]


def budget_sources(files: Sequence[Mapping[str, Any]], links: Sequence[str]) -> str:
    """What each result file holds: how many runs of which stage, on what, by which command, and which runs failed."""
    lines = []
    for file, link in zip(files, links, strict=True):
        records = unpacked(file)
        counts = Counter(record["stage"] for record in records)
        told = ", ".join(f"{counts[stage]} of `{stage}`" for stage in STAGES if counts[stage])
        machines = " and ".join(sorted({machine_name(record) for record in records}))
        lines.append(f"- {link}: {told or 'no finished runs'}" + f"; {machines}" * bool(machines))
        lines += [f"  - `{command}`" for command in dict.fromkeys(r["command"] for r in records if "command" in r)]
        for run in file.get("failed", []):
            which = f"{run['recipe']}, rate {run['rate']:g}, seed {run['seed']}, {run['budget']:,} bytes"
            lines.append(f"  - failed: {which}: {run['error']}")
    return "\n".join(lines) or NOTHING


def _best(records: Iterable[Record], trits: Collection[int] = range(6)) -> list[Record]:
    """Of those with so many trits a weight the runs of the recipe and setting with the best mean; none: []."""
    own = [record for record in records if trits_of(record) in trits]
    return min(alike(own), key=mean_bpb, default=[])


def _best_of_each(records: Sequence[Record]) -> dict[str, list[Record]]:
    """The best of each of KINDS."""
    return {called: _best(records, trits) for called, trits in KINDS.items()}


def _named(group: Sequence[Record]) -> str:
    spread = f", sd {statistics.stdev(map(bpb_of, group)):.4f}" if len(group) > 1 else ""
    return f"`{group[0]['recipe']}` {mean_bpb(group):.4f} (n = {len(group)}{spread})"


def _mean(group: Iterable[Record], key: str, *inner: str) -> float:
    values = [record[key] for record in group]
    for name in inner:
        values = [value[name] for value in values]
    return statistics.fmean(values)


def _signed(gap: float) -> str:
    return f"{gap:+.4f}".replace("-", "−") if gap else "0"


def _range(gaps: Sequence[float]) -> str:
    """The mean, and the least and the most where there is more than one."""
    if not gaps:
        return ""
    told = _signed(statistics.fmean(gaps))
    return told if min(gaps) == max(gaps) else f"{told} ({_signed(min(gaps))} … {_signed(max(gaps))})"


TABLES: dict[str, Callable[[Sequence[Record]], Iterator[str]]] = {
    "contest": contest,
    "course": course,
    "depth": depth,
    "ship": ship,
    "average": average,
    "parts": parts,
    "rates": rates,
}
