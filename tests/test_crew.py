"""Several processes against one: the same registers after the same global batches, through torchrun and gloo."""

import json
import os
import subprocess
import sys

import pytest
import torch

from tritwise.cli.app import main
from tritwise.errors import UserError
from tritwise.files import read_json, read_json_lines
from tritwise.ship.container import read_container
from tritwise.train import train
from tritwise.train.crew import Crew


def torchrun(*arguments: object, processes: int = 2) -> subprocess.CompletedProcess:
    """`tritwise …` in several processes."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone"]
    # A process that pytest-cov started with settings for subprocesses would measure these too, at their cost.
    env = {k: v for k, v in os.environ.items() if not k.startswith("COV")} | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, "-m", "tritwise", *map(str, arguments)], capture_output=True, text=True, env=env, timeout=240
    )


def test_two_processes_have_the_registers_of_one(small_config, small_text, tmp_path, assert_same_state):
    shape = {
        "accum": 2,
        "steps": 50,
        "depth": 2,
        "loops": 2,
        "depth_plan": "0.5:1,1:2",
        "repeat_skip": True,
        "ngrams": 2,
        "ngram_rows": 64,
        "scale_rate": 0.005,
        "save_interval": 25,
        "eval_interval": 25,
    }
    config = small_config(**shape)
    alone = train(config, tmp_path / "one")
    flags = [
        f"--set={key}={value}" for key, value in {**config.as_dict()["model"], **config.as_dict()["train"]}.items()
    ]
    told = torchrun("train", "--recipe", "tiny", "--out", tmp_path / "two", "--json", *flags)
    assert told.returncode == 0, told.stderr
    assert_same_state(tmp_path / "one", tmp_path / "two")
    together = json.loads(told.stdout.splitlines()[-1])
    assert together["val"] == alone["val"] and together["steps"] == 50
    files = [read_container(tmp_path / run / "model.tritwise")[1] for run in ("one", "two")]
    assert files[0] == files[1]
    losses = [
        [line["loss"] for line in read_json_lines(tmp_path / run / "metrics.jsonl") if line["kind"] == "train"]
        for run in ("one", "two")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6) and len(losses[0]) == 25
    assert read_json(tmp_path / "two/config.json")["train"]["accum"] == 2


EXPERTS = ["train", "--recipe", "tiny", "--set=experts=16", "--set=active_experts=1", "--batch", "1", "--ctx", "64"]


@pytest.mark.parametrize("weights", ["trit", "float"])
def test_experts_that_one_process_sends_nothing_to(weights, tmp_path, assert_same_state):
    """Of 16 experts, which 64 bytes are shared out to, a process has no gradient now of these, now of those."""
    words = [*EXPERTS, "--steps", "12", "--accum", "2", f"--set=weights={weights}", "--set=eval_bytes=2000"]
    if weights == "float":
        words += ["--set=optimizer=muon", "--rate", "0.02"]
    assert main([*words, "--out", str(tmp_path / "one")]) == 0
    told = torchrun(*words, "--out", tmp_path / "two")
    assert told.returncode == 0, told.stderr
    assert_same_state(tmp_path / "one", tmp_path / "two")


def test_processes_whose_batches_are_of_different_kinds(
    tmp_path, small_text, image_pairs, tiny_vision, assert_same_state, monkeypatch
):
    monkeypatch.setenv("TRITWISE_CACHE", str(tmp_path / "cache"))
    words = ["pretrain", "--mixture", "text=1,vision=1", "--text", small_text, "--images", image_pairs]
    words += ["--vision-encoder", tiny_vision, "--ctx", "32", "--batch", "2", "--accum", "2", "--steps", "12"]
    words += ["--set=width=32", "--set=depth=1", "--set=eval_examples=2", "--set=eval_bytes=2000"]
    words += ["--set=seconds=1000"]  # so that every shape is warmed before the clock
    assert main([*map(str, words), "--out", str(tmp_path / "one")]) == 0
    told = torchrun(*words, "--out", tmp_path / "two")
    assert told.returncode == 0, told.stderr
    assert_same_state(tmp_path / "one", tmp_path / "two")
    lines = read_json_lines(tmp_path / "two/metrics.jsonl")
    assert any(set(line["losses"]) == {"text", "vision"} for line in lines if line["kind"] == "train")


def test_micro_batches_are_shared_evenly_or_not_at_all():
    assert [list(Crew(rank, 3).micros(6)) for rank in range(3)] == [[0, 3], [1, 4], [2, 5]]
    assert list(Crew().micros(3)) == [0, 1, 2]
    with pytest.raises(UserError, match=r"accum is 4: .* divide among 3 processes; set accum to a multiple of 3"):
        Crew(1, 3).micros(4)


def test_a_crew_of_one_talks_to_nobody():
    crew, tensor = Crew(), torch.arange(3)
    assert crew.first and crew.most(1.5) == 1.5 and crew.any(True) and not crew.any(False)
    assert crew.gather(tensor) == [tensor]
    crew.add_up([tensor])
    crew.require_same([tensor])
    crew.leave()
    assert tensor.tolist() == [0, 1, 2]
    assert not torch.distributed.is_initialized()


WORKER = """
import os, sys, torch
from tritwise.errors import UserError
from tritwise.train.crew import Crew

crew = Crew.join(torch.device("cpu"))
assert [t.item() for t in crew.gather(torch.tensor(float(crew.rank)))] == [0.0, 1.0]
assert crew.most(float(crew.rank)) == 1.0 and crew.any(crew.rank == 1) and not crew.any(False)
total = torch.ones(2) * (crew.rank + 1)
crew.add_up([total])
assert total.tolist() == [3.0, 3.0]
crew.require_same([torch.arange(9, dtype=torch.int8), torch.ones(2)])
swapped = torch.tensor([1, 2] if crew.rank else [2, 1], dtype=torch.int8)
try:
    crew.require_same([swapped])
except UserError as error:
    sys.stdout.write(f"rank {crew.rank}: {error}\\n")
crew.leave()
if crew.rank == 1:
    os._exit(0)  # as if it had been killed
try:
    crew.gather(torch.ones(1))
except UserError as error:
    sys.stdout.write(f"rank {crew.rank}: {error}\\n")
crew.leave()  # the first one is not held up by what has ended
"""


def test_processes_tell_each_other(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", str(script)]
    told = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert told.returncode == 0, told.stderr
    assert told.stdout.count("drifted apart") == 2
    assert told.stdout.count("rank 0: another process of this run has ended") == 1
