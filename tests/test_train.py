"""The training loop: it learns, writes down what it did, skips what is no number, and stops when it is asked to."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console

from tritwise.data import Sampler, open_bytes
from tritwise.data.split import split
from tritwise.errors import UserError
from tritwise.files import read_json, read_json_lines
from tritwise.loading import load
from tritwise.models import ByteLM, ModelConfig
from tritwise.nn import trit_modules
from tritwise.optim import TritOptimizer, rate_factor
from tritwise.recipes import tiny
from tritwise.registers import LEAD, zero_fraction
from tritwise.report import write_report
from tritwise.score import score
from tritwise.ship import read_artifact
from tritwise.train import RunFolder, TrainConfig, audit, finish, load_run, override, train
from tritwise.train.finish import ship_run
from tritwise.train.meter import Meter
from tritwise.train.optimizers import build_optimizers
from tritwise.train.progress import LiveLine, PlainLines, make_display
from tritwise.train.stepper import Stepper

FLOATS = {
    "adamw": {"weights": "float", "optimizer": "adamw", "rate": 0.01},
    "muon": {"weights": "float", "optimizer": "muon", "rate": 0.1},
}


def lines_of(run: Path, kind: str) -> list[dict]:
    return [line for line in read_json_lines(run / "metrics.jsonl") if line["kind"] == kind]


# What a run leaves behind


def test_it_learns(trained: Path):
    losses = [line["loss"] for line in lines_of(trained, "train")]
    scored = read_json(trained / "result.json")["val"]["nats"]
    # A model without context cannot pass below the unigram, 3.3; random or frozen registers stay above 5.
    unigram = next(row["nats"] for row in read_json(trained / "ladder.json")["rows"] if row["name"] == "unigram")
    assert scored < 2.9 < unigram
    assert scored < losses[0] - 2


def test_a_run_leaves_all_its_files(trained: Path):
    assert {path.name for path in trained.iterdir()} == {
        "audit.json",
        "checkpoints",
        "config.json",
        "histogram.json",
        "ladder.json",
        "manifest.json",
        "metrics.jsonl",
        "model.tritwise",
        "result.json",
    }
    assert sorted(path.name for path in (trained / "checkpoints").iterdir()) == [
        f"step_000000{step}.{kind}" for step in (40, 60) for kind in ("json", "safetensors")
    ]


def test_metrics(trained: Path):
    config = tiny()
    rows = lines_of(trained, "train")
    assert [row["step"] for row in rows] == [10, 20, 30, 40, 50, 60]
    for row in rows:
        assert row.keys() == {
            "kind",
            "step",
            "bytes",
            "seconds",
            "loss",
            "bpb",
            "rate",
            "bytes_per_second",
            "step_seconds",
            "skipped",
            "flips",
            "flip_rate",
            "zero_fraction",
        }
        assert row["bytes"] == row["step"] * 16 * 32
        assert row["bpb"] == pytest.approx(row["loss"] / math.log(2))
        factor = rate_factor(row["step"] - 1, 60, config.train.warmup, config.train.decay)
        assert row["rate"] == pytest.approx(config.train.rate * factor)
        assert row["flips"] > 0 and 0.3 < row["zero_fraction"] < 0.8 and row["skipped"] == 0
        assert row["bytes_per_second"] == pytest.approx(16 * 32 / row["step_seconds"])
    assert [row["seconds"] for row in rows] == sorted(row["seconds"] for row in rows)

    evals = lines_of(trained, "eval")
    assert [row["step"] for row in evals] == [30, 60]
    for row in evals:
        assert row.keys() == {
            "kind",
            "step",
            "bytes",
            "seconds",
            "split",
            "loss",
            "bpb",
            "scored",
            "loops",
            "rate",
            "phase",
        }
        assert row["split"] == "val" and row["scored"] == 4096

    for row in lines_of(trained, "layers"):
        assert len(row["layers"]) == 10
        for layer in row["layers"].values():
            assert layer.keys() == {"flip_rate", "zero_fraction", "saturation"}
            assert all(0 <= value <= 1 for value in layer.values())

    samples = lines_of(trained, "sample")
    assert [row["step"] for row in samples] == [30, 60]
    assert all(row["prompt"] == "\n" and 20 <= len(row["text"]) <= 40 for row in samples)


def test_flips_and_zeros_are_what_they_say(small_config, tmp_path: Path):
    config = small_config(steps=1, log_interval=1, decay=0)
    torch.manual_seed(config.train.seed)
    before = {name: layer.register.clone() for name, layer in trit_modules(ByteLM(config.model))}
    train(config, tmp_path)
    _, model, _, _ = load_run(tmp_path)
    row, layers = lines_of(tmp_path, "train")[0], lines_of(tmp_path, "layers")[0]["layers"]
    flips, total, zeros = 0, 0, 0.0
    for name, layer in trit_modules(model):
        old, new = ((x.to(torch.int16) + 121).div(81, rounding_mode="floor") for x in (before[name], layer.register))
        changed = int((old != new).sum())
        assert layers[name]["flip_rate"] == pytest.approx(changed / layer.register.numel())
        assert layers[name]["zero_fraction"] == zero_fraction(layer.register)
        flips, total = flips + changed, total + layer.register.numel()
        zeros += zero_fraction(layer.register) * layer.register.numel()
    assert row["flips"] == flips > 0
    assert row["flip_rate"] == pytest.approx(flips / total) and row["zero_fraction"] == pytest.approx(zeros / total)


def test_a_line_is_the_mean_of_its_steps(small_config, tmp_path: Path):
    for interval in (1, 4):
        train(small_config(log_interval=interval), tmp_path / str(interval))
    fine, coarse = (lines_of(tmp_path / name, "train") for name in ("1", "4"))
    for number, row in enumerate(coarse):
        steps = fine[4 * number : 4 * number + 4]
        for key in ("loss", "bpb", "flips", "flip_rate"):
            assert row[key] == pytest.approx(sum(step[key] for step in steps) / 4)
        assert row["zero_fraction"] == steps[-1]["zero_fraction"] and row["rate"] == steps[-1]["rate"]
    layers = [line["layers"]["head"]["flip_rate"] for line in lines_of(tmp_path / "1", "layers")]
    assert lines_of(tmp_path / "4", "layers")[0]["layers"]["head"]["flip_rate"] == pytest.approx(sum(layers[:4]) / 4)


def test_result_ladder_histogram_and_artifact_belong_together(trained: Path, text: Path):
    result, ladder = read_json(trained / "result.json"), read_json(trained / "ladder.json")
    assert result["steps"] == 60 and result["bytes_seen"] == 60 * 16 * 32 and result["recipe"] == "tiny"
    assert result["val"]["bytes"] == ladder["bytes"] == 6000 and ladder["split"] == "val"
    assert [row["name"] for row in ladder["rows"]][:2] == ["uniform", "unigram"]
    assert result["artifact"]["bytes"] == (trained / "model.tritwise").stat().st_size
    assert result["artifact"]["bpb_reread"] == result["val"]["bpb"]
    assert load(trained).score(text, split="val").bpb == result["val"]["bpb"]

    _, model, _, _ = load_run(trained)
    histogram = read_json(trained / "histogram.json")
    assert histogram["step"] == 60
    for name, layer in trit_modules(model):
        counts = histogram["layers"][name]
        assert len(counts) == 243 and sum(counts) == layer.register.numel()
        assert counts[0] == int((layer.register == -121).sum()) and counts[121 + 7] == int((layer.register == 7).sum())


def test_the_manifest_says_what_made_the_run(trained: Path):
    manifest = read_json(trained / "manifest.json")
    assert manifest.keys() == {
        "tritwise",
        "git_commit",
        "python",
        "torch",
        "platform",
        "cpu",
        "threads",
        "device",
        "backends",
        "seed",
        "started",
        "command",
    }
    assert manifest["torch"] == torch.__version__ and manifest["device"] == "cpu" and manifest["seed"] == 0
    assert {"linear", "embedding", "update", "direction"} <= manifest["backends"].keys()
    assert isinstance(manifest["command"], list) and "/" not in manifest["command"][0]


def test_config_json_is_the_config(trained: Path, text: Path):
    assert RunFolder(trained).config() == override(tiny(), {"data": str(text)})


# Memory


@pytest.fixture(scope="module")
def wide(tmp_path_factory, small_config) -> Path:
    out = tmp_path_factory.mktemp("wide")
    train(small_config(width=64, depth=2, steps=3), out)
    return out


def test_no_trained_float_and_two_bytes_a_weight(wide: Path):
    _, model, optimizers, _ = load_run(wide, with_optimizers=True)
    found = audit(model, optimizers)
    assert found["float_trainable"] == 0 and found["float_state_bytes"] == 0
    assert 2 <= found["state_bytes_per_weight"] <= 2.05
    assert found["weights"] == sum(layer.register.numel() for _, layer in trit_modules(model))
    saved = read_json(wide / "audit.json")
    named = [{row["name"]: row for row in told["tensors"]} for told in (saved, found)]
    assert named[0] == named[1] and saved["bytes_by_role"] == found["bytes_by_role"]
    assert saved["peak_bytes"] > 10_000_000
    lasting = {"matrix", "embedding", "head", "scale", "momentum"}
    assert set(found["bytes_by_role"]) == lasting
    assert {row["role"] for row in found["tensors"]} == lasting | {"table", "port"}
    assert sum(row["bytes"] for row in found["tensors"] if row["trainable"]) == found["state_bytes"]
    types = {row["name"].rpartition(".")[2]: row["dtype"] for row in found["tensors"] if row["trainable"]}
    assert types.pop("row_level") == "int16" and set(types.values()) == {"int8"}
    # A port shows the shape of a weight and holds one number.
    assert {row["bytes"] for row in found["tensors"] if row["role"] == "port"} == {4}


def test_a_float_cannot_hide_from_the_audit(wide: Path):
    _, model, _, _ = load_run(wide)
    assert audit(model)["float_trainable"] == 0
    model.register_parameter("gain", torch.nn.Parameter(torch.ones(5)))
    model.roles = {"gain": "vector"}
    optimizer = torch.optim.AdamW([model.gain], lr=0.1)
    model.gain.sum().backward()
    optimizer.step()
    found = audit(model, [optimizer])
    # the five, two moments for each, and AdamW's count of steps
    assert found["float_trainable"] == 5 + 10 + 1 and found["float_state_bytes"] == 4 * 16
    del model.roles
    with pytest.raises(ValueError, match=r"gain has no role; declare it in ByteLM\.roles"):
        audit(model)


# Float8


def test_products_in_float8_train_and_scores_stay_exact(small_config, text: Path, tmp_path: Path, cli, state_of):
    """A hidden layer of 1024: of the two matrices beside it one rounds x, and one rounds dL/dy."""
    large = {"mlp_ratio": 32, "group": 65_536, "data": str(text)}
    train(small_config(**large), tmp_path / "exact")
    train(small_config(**large, fp8=True), tmp_path / "fp8")
    assert [line["message"] for line in lines_of(tmp_path / "fp8", "event")] == ["2 matrices multiply in float8"]
    registers = [state_of(tmp_path / name)["model.blocks.0.mlp.up.register"] for name in ("exact", "fp8")]
    assert not torch.equal(*registers)
    losses = [[line["loss"] for line in lines_of(tmp_path / name, "train")] for name in ("exact", "fp8")]
    assert losses[1] != losses[0] == pytest.approx(losses[1], rel=0.05)
    config, model, _, _ = load_run(tmp_path / "fp8")
    val = split(open_bytes(text), config.train.split)["val"][: config.train.eval_bytes]
    assert lines_of(tmp_path / "fp8", "eval")[-1]["loss"] == score(model, val, stride=model.context).nats
    # A machine that cannot do it may go on without.
    done = cli("train", "--resume", "--out", tmp_path / "fp8", "--steps", 14, "--set", "fp8=false", "--json")
    assert done.code == 0 and done.json["steps"] == 14 and not RunFolder(tmp_path / "fp8").config().train.fp8


# Randomness and accumulation


def test_a_seed_fixes_a_run_and_another_changes_it(small_config, tmp_path: Path, assert_same_state, state_of):
    for name, seed in (("one", 5), ("two", 5), ("other", 6)):
        train(small_config(seed=seed), tmp_path / name)
    assert_same_state(tmp_path / "one", tmp_path / "two")
    one, other = (state_of(tmp_path / name) for name in ("one", "other"))
    assert not torch.equal(one["model.embed.register"], other["model.embed.register"])


def train_step(model: ByteLM, optimizers: list[torch.optim.Optimizer], sampler, step: int, accum: int = 1) -> float:
    """One step over `accum` micro-batches; the mean loss."""
    batches = [sampler.batch_at(step, micro) for micro in range(accum)]
    return Stepper(model, optimizers, accum, guard=True).step_over(batches).item()


class Rows:
    """A sampler that gives the same sixteen rows, in as many parts as asked."""

    def __init__(self, data, parts: int) -> None:
        whole = Sampler(data, 16, 16, seed=1).batch_at(0)
        self.parts = [part.chunk(parts) for part in whole]

    def batch_at(self, step: int, micro: int = 0):
        return self.parts[0][micro], self.parts[1][micro]


@pytest.mark.parametrize("optimizer", ["trit", "adamw"])
def test_accumulation_is_the_gradient_of_the_whole_batch(optimizer: str, small_config, small_text: Path):
    data = open_bytes(small_text)
    losses, directions = [], []
    for parts in (1, 4):
        config = small_config(**FLOATS.get(optimizer, {}))
        torch.manual_seed(0)
        model = ByteLM(config.model)
        optimizers = build_optimizers(model, config.train)
        losses.append(train_step(model, optimizers, Rows(data, parts), 0, parts))  # type: ignore[arg-type]
        if optimizer == "trit":
            states = [optimizers[0].state[layer.register] for _, layer in trit_modules(model)]
            moments = [state["momentum"] * torch.exp2(state["row_exponent"].float()) for state in states]
        else:
            moments = [optimizers[0].state[parameter]["exp_avg"] for parameter in model.parameters()]
        directions.append(torch.cat([moment.flatten() for moment in moments]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    whole, parts = directions
    # int8 and stochastic rounding leave a noise of two hundredths
    assert float((whole - parts).norm() / whole.norm()) < (0.04 if optimizer == "trit" else 1e-5)


def test_accumulated_runs_see_as_many_bytes_and_learn_as_much(small_config, text: Path, tmp_path: Path):
    common = {"data": str(text), "ctx": 32, "steps": 40, "eval_bytes": 4096, "interval": 1}
    whole = train(small_config(batch=16, **common), tmp_path / "whole")
    parts = train(small_config(batch=4, accum=4, **common), tmp_path / "parts")
    assert whole["bytes_seen"] == parts["bytes_seen"] == 40 * 16 * 32
    assert abs(whole["val"]["nats"] - parts["val"]["nats"]) < 0.25
    assert max(whole["val"]["nats"], parts["val"]["nats"]) < 3.4


# What is no number


class Poison(torch.autograd.Function):
    """The identity, with a gradient that is no number."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * math.nan


