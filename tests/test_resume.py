"""Resuming: a run that was stopped, killed or lengthened ends with the bits of one that never stopped."""

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tritwise.bench.entries import PARTS
from tritwise.errors import UserError
from tritwise.files import read_json, read_json_lines
from tritwise.ship.container import read_container
from tritwise.train import RunFolder, override, train

FIGURES = ("val", "val_chunked", "averaged")
TIMES = ("seconds", "step_seconds", "bytes_per_second")


def course(run: Path) -> list[dict]:
    """Every line of the metrics that says what was computed, without how long it took."""
    lines = [line for line in read_json_lines(run / "metrics.jsonl") if line["kind"] != "event"]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def figures(run: Path) -> dict:
    return {key: value["bpb"] for key, value in read_json(run / "result.json").items() if key in FIGURES}


@pytest.fixture
def same_run(assert_same_state):
    """same_run(one, other): registers, exponents, momentum, metrics and scores are equal to the last bit."""

    def check(one: Path, other: Path) -> None:
        assert_same_state(one, other)
        assert course(one) == course(other)
        assert figures(one) == figures(other)
        for name in ("histogram.json", "model.tritwise"):
            assert (one / name).exists() == (other / name).exists()
        if (one / "histogram.json").exists():
            assert read_json(one / "histogram.json") == read_json(other / "histogram.json")

    return check


RECURRENT = PARTS | {"depth": 3, "prelude": 1, "loops": 3, "average_from": 0.3, "exclusive": 2}
VARIANTS = {
    "plain": {},
    "accumulated": {"accum": 2},
    "n-grams": {"ngrams": 3, "ngram_rows": 64},
    "words through a matrix, dropped": {"word_tables": 2, "ngram_rows": 64, "ngram_width": 8, "ngram_dropout": 0.3},
    "scales": {"scale_rate": 0.05},
    "two trits a weight": {"weight_trits": 2, "scale_rate": 0.05, "column_scales": True, "experts": 2},
    "turns": {"interval": 4},
    "float8 products": {"mlp_ratio": 32, "group": 65_536, "fp8": True},
    "grouped heads and a window": {"heads": 2, "kv_heads": 1, "window": 5},
    "adamw": {"weights": "float", "optimizer": "adamw", "rate": 0.003},
    "muon": {"weights": "float", "optimizer": "muon", "rate": 0.02},
    # Stopped in the second of three phases, so that the third comes after the resume.
    "deepening": {"depth_plan": "0.3:1,0.7:2,1:3", "average_every": 2, **RECURRENT},
    "deepening in float": {
        "depth_plan": "0.3:1,0.7:2,1:3",
        "average_every": 2,
        "weights": "float",
        "optimizer": "muon",
        "clip": 0.3,
        "momentum_start": 0.5,
        "momentum_warmup": 9,
        "weight_decay": 0.04,
        **RECURRENT,
    },
}


@pytest.mark.parametrize("name", VARIANTS)
def test_stopped_and_resumed_is_never_stopped(name: str, small_config, stop_at, tmp_path: Path, same_run):
    config = small_config(**VARIANTS[name])
    train(config, tmp_path / "whole")
    # Stopped in the middle of the schedule, at a step that is no multiple of the save interval.
    assert train(config, tmp_path / "parts", display=stop_at(6))["interrupted"]
    done = train(config, tmp_path / "parts", resume=True)
    assert done["steps"] == 12 and "interrupted" not in done
    same_run(tmp_path / "whole", tmp_path / "parts")


def test_stopped_again_and_again(small_config, stop_at, tmp_path: Path, same_run):
    train(small_config(), tmp_path / "whole")
    for number, step in enumerate((2, 4, 8, 10)):
        train(small_config(), tmp_path / "parts", display=stop_at(step), resume=number > 0)
    train(small_config(), tmp_path / "parts", resume=True)
    same_run(tmp_path / "whole", tmp_path / "parts")
    messages = [line["message"] for line in read_json_lines(tmp_path / "parts/metrics.jsonl") if "message" in line]
    assert messages == [
        text for step in (2, 4, 8, 10) for text in (f"stopped at step {step}", f"resumed from step {step}")
    ]


def test_another_file_with_the_same_bytes_resumes(small_config, stop_at, small_text, tmp_path, same_run, monkeypatch):
    monkeypatch.setenv("TRITWISE_CACHE", str(tmp_path / "cache"))
    packed = tmp_path / "text.gz"
    packed.write_bytes(gzip.compress(small_text.read_bytes()))
    train(small_config(), tmp_path / "whole")
    config = small_config(data=str(packed))
    train(config, tmp_path / "parts", display=stop_at(6))
    packed.write_bytes(gzip.compress(small_text.read_bytes(), 1))
    train(config, tmp_path / "parts", resume=True)
    same_run(tmp_path / "whole", tmp_path / "parts")


