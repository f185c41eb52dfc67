"""The script of the study under a budget: its cells, and that it can be cut off and taken up."""

import dataclasses
import importlib
import importlib.util
import sys
from pathlib import Path

import pytest

from tritwise.bench.entries import ENTRIES, PARTS
from tritwise.files import make_folder, read_json, write_json
from tritwise.report.budget_rows import unpacked
from tritwise.train.checkpoint import CheckpointStore

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
    assert len(cells.tune()) == 21 and {config.train.seconds for config in cells.tune()} == {100}
    for stage in ("tune", "main", "ablate"):
        assert all(study.estimated(config, stage, {}) <= 540 for config in getattr(cells, stage)())
    assert study.estimated(cells.main()[0], "main", {"main flat-float": 50.0}) == pytest.approx(455)
    ablated = cells.ablate()
    assert len(ablated) == 2 * (2 + len(PARTS)) and len({study.folder_name(c) for c in ablated}) == len(ablated)
    assert len({(c.model.width, c.model.depth, c.train.steps, c.train.depth_plan) for c in ablated}) == 1
    assert not any(ablated[2 + at].model == ablated[0].model for at in range(len(PARTS)))
    for stage, configs in (("ablate", ablated), ("small", cells.small()[: len(study.ABLATIONS)])):
        told = [study.tagged({"recipe": c.recipe, "config": c.as_dict()}, stage) for c in configs]
        assert [one["variant"] for one in told] == list(study.ABLATIONS) * (len(told) // len(study.ABLATIONS))
    with pytest.raises(study.UserError, match="run main first"):
        cells.seeds()
    assert study.waves(["tune", "main", "main4", "seeds", "ablate"]) == [
        ["tune"],
        ["main", "main4"],
        ["seeds"],
        ["ablate"],
    ]


def tuned(study, folder, small_text):
    """A tiny study whose stage tune has been run: records of made-up scores."""
    cells = study.Study(str(small_text), folder, tiny=True)
    best = {("flat-ternary", 0.02): 2.5, ("flat-float", 0.01): 2.0, ("recurrent-ternary", 0.03): 2.1}
    for config in cells.tune():
        bpb = best.get((config.recipe, config.train.rate), 3.0)
        record = {"recipe": config.recipe, "rate": config.train.rate, "scores": {"val_sliding": {"bpb": bpb}}}
        write_json(make_folder(cells.folder(config)) / "record.json", record)
    return cells


def test_the_best_rate_is_taken(study, small_text, tmp_path, capsys):
    words = ["--data", str(small_text), "--out", str(tmp_path / "new"), "--tiny"]
    assert study.run(["tune", *words, "--minutes", "-1"]) == 3
    assert "21 cells are left" in capsys.readouterr().out
    assert study.run(["tune", *words, "--minutes", "-1", "--only", "flat-float,flat-ternary"]) == 3
    assert "8 cells are left" in capsys.readouterr().out
    assert study.run(["tune", *words, "--only", "flat-flat"]) == 2
    assert "there is no contestant 'flat-flat'" in capsys.readouterr().err
    cells = tuned(study, tmp_path, small_text)
    assert cells.best_rate("flat-ternary") == 0.02 and cells.best_rate("recurrent-ternary-constant") == 0.03
    assert cells.best_rate("flat-float") == 0.01 and cells.best_rate("recurrent-ternary-lean-3-trits-ngrams") == 0.005
    assert {config.train.rate for config in cells.main() if config.recipe == "flat-float"} == {0.01}
    given = study.Study(str(small_text), tmp_path, tiny=True, rate=0.5)
    assert {config.train.rate for config in [*given.main(), *given.main4()]} == {0.5}
    assert [study.folder_name(c) for c in given.tune()] == [study.folder_name(c) for c in cells.tune()]
    changed = study.Study(str(small_text), tmp_path, tiny=True, changes={"width": "64", "rate": "0.25"})
    assert {(c.model.width, c.train.rate) for c in [*changed.main(), *changed.main4()]} == {(64, 0.25)}
    assert [study.folder_name(c) for c in changed.tune()] == [study.folder_name(c) for c in cells.tune()]
    assert study.run(["everything", *words]) == 2
    assert study.run(["tune", *words, "--known", str(tmp_path / "missing.json")]) == 2


def test_what_a_result_file_has_of_tune_is_not_run_again(study, small_text, tmp_path):
    cells = tuned(study, tmp_path, small_text)
    records = [cells.record(c) | {"stage": "tune", "config": c.as_dict()} for c in cells.tune()]
    other = records[3] | {"stage": "main", "scores": {"val_sliding": {"bpb": 0.1}}}
    write_json(tmp_path / "known.json", {"kind": "budget", "records": [*records[:-1], other]})
    again = study.Study(str(small_text), tmp_path / "new", tiny=True, known=tmp_path / "known.json")
    assert [study.folder_name(c) for c in again.tune() if again.open(c)] == [study.folder_name(cells.tune()[-1])]
    assert again.best_rate("flat-ternary") == 0.02 and all(again.open(c) for c in again.main())
    # One run for the whole time says nothing of rates, two do.
    whole = made_at(again, {0.03: 1.5, 0.045: 1.4})
    for count, best in ((1, 0.02), (2, 0.045)):
        write_json(tmp_path / "known.json", {"kind": "budget", "records": [*records[:-1], *whole[:count]]})
        again = study.Study(str(small_text), tmp_path / "new", tiny=True, known=tmp_path / "known.json")
        assert again.best_rate("flat-ternary") == again.best_rate("flat-ternary-ngrams") == best
    # Rates of its own for the whole time come before those of the one that it is made after.
    own = [one | {"recipe": "flat-ternary-ngrams"} for one in made_at(again, {0.03: 1.2, 0.014: 1.1, 0.02: 1.3})]
    for count, best in ((1, 0.045), (3, 0.014)):
        write_json(tmp_path / "known.json", {"kind": "budget", "records": [*records[:-1], *whole, *own[:count]]})
        again = study.Study(str(small_text), tmp_path / "new", tiny=True, known=tmp_path / "known.json")
        assert (again.best_rate("flat-ternary"), again.best_rate("flat-ternary-ngrams")) == (0.045, best)
    longer = study.Study(str(small_text), tmp_path, tiny=True, seconds=800.0, known=tmp_path / "known.json")
    assert longer.best_rate("flat-ternary") == 0.02


def made_at(cells, scores: dict[float, float]) -> list[dict]:
    """What is known of flat ternary runs for the whole time, by their rates."""
    alike = {"stage": "main", "recipe": "flat-ternary", "config": {"train": {"seconds": cells.seconds}}}
    return [alike | {"rate": rate, "scores": {"val_sliding": {"bpb": bpb}}} for rate, bpb in scores.items()]


def test_cells_run_side_by_side_each_on_a_gpu_of_its_own(study, small_text, tmp_path, monkeypatch):
    """Two processes at once, each told of another GPU; what they left is in the table, without what is large."""
    cells, given = tuned(study, tmp_path, small_text), []
    own = [
        cells.cell(name, 16_000_000, 0.0, rate=rate) for name, rate in (("flat-ternary", 0.02), ("flat-float", 0.01))
    ]
    monkeypatch.setattr(cells, "main", lambda *_: own)
    monkeypatch.setattr(study.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")

    def started(command, *, env, **rest):
        stage, name = command[2], command[command.index("--cell") + 1]
        given.append(env["CUDA_VISIBLE_DEVICES"])
        code = f"import sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r}); import budget_study as b\n"
        code += f"from pathlib import Path\ns = b.Study({str(small_text)!r}, Path({str(tmp_path)!r}), True)\n"
        code += "own = [s.cell(n, 16_000_000, 0.0, rate=r) for n, r in (('flat-ternary', .02), ('flat-float', .01))]\n"
        code += f"s.main = lambda *_: own\nsys.exit(b.run_cell(s, {stage!r}, {name!r}))"
        return Popen([sys.executable, "-c", code], env=env, **rest)

    Popen = study.subprocess.Popen
    monkeypatch.setattr(study.subprocess, "Popen", started)
    assert study.run_wave(cells, ["main"], 1e18, study.Console(quiet=True), [], slim=True) == 0
    assert given == ["5", "7"]
    told = read_json(tmp_path / "main.json")
    assert [record["rate"] for record in told["records"]] == [0.02, 0.01] and told["records"][0]["ship_gap"] == 0
    table = (tmp_path / "main.md").read_text()
    assert "contestant's after 100 s" in table and "| flat-ternary | 0.02 |" in table
    assert "**150,000 bytes, 4 steps of training.**" in table
    folder = cells.folder(own[0])
    assert not (folder / "checkpoints").exists() and not (folder / "model.tritwise").exists()
    walls = read_json(tmp_path / "walls.json")
    assert set(walls) == {"main flat-ternary", "main flat-float"} and min(walls.values()) > 0
    # A stopped cell needs what is left of it, and what it took before is not taken for what is beside training.
    later = cells.cell("flat-ternary", 16_000_000, 0.0, rate=0.02)
    CheckpointStore(cells.folder(later) / "checkpoints").save(2, {}, {"trained": 40.0})
    assert cells.trained(later) == 40 and cells.trained(own[1]) == 0
    assert study.estimated(later, "main", {}, 40.0) == study.STEPPED - 40 + study.OTHERS
    assert study.estimated(later, "main", {}, 4000.0) == study.OTHERS
    # One that may begin needs no more than to get on, or what is left of it.
    ask = [
        study.needed(own[0], "main", walls, 0.0, begin)
        for begin in (False, True)
        for walls in ({}, {"main flat-ternary": 5.0})
    ]
    assert ask[:2] == [study.estimated(own[0], "main", {}), study.STEPPED + 5.5] and ask[2:] == [
        study.WARM,
        study.STEPPED + 5.5,
    ]
    # What one contestant took says nothing of another.
    seen = {"main flat-ternary": 10.0}
    assert [round(study.estimated(c, "main", seen) - study.STEPPED) for c in own] == [11, round(study.OTHERS)]
    # What they left can be collected as it is.
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    collect = importlib.import_module("collect_budget")
    assert collect.main([str(tmp_path), "--date", "2026-01-31", "--root", str(tmp_path / "root")]) == 0
    kept = read_json(tmp_path / "root/benchmarks/results/budget_cpu2_2026-01-31.json")
    trit, real = sorted(unpacked(kept), key=lambda record: record["rate"], reverse=True)
    assert trit["stage"] == real["stage"] == "main" and trit["scores"]["val_chunked"]["bpb"] == trit["chunked_before"]
    assert trit.items() >= told["records"][0].items()
    copied = [path for path in (tmp_path / "root/records/cpu2").rglob("*") if path.is_file()]
    assert len(copied) == 8 and not any(str(tmp_path) in path.read_text() for path in copied)
    assert read_json(tmp_path / "root/records/cpu2" / f"main-{folder.name}" / "record.json")["sha256"] == trit["sha256"]


@pytest.mark.parametrize(("stage", "begun"), [("ablate", ["0", "1", "0", "1"]), ("main", ["0", "1"])])
def test_only_cells_that_go_by_steps_share_a_gpu(study, small_text, tmp_path, monkeypatch, stage, begun):
    cells, running, most = study.Study(str(small_text), tmp_path, tiny=True), [], []
    own = getattr(cells, stage)()[:5]
    monkeypatch.setattr(cells, stage, lambda *_: own)
    monkeypatch.setattr(study.torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    class Process:
        def __init__(self, command, *, env, **rest):
            running.append(env["CUDA_VISIBLE_DEVICES"])

        def poll(self):
            most.append(list(running))
            return 0

    monkeypatch.setattr(study.subprocess, "Popen", Process)
    assert study.run_wave(cells, [stage], 1e18, study.Console(quiet=True), [], each=2) == len(own)
    assert most[0] == begun and len(running) == len(own)


def test_a_cell_that_cannot_work_is_not_tried_again(study, small_text, tmp_path, capsys):
    cells = study.Study(str(small_text), tmp_path, tiny=True)
    config = cells.tune()[0]
    write_json(make_folder(cells.folder(config)) / "config.json", config.as_dict() | {"recipe": "another"})
    assert cells.open(config) and study.run_cell(cells, "tune", study.folder_name(config)) == 1
    assert "is a run with other settings" in read_json(cells.folder(config) / "failed.json")["error"]
    assert not cells.open(config)


def test_a_stopped_cell_goes_on(study, small_text, tmp_path, monkeypatch, stop_at):
    cells = study.Study(str(small_text), tmp_path, tiny=True)
    told = cells.small()[0]
    config = dataclasses.replace(told, train=dataclasses.replace(told.train, log_interval=1))
    monkeypatch.setattr(cells, "small", lambda: [config])
    name, folder = study.folder_name(config), cells.folder(config)
    with monkeypatch.context() as patch:
        patch.setattr(study, "PlainLines", lambda *_: stop_at(2))
        assert study.run_cell(cells, "small", name) == 1
    assert cells.open(config) and not (folder / "failed.json").exists() and (folder / "checkpoints").exists()
    assert study.run_cell(cells, "small", name) == 0
    assert not cells.open(config) and read_json(folder / "record.json")["steps"] > 2