def poison(monkeypatch, where: str, calls: set[int]) -> None:
    """Spoil the loss, or only its gradient, at the given calls of ByteLM.loss, counted from 1."""
    sound, count = ByteLM.loss, [0]

    def loss(self, ids, targets):
        count[0] += 1
        value = sound(self, ids, targets)
        if count[0] not in calls:
            return value
        return value * math.inf if where == "loss" else Poison.apply(value)

    monkeypatch.setattr(ByteLM, "loss", loss)


@pytest.mark.parametrize("accum", [1, 3])
@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("optimizer", ["trit", "adamw", "muon"])
def test_a_step_that_is_no_number_moves_nothing(
    optimizer: str, where: str, accum: int, small_config, small_text: Path, monkeypatch
):
    config = small_config(**FLOATS.get(optimizer, {}))
    torch.manual_seed(0)
    model = ByteLM(config.model)
    optimizers = build_optimizers(model, config.train)
    sampler = Sampler(split(open_bytes(small_text), "90/10")["train"], 4, 16, seed=0, accum=accum)

    def weights() -> torch.Tensor:
        return torch.cat([parameter.detach().flatten().clone() for parameter in model.parameters()])

    def skipped() -> list[int]:
        return [optimizer.param_groups[0].get("skipped", 0) for optimizer in optimizers]

    train_step(model, optimizers, sampler, 0, accum)
    before = weights()
    poison(monkeypatch, where, {accum})  # the last micro-batch of the next step
    loss = train_step(model, optimizers, sampler, 1, accum)
    assert torch.equal(weights(), before)
    assert math.isfinite(loss) == (where == "gradient")
    assert skipped() == [1] * len(optimizers)
    loss = train_step(model, optimizers, sampler, 2, accum)
    assert math.isfinite(loss) and skipped() == [1] * len(optimizers)
    assert not torch.equal(weights(), before) and torch.isfinite(weights().float()).all()