def test_more_steps_of_a_constant_rate(small_config, tmp_path: Path, cli, assert_same_state, state_of):
    train(small_config(decay=0, steps=16), tmp_path / "whole")
    train(small_config(decay=0, steps=8), tmp_path / "parts")
    assert len(state_of(tmp_path / "parts")) == len(state_of(tmp_path / "whole"))
    assert cli("train", "--resume", "--out", tmp_path / "parts", "--steps", 16).code == 0
    assert_same_state(tmp_path / "whole", tmp_path / "parts")
    losses = [[row["loss"] for row in course(tmp_path / run) if row["kind"] == "train"] for run in ("whole", "parts")]
    assert losses[0] == losses[1]


def test_more_steps_are_remembered(small_config, stop_at, tmp_path: Path, cli, assert_same_state):
    """A run that was given more steps, and then killed, must not go back to the steps it began with."""
    longer = override(small_config(), {"steps": 20})
    train(small_config(), tmp_path / "one")
    train(longer, tmp_path / "one", resume=True)
    train(small_config(), tmp_path / "two")
    train(longer, tmp_path / "two", resume=True, display=stop_at(16))
    assert cli("train", "--resume", "--out", tmp_path / "two", "--json").json["steps"] == 20
    assert_same_state(tmp_path / "one", tmp_path / "two")
    assert RunFolder(tmp_path / "two").config() == longer


def test_fewer_steps_than_there_are(small_config, tmp_path: Path):
    train(small_config(), tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(UserError, match="is at step 12 already; resume it with --steps 12 or more"):
        train(small_config(steps=11), tmp_path, resume=True)
    assert (tmp_path / "config.json").read_bytes() == before


def test_a_finished_run_is_finished_again(small_config, tmp_path: Path, cli, same_run):
    for name in ("one", "two"):
        train(small_config(), tmp_path / name)
    _, artifact = read_container(tmp_path / "two/model.tritwise")
    (tmp_path / "two/result.json").unlink()
    again = cli("train", "--resume", "--out", tmp_path / "two", "--json")
    assert again.code == 0 and again.json["steps"] == 12 and "resumed from step 12" in again.err
    same_run(tmp_path / "one", tmp_path / "two")
    assert read_container(tmp_path / "two/model.tritwise")[1] == artifact


def test_killed_before_the_first_checkpoint_starts_over(small_config, tmp_path: Path, same_run):
    train(small_config(), tmp_path / "one")
    train(small_config(), tmp_path / "two")
    for path in (tmp_path / "two/checkpoints").iterdir():
        path.unlink()
    train(small_config(), tmp_path / "two", resume=True)
    same_run(tmp_path / "one", tmp_path / "two")
    # … and with no more than a config.
    (tmp_path / "three").mkdir()
    (tmp_path / "three/config.json").write_bytes((tmp_path / "one/config.json").read_bytes())
    train(small_config(), tmp_path / "three", resume=True)
    same_run(tmp_path / "one", tmp_path / "three")


def test_lines_after_the_checkpoint_are_dropped(small_config, stop_at, tmp_path: Path, same_run):
    train(small_config(), tmp_path / "one")
    train(small_config(), tmp_path / "two", display=stop_at(6))
    with (tmp_path / "two/metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "train", "step": 8, "loss": 1}) + "\n")
        file.write(json.dumps({"kind": "eval", "step": 10, "loss": 1}) + "\n")
        file.write('{"kind": "train", "step": 10, "lo')  # torn by a kill
    train(small_config(), tmp_path / "two", resume=True)
    same_run(tmp_path / "one", tmp_path / "two")


def test_an_earlier_checkpoint_serves_as_well(small_config, tmp_path: Path, same_run):
    config = small_config(keep=0)
    for name in ("one", "two"):
        train(config, tmp_path / name)
    damaged = tmp_path / "two/checkpoints/step_00000012.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"cut short.*; delete .*step_00000012\.json to resume from step 8"):
        train(config, tmp_path / "two", resume=True)
    damaged.with_suffix(".json").unlink()
    train(config, tmp_path / "two", resume=True)
    same_run(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seed", 1], "seed cannot change in the middle of a run; start a new one with another --out"),
        (["--batch", 8], "batch cannot change"),
        (["--accum", 2], "accum cannot change"),
        (["--ctx", 8], "ctx cannot change"),
        (["--width", 64], "width cannot change"),
        (["--depth", 3], "depth cannot change"),
        (["--rate", 0.5], "rate cannot change"),
        (["--data", "shakespeare"], "data cannot change"),
        (["--set", "split=80/20"], "split cannot change"),
        (["--set", "decay=0.1"], "decay cannot change"),
        (["--recipe", "shakespeare"], "is a run of tiny, not shakespeare; leave out --recipe"),
    ],
)
def test_what_would_make_another_run_is_refused(flags: list, message: str, copied: Path, cli):
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    refused = cli("train", "--resume", "--out", copied, *flags)
    assert refused.code == 2 and message in refused.err
    assert {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()} == before


def test_what_may_change(copied: Path, cli):
    flags = ["--recipe", "tiny", "--steps", 62, "--log-interval", 1, "--eval-interval", 0, "--save-interval", 1]
    flags += ["--seed", 0, "--width", 32, "--set", "keep=3", "--set", "sample_bytes=0", "--set", "eval_bytes=64"]
    done = cli("train", "--resume", "--out", copied, *flags, "--json")
    assert done.code == 0 and done.json["steps"] == 62
    assert RunFolder(copied).store().steps() == [60, 61, 62]


def test_other_bytes_in_the_same_file_are_refused(small_config, stop_at, small_text: Path, tmp_path: Path):
    data = tmp_path / "text.txt"
    data.write_bytes(small_text.read_bytes())
    config = small_config(data=str(data))
    train(config, tmp_path / "run", display=stop_at(6))
    data.write_bytes(small_text.read_bytes() + b"ten bytes more")
    with pytest.raises(
        UserError, match=r"cannot resume exactly: bytes was 2700, is 2712, digest was .*; give the same"
    ):
        train(config, tmp_path / "run", resume=True)
    changed = bytearray(small_text.read_bytes())
    changed[100] ^= 1
    data.write_bytes(changed)
    with pytest.raises(UserError, match="cannot resume exactly: digest was"):
        train(config, tmp_path / "run", resume=True)
    data.write_bytes(small_text.read_bytes())
    assert train(config, tmp_path / "run", resume=True)["steps"] == 12


def test_nothing_to_resume(small_config, tmp_path: Path):
    with pytest.raises(UserError, match="holds no run to resume; leave out --resume to start one"):
        train(small_config(), tmp_path / "none", resume=True)
    assert not (tmp_path / "none").exists()


def test_a_checkpoint_of_another_shape_is_refused(small_config, tmp_path: Path):
    train(small_config(), tmp_path / "run")
    with pytest.raises(UserError, match=r"checkpoint 12 does not fit the run's config \(.*\); train again"):
        train(small_config(width=64), tmp_path / "run", resume=True)
    with pytest.raises(UserError, match="does not fit the run's config"):
        train(small_config(ngrams=2, ngram_rows=8), tmp_path / "run", resume=True)


# Killed

LONG = {"steps": 60, "log_interval": 1, "save_interval": 3, "eval_interval": 10}


@pytest.fixture(scope="module")
def uninterrupted(small_config, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("uninterrupted")
    train(small_config(**LONG), out)
    return out


def start(arguments: list[str]) -> subprocess.Popen:
    command = [sys.executable, "-m", "tritwise", "train", *arguments]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=dict(os.environ))


def kill_after(process: subprocess.Popen, run: Path, step: int, delay: float) -> None:
    """kill -9, `delay` seconds after the run has logged `step`."""
    try:
        deadline = time.monotonic() + 120
        while logged(run) < step:
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(delay)
    finally:
        process.kill()
        _, told = process.communicate()
    assert process.returncode == -signal.SIGKILL, told
    assert not (run / "result.json").exists(), "it was too late: the run had finished"


def logged(run: Path) -> int:
    """How many steps the run has logged; its file may be torn or half-way through a rename."""
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b'"kind": "train"') if path.exists() else 0


