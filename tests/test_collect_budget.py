"""From the folder of a study, with made-up runs, to result files and records that say nothing of where files lay."""

import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tritwise.errors import UserError
from tritwise.files import JsonLines, make_folder, read_json, read_json_lines, write_json
from tritwise.report.budget_rows import unpacked

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def collect(benchmark_script) -> ModuleType:
    return benchmark_script("collect_budget")


def make_run(out: Path, name: str, device: str = "NVIDIA H100 80GB HBM3", lines: int = 2, **changes: Any) -> Path:
    """A finished run as the study leaves it, in `out`. changes: of the record, or of settings of training."""
    folder = make_folder(out / "records" / name)
    recipe, seed, _ = name.rsplit("-", 2)
    train = {
        "data": "enwik8.gz",
        "split": "90/5/5",
        "seconds": 90.0,
        "seed": int(seed),
        "rate": 0.02,
        "budget": 16_000_000,
    }
    train |= {key: changes.pop(key) for key in list(changes) if key in train}
    record = {
        "recipe": recipe,
        "config": {"model": {"width": 64}, "train": train},
        "device": device,
        "log": "metrics.jsonl",
    }
    record |= {
        "rate": train["rate"],
        "seed": int(seed),
        "file": "model.tritwise",
        "bytes": 9,
        "cpu": "abacus",
        "threads": 1,
    }
    write_json(folder / "record.json", record | changes)
    write_json(folder / "config.json", {"recipe": recipe, "train": train | {"data": str(out / "enwik8.gz")}})
    made = dict.fromkeys(
        ("tritwise", "git_commit", "python", "torch", "platform", "cpu", "threads", "seed", "started"), 1
    )
    command = ["budget_study.py", "main", "--data", str(out / "enwik8.gz"), f"--out={out}"]
    write_json(folder / "manifest.json", made | {"device": device, "backends": {}, "command": command})
    write_json(folder / "result.json", {"run": str(folder), "val_chunked": {"bpb": 1.5}})
    with JsonLines(folder / "metrics.jsonl") as log:
        log.write({"kind": "event", "step": 0, "message": f"read {out / 'enwik8.gz'}: all of it"})
        for step in range(1, lines + 1):
            log.write({"kind": "train", "step": step, "loss": 1 / step})
            log.write({"kind": "layers", "step": step, "layers": {"embed": 0.5}})
    (folder / "model.tritwise").write_bytes(b"a model")
    make_folder(folder / "checkpoints")
    return folder


def test_a_study_becomes_a_file_for_each_machine_and_records(collect, tmp_path, capsys):
    study, root = tmp_path / "study", tmp_path / "root"
    make_run(study, "flat-float-0-aaaa", stage="main")
    make_run(study, "flat-float-0-bbbb", "cpu", stage="main")
    make_run(study, "flat-ternary-1-cccc", "NVIDIA H200", stage="seeds", lines=500)
    make_run(study, "flat-ternary-0-dddd", stage="tune")
    unfinished = make_run(study, "flat-ternary-0-eeee", stage="tune")
    (unfinished / "record.json").unlink()
    failed = make_run(study, "flat-float-0-ffff", rate=0.5)
    (failed / "record.json").unlink()
    write_json(
        failed / "failed.json", {"error": f"{study}/records/x/model.tritwise has 17 bytes, 1 over; or/and 90/5/5"}
    )
    assert collect.main([str(study), "--date", "2026-01-31", "--root", str(root)]) == 0
    assert "budget_h100_2026-01-31.json: 2 runs" in capsys.readouterr().out
    kinds = {
        kind: read_json(root / f"benchmarks/results/budget_{kind}_2026-01-31.json") for kind in ("h100", "h200", "cpu2")
    }
    assert [record["stage"] for record in unpacked(kinds["h100"])] == ["tune", "main"]
    assert unpacked(kinds["h200"])[0]["chunked_before"] == 1.5 and unpacked(kinds["cpu2"])[0]["device"] == "cpu"
    (told,) = kinds["h100"]["failed"]
    assert told["error"] == "model.tritwise has 17 bytes, 1 over; or/and 90/5/5" and told["rate"] == 0.5
    folders = sorted(str(path.relative_to(root)) for path in (root / "records").glob("*/*"))
    assert folders == [
        "records/cpu2/main-flat-float-0-bbbb",
        "records/h100/main-flat-float-0-aaaa",
        "records/h200/seeds-flat-ternary-1-cccc",
    ]
    written = [path for path in root.rglob("*") if path.is_file()]
    assert not any(str(tmp_path) in path.read_text() for path in written)
    short, long = (root / folders[0], root / folders[2])
    names = {"record.json", "config.json", "manifest.json"}
    assert {path.name for path in short.iterdir()} == names | {"metrics_thinned.jsonl"}
    assert read_json(short / "record.json")["log"] == "metrics_thinned.jsonl"
    assert read_json(short / "config.json")["train"]["data"] == "enwik8.gz"
    assert read_json(short / "manifest.json")["command"][2:] == ["--data", "enwik8.gz", "--out=study"]
    first, *rest = read_json_lines(long / "metrics_thinned.jsonl")
    assert first == {
        "kind": "thinned",
        "message": "kept 100 of 500 lines of train, 1 of 500 lines of layers, evenly spaced; all others",
    }
    assert [line["step"] for line in rest if line["kind"] == "train"] == [*range(5, 501, 5)]
    assert (
        rest[-1] == {"kind": "layers", "step": 500, "layers": {"embed": 0.5}}
        and rest[0]["message"] == "read enwik8.gz: all of it"
    )