def test_a_spoilt_table_holds_back_muon_as_well(small_config, small_text: Path):
    config = small_config(**FLOATS["muon"])
    model = ByteLM(config.model)
    optimizers = build_optimizers(model, config.train)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    model.embed.weight.register_hook(lambda grad: grad * math.nan)
    train_step(model, optimizers, Sampler(open_bytes(small_text), 4, 16, seed=0), 0)
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_run_goes_on_after_skipped_steps(where: str, small_config, tmp_path: Path, monkeypatch):
    poison(monkeypatch, where, {1 + step for step in (3, 5, 6)})  # the first call measures activations
    result = train(small_config(log_interval=1), tmp_path)
    rows = lines_of(tmp_path, "train")
    assert [row["skipped"] for row in rows] == [0, 0, 1, 1, 2, 3] + [3] * 6
    assert [row["step"] for row in rows if row["flips"] == 0] == [3, 5, 6]
    assert [row["loss"] is None for row in rows] == [where == "loss" and row["step"] in (3, 5, 6) for row in rows]
    assert result["steps"] == 12 and math.isfinite(result["val"]["nats"])


def test_the_meter_leaves_out_what_is_no_number():
    meter = Meter(torch.nn.Linear(1, 1))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    for loss in (1.0, math.nan, 3.0):
        meter.add(loss, 100, 0.5, optimizer)
    (record,) = meter.records(3, {"step": 3}, 0.1, 1)
    assert record["loss"] == 2.0 and record["bytes_per_second"] == 200 and record["step_seconds"] == 0.5
    assert "flips" not in record and record["skipped"] == 1