def arguments_of(config, run: Path) -> list[str]:
    settings = config.as_dict()
    pairs = {**settings["model"], **settings["train"]}
    return ["--recipe", "tiny", "--out", str(run), *(f"--set={key}={value}" for key, value in pairs.items())]


@pytest.mark.parametrize("seed", [1, 2])
def test_killed_at_any_moment(seed: int, small_config, uninterrupted: Path, tmp_path: Path, same_run):
    chance = random.Random(seed)
    config = small_config(**LONG)
    run = tmp_path / "run"
    step, delay = chance.randint(1, 45), chance.uniform(0, 0.04)
    kill_after(start(arguments_of(config, run)), run, step, delay)
    train(config, run, resume=True)
    same_run(uninterrupted, run)


@pytest.mark.slow
def test_killed_again_and_again(small_config, uninterrupted: Path, tmp_path: Path, same_run):
    chance = random.Random(3)
    config = small_config(**LONG)
    for attempt in range(3):
        run = tmp_path / f"run{attempt}"
        kill_after(start(arguments_of(config, run)), run, chance.randint(1, 10), chance.uniform(0, 0.04))
        for goal in (15, 25, 35, 45):
            process = start(["--resume", "--out", str(run)])
            kill_after(process, run, goal + chance.randint(0, 5), chance.uniform(0, 0.04))
        train(config, run, resume=True)
        same_run(uninterrupted, run)
