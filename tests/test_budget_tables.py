"""Tables of models under a budget, from made-up records, and the page that they are on."""

import importlib
import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from tritwise.bench.entries import ENTRIES, PARTS
from tritwise.files import write_json
from tritwise.report.budget_rows import packed, unpacked
from tritwise.report.budget_tables import NOT_ON_GPU, NOTHING, TABLES, budget_sources, budget_table, short_budget

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs/RECURRENCE.md").read_text(encoding="utf-8")
H100 = "NVIDIA H100 80GB HBM3"


def record(recipe: str, bpb: float, seed: int = 0, stage: str = "main", **changes: Any) -> dict[str, Any]:
    """A record as the study leaves it. changes: of the record, or of settings; took: steps that it went."""
    trits = "ternary" in recipe
    model = {"width": 64, "depth": 6, "ctx": 512, "loops": 3, "gains": True, "weights": "trit" if trits else "float"}
    model |= {"weight_trits": changes.pop("weight_trits")} if "weight_trits" in changes else {}  # older ones have none
    train = {"data": "enwik8.gz", "split": "90/5/5", "batch": 64, "seed": seed, "rate": 0.03}
    train |= {
        "seconds": 90.0,
        "steps": 10**9,
        "depth_plan": "" if "constant" in recipe or "flat" in recipe else "0.5:1,1:3",
    }
    for part in (model, train):
        part |= {key: changes.pop(key) for key in list(changes) if key in part}
    made = {
        "recipe": recipe,
        "stage": stage,
        "config": {"model": model, "train": train},
        "seed": seed,
        "rate": train["rate"],
        "commit": "0123456789abcdef",
        "torch": "2.13.0",
        "device": H100,
        "cpu": "abacus",
        "threads": 1,
        "bytes": 12_000_000,
        "budget": 16_000_000,
        "way": "base3" if trits else "int7",
        "weights": 60_000_000,
        "steps": changes.pop("took", 1000),
        "seconds": 90.1,
        "warm_seconds": 20.0,
        "compiled_in_clock": 0,
        "bpb_before": bpb if trits else bpb - 0.01,
        "ship_gap": 0.0 if trits else 0.01,
        "averaged": None,
        "scores": {"val_sliding": {"bpb": bpb}, "val_chunked": {"bpb": bpb + 0.05}, "test_sliding": {"bpb": bpb - 0.1}},
        "chunked_before": bpb + 0.05 if trits else bpb + 0.03,
    }
    return made | changes