# Float baselines


@pytest.mark.parametrize("optimizer", FLOATS)
def test_float_baselines_learn_and_cannot_be_shipped(optimizer: str, small_config, text: Path, tmp_path: Path):
    config = small_config(data=str(text), batch=16, ctx=32, steps=60, **FLOATS[optimizer])
    result = train(config, tmp_path / "run")
    assert result["val"]["nats"] < 3.0 and "artifact" not in result
    assert not (tmp_path / "run/model.tritwise").exists() and not (tmp_path / "run/histogram.json").exists()
    assert load(tmp_path / "run").score(text, split="val").nats == result["val"]["nats"]
    found = read_json(tmp_path / "run/audit.json")
    assert found["float_trainable"] >= 2 * found["weights"] and found["state_bytes_per_weight"] >= 8
    assert all("flips" not in row for row in lines_of(tmp_path / "run", "train"))
    with pytest.raises(UserError, match="only ternary models can be shipped"):
        ship_run(tmp_path / "run", tmp_path / "model.tritwise")
    assert not (tmp_path / "model.tritwise").exists()


def test_tensors_are_grouped_by_role(small_config):
    config = small_config(embedding_rate=0.5, head_rate=2.0, rate=0.01, ngrams=2, ngram_rows=16)
    (optimizer,) = build_optimizers(ByteLM(config.model), config.train)
    assert isinstance(optimizer, TritOptimizer)
    groups = {group["role"]: group for group in optimizer.param_groups}
    assert {role: len(group["params"]) for role, group in groups.items()} == {"matrix": 4, "embedding": 2, "head": 1}
    assert {role: group["initial_lr"] for role, group in groups.items()} == {
        "matrix": 0.01,
        "embedding": 0.005,
        "head": 0.02,
    }
    muon = small_config(embedding_rate=0.5, head_rate=2.0, **FLOATS["muon"], momentum=0.8)
    first, others = build_optimizers(ByteLM(muon.model), muon.train)
    assert [len(group["params"]) for group in first.param_groups] == [1, 3]  # query, key and value are three in one
    assert {group["initial_lr"] for group in first.param_groups} == {muon.train.rate}
    assert [group["initial_lr"] / muon.train.rate for group in others.param_groups] == pytest.approx([0.05, 0.2])


