"""The report of a benchmark: tables and plots from made rows, whole, cut, diverged and nonsensical."""

import importlib
import itertools
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tritwise.errors import UserError
from tritwise.files import canonical_json
from tritwise.report.bench_markdown import (
    ablation_markdown,
    recipe_markdown,
    rules_markdown,
    short_markdown,
    texts_markdown,
)
from tritwise.report.bench_plots import choose_bench_plots, write_bench_report
from tritwise.report.bench_rows import Variant, read_bench, sort_rows
from tritwise.report.bench_tables import Summary, summary, table
from tritwise.report.bench_trends import least_squares, robustness, trends
from tritwise.report.engine_tables import capacity_markdown, engine_markdown, newest_of_each

imread = pytest.importorskip("matplotlib.image").imread

ROOT = Path(__file__).resolve().parent.parent

RULES = (  # name, bytes a weight, bytes of float state a weight, zero fraction, val bpb, best rate
    ("ours", 2.01, 0, 0.29, 1.437, 0.015),
    ("adamw", 12.0, 12, None, 1.452, 2e-3),
    ("muon", 8.0, 8, None, 1.441, 0.02),
    ("lion", 8.0, 8, None, 1.468, 3e-4),
    ("signsgd", 4.0, 4, None, 1.92, 1e-4),
    ("bitnet-adamw", 12.0, 12, 0.33, 1.514, 2e-3),
    ("bitnet-muon", 8.0, 8, 0.31, 1.504, 0.02),
    ("ternary-dqt", 8.2, 8, 0.27, 1.63, 1e-3),
    ("bop", 1.2, 0, 0.36, 2.31, 1e-4),
    ("counter", 1.2, 0, 0.2, 2.33, None),
    ("random-trits", 4.3, 4, 0.33, 2.95, 1e-2),
)
LADDER = (("uniform-288", 5.663), ("unigram", 3.347), ("bigram", 2.486), ("trigram", 2.049), ("5-gram", 1.669))


def made_row(rule: str, *, seed: int = 0, rate: float | None = 0.01, bpb: float | None = 1.5, **other) -> dict:
    """A row as `tritwise bench rules` writes it, less what no table and no plot reads."""
    row = {
        "bench": "rules",
        "rule": rule,
        "settings": {},
        "rate": rate,
        "seed": seed,
        "steps": 3600,
        "batch": 64,
        "ctx": 512,
        "width": 512,
        "depth": 6,
        "weights": 19136512,
        "data": "enwik8",
        "split": "first:38000000,last:2000000",
        "val_bpb": bpb,
        "bytes_per_weight": 2.01,
        "float_state_bytes": 0,
        "flip_rate": None,
        "flip_back": None,
        "zero_fraction": None,
        "saturation": None,
        "step_ms": 41.0,
        "device": "a GPU",
        "torch": "2.11.0",
        "dtype": "bfloat16",
        "commit": "abc1234",
        "tritwise": "0.1.0",
        "curve": [],
        "evals": [],
    }
    return row | other