def test_a_short_log_stays_whole(collect):
    lines = [{"kind": "train", "step": step} for step in range(collect.MOST)] + [{"kind": "layers"}]
    assert collect.thinned(lines) is lines


def test_runs_of_other_folders_are_kept_if_they_are_named(collect, tmp_path, capsys):
    root, words = tmp_path / "root", ["--root", str(tmp_path / "root"), "--date"]
    make_run(tmp_path / "one", "flat-float-0-aaaa", stage="main")
    make_run(tmp_path / "two", "flat-float-0-bbbb", stage="main", seconds=400.0)
    assert collect.main([str(tmp_path / "one"), *words, "2026-01-30"]) == 0
    first = root / "benchmarks/results/budget_h100_2026-01-30.json"
    assert collect.main([str(tmp_path / "two"), *words, "2026-01-30"]) == 2  # nothing is overwritten
    assert "has 1 runs that these sources lack" in capsys.readouterr().err
    assert len(unpacked(read_json(first))) == 1
    assert collect.main([str(tmp_path / "two"), *words, "2026-01-31"]) == 0
    assert "has 1 runs that these sources lack" in capsys.readouterr().out
    second = root / "benchmarks/results/budget_h100_2026-01-31.json"
    assert collect.main([str(second), str(first), str(tmp_path / "two"), *words, "2026-01-31"]) == 0
    assert [record["config"]["train"]["seconds"] for record in unpacked(read_json(second))] == [400.0, 90.0]


def test_one_cell_on_two_processors_is_two_runs(collect, tmp_path):
    words = ["--root", str(tmp_path / "root"), "--date", "2026-01-31"]
    for cpu in ("abacus", "slide rule"):
        make_run(tmp_path / cpu, "flat-float-0-aaaa", "cpu", cpu=cpu)
    assert collect.main([str(tmp_path / "abacus"), str(tmp_path / "slide rule"), *words]) == 0
    target = tmp_path / "root/benchmarks/results/budget_cpu2_2026-01-31.json"
    assert sorted(record["cpu"] for record in unpacked(read_json(target))) == ["abacus", "slide rule"]
    assert collect.main([str(target), str(tmp_path / "abacus"), *words]) == 0  # again: it takes the place of its own
    assert sorted(record["cpu"] for record in unpacked(read_json(target))) == ["abacus", "slide rule"]


def test_records_that_do_not_say_their_stage(collect, tmp_path):
    """Those of an older study by what they are, and all others are of `tritwise bench budget`, with its command."""
    changes: list[dict[str, Any]] = [
        {"split": "90/1/9"},
        {},
        {"budget": 4_000_000},
        {"seconds": 0.0},
        {"seconds": 0.0, "split": "90/10"},
    ]
    for number, own in enumerate(changes):
        make_run(tmp_path, f"recurrent-float-0-{number}", **own)
    make_run(tmp_path, "recurrent-float-1-5")
    stages = [run.record["stage"] for run in collect.runs_of(tmp_path)]
    assert stages == ["bench"] * 6 and collect.runs_of(tmp_path)[0].record["command"].startswith("tritwise main --data")
    write_json(tmp_path / "main.json", {})
    assert [run.record["stage"] for run in collect.runs_of(tmp_path)] == [
        "tune",
        "main",
        "main4",
        "ablate",
        "small",
        "seeds",
    ]


def test_what_cannot_be_collected_is_refused(collect, tmp_path, capsys):
    with pytest.raises(UserError, match="holds no records"):
        collect.runs_of(tmp_path)
    write_json(tmp_path / "x.json", {"rows": []})
    assert collect.main([str(tmp_path / "x.json")]) == 2 and "no result file of a budget" in capsys.readouterr().err
    make_run(tmp_path / "study", "flat-float-0-aaaa", "NVIDIA T4", stage="main")
    assert collect.main([str(tmp_path / "study"), "--root", str(tmp_path)]) == 2
    assert "NVIDIA T4" in capsys.readouterr().err


def test_committed_records_hold_no_paths_and_no_models():
    root = BENCHMARKS.parent / "records"
    files = [path for path in root.rglob("*") if path.is_file() and path.name != "README.md"]
    assert {path.suffix for path in files} <= {".json", ".jsonl"}
    texts = [*files, *(BENCHMARKS / "results").glob("budget_*.json")]
    assert not [path for path in texts if re.search(r"\"/|[= ]/\w", path.read_text())]
    assert json.loads((BENCHMARKS / "results/budget_cpu2_2026-11-24.json").read_text())["kind"] == "budget"