# Checkpoints and files


def saved_steps(run: Path) -> list[int]:
    return RunFolder(run).store().steps()


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"keep": 1}, [12]),
        ({"keep": 2}, [8, 12]),
        ({"keep": 0}, [4, 8, 12]),
        ({"save_interval": 0}, [12]),
        ({"save_interval": 5, "keep": 0}, [5, 10, 12]),
    ],
    ids=str,
)
def test_checkpoints_that_stay(changes: dict, steps: list[int], small_config, tmp_path: Path):
    train(small_config(**changes), tmp_path)
    assert saved_steps(tmp_path) == steps


def test_no_save_writes_no_checkpoint(small_config, tmp_path: Path):
    result = train(small_config(save=False), tmp_path)
    assert not (tmp_path / "checkpoints").exists()
    assert load(tmp_path / "model.tritwise").about["steps"] == 12 == result["steps"]


def test_intervals(small_config, tmp_path: Path):
    train(small_config(log_interval=5, eval_interval=0, sample_bytes=0, eval_bytes=0), tmp_path)
    assert [row["step"] for row in lines_of(tmp_path, "train")] == [5, 10, 12]
    assert [(row["step"], row["scored"]) for row in lines_of(tmp_path, "eval")] == [(12, 300)]
    assert not lines_of(tmp_path, "sample")


