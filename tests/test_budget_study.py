"""The script of the study under a budget: its cells, and that it can be cut off and taken up."""

import importlib.util
import sys
from pathlib import Path

import pytest

from tritwise.bench.entries import ENTRIES, PARTS
from tritwise.files import make_folder, read_json, write_json

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def study():
    spec = importlib.util.spec_from_file_location("budget_study", ROOT / "benchmarks/budget_study.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["budget_study"] = module
    spec.loader.exec_module(module)
    return module


def test_cells_are_the_contest_and_fit_into_nine_minutes(study, tmp_path):
    cells = study.Study("shakespeare", tmp_path, tiny=False)
    assert [config.recipe for config in cells.main()] == list(ENTRIES)
    assert {config.train.seconds for config in cells.main4()} == {400}
    assert {config.train.budget for config in cells.main4()} == {4_000_000}
    assert len(cells.tune()) == 12
    assert all(study.estimated(config) <= 540 for stage in (cells.tune, cells.main, cells.ablate) for config in stage())
    ablated = cells.ablate()
    assert len(ablated) == 2 * (2 + len(PARTS)) and len({study.folder_name(c) for c in ablated}) == len(ablated)
    assert len({(c.model.width, c.model.depth, c.train.steps, c.train.depth_plan) for c in ablated}) == 1
    assert not any(ablated[2 + at].model == ablated[0].model for at in range(len(PARTS)))
    with pytest.raises(study.UserError, match="run main first"):
        cells.seeds()


def test_the_tuned_rate_is_taken_and_a_study_goes_on(study, small_text, tmp_path, capsys):
    words = ["--data", str(small_text), "--out", str(tmp_path), "--tiny"]
    assert study.run(["tune", *words, "--minutes", "-1"]) == 3
    assert "12 cells are left" in capsys.readouterr().out
    cells = study.Study(str(small_text), tmp_path, tiny=True)
    for config, bpb in zip(cells.tune(), (3.0, 3.0, 3.0, 3.0, 2.5, 3.5, 2.0, 3.1, 2.9, 2.1, 2.7, 3.0), strict=True):
        record = {"recipe": config.recipe, "rate": config.train.rate, "scores": {"val_sliding": {"bpb": bpb}}}
        write_json(make_folder(cells.folder(config)) / "record.json", record)
    assert cells.best_rate("flat-ternary") == 0.02 and cells.best_rate("recurrent-ternary-constant") == 0.045
    assert cells.best_rate("flat-float") == 0.01
    cells.main = lambda *_: [cells.cell("flat-ternary", 16_000_000, 0.0, rate=cells.best_rate("flat-ternary"))]  # type: ignore[method-assign]
    assert study.run_stage(cells, "main", 1e18, study.Console(quiet=True)) == 0
    told = read_json(tmp_path / "main.json")
    assert [record["rate"] for record in told["records"]] == [0.02] and told["records"][0]["ship_gap"] == 0
    assert "| flat-ternary | 0.02 |" in (tmp_path / "main.md").read_text()
    assert study.run(["everything", *words]) == 2