def whole_bench() -> list[dict]:
    """Rows of everything there can be: rules with tuned rates and seeds, variants, three sizes, batches, widths."""
    rng = np.random.default_rng(3)
    rows: list[dict] = [
        {
            "bench": "ladder",
            "data": "enwik8",
            "split": "first:38000000,last:2000000",
            "rows": [{"name": name, "nats": nats} for name, nats in LADDER],
        }
    ]

    def tuned(rule, size, floats, zeros, bpb, best, seeds=3, **other):
        rates = [None] if best is None else [best / 4, best / 2, best, best * 2, best * 8]
        for rate in rates:
            off = 0.0 if rate is None else 0.035 * math.log2(rate / best) ** 2
            for seed in range(seeds if off == 0 else 1):
                scored = None if off > 0.3 else bpb + off + rng.normal(0, 0.003)
                where = {"steps": 3600, "batch": 64} | {k: v for k, v in other.items() if k in ("steps", "batch")}
                length = where["steps"] * where["batch"] * 512
                seen = np.linspace(length / 150, length, 150)
                end = (scored or 2) * math.log(2)
                curve = end + 3.2 * np.exp(-seen / length * 55) + 0.5 * (1 - seen / length) * np.exp(-3 * seen / length)
                curve += rng.normal(0, 0.006, len(curve))
                rows.append(
                    made_row(
                        rule,
                        seed=seed,
                        rate=rate,
                        bpb=scored,
                        bytes_per_weight=size,
                        float_state_bytes=int(floats * 19136512),
                        zero_fraction=zeros,
                        flip_rate=None if zeros is None else 0.0004 * bpb**3,
                        flip_back=None if zeros is None else 0.31,
                        saturation=0.011 if rule == "ours" else None,
                        curve=np.stack([seen, curve], 1).round(4).tolist(),
                        **other,
                    )
                )

    for rule in RULES:
        tuned(*rule)
    for settings, size, bpb in (
        ({"direction": "sign"}, 2.01, 1.49),
        ({"momentum_bits": 4}, 1.51, 1.463),
        ({"one_byte": True}, 1.05, 1.521),
        ({"scales": False}, 2.0, 1.446),
    ):
        tuned("ours", size, 0, 0.3, bpb, 0.015, 1, settings=settings)
    for width, depth, weights, gap in ((320, 4, 5_000_000, 0.006), (512, 6, 19136512, -0.012), (1024, 8, 85e6, -0.03)):
        for steps, shift in ((1200, 0.12), (3600, 0.0)):
            if (width, steps) != (512, 3600):
                base = 1.452 + shift - 0.1 * math.log10(weights / 19e6)
                shape = {"width": width, "depth": depth, "weights": weights, "steps": steps}
                tuned("adamw", 12.0, 12, None, base, 2e-3, 2, **shape)
                tuned("ours", 2.01, 0, 0.29, base + gap + 0.06 * shift, 0.015, 2, **shape)
    for batch, best in ((32, 0.011), (128, 0.018), (256, 0.03)):
        tuned("ours", 2.01, 0, 0.29, 1.44, best, 1, batch=batch)
        rows.append(made_row("ours", rate=0.015, batch=batch, bpb=1.44 + 0.02 * math.log2(best / 0.015) ** 2))
    for width, best in ((256, 0.02), (1024, 0.0125)):
        tuned("ours", 2.01, 0, 0.29, 1.5, best, 1, width=width)
        rows.append(made_row("ours", rate=0.015, width=width, bpb=1.5 + 0.02 * math.log2(best / 0.015) ** 2))
    return rows