def test_a_run_is_never_overwritten(small_config, tmp_path: Path, assert_same_state):
    train(small_config(), tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="already holds a run; add --resume"):
        train(small_config(), tmp_path / "run")
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_nothing_is_made_for_data_or_devices_that_are_not_there(small_config, tmp_path: Path):
    for changes, message in [
        ({"data": str(tmp_path / "none")}, "no such file"),
        ({"split": "all"}, "leaves nothing to train on; use 90/10"),
        ({"ctx": 5000}, "data too short"),
        *([] if torch.cuda.is_available() else [({"device": "cuda"}, "torch sees no GPU; use --set device=cpu")]),
    ]:
        with pytest.raises(UserError, match=message):
            train(small_config(**changes), tmp_path / "run")
        assert not (tmp_path / "run").exists()


# Stopping


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_finishes_the_step_and_saves(number, small_config, stop_at, tmp_path: Path):
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    result = train(small_config(save_interval=0), tmp_path, display=stop_at(6, number))
    assert result["interrupted"] is True and result["steps"] == 6
    assert saved_steps(tmp_path) == [6]
    assert not (tmp_path / "result.json").exists() and not (tmp_path / "model.tritwise").exists()
    assert lines_of(tmp_path, "event")[-1] == {
        **lines_of(tmp_path, "event")[-1],
        "step": 6,
        "message": "stopped at step 6",
    }
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_second_ctrl_c_stops_at_once(small_config, stop_at, tmp_path: Path):
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(small_config(), tmp_path, display=stop_at(6, times=2))
    assert saved_steps(tmp_path) == [4]
    assert signal.getsignal(signal.SIGINT) is handler