def rows_of(text: str) -> list[list[str]]:
    """The cells of a Markdown table's rows, without its head."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_a_result_file_gives_its_records_back():
    averaged = {"count": 2, "shipped": True, "bpb": 1.0, "bpb_unaveraged": 1.1}
    records = [
        record("flat-float", 1.5),
        record("recurrent-float", 1.4, averaged=averaged),
        record("flat-float", 1.6, 1),
    ]
    file = json.loads(json.dumps(packed(records)))
    assert unpacked(file) == records
    assert file["common"]["device"] == H100 and file["common"]["config"]["model"]["ctx"] == 512
    assert "device" not in file["records"][0] and file["records"][2]["config"]["train"]["seed"] == 1
    assert unpacked(packed(records[:1])) == records[:1] and unpacked(packed([])) == []


def test_a_contest_of_each_time_has_its_table_and_its_verdict():
    records = [record("flat-float", 1.50, seed) for seed in (0, 1)]
    records += [record("flat-ternary", 1.44 + 0.02 * seed, seed, "seeds" if seed else "main") for seed in (0, 1)]
    records += [record("recurrent-ternary", 1.60), record("recurrent-ternary", 1.3, seconds=400.0)]
    records += [record("flat-float", 1.25, seconds=400.0), record("flat-float", 1.0, stage="tune")]
    text = budget_table("contest", records)
    longest, shorter = text.split("**16,000,000 bytes, 90 s of training.**")
    assert longest.startswith("**16,000,000 bytes, 400 s of training.**") and NOT_ON_GPU not in text
    assert [row[0] for row in rows_of(longest)] == ["flat-float", "recurrent-ternary"]
    assert [row[0] for row in rows_of(shorter)] == ["flat-ternary", "flat-float", "recurrent-ternary"]
    assert "`recurrent-ternary` 1.3000 (n = 1) against `flat-float` 1.2500 (n = 1), difference **+0.0500**" in longest
    assert "`flat-ternary` 1.4500 (n = 2, sd 0.0141) against `flat-float` 1.5000 (n = 2, sd 0.0000)" in shorter
    assert (
        "difference **−0.0500** bits per byte; ternary is ahead. The standard error of the difference is 0.0100."
        in text
    )
    assert "1.3500 against 1.4000, −0.0500." in shorter and "busy" not in text
    slow = record("flat-float", 1.7, 2, took=100)
    assert "took 100 to 1,000 steps" in budget_table("contest", [*records, slow])
    alone = budget_table("contest", records[:1])
    assert "Best ternary" not in alone


def test_several_trits_a_weight_are_told_apart_from_one():
    records = [record("recurrent-ternary", 1.3), record("recurrent-float", 1.2)]
    both = [*records, record("recurrent-ternary-2-trits", 1.1, weight_trits=2)]
    alone, text = budget_table("contest", records), budget_table("contest", both)
    assert "several" not in alone and "difference **+0.1000** bits per byte; float is ahead." in text
    told = "Best of several trits a weight: `recurrent-ternary-2-trits` 1.1000 (n = 1) against `recurrent-float` 1.2000"
    assert f"{told} (n = 1), difference **−0.1000** bits per byte; several trits are ahead." in text
    assert {row[3] for row in rows_of(text)} == {"64 × 6", "64 × 6 × 2 trits"}


def test_devices_and_budgets_are_contests_of_their_own():
    records = [record("flat-float", 1.5), record("flat-float", 1.6, budget=4_000_000, stage="main4")]
    records += [record("flat-float", 1.7, device="NVIDIA H200"), record("flat-float", 1.8, device="cpu", stage="bench")]
    heads = [line for line in budget_table("contest", records).splitlines() if line.startswith("**")]
    assert [("4,000,000" in head, "H200" in head, "abacus, 1 thread" in head) for head in heads] == [
        (False, False, False),
        (False, True, False),
        (True, False, False),
        (False, False, True),
    ]


def test_the_course_says_where_curves_cross():
    def at(seconds: float, trit: float, real: float) -> list[dict[str, Any]]:
        return [record("flat-ternary", trit, seconds=seconds), record("flat-float", real, seconds=seconds)]

    one = at(90.0, 1.6, 1.5)
    assert budget_table("course", one) == NOTHING
    text = budget_table("course", [*at(400.0, 1.3, 1.35), *one])
    recipes = [cell.strip() for cell in text.splitlines()[2].strip("|").split("|")][1:3]
    trit, real = (1 + recipes.index(name) for name in ("flat-ternary", "flat-float"))
    found = [(row[0], row[trit], row[real], row[3]) for row in rows_of(text)]
    assert found == [("90", "1.6000", "1.5000", "+0.1000"), ("400", "1.3000", "1.3500", "−0.0500")]
    assert "The curves of ternary and float cross: between 90 s and 400 s ternary takes the lead." in text
    text = budget_table("course", [*at(400.0, 1.36, 1.35), *one])
    assert "Float leads over ternary at every length; from 90 s to 400 s the difference narrows." in text


def test_the_course_of_several_trits_is_told_apart():
    scores = {90.0: (1.6, 1.45, 1.5), 400.0: (1.36, 1.2, 1.35)}  # one trit, five, float
    records = []
    for seconds, (one, five, real) in scores.items():
        records += [record("flat-ternary", one, seconds=seconds), record("flat-float", real, seconds=seconds)]
        records += [record("flat-ternary-ngrams", five, seconds=seconds, weight_trits=5)]
    text = budget_table("course", records)
    assert "| best ternary − best float | best of several trits − best float |" in text
    assert [row[-2:] for row in rows_of(text)] == [["+0.1000", "−0.0500"], ["+0.0100", "−0.1500"]]
    assert "Float leads over ternary at every length; from 90 s to 400 s the difference narrows." in text
    assert "Several trits lead over float at every length; from 90 s to 400 s the difference widens." in text
    records = [one for one in records if "ngrams" not in one["recipe"]]
    records += [record("flat-ternary-ngrams", 1.6, seconds=90.0, weight_trits=2)]
    assert [row[-1] for row in rows_of(budget_table("course", records))] == ["+0.1000", ""]  # one length has none
    records += [record("flat-ternary-ngrams", 1.2, seconds=400.0, weight_trits=2)]
    told = budget_table("course", records)
    assert "The curves of several trits and float cross: between 90 s and 400 s several trits take the lead." in told


def test_the_best_of_each_kind_in_short():
    records = [record("flat-ternary", 1.40), record("flat-float", 1.41), record("flat-float", 1.39, seed=1)]
    records += [record("flat-ternary-ngrams", 1.35, weight_trits=2), record("recurrent-ternary", 1.45)]
    records += [record("flat-ternary", 1.1, device="cpu"), record("flat-float", 1.2, device="cpu")]
    records += [record("flat-ternary", 1.1, budget=4_000_000)]  # nothing in float beside it
    records += [record(name, 1.1, seconds=0.0, steps=800) for name in ("flat-ternary", "flat-float")]  # by steps
    rows = rows_of(short_budget(records))
    assert [row[:2] for row in rows] == [["16,000,000", "90"]] * 3
    assert [row[2:4] for row in rows] == [
        ["2 trits", "`flat-ternary-ngrams`"],
        ["−1, 0, +1", "`flat-ternary`"],
        ["float, int7", "`flat-float`"],
    ]
    assert [row[6:] for row in rows] == [
        ["1.3500", "1.2500", "−0.0500", "1"],
        ["1.4000", "1.3000", "0", "1"],
        ["1.4000", "1.3000", "0", "2"],
    ]
    del records[0]["scores"]["test_sliding"]
    assert [row[7] for row in rows_of(short_budget(records))] == ["1.2500", "", "1.3000"]
    assert short_budget([one for one in records if "float" not in one["recipe"]]) == ""


def test_growing_depth_stands_beside_constant_depth():
    records = [record("recurrent-ternary", 1.4, took=1500), record("recurrent-ternary-constant", 1.45)]
    records += [record("recurrent-float", 1.3)]  # which has no constant twin
    constant, growing = rows_of(budget_table("depth", records))
    assert constant[2:] == ["always 3", "1", "1,000", "", "90.1", "20.0", "0", "1.4500", ""]
    assert growing[2:] == ["0.5:1, 1:3", "1", "1,500", "1.50×", "90.1", "20.0", "0", "1.4000", "−0.0500"]
    assert budget_table("depth", records[1:]) == NOTHING


def test_what_shipping_costs_is_told_of_both_kinds():
    records = [record("flat-ternary", 1.4), record("flat-float", 1.5), record("flat-float", 1.6, 1, ship_gap=0.03)]
    text = budget_table("ship", records)
    trit, real = rows_of(text)
    assert trit[1:] == ["flat-ternary", "base3", "1", "12,000,000", "75.0 %", "1.60", "same logits", "0"]
    assert real[7] == "+0.0200 (+0.0100 … +0.0300)" and real[8] == "+0.0200"
    assert "Of 1 ternary models the score in chunks, before shipping and of the file, is the same" in text
    records[0]["chunked_before"] += 2e-5
    assert "differs by at most 2.0e-05" in budget_table("ship", records)
    averaged = {"count": 4, "shipped": False, "bpb": 1.41, "bpb_unaveraged": 1.4, "changed_trits": 0.005}
    text = budget_table("average", [record("flat-ternary", 1.4, averaged=averaged), records[1]])
    assert text.endswith("better than the last weights in 0 of 1 ternary models.")
    (row,) = rows_of(text)
    assert row[1:] == ["flat-ternary", "1", "4", "1.4100", "1.4000", "+0.0100", "0.50 %", "last"]


def test_parts_are_held_against_the_whole_of_the_same_seed():
    steps: dict[str, Any] = {"stage": "ablate", "seconds": 0.0, "steps": 800}
    name = "recurrent-ternary-constant"
    whole = [record(name, 1.4 + seed, seed, variant="as it is", **steps) for seed in (0, 1)]
    less = [record(name, 1.5 + 1.2 * seed, seed, variant="no gains", gains=False, **steps) for seed in (0, 1)]
    flat = [record(name, 1.3, variant="no repeats", loops=1, **steps)]
    other = [record(name, 9.0, variant="no gains", rate=0.02, **steps)]  # of a rate that has no whole
    text = budget_table("parts", [*whole, *less, *flat, *other])
    assert "800 steps of training" in text
    assert rows_of(text) == [
        ["`gains`", "1.9000", "2.1000", "+0.2000", "+0.1000, +0.3000"],
        ["repeats", "1.4000", "1.3000", "−0.1000", "−0.1000"],
    ]
    small = [
        record(name, 1.4, stage="small", device="cpu", variant="as it is"),
        record("flat-float", 1.2, stage="small"),
    ]
    assert "| flat-float | 0.03 |" in budget_table("parts", small)


def test_rates_are_told_with_the_best_one():
    tried = ((0.02, 1.6), (0.03, 1.5), (0.045, 1.55))
    records = [record("flat-ternary", bpb, stage="tune", rate=rate) for rate, bpb in tried]
    records += [record("flat-float", bpb, stage="tune", rate=rate) for rate, bpb in tried[:2]]
    assert rows_of(budget_table("rates", records)) == [
        ["flat-ternary", "0.02: 1.6000, **0.03: 1.5000**, 0.045: 1.5500", "yes"],
        ["flat-float", "0.02: 1.6000, **0.03: 1.5000**", "no"],
    ]


def test_sources_tell_what_ran_and_what_failed():
    failed = {"recipe": "flat-float", "rate": 0.1, "seed": 0, "budget": 16_000_000, "error": "diverged"}
    records = [record("flat-float", 1.5), record("flat-float", 1.6, stage="bench", command="tritwise bench budget")]
    text = budget_sources([packed(records) | {"failed": [failed]}], ["[file](file)"])
    assert text.splitlines() == [
        f"- [file](file): 1 of `bench`, 1 of `main`; {H100}",
        "  - `tritwise bench budget`",
        "  - failed: flat-float, rate 0.1, seed 0, 16,000,000 bytes: diverged",
    ]
    assert budget_sources([], []) == NOTHING


@pytest.mark.parametrize("name", TABLES)
def test_what_is_not_there_is_said(name):
    assert budget_table(name, []) == NOTHING
    records = [record("flat-ternary", 1.4, device="cpu"), record("flat-float", 1.3, device="cpu", stage="tune")]
    assert budget_table(name, records).endswith((NOT_ON_GPU, NOTHING))


def test_the_page_names_every_part_and_contestant():
    for name in (*PARTS, *ENTRIES):
        assert f"\n| `{name}` |" in PAGE


def test_the_page_is_filled_from_the_newest_files(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    readme = importlib.import_module("readme")
    monkeypatch.setattr(readme, "blocks", lambda root: {})  # README's own blocks have their tests
    (tmp_path / "README.md").write_text("no blocks")
    page, results = tmp_path / readme.RECURRENCE, tmp_path / readme.RESULTS
    for folder in (page.parent, results):
        folder.mkdir(parents=True)
    page.write_text(PAGE)
    assert set(readme.BUDGET_BLOCKS) == set(readme.pages(tmp_path)[readme.RECURRENCE])
    readme.write(tmp_path)
    assert page.read_text().count(NOTHING) == len(readme.BUDGET_BLOCKS) and readme.stale(tmp_path) == []
    for date, bpb in (("2026-01-30", 9.0), ("2026-01-31", 1.5)):
        write_json(results / f"budget_h100_{date}.json", packed([record("flat-float", bpb)]) | {"failed": []})
    on_cpu = deepcopy(record("flat-ternary", 3.0, stage="bench")) | {"device": "cpu"}
    write_json(results / "budget_cpu2_2026-01-31.json", packed([on_cpu]))
    assert "budget_contest" in readme.stale(tmp_path)
    assert readme.write(tmp_path) == ["README.md", readme.RECURRENCE] and readme.stale(tmp_path) == []
    text = page.read_text()
    assert "1.5000" in text and "9.0000" not in text and "abacus, 1 thread" in text
    assert "(../benchmarks/results/budget_h100_2026-01-31.json)" in text and "2026-01-30" not in text
