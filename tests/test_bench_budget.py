"""The contest under a budget: contestants as wide as fits, records from the files, the table, going on, refusals."""

import json
from dataclasses import replace

import pytest
import torch

from tritwise.bench.budget import run_record
from tritwise.bench.entries import (
    ENOUGH,
    ENTRIES,
    EXTRA,
    PARTS,
    ROWS,
    SMALLER,
    SPARE,
    base_config,
    entry,
    shape_bytes,
)
from tritwise.errors import UserError
from tritwise.files import read_json, sha256_of
from tritwise.models import ByteLM
from tritwise.report.budget_tables import table_of
from tritwise.ship import estimate, write_artifact

BUDGET = 130_000
QUICK = ["--budget", BUDGET, "--steps", 3, "--ctx", 16, "--batch", 2, "--set", "ship_small=500"]


def base(**changes):
    settings = {"ctx": 16, "batch": 2, "steps": 3, "seconds": 0.0, "seed": 0} | changes
    return base_config("shakespeare", "90/10", **settings)


@pytest.mark.parametrize("name", ENTRIES)
@pytest.mark.parametrize("budget", [BUDGET, 400_000])
def test_a_contestant_is_as_wide_as_fits_and_its_count_is_the_models(name, budget):
    config = entry(name, base(), budget, {"ship_small": 500})
    assert config.recipe == name and config.train.budget == budget
    room, whole = SPARE * budget * SMALLER.get(name, 1.0), config.model
    assert shape_bytes(config) <= SPARE * budget
    if whole.hashed_tables:  # tables fill what the rest of the model was not made for
        more = replace(whole, ngram_rows=whole.ngram_rows + ROWS)
        assert shape_bytes(replace(config, model=more)) > SPARE * budget
        config = replace(config, model=replace(whole, ngrams=1, word_tables=0))
    assert shape_bytes(config) <= room
    step = 32 if config.model.width < 128 else 64
    least = ENTRIES[name]["depth"]
    wide = replace(config.model, width=config.model.width + step, heads=0, kv_heads=0, depth=least)
    assert shape_bytes(replace(config, model=wide)) > room
    deep = replace(config.model, depth=config.model.depth + 1)
    assert config.model.depth == least + EXTRA or shape_bytes(replace(config, model=deep)) > room
    if config.model.depth < least:  # only where a narrower one of enough blocks would leave more than a quarter empty
        narrow = replace(config.model, width=config.model.width - 32, heads=0, kv_heads=0, depth=least + EXTRA)
        assert shape_bytes(replace(config, model=narrow)) < ENOUGH * room / SPARE
    given = entry(name, base(), budget, {"ship_small": 500, "width": "64"})  # as it comes from a command line
    assert given.model.width == 64 and given.model.depth == least
    torch.manual_seed(0)
    config = replace(config, model=whole)
    drawn = torch.get_rng_state()
    count = shape_bytes(config)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert count == estimate(ByteLM(whole), config.train.ship_as, 500)["total"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--set", "steps=7"], "steps is the same for all contestants; give --steps"),
        (["--set", "flat-ternary:budget=7"], "budget is the same for all"),
        (["--steps", 0], "--steps"),
        (["--budget", 20_000, "--recipes", "flat-ternary,flat-float"], "flat-ternary: not even 32 channels fit"),
        (["--recipes", "flat-float,,wings"], "there is no recipe 'wings'; choose one of flat-float,"),
    ],
)
def test_a_contest_that_cannot_be_is_refused_in_one_line(words, said, cli, tmp_path):
    told = cli("bench", "budget", *QUICK, *words, "--out", tmp_path / "out")
    assert told.code == 2 and said in told.err and told.err.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_contest_is_of_one_process(cli, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    told = cli("bench", "budget", *QUICK, "--out", tmp_path / "out")
    assert told.code == 2 and "start it without torchrun" in told.err


@pytest.mark.parametrize("changes", [{"mixer": "lstm"}, {"graph": "true"}, {"max_moe_iters": 3, "experts": 4}])
def test_what_is_counted_is_the_model_whatever_it_is_made_of(changes, tmp_path):
    config = entry("flat-ternary", base(), 400_000, changes)
    info = write_artifact(ByteLM(config.model), tmp_path / "model")
    assert 0.85 * 400_000 < shape_bytes(config) <= SPARE * 400_000 and info.bytes <= shape_bytes(config)


def test_the_recurrent_contestants_have_every_part_but_for_lean_ones():
    for name in (name for name in ENTRIES if name.startswith("recurrent")):
        without = {part for part, value in PARTS.items() if ENTRIES[name][part] != value}
        spared = {"loop_embedding", "value_tables", "repeat_skip", "input_mix", "gains"}
        assert without == (spared if "lean" in name else set())
    with pytest.raises(UserError, match="did you mean flat-ternary"):
        entry("flat-ternery", base(), BUDGET, {})
    with pytest.raises(UserError, match="not even 32 channels"):
        entry("flat-ternary", base(), 9_000, {})


def test_records_come_from_the_files(tmp_path, cli, text):
    names = "recurrent-float,recurrent-ternary"
    words = ["bench", "budget", *QUICK, "--data", text, "--recipes", names, "--out", tmp_path / "out", "--json"]
    done = cli(*words, "--set", "recurrent-ternary:rate=0.02", "--split", "90/5/5")
    assert done.code == 0, done.err
    folders = sorted((tmp_path / "out/records").iterdir())
    assert [folder.name.rsplit("-", 2)[0] for folder in folders] == names.split(",")
    for folder, record in zip(folders, done.json["records"], strict=True):
        assert read_json(folder / "record.json") == record
        assert record["bytes"] == (folder / record["file"]).stat().st_size <= BUDGET
        assert record["sha256"] == sha256_of(folder / record["file"]) and (folder / record["log"]).exists()
        assert record["steps"] == 3 and record["scores"].keys() == {"val_sliding", "val_chunked", "test_sliding"}
        assert str(tmp_path) not in json.dumps(record)
    floats, trits = done.json["records"]
    assert trits["rate"] == 0.02 and floats["rate"] == ENTRIES["recurrent-float"]["rate"]
    assert trits["ship_gap"] == 0 and trits["way"] == "base3"  # to the last bit
    assert floats["ship_gap"] != 0 and floats["way"] in ("int8", "int7", "int6")
    told = floats["averaged"]
    assert told["shipped"] == (told["bpb"] < told["bpb_unaveraged"]) and not trits["averaged"]["shipped"]
    assert floats["bpb_before"] == min(told["bpb"], told["bpb_unaveraged"])
    rows = (tmp_path / "out/table.md").read_text().splitlines()
    assert len(rows) == 4 and len(table_of(done.json["records"])) == 2
    # What is there is not run again, and another run is not taken for it.
    before = {path: path.stat().st_mtime_ns for path in folders[0].iterdir()}
    assert cli(*words, "--set", "recurrent-ternary:rate=0.02", "--split", "90/5/5").json == done.json
    assert {path: path.stat().st_mtime_ns for path in folders[0].iterdir()} == before
    with pytest.raises(UserError, match="a run with other settings"):
        run_record(entry("flat-ternary", base(), BUDGET, {}), folders[0])


def test_a_contestant_that_does_not_fit_keeps_no_other_from_running(cli, tmp_path):
    words = ["bench", "budget", *QUICK, "--recipes", "flat-ternary,flat-float,recurrent-ternary"]
    words += ["--set", "flat-ternary:width=512", "--set", "flat-float:width=128", "--out", tmp_path / "out"]
    told = cli(*words)
    assert told.code == 2 and "error: flat-ternary: the model's trits take" in told.err
    assert "over the budget of 130,000" in told.err and "and 1 more do not fit" in told.err
    assert "flat-float: " in told.out and "recurrent-ternary" in (tmp_path / "out/table.md").read_text()
    alone = cli(*words[:-6], "--set", "flat-ternary:width=512", "--recipes", "flat-ternary", "--out", tmp_path / "no")
    assert alone.code == 2 and not (tmp_path / "no/table.md").exists()


def test_seeds_make_a_mean_with_its_spread():
    record = {
        "recipe": "flat-ternary",
        "config": {"model": {"width": 32, "depth": 2, "weights": "trit"}, "train": {"seed": 0, "rate": 1}},
        "rate": 0.03,
        "weights": 10,
        "steps": 5,
        "seconds": 1.0,
        "bytes": 7,
        "way": "base3",
        "bpb_before": 2.0,
        "ship_gap": 0.0,
        "scores": {"val_sliding": {"bpb": 2.0}, "val_chunked": {"bpb": 2.1}},
    }
    other = record | {"config": record["config"] | {"train": {"seed": 1, "rate": 1}}}
    other |= {"scores": {"val_sliding": {"bpb": 2.2}, "val_chunked": {"bpb": 2.1}}}
    third = record | {"config": record["config"] | {"train": {"seed": 0, "rate": 2}}, "recipe": "flat-float"}
    rows = table_of([record, other, third])
    assert [row[0] for row in rows] == ["flat-float", "flat-ternary"]
    assert rows[1][3] == "32 × 2" and rows[1][9] == "2.1000" and rows[1][12:] == ["2", "0.1414"]
    assert rows[0][12:] == ["1", ""]


def test_settings_for_nobody_are_refused(cli, tmp_path):
    told = cli("bench", "budget", *QUICK, "--recipes", "flat-ternary", "--set", "flat-float:rate=1", "--out", tmp_path)
    assert told.code == 2 and "names no contestant" in told.err
    told = cli("bench", "budget", *QUICK, "--recipes", "flat-ternary", "--set", "depth_plan=0.5:1", "--out", tmp_path)
    assert told.code == 2 and "depth_plan" in told.err