def test_stopped_with_no_save_says_so(small_config, stop_at, tmp_path: Path):
    class Told(stop_at):
        said: list[str] = []  # noqa: RUF012

        def say(self, message: str) -> None:
            self.said.append(message)

    assert train(small_config(save=False), tmp_path, display=Told(6))["interrupted"]
    assert Told.said == ["stopped at step 6, not saved (--no-save)"] and not saved_steps(tmp_path)


def test_ctrl_c_on_the_command_line(small_text: Path, tmp_path: Path, cli):
    run = tmp_path / "run"
    options = {"--data": small_text, "--out": run, "--steps": 10**6, "--width": 32, "--depth": 1, "--ctx": 16}
    options |= {"--log-interval": 1, "--save-interval": 0, "--eval-interval": 0}
    words = [str(word) for option in options.items() for word in option]
    command = [sys.executable, "-m", "tritwise", "train", "--recipe", "tiny", "--json", *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while not (run / "metrics.jsonl").exists() or len(lines_of(run, "train")) < 5:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and "Traceback" not in err
    (step,) = saved_steps(run)
    assert step >= 5 and f"stopped at step {step}, saved; go on with --resume" in err
    told = json.loads(out)
    assert told["interrupted"] is True and told["steps"] == step
    resumed = cli("train", "--resume", "--out", run, "--steps", step + 3, "--json")
    assert resumed.code == 0 and resumed.json["steps"] == step + 3


# What a person sees


def test_plain_lines_away_from_a_terminal(small_config, tmp_path: Path):
    display = make_display(Console(file=StringIO(), width=200))
    assert isinstance(display, PlainLines)
    train(small_config(), tmp_path, display=display)
    lines = display.console.file.getvalue().splitlines()
    assert len(lines) == 6 + 2 + 2 and "\x1b" not in "".join(lines)
    memory = [line for line in lines if line.startswith("memory  ")]
    assert len(memory) == 2 and "registers 28.7 kB" in memory[0] and "floats" not in memory[0]
    lines = [line for line in lines if line not in memory]
    assert re.fullmatch(
        r"step      2/12  loss \d\.\d{3}  bpb \d\.\d{3}  [\d.]+k? B/s  flips \d+  zeros \d\d\.\d%  left \d+:\d\d",
        lines[0],
    )
    assert re.fullmatch(r"step      6  val loss \d\.\d{4}  val bpb \d\.\d{4}", lines[3])
    assert lines[-2].endswith("left 0:00")


def test_a_live_line_on_a_terminal(small_config, tmp_path: Path):
    display = make_display(Console(file=StringIO(), force_terminal=True, width=120))
    assert isinstance(display, LiveLine)
    train(small_config(), tmp_path, display=display)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", display.console.file.getvalue())
    for pattern in (
        r"step 12/12",
        r"100%",
        r"\d:\d\d:\d\d|-:--:--",
        r"loss \d\.\d{3}",
        r"bpb \d\.\d{3}",
        r"bytes/s [\d.]+k?",
        r"flips/step \d+",
        r"zeros \d\d\.\d%",
        r"registers [\d.]+ kB  momentum [\d.]+ kB  scales [\d.]+ k?B",
        r"best val bpb \d\.\d{4}",
        r"step      6  val loss \d\.\d{4}  val bpb \d\.\d{4}",
    ):
        assert re.search(pattern, shown), pattern


@pytest.mark.parametrize("terminal", [False, True])
def test_displays_show_skipped_steps_and_float_runs(terminal: bool):
    file = StringIO()
    display = make_display(Console(file=file, force_terminal=terminal, width=120))
    record = {"kind": "train", "step": 5, "loss": math.nan, "bpb": math.nan, "bytes_per_second": 2.5e6}
    display.start(0, 10)
    display.say("[bold] is no markup here")
    display.record(record | {"step_seconds": 900.0, "skipped": 3})
    display.record({"kind": "event", "step": 5, "message": "x"})
    display.stop()
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue())
    assert "[bold] is no markup here" in shown and "skipped 3" in shown and "2.50M" in shown and "nan" in shown
    assert "flips" not in shown and "zeros" not in shown
    assert terminal or "left 1:15:00" in shown