def write_rows(folder: Path, rows: list[dict]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_bytes(b"".join(canonical_json(row) + b"\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> tuple[Path, list[Path]]:
    """A folder with everything in it, and what was written."""
    folder = write_rows(tmp_path_factory.mktemp("bench"), whole_bench())
    return folder, write_bench_report(folder)


def entry_of(rows: list[dict]) -> Summary:
    (entry,) = summary(rows)
    return entry


# Tables


def test_the_best_rate_and_its_figures():
    rows = [
        made_row("ours", rate=rate, seed=seed, bpb=bpb, flip_rate=0.001 * (seed + 1), step_ms=ms)
        for rate, seed, bpb, ms in (
            (0.01, 0, 1.52, 9.0),
            (0.02, 0, 1.50, 10.0),
            (0.02, 1, 1.53, 90.0),
            (0.02, 2, 1.51, 11.0),
            (0.04, 0, 1.6, 9.0),
        )
    ]
    entry = entry_of(rows)
    assert entry.best.rate == 0.02 and entry.edge == ""
    assert entry.mean == pytest.approx((1.50 + 1.53 + 1.51) / 3)
    assert entry.spread == pytest.approx(0.03)
    assert entry.sd == pytest.approx(math.sqrt(((0.0133**2) * 1 + 0.01667**2 + 0.00333**2) / 2), rel=1e-2)
    assert entry.flip_rate == pytest.approx(0.002) and entry.step_ms == 11.0
    assert [one.rate for one in entry.tried] == [0.01, 0.02, 0.04]
    head, (row,) = table([entry])
    assert dict(zip(head, row, strict=True)) == {
        "rule": "ours",
        "rate": "0.02",
        "val bpb": "1.513",
        "n": "3",
        "spread": "0.030",
        "sd": "0.0153",
        "B/weight": "2.01",
        "float state": "none",
        "flips/step": "0.20 %",
        "ms/step": "11.0",
    }


def test_a_rate_is_chosen_on_seeds_that_all_rates_have():
    lucky = [made_row("ours", rate=0.01, seed=0, bpb=1.500)]
    tuned = [made_row("ours", rate=0.02, seed=seed, bpb=bpb) for seed, bpb in ((0, 1.490), (1, 1.52), (2, 1.52))]
    assert entry_of(lucky + tuned).best.rate == 0.02  # though its mean over three seeds is the higher
    apart = [made_row("ours", rate=0.02, seed=seed, bpb=1.52) for seed in (1, 2)]
    assert entry_of(lucky + apart).best.rate == 0.01


@pytest.mark.parametrize(
    ("scores", "edge", "shown"),
    [
        ({0.01: 1.5, 0.02: 1.4, 0.04: 1.5}, "", "0.02"),
        ({0.01: 1.5, 0.02: 1.4}, "highest", "0.02 ↑"),
        ({0.01: 1.3, 0.02: 1.4}, "lowest", "0.01 ↓"),
        ({0.01: 1.5, 0.02: 1.4, 0.04: None}, "", "0.02"),  # it diverged, so the grid went far enough
        ({0.02: 1.4}, "only", "0.02 ○"),
        ({None: 1.4}, "", ""),
        ({0.01: None, 0.02: None}, "", ""),
    ],
)
def test_edges_of_the_grid(scores, edge, shown):
    entry = entry_of([made_row("ours", rate=rate, bpb=bpb) for rate, bpb in scores.items()])
    assert entry.edge == edge
    assert table([entry])[1][0][1] == shown


def test_diverged_runs_count_and_are_not_averaged():
    rows = [made_row("ours", rate=0.02, seed=seed, bpb=bpb) for seed, bpb in ((0, 1.3), (1, None), (2, math.nan))]
    assert table([entry_of(rows)])[1][0][2:4] == ["1.300", "1 of 3"]
    safe = made_row("ours", rate=0.01, bpb=1.4)
    assert entry_of([*rows, safe]).best.rate == 0.01  # a rate at which two of three diverge is nobody's best
    lost = [made_row("adamw", rate=rate, bpb=None) for rate in (0.1, 0.2)]
    assert [entry.label for entry in summary([*lost, safe])] == ["ours", "adamw"]
    assert table(summary([*lost, safe]))[1][1][:4] == ["adamw", "", "diverged", "0 of 1"]


def test_a_run_written_twice_counts_once_and_nats_stand_in_for_bits():
    rows = [made_row("ours", bpb=1.6), made_row("ours", bpb=None, val_nats=math.log(2) * 1.5)]
    entry = entry_of(rows)
    assert len(entry.runs) == 1 and entry.mean == pytest.approx(1.5)
    assert entry.spread is None and entry.sd is None


def test_what_differs_is_never_mixed():
    rows = [
        made_row("ours", bpb=1.5),
        *(
            made_row("ours", bpb=1.6, **other)
            for other in ({"width": 256}, {"steps": 9}, {"stride": 64}, {"split": "x"})
        ),
        made_row("ours", bpb=1.7, settings={"momentum": 0.9}),
        made_row("ours", bpb=1.8, dtype="float32"),
    ]
    entries = summary(rows)
    assert len(entries) == len(rows) and len({entry.cell for entry in entries}) == 5
    assert [e.label for e in entries if e.cell == entries[0].cell] == [
        "ours · bfloat16",
        "ours · momentum 0.9",
        "ours · float32",
    ]


def test_a_schedule_belongs_to_its_rule():
    """Each rule may have a schedule of its own: it stays in the comparison, and what is unusual is told."""
    rows = [
        made_row("ours", bpb=1.5, decay=1.0, warmup=100),
        made_row("ours", bpb=1.6, decay=0.5, warmup=100),
        made_row("ours", bpb=1.7, decay=0.5, warmup=300),
        made_row("adamw", bpb=1.8, decay=0.5, warmup=100),
        made_row("muon", bpb=1.9, decay=1, warmup=100),
    ]
    entries = summary(rows)
    assert len({entry.cell for entry in entries}) == 1
    assert [entry.label for entry in entries] == ["ours · decay 1", "ours", "ours · warmup 300", "adamw", "muon"]
    assert [entry.variant.values for entry in entries[1:4]] == [{}, {"warmup": 300}, {}]
    (other,) = summary([made_row("ours", warmup=300, steps=9, decay="late")])
    assert other.variant.values == {} and entries[0].variant.values == {"decay": 1}


def test_missing_fields_and_nonsense_are_left_out(tmp_path):
    rows = [{"rule": "ours"}, {"rule": "adamw", "rate": "fast", "val_bpb": "low", "settings": 3, "curve": 7}, {"a": 1}]
    folder = write_rows(tmp_path / "odd", rows)
    with (folder / "rows.jsonl").open("ab") as file:
        file.write(b'[1]\n{"rule": "ours", "val')
    bench = read_bench(folder)
    assert len(bench.trials) == 2 and len(bench.notes) == 3
    (page,) = write_bench_report(folder)
    assert "1 row without a rule left out" in page.read_text()
    assert "| ours |  | diverged | 0 of 1 |" in rules_markdown(bench).replace("**", "")
    for bad in (tmp_path / "none", tmp_path):
        with pytest.raises(UserError, match=r"rows\.jsonl|none"):
            read_bench(bad)
    with pytest.raises(UserError, match="no row with a rule"):
        read_bench(write_rows(tmp_path / "empty", [{"a": 1}]))


def test_the_ladder_is_of_the_same_text():
    bench = sort_rows([made_row("ours"), *(row for row in whole_bench() if row["bench"] == "ladder")])
    cell = bench.trials[0].cell
    assert bench.ladder(cell) == list(LADDER)
    assert bench.ladder(replace(cell, data="other")) == [("uniform", math.log(256))]
    assert bench.ladder(replace(cell, split="90/10")) == [("uniform", math.log(256))]


def test_the_markdown_of_rules():
    rows = [made_row("a|b", rate=0.1, bpb=1.6, step_ms=None), made_row("ours", rate=0.2, bpb=1.5, step_ms=None)]
    text = rules_markdown(rows)
    assert text.splitlines()[2:6] == [
        "| rule | rate | val bpb | n | B/weight | float state |",
        "| :-- | --: | --: | --: | --: | --: |",
        "| **ours** | **0.2 ○** | **1.500** | 1 | 2.01 | none |",
        "| a\\|b | 0.1 ○ | 1.600 | 1 | 2.01 | none |",
    ]
    assert text.startswith("enwik8 · width 512, depth 6, 19.1M weights · 3,600 steps of 64 × 512 bytes (118 MB)\n")
    assert rules_markdown([]) == texts_markdown([]) == "No rules have been measured yet."


def test_every_text_has_a_table_of_its_own():
    """Of each the cell with the most rules, and what all tables need to be read once, at the end."""
    one = [made_row("ours", bpb=1.5), made_row("adamw", bpb=1.6)]
    other = [made_row("ours", bpb=1.3, data="tales"), made_row("ours", bpb=1.2, data="tales", steps=7)]
    text = texts_markdown([*other, *one])
    assert text.count("n: seeds") == 1 and text.rstrip().endswith(rules_markdown(one).splitlines()[-1])
    titles = [line.split(" · ")[0] for line in text.splitlines() if "width 512" in line]
    assert titles == ["enwik8", "tales"] and rules_markdown(one).split("\n\n")[1] in text
    assert "1.300" in text and "1.200" not in text
    assert texts_markdown(one) == rules_markdown(one)


@pytest.mark.parametrize("written", ["given", "all"])
def test_the_markdown_of_the_ablation(written):
    """Whether rows hold only what differs from the defaults, or every setting."""
    defaults = {} if written == "given" else {"momentum": 0.95, "steps": 3, "scales": True}
    changes = ({}, {"momentum": 0.9}, {"steps": 5}, {"scales": False})
    rows = [
        made_row("ours", rate=0.02, bpb=bpb, settings=defaults | change)
        for change, bpb in zip(changes, (1.5, 1.49, 1.532, 1.6), strict=True)
    ]
    text = ablation_markdown([*rows, made_row("adamw", bpb=1.4)])
    assert [line.split(" | ")[0:4] for line in text.splitlines()[4:]] == [
        ["| **default**", "0.02 ○", "1.500", ""],
        ["| momentum 0.9", "0.02 ○", "1.490", "−0.010"],
        ["| steps 5", "0.02 ○", "1.532", "+0.032"],
        ["| no scales", "0.02 ○", "1.600", "+0.100"],
    ]
    assert ablation_markdown(rows[:1]) == "No variants have been measured yet."


def test_the_ablation_has_every_length_with_many_variants():
    """Four variants at a third of the length are too few beside the richest length, five are a table of their own."""
    settings = [{"momentum": m / 100} for m in range(90, 98)]
    long = [made_row("ours", bpb=1.4, settings=own) for own in settings]
    short = [made_row("ours", bpb=1.5, settings=own, steps=1200) for own in settings[:5]]
    assert ablation_markdown(long + short[:4]).count("**default**") == 1
    both = ablation_markdown(long + short)
    assert both.count("**default**") == 2 and both.index("3,600 steps") < both.index("1,200 steps")


# Trends


def test_the_trend_is_least_squares_over_paired_seeds():
    assert least_squares([0, 1, 2], [1, 3, 5]) == pytest.approx((2, 1))
    assert least_squares([-1, 0, 1], [0, 3, 0]) == pytest.approx((0, 1))
    rows = []
    for weights, width, gap in ((1e6, 128, 0.02), (1e7, 256, 0.01), (1e8, 512, 0.0)):
        for seed, luck in ((0, 0.3), (1, -0.1)):
            size = {"weights": weights, "width": width, "depth": width // 64, "seed": seed}
            rows.append(made_row("adamw", bpb=2 + luck, **size))
            rows.append(made_row("ours", bpb=2 + luck + gap, **size))
    rows.append(made_row("ours", bpb=9.0, width=1024, weights=5e8))  # no AdamW there
    (trend,) = trends(summary(rows), Variant("ours", "{}", "bfloat16"))
    assert [point.weights for point in trend.points] == [1e6, 1e7, 1e8]
    assert [gap for point in trend.points for gap in point.gaps] == pytest.approx([0.02, 0.02, 0.01, 0.01, 0, 0])
    assert (trend.slope, trend.at_10m) == pytest.approx((-0.01, 0.01))
    assert trend.caption == "118 MB: +0.0100 at 10M weights, −0.0100 for every tenfold of weights (3 sizes)"
    assert trends(summary(rows[:4]), Variant("ours", "{}", "bfloat16")) == []  # one size is no trend


def test_robustness_needs_the_rate_and_another_to_compare_with():
    def tried(scores, **where):
        return [made_row("ours", rate=rate, bpb=bpb, **where) for rate, bpb in scores.items()]

    rows = [
        *tried({0.01: 1.52, 0.02: 1.5, 0.04: 1.52}),
        *tried({0.01: 1.46, 0.02: 1.47, 0.04: 1.5}, batch=32),
        *tried({0.02: 1.4}, batch=128),  # nothing to compare with
        *tried({0.01: 1.4, 0.04: 1.3}, batch=256),  # the rate itself was not tried
        *tried({0.01: 1.55, 0.02: 1.5}, batch=16, steps=14400),  # the same bytes
        *tried({0.01: 1.55, 0.02: 1.5}, batch=8, steps=100),  # neither the steps nor the bytes
        *tried({0.02: 1.9, 0.04: 1.8}, width=256, depth=3),
    ]
    entries = summary(rows)
    costs = robustness(entries, entries[0].variant, entries[0].cell, 0.02)
    assert [(p.size, round(p.bpb, 6), p.edge) for p in costs["batch"]] == [
        (16, 0, True),
        (32, 0.01, True),
        (64, 0, False),
    ]
    assert [(p.size, round(p.bpb, 6)) for p in costs["width"]] == [(256, 0.1), (512, 0)]
    assert robustness(entries, entries[0].variant, None, 0.02) == {}
    # At the length where most rules were run, the rate was not tuned: what is told is of the length where it was.
    rows += [made_row(rule, rate=0.02, bpb=1.3, steps=7200) for rule in ("ours", "adamw", "lion")]
    assert "at most 0.100" in choose_bench_plots(sort_rows(rows))["robustness"].alt


# Plots


def test_every_plot_is_drawn(drawn):
    folder, paths = drawn
    names = ["loss", "state", "rates", "activity", "scaling", "robustness"]
    assert paths == [*(folder / f"{name}.png" for name in names), folder / "index.html"]
    sizes = set()
    for path in paths[:-1]:
        pixels = imread(path)
        assert pixels.shape[1] == 1260 and 300 < pixels.shape[0] < 1300
        ink = (pixels[..., :3] < 0.9).any(axis=2).mean()
        assert 0.005 < ink < 0.5, f"{path.name} is {ink:.1%} ink"
        blue = (np.abs(pixels[..., :3] - np.array([0, 0x72, 0xB2]) / 255) < 0.02).all(axis=2).mean()
        assert blue > 0.0005 or path.stem == "scaling", f"{path.name} does not show ours"
        sizes.add(path.stat().st_size)
    assert len(sizes) == len(names)
    page = paths[-1].read_text()
    assert page.count("data:image/png;base64,") == len(names)
    assert "<td" in page and "ours · direction sign" in page and "abc1234" in page
    assert "for every tenfold of weights (3 sizes)" in page and "at the rate 0.015 everywhere" in page


def test_the_same_rows_give_the_same_bytes(tmp_path):
    rows = [row for row in whole_bench() if row.get("rule") in ("ours", "adamw") and row["batch"] == 64]
    rows = [row for row in rows if row["settings"] == {}]
    one, two = (write_bench_report(write_rows(tmp_path / name, rows)) for name in ("a", "b"))
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]


def test_a_plot_without_rows_is_left_out(tmp_path):
    rows = [made_row("ours", bpb=1.5), made_row("adamw", bpb=1.6, bytes_per_weight=12.0)]
    assert [path.name for path in write_bench_report(write_rows(tmp_path, rows))] == ["state.png", "index.html"]
    names = choose_bench_plots(sort_rows([*rows, made_row("bop", zero_fraction=0.4, bytes_per_weight=None)]))
    assert list(names) == ["state", "activity"]
    lost = [made_row("ours", bpb=None, rate=rate) for rate in (0.1, 0.2)]
    assert list(choose_bench_plots(sort_rows(lost))) == []


def test_one_seed_one_rule_one_point(tmp_path):
    row = made_row("ours", bpb=1.5, zero_fraction=0.3, curve=[[0, 5.5], [100, None], [1000, 2.0]])
    paths = write_bench_report(write_rows(tmp_path, [row]))
    assert [path.name for path in paths] == ["loss.png", "state.png", "activity.png", "index.html"]


@pytest.mark.filterwarnings("error:constrained_layout not applied")
def test_a_grid_without_a_lost_run_is_laid_out(tmp_path):
    """Something drawn outside a panel without a place would make matplotlib give up laying out all of them."""
    rows = [made_row("ours", rate=rate, bpb=bpb, bytes_per_weight=None) for rate, bpb in ((0.01, 1.6), (0.02, 1.5))]
    paths = write_bench_report(write_rows(tmp_path, rows))
    assert [path.name for path in paths] == ["rates.png", "index.html"]


def test_a_second_text_has_plots_of_its_own(tmp_path):
    rows = [made_row(rule, data=data, bpb=1.5) for data in ("enwik8", "My text!") for rule in ("ours", "adamw")]
    paths = write_bench_report(write_rows(tmp_path, rows))
    assert [path.name for path in paths] == ["state.png", "state_my-text-.png", "index.html"]


def test_a_variant_that_another_beats_at_its_size_is_for_the_tables(monkeypatch):
    told: dict[str, list[str]] = {}
    keep = lambda entries, *rest: told.update(state=[entry.label for entry in entries])  # noqa: E731
    monkeypatch.setattr("tritwise.report.bench_plots.state_figure", keep)
    changes = (({}, 2.0, 1.5), ({"a": 1}, 2.0, 1.6), ({"b": 1}, 1.0, 1.7), ({"c": 1}, 2.0, 1.4), ({"d": 1}, 2.0, 1.45))
    rows = [made_row("ours", settings=s, bytes_per_weight=size, bpb=bpb) for s, size, bpb in changes]
    choose_bench_plots(sort_rows(rows))["state"].figure()
    assert told["state"] == ["ours · c 1", "ours", "ours · b 1"]  # the default always; the best of each size


def test_names_do_not_lie_on_each_other(drawn):
    """Of the plots whose names are placed by measure: no two boxes of text share more than an edge."""
    folder, _ = drawn
    for name in ("loss", "state", "scaling"):
        figure = choose_bench_plots(read_bench(folder))[name].figure()
        figure.draw_without_rendering()
        canvas: Any = figure.canvas
        for axes in figure.axes:
            placed = [text for text in axes.texts if text.get_text()]
            boxes = [text.get_window_extent(canvas.get_renderer()) for text in placed]
            assert len(boxes) >= 3
            for (a, one), (b, two) in itertools.combinations(zip(placed, boxes, strict=True), 2):
                wide, tall = min(one.x1, two.x1) - max(one.x0, two.x0), min(one.y1, two.y1) - max(one.y0, two.y0)
                assert min(wide, tall) < 4, f"{name}: {a.get_text()} lies on {b.get_text()}"
            for box in boxes:
                assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1, f"{name}: a name is cut off"


# docs/RULE.md


def test_the_page_of_the_rule_is_filled_from_results(tmp_path, monkeypatch):
    """Whatever of the blocks the page has, and nothing if there is no page."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    readme = importlib.import_module("readme")
    monkeypatch.setattr(readme, "blocks", lambda root: {})  # README's own blocks have their tests
    (tmp_path / "README.md").write_text("no blocks")
    results = tmp_path / readme.RESULTS
    results.mkdir(parents=True)
    assert readme.draw(tmp_path) == [] and readme.stale(tmp_path) == []
    page = tmp_path / readme.RULE
    page.parent.mkdir()
    wanted = ("rules_table", "rules_ablation", "rules_state", "rules_scaling")
    page.write_text("".join(f"# {name}\n<!-- generated:{name} -->\n<!-- end:{name} -->\n" for name in wanted))
    readme.write(tmp_path)
    assert page.read_text().count("Nothing has been recorded") == 4 and readme.stale(tmp_path) == []

    rows = [row for row in whole_bench() if row.get("rule") in ("ours", "adamw") and row["batch"] == 64]
    write_rows(results, rows).joinpath("rows.jsonl").rename(results / "rules_h100_2026-01-31.jsonl")
    assert readme.stale(tmp_path) == list(wanted)
    assert readme.draw(tmp_path) == ["docs/images/rules_state.png", "docs/images/rules_scaling.png"]
    assert readme.write(tmp_path) == ["README.md", "docs/RULE.md"] and readme.stale(tmp_path) == []
    text = page.read_text()
    assert "| **default** | 0.015 |" in text and "for every tenfold of weights" in text
    for target in re.findall(r"\]\(([^)]+)\)", text):
        assert (page.parent / target).exists(), target

    (results / "ablation_h100_2026-02-01.jsonl").write_bytes(canonical_json(made_row("ours")) + b"\n")
    assert readme.stale(tmp_path) == ["rules_ablation"]
    (tmp_path / "docs/images/rules_state.png").write_bytes(b"another")
    assert readme.stale(tmp_path) == ["rules_ablation", "rules_state"]
    page.write_text("<!-- generated:rules_typo -->\n<!-- end:rules_typo -->\n")
    with pytest.raises(ValueError, match=r"docs/RULE\.md has the generated blocks \['rules_typo'\]"):
        readme.stale(tmp_path)


# --- several devices, and a recipe ------------------------------------------------------------------------------------


def test_rows_of_several_files_are_one_bench(tmp_path):
    one = write_rows(tmp_path / "a", [made_row("adamw", bpb=1.4), made_row("ours", bpb=1.5)])
    two = write_rows(tmp_path / "b", [made_row("ours", bpb=1.45), made_row("ours", bpb=1.3, seed=1)])
    assert [(t.variant.rule, t.seed, t.bpb) for t in read_bench(one, two).trials] == [
        ("adamw", 0, 1.4),
        ("ours", 0, 1.45),  # the later file counts
        ("ours", 1, 1.3),
    ]


def test_times_of_another_device_are_not_compared():
    rows = [made_row("adamw", step_ms=11.5), made_row("lion", step_ms=12.5), made_row("ours", step_ms=99.5, device="B")]
    told = rules_markdown(rows)
    assert "11.5" in told and "12.5" in told and "99.5" not in told and "from one device, a GPU" in told
    assert "from one device" not in rules_markdown(rows[:2])


def test_a_recipe_is_a_table_in_nats_with_the_best_first():
    shape = {"dropout": 0.5}
    rows = [
        made_row("ours", bench="recipe", bpb=2.2, train_nats=1.0, rate=0.03, steps=1000),
        made_row("ours", bench="recipe", bpb=2.0, train_nats=1.2, rate=0.03, steps=2000, shape=shape),
        made_row("ours", bench="recipe", bpb=2.1, train_nats=1.2, rate=0.03, steps=2000, shape=shape, seed=1),
        made_row("adamw", bench="recipe", bpb=2.12, rate=0.001, steps=1000),
        made_row("adamw", bpb=1.0),
    ]
    lines = recipe_markdown(rows, "recipe").splitlines()
    assert [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]] == [
        ["**ours**", "**0.5**", "**2,000**", "**0.03**", "**1.4210**", "2", "0.0693", "1.200"],
        ["adamw", "0", "1,000", "0.001", "1.4695", "1", "", ""],
        ["**ours**", "**0**", "**1,000**", "**0.03**", "**1.5249**", "1", "", "1.000"],
    ]
    assert recipe_markdown(rows, "other") == "Nothing has been measured yet."


def test_readers_in_a_hurry_see_each_rule_once_and_ours_once_a_size():
    compact = {"settings": {"compact": True}, "bytes_per_weight": 1.05}
    rows = [
        made_row("adamw", bpb=1.45, bytes_per_weight=12.0, float_state_bytes=100),
        made_row("adamw", bpb=1.40, bytes_per_weight=12.0, float_state_bytes=100, settings={"weight_decay": 0.1}),
        made_row("ours", bpb=1.42),
        made_row("ours", bpb=1.43, settings={"momentum": 0.8}),
        made_row("ours", bpb=1.50, **compact),
        made_row("lion", bpb=None),
    ]
    lines = short_markdown(rows).splitlines()[4:]
    assert [line.split("|")[1].strip() for line in lines] == [
        "adamw · weight decay 0.1",
        "**ours**",
        "**ours · compact**",
    ]
    assert lines[0].split("|")[2:-1] == [" 1.400 ", " 1 ", " 12.00 ", " 100 B "] and "none" in lines[1]
    assert short_markdown([]) == "No rules have been measured yet."


def test_a_lucky_single_run_does_not_stand_for_a_rule():
    steady = [made_row("ours", bpb=1.42, seed=seed, settings={"momentum": 0.9}) for seed in range(3)]
    lucky = made_row("ours", bpb=1.41, settings={"momentum": 0.93})
    rival = made_row("adamw", bpb=1.43)
    assert [line.split("|")[2].strip() for line in short_markdown([lucky, *steady, rival]).splitlines()[4:]] == [
        "**1.420**",
        "1.430",
    ]


def step_file(size: str, weights: int, ours: float, rival: float | None, **changes) -> dict:
    """A result file of `tritwise bench step`."""
    row = {"size": size, "weights": weights, "bytes_a_step": 1024, "state_bytes": 2 * weights, "peak_bytes": 10**9}
    own = row | {"contender": "ours", "rule": "ours", "settings": {}, "step_ms_rounds": [ours] * 5}
    rows = [own | {"step_ms": ours, "update_share": 0.125, "ratio": (rival or 0) / ours} | changes]
    rows += [row | {"contender": "adamw-bf16", "rule": "adamw-bf16", "step_ms": rival, "ratio": 1.0}] if rival else []
    return {"bench": "step", "device": "a GPU", "torch": "2.11.0", "rows": rows}


def test_steps_of_every_size_stand_beside_adamw():
    files = [step_file("large", 3 * 10**9, 700.0, None), step_file("small", 20 * 10**6, 20.0, 15.0)]
    told = engine_markdown(files)
    assert told.startswith("One a GPU, torch 2.11.0, bfloat16")
    small, large = [[cell.strip() for cell in line.split("|")[1:-1]] for line in told.splitlines()[4:]]
    assert small == [
        "20M",
        "default",
        "1,024",
        "20.0",
        "15.0",
        "0.75",
        "5",
        "12 %",
        "40.0 MB",
        "40.0 MB",
        "1.00 GB",
        "1.00 GB",
    ]
    assert large[:8] == ["3B", "default", "1,024", "700", "", "", "5", "12 %"] and large[9] == large[11] == ""
    failed = step_file("small", 20 * 10**6, 20.0, 15.0, error="out of memory")
    assert engine_markdown([failed]) == engine_markdown([]) == "Nothing has been measured yet."


def test_other_settings_stand_below_the_default():
    file = step_file("small", 20 * 10**6, 20.0, 15.0)
    fast = {
        "contender": "ours-turns-fp8",
        "settings": {"fp8": True, "interval": 2, "head_interval": 1},
        "step_ms": 10.0,
    }
    file["rows"].insert(0, file["rows"][0] | fast | {"ratio": 1.5})
    told = [[cell.strip() for cell in line.split("|")[1:-1]] for line in engine_markdown([file]).splitlines()[4:]]
    assert [row[1] for row in told] == ["default", "interval=2, fp8=true"]
    assert told[1][3:6] == ["10.0", "15.0", "1.50"]


def test_capacity_is_told_in_a_sentence():
    largest = {"weights": 28_100_000_000, "peak_bytes": 6 * 10**10, "fits": True}
    rows = [
        {"contender": "ours", "largest": largest, "fails": 56_000_000_000},
        {"contender": "adamw-bf16", "largest": {"weights": 9_900_000_000}, "fails": None},
        {"contender": "adamw", "largest": None, "fails": 10**9},
    ]
    assert capacity_markdown({"room": 84e9, "rows": rows}) == (
        "The largest model whose loss falls in 84.0 GB: **28.1B** weights with ours (60.0 GB at its peak, 56B do not "
        "fit), **9.9B** weights with adamw-bf16."
    )
    assert capacity_markdown({"rows": rows[2:]}) == "Nothing has been measured yet."


def test_a_size_that_was_measured_again_counts_once():
    old, new, other = (step_file(size, 10**6, ms, None) for size, ms in (("a", 1.0), ("a", 2.0), ("b", 3.0)))
    assert newest_of_each([("2026-02-01", new), ("2026-01-01", old), ("2026-01-01", other)]) == [new, other]
