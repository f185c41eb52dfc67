"""The study of scoring in small, and the tables that are made of it."""

import json
import sys
from types import ModuleType

import numpy as np
import pytest
import torch

from tritwise.data import open_bytes
from tritwise.models import ByteLM, ModelConfig
from tritwise.recipes import recipe
from tritwise.report.score_tables import TABLES, score_sources, score_table
from tritwise.score.learning import Learning
from tritwise.ship import write_artifact


@pytest.fixture(scope="module")
def study(benchmark_script) -> ModuleType:
    return benchmark_script("score_study")


@pytest.fixture(scope="module")
def task(study, tmp_path_factory):
    """A model that knows nothing yet, with a context of 32, and 3,000 bytes to read."""
    torch.manual_seed(0)
    artifact = tmp_path_factory.mktemp("study") / "model.tritwise"
    write_artifact(ByteLM(ModelConfig(width=32, depth=1, ctx=32)), artifact, {"steps": 0, "seconds": 0.0})
    text = np.array(open_bytes("shakespeare")[:3000])
    return study.Task(recipe("tiny"), artifact, text, torch.device("cpu"), 0.0, text)


@pytest.fixture(scope="module")
def record(study, task):
    """What the study writes, of the items that are quick."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["compress_items"], "BAD_BYTES", 96)
        patch.setattr(sys.modules["compress_items"], "DECODE_BYTES", 64)
        items = {name: study.ITEMS[name](task) for name in ("windows", "agree", "cheats", "bad", "decode")}
    items["mix"] = study.learn_item(task._replace(text=task.text[:1000]), Learning(mix=True))
    made = {"cpu": "a processor", "threads": 1, "device": "cpu", "torch": torch.__version__}
    about = {
        "bytes": 3000,
        "data": "shakespeare",
        "split": "90/10",
        "part": "val",
        "artifact": study._about(task.artifact),
    }
    return json.loads(json.dumps(about | {"manifest": made, "items": items}))


def test_ways_of_reading_agree(record):
    agree = record["items"]["agree"]
    assert max(agree["pieces"]["spread"], agree["text"]["spread"]) < 1e-4
    assert len(agree["pieces"]["bpb"]) == 5 and agree["text"]["bytes"] == 32 + (3000 - 32) // 16 * 16


def test_every_cheat_would_gain_and_is_rejected(record):
    cheats = record["items"]["cheats"]
    assert [row["breaks"] for row in cheats["rows"]] == [2, 1, 3, 4]
    for row in cheats["rows"]:
        assert row["rejected"] and row["would_claim"] < cheats["honest"], row


def test_bad_input_is_never_wrong_output(record):
    rows = record["items"]["bad"]["rows"]
    assert record["items"]["bad"]["wrong"] == 0
    for row in rows:
        comes_back = row["what"] in ("empty file", "one byte", "binary file")
        assert row["identical" if comes_back else "refused"] == row["cases"], row


def test_learning_is_bounded(record):
    mix = record["items"]["mix"]
    assert mix["bytes"] == 1000 and mix["gain"] == pytest.approx(mix["neural_bpb"] - mix["bpb"])
    assert mix["worst_prefix"] < 0.00071


def test_what_learns_can_be_decoded(record):
    rows = record["items"]["decode"]["rows"]
    assert set(rows) == {"mix", "adapt", "scales", "both"}
    for row in rows.values():
        assert row["identical"] and -1 < row["bytes"] - row["claimed_bits"] / 8 < 2


def test_tables(record):
    for name, (_, head, marks) in TABLES.items():
        assert len(head) == len(marks)
        lines = score_table(name, [record]).splitlines()
        if name in ("proof", "peers", "repeat", "compare"):
            assert "Nothing has been recorded" in lines[0]
        else:
            assert len({line.count(" | ") for line in lines[2:]} | {len(head) - 1}) == 1, name
    assert "**passes**" not in score_table("cheats", [record])
    told = score_sources([record], ["[file](file)"])
    assert "tinyshakespeare, first 3,000 bytes" in told and "trained in 0 steps" in told


def test_a_cheat_that_passes_is_shown(record):
    broken = json.loads(json.dumps(record))
    broken["items"]["cheats"]["rows"][0] |= {"rejected": False, "said": None}
    assert "**passes**" in score_table("cheats", [broken])


def test_a_call_that_was_cut_off_goes_on(study, task, tmp_path, monkeypatch, capsys):
    asked: list[list[str]] = []

    def run(command: list[str], limit: float) -> dict:
        asked.append(command)
        return {"code": 0, "seconds": 1.0, "said": ""}

    monkeypatch.setattr(study, "run_limited", run)
    (tmp_path / "windows.json").write_text("{}")
    monkeypatch.setattr(
        sys, "argv", ["score_study.py", "--model", str(task.artifact), "--groups", "cuda", "--out", str(tmp_path)]
    )
    assert study.main() == 1  # nothing was made by `run`, and that is told
    chains = [word.removeprefix("--item=") for command in asked for word in command if word.startswith("--item=")]
    assert sorted(chains) == ["agree,cheats", "bad", "compress", "mix,adapt,scales,repeat", "peers"]
    assert json.loads((tmp_path / "study.json").read_text())["items"] == {"windows": {}}