@pytest.mark.parametrize("terminal", [False, True])
def test_a_run_by_the_clock_is_shown_by_the_clock(terminal: bool):
    file = StringIO()
    display = make_display(Console(file=file, force_terminal=terminal, width=120))
    display.start(0, 10**9, 40.0)
    record = {"kind": "train", "step": 50, "seconds": 10.0, "step_seconds": 0.2, "loss": 1.0, "bytes_per_second": 1.0}
    display.record(record | {"skipped": 0})
    display.record({"kind": "size", "step": 50, "bytes": 1200, "budget": 1000})
    display.stop()
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue())
    assert "000000" not in shown and "1,200 bytes when shipped, of 1,000, too many" in shown
    assert ("step 50, 10 of 40 s" in shown and "25%" in shown) if terminal else "left 0:30" in shown


@pytest.mark.parametrize("what", ["a trit", "what is no weight"])
def test_an_artifact_that_differs_is_never_reported(what, small_config, tmp_path: Path, monkeypatch):
    def one_trit(model):
        weight = model.head.register[65, 0]
        weight.copy_(LEAD if weight == 0 else 0)

    spoil, message = {
        "a trit": (one_trit, "head of the artifact differs from the model's; do not use it"),
        "what is no weight": (
            lambda m: m.rotary.sin.neg_(),
            "the artifact's logits differ from the model's; do not use",
        ),
    }[what]

    def misread(path: Path):
        model, header = read_artifact(path)
        spoil(model)
        return model, header

    monkeypatch.setattr(finish, "read_artifact", misread)
    with pytest.raises(UserError, match=message):
        train(small_config(), tmp_path)
    assert not (tmp_path / "result.json").exists() and saved_steps(tmp_path) == [8, 12]


# The report


def test_the_report_of_a_real_run(copied: Path):
    pytest.importorskip("matplotlib")
    code = (
        "import sys\nfrom pathlib import Path\nfrom tritwise.report import write_report\n"
        "print(len(write_report(Path(sys.argv[1])).plots))\nassert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code, copied], capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    page = (copied / "report/index.html").read_text(encoding="utf-8")
    result = read_json(copied / "result.json")
    assert f"{result['val']['bpb']:.3f}" in page and "left out" not in page
    assert len(list((copied / "report").glob("*.png"))) == int(done.stdout) >= 4


def test_the_report_of_an_interrupted_run(small_config, stop_at, tmp_path: Path):
    pytest.importorskip("matplotlib")
    train(small_config(), tmp_path, display=stop_at(6))
    assert write_report(tmp_path).page.is_file()


def test_every_layer_of_the_model_can_be_tried_in_training(small_config, tmp_path: Path):
    shapes = [{"heads": 2, "kv_heads": 1}, {"window": 4}, {"ngrams": 3, "ngram_rows": 64}, {"group": 16}, {"ctx": 1}]
    rules = [{"direction": "sign"}, {"direction": "rms"}, {"scale_rate": 0.05}, {"interval": 3}, {"momentum": 0}]
    for number, changes in enumerate(shapes + rules):
        result = train(small_config(**changes), tmp_path / str(number))
        assert result["val"]["nats"] < 6.1 and result["artifact"]["bpb_reread"] == result["val"]["bpb"], changes


def test_train_config_has_the_words_of_the_model_config():
    assert not {*TrainConfig.__dataclass_fields__} & {*ModelConfig.__dataclass_fields__}
