"""The 14M-weight comparison, in small: equal terms for every row, honest bytes, flags that do what they say."""

import io
import math
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from rich.console import Console

from tritwise.bench.contenders import CONTENDERS
from tritwise.bench.memory import THREE_BILLION, measure_state, restart_peak
from tritwise.bench.phases import PHASES, PhaseTimer
from tritwise.bench.sizes import weights_of
from tritwise.bench.true_ternary import run
from tritwise.errors import UserError
from tritwise.files import read_json, write_json
from tritwise.models import ByteLM, ModelConfig
from tritwise.nn import trit_modules
from tritwise.optim import TritOptimizer
from tritwise.train.audit import peak_bytes

ALL = tuple(CONTENDERS)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def small(text) -> Callable[..., dict[str, Any]]:
    """small(steps=3, …): a run of a very small model; the arguments are those of `run`."""
    defaults: dict[str, Any] = {"configs": ALL, "steps": 6, "batch": 2, "ctx": 16, "width": 64, "depth": 1}
    defaults |= {"val_bytes": 256, "data": str(text), "device": "cpu", "print_every": 4}
    return lambda **changes: run(**defaults | changes)


@pytest.fixture(scope="module")
def result(small, tmp_path_factory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("bench") / "new" / "base.json"
    found = small(out=path)
    assert read_json(path) == found
    return found | {"path": path}


@pytest.fixture(scope="module")
def rows(result) -> dict[str, dict[str, Any]]:
    return {row["rule"]: row for row in result["rows"]}


# --- equal terms ----------------------------------------------------------------------------------------------------


def test_every_row_starts_from_the_same_batch_and_its_kind_of_model(rows):
    # The counter cuts registers to their trits, which changes no weight that a matmul sees.
    assert rows["true-ternary"]["first_loss"] == rows["sign-counter"]["first_loss"]
    assert rows["adam-fp32"]["first_loss"] == rows["signsgd"]["first_loss"]
    assert len({row["weights"] for row in rows.values()}) == len({row["digest"] for row in rows.values()}) == 1
    assert rows["true-ternary"]["first_loss"] == pytest.approx(rows["adam-fp32"]["first_loss"], rel=0.15)


def test_floats_start_near_chance_and_not_far_above(rows):
    assert math.log(288) - 0.2 < rows["adam-fp32"]["first_loss"] < math.log(288) + 1.0


def test_the_ternary_row_learns(small):
    (row,) = small(configs=["true-ternary"], steps=50, batch=8)["rows"]
    assert row["val_nats"] < 3.6 < row["first_loss"] and row["min_loss"] <= row["final_loss"]
    assert row["flip_rate"] > 0 and 0 < row["zero_fraction"] < 1 and 0 <= row["saturation"] < 1


def test_rows_carry_what_happened(rows):
    row = rows["adam-fp32"]
    assert row["bytes_seen"] == 6 * 2 * 16 and row["evals"] == [[192, row["val_bpb"]]]
    assert row["val_bpb"] == pytest.approx(row["val_nats"] / math.log(2)) and row["scored"] == 256
    assert [seen for seen, _ in row["curve"]] == [4 * 32, 6 * 32]
    assert row["curve"][-1][1] == row["final_loss_mean"]
    assert row["rates_tried"] == [[CONTENDERS["adam-fp32"].rate, row["val_nats"]]]
    assert row["flip_rate"] is None and row["saturation"] is None and row["zero_fraction"] is None


def test_the_ladder_stands_beside(result):
    rungs = {rung["name"]: rung["nats"] for rung in result["ladder"]["rows"]}
    assert rungs["uniform-288"] == pytest.approx(5.663, abs=1e-3)
    assert 2.2 < rungs["bigram"] < rungs["unigram"] < 3.6


def test_the_default_model_has_14_millionweights_of():
    assert weights_of(ModelConfig(width=384, depth=8, vocab=288)) == 14_376_960


# --- bytes ----------------------------------------------------------------------------------------------------------


def test_bytes_are_those_of_the_audit(rows, result):
    weights = rows["adam-fp32"]["weights"]
    assert weights == weights_of(ModelConfig(width=64, depth=1, vocab=288))
    ours, adam, sign = rows["true-ternary"], rows["adam-fp32"], rows["signsgd"]
    assert ours["float_state_bytes"] == ours["float_trainable"] == 0
    assert ours["weight_bytes"] == weights and 2.0 < ours["bytes_per_weight"] < 2.06
    assert adam["bytes_per_weight"] == pytest.approx(12, abs=0.01) and adam["momentum_bytes"] >= 8 * weights
    # No optimizer state, and yet four bytes a weight: the float weight itself.
    assert sign["momentum_bytes"] == 0 and sign["state_bytes"] == sign["float_state_bytes"] == 4 * weights
    for row in rows.values():
        assert row["state_bytes"] == row["weight_bytes"] + row["scale_bytes"] + row["momentum_bytes"]
        assert result["projected_3b"][row["rule"]] == round(3e9 * row["bytes_per_weight"])


def test_ternary_gradients_are_held_one_layer_at_a_time(rows):
    assert rows["adam-fp32"]["gradient_bytes"] == 4 * rows["adam-fp32"]["weights"]
    assert rows["true-ternary"]["gradient_bytes"] == 4 * max(288 * 64, 4 * 64 * 64)


def test_the_peak_starts_again():
    if not restart_peak(CPU):
        pytest.skip("this system keeps the peak of the whole process")
    block = torch.ones(50_000_000)
    high = peak_bytes()
    del block
    restart_peak(CPU)
    assert peak_bytes() < high - 150_000_000


# --- phases ---------------------------------------------------------------------------------------------------------


def test_phases_are_parts_of_the_step(rows):
    for row in rows.values():
        assert set(row["phases_ms"]) == set(PHASES) and min(row["phases_ms"].values()) > 0
        assert max(row["phases_ms"].values()) < row["step_ms"]


def test_what_an_optimizer_does_inside_backward_is_update(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("tritwise.bench.phases.time.perf_counter", lambda: now[0])
    model = ByteLM(ModelConfig(width=32, depth=1, ctx=8))
    layers = [layer for _, layer in trit_modules(model)]

    def take(layer, grad):
        now[0] += 1.0

    for layer in layers:
        layer.consumer = take
    timer = PhaseTimer(model, [])
    ids = torch.zeros(1, 8, dtype=torch.int64)
    timer.step(ids, ids)
    assert timer.seconds == {"forward": [0.0], "backward": [0.0], "update": [float(len(layers))]}
    assert timer.median_ms()["step"] == 1000.0 * len(layers)


def test_the_timer_leaves_the_step_as_it_is():
    ids = torch.randint(256, (2, 8), generator=torch.Generator().manual_seed(0))
    registers = []
    for timed in (True, False):
        torch.manual_seed(0)
        model = ByteLM(ModelConfig(width=32, depth=1, ctx=8))
        optimizer = TritOptimizer(model, rate=0.3)
        if timed:
            PhaseTimer(model, [optimizer]).step(ids, ids)
        else:
            model.loss(ids, ids).backward()
            optimizer.step()
        registers.append(model.head.register.clone())
    assert torch.equal(*registers)


# --- flags ----------------------------------------------------------------------------------------------------------


def test_without_updates_the_loss_stays_where_it_starts(small):
    one, three = (small(update_backend="none", steps=steps) for steps in (1, 3))
    for before, after in zip(one["rows"], three["rows"], strict=True):
        assert before["val_nats"] == after["val_nats"] and before["curve"][0][1] == after["first_loss"]
        assert after["state_bytes"] == after["weight_bytes"] + after["scale_bytes"]
        assert not after["flip_rate"]
    assert small(configs=["true-ternary"], steps=3)["rows"][0]["val_nats"] != three["rows"][0]["val_nats"]


def test_dense_fallback_is_the_reference(small, rows):
    (row,) = small(configs=["true-ternary"], update_backend="dense-fallback")["rows"]
    assert set(row["backends"].values()) == {"reference"}
    assert row["val_nats"] == pytest.approx(rows["true-ternary"]["val_nats"], rel=0.01)


@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="the interpreter runs on a CPU")
def test_gpu_on_a_cpu_is_refused_with_the_reason(small):
    with pytest.raises(UserError, match="triton"):
        small(configs=["true-ternary"], update_backend="gpu")


def test_scales_learn_only_when_asked(small, rows, monkeypatch):
    monkeypatch.setattr("tritwise.bench.contenders.SCALE_RATE", 0.2)  # so that a few steps show
    results = {n: small(configs=["true-ternary"], scale_update_interval=n, steps=12)["rows"][0] for n in (0, 1, 2)}
    assert len({row["val_nats"] for row in results.values()}) == 3
    assert results[0]["momentum_bytes"] == rows["true-ternary"]["momentum_bytes"] < results[1]["momentum_bytes"]
    assert results[2]["settings"]["scale_update_interval"] == 2


def test_the_threshold_is_that_of_the_counter(small):
    quick, slow = (small(configs=["sign-counter"], accum_threshold=n)["rows"][0] for n in (1, 127))
    assert quick["flip_rate"] > 0.01 and slow["flip_rate"] == 0
    with pytest.raises(UserError, match="threshold"):
        small(configs=["sign-counter"], accum_threshold=128)


def test_the_best_rate_makes_the_row(small):
    rates = [1e-5, 3e-3, 1e38]
    (row,) = small(configs=["adam-fp32"], rates={"adam-fp32": rates}, steps=20)["rows"]
    assert row["rate"] == 3e-3 and [rate for rate, _ in row["rates_tried"]] == rates
    assert row["val_nats"] == min(nats for _, nats in row["rates_tried"] if nats is not None)


def test_a_run_that_diverges_is_a_row(small):
    out = io.StringIO()
    console = Console(file=out, width=160)
    (row,) = small(configs=["signsgd"], rates={"signsgd": [1e38]}, console=console)["rows"]
    assert row["diverged"] and row["val_nats"] is None and row["min_loss"] is None
    assert "diverged" in out.getvalue()
    # Its only loss is that of the start; only the score can tell what became of it.
    (row,) = small(configs=["signsgd"], rates={"signsgd": [1e38]}, steps=1)["rows"]
    assert row["diverged"] and row["val_nats"] is None and math.isfinite(row["final_loss"])


# --- reuse ----------------------------------------------------------------------------------------------------------


def test_float_rows_are_reused_and_ternary_rows_run_again(small, result, rows):
    again = small(reuse_base=result["path"], print_every=2)
    for row in again["rows"]:
        base = rows[row["rule"]]
        if CONTENDERS[row["rule"]].ternary:
            assert not row["reused"] and len(row["curve"]) != len(base["curve"])
            assert row["val_nats"] == base["val_nats"]
        else:
            assert row == base | {"reused": True}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"steps": 7}, "steps 6, this run has 7"),
        ({"seed": 1}, "seed"),
        ({"ctx": 8}, "ctx"),
        ({"width": 128}, "width"),
        ({"val_bytes": 128}, "val_bytes"),
        ({"update_backend": "none"}, "updates"),
        ({"rates": {"adam-fp32": [0.1]}}, "rates"),
    ],
)
def test_rows_of_other_settings_are_not_reused(small, result, changes, named):
    with pytest.raises(UserError, match=named):
        small(reuse_base=result["path"], **changes)


def test_another_text_of_the_same_name_is_noticed(small, result, tmp_path, text):
    first = tmp_path / "text.txt"
    first.write_bytes(text.read_bytes())
    small(data=str(first), configs=["signsgd"], steps=1, out=tmp_path / "base.json")
    first.write_bytes(text.read_bytes()[1:])
    with pytest.raises(UserError, match="digest"):
        small(data=str(first), configs=["signsgd"], steps=1, reuse_base=tmp_path / "base.json")


def test_a_file_of_something_else_is_refused(small, tmp_path):
    write_json(tmp_path / "other.json", {"bench": "rules"})
    with pytest.raises(UserError, match="no result of the true-ternary benchmark"):
        small(reuse_base=tmp_path / "other.json")
    with pytest.raises(UserError, match="does not exist"):
        small(reuse_base=tmp_path / "none.json")


# --- refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"configs": ["true-ternery"]}, "did you mean true-ternary"),
        ({"configs": []}, "no configuration"),
        ({"print_every": 0}, "print_every is 0"),
        ({"steps": 0}, "steps is 0"),
        ({"scale_update_interval": -1}, "scale_update_interval"),
        ({"update_backend": "tpu"}, "no backend 'tpu'"),
        ({"rates": {"adam-fp32": []}}, "rates of adam-fp32"),
        ({"rates": {"adam-fp32": [math.nan]}}, "rates of adam-fp32"),
        ({"rates": {"adam": [1e-3]}}, "no configuration 'adam'"),
        ({"split": "all"}, "train"),
    ],
)
def test_what_cannot_work_is_refused_in_words(small, changes, named):
    with pytest.raises(UserError, match=named):
        small(**changes)


# --- the printed tables ---------------------------------------------------------------------------------------------


def test_everything_is_printed(small, monkeypatch):
    tiny = replace(THREE_BILLION, width=64, depth=2, heads=0, kv_heads=0)
    monkeypatch.setattr("tritwise.bench.true_ternary.measure_state", lambda device, seed: measure_state(device, tiny))
    out = io.StringIO()
    small(console=Console(file=out, width=200), measure_3b=True)
    printed = out.getvalue()
    for expected in (*ALL, "uniform-288", "unigram", "bigram", "forward", "step     4/6", "GB at 3B", "36.00"):
        assert expected in printed
    assert f"true-ternary at {weights_of(tiny):,} weights, one whole training step" in printed


# --- the state of three billion weights -----------------------------------------------------------------------------


def test_the_shape_has_three_billionweights_of():
    assert weights_of(THREE_BILLION) == pytest.approx(3e9, rel=0.01)


def test_a_state_is_built_and_measured():
    shape = replace(THREE_BILLION, width=128, depth=3, heads=0, kv_heads=0)
    found = measure_state(CPU, shape)
    assert found["measured"] and found["weights"] == weights_of(shape) and found["float_state_bytes"] == 0
    assert found["state_bytes"] == sum(found["bytes_by_role"].values())
    assert found["bytes_by_role"]["momentum"] > found["weights"] and 2.0 < found["bytes_per_weight"] < 2.05
    assert math.isfinite(found["loss"]) and found["flips"] > 0 and found["layers"] == 3 * 4 + 2


def test_the_blocks_have_registers_of_their_own():
    # 12 MB a block: copies that shared storage would show in the growth.
    shape = replace(THREE_BILLION, width=1024, depth=4, heads=0, kv_heads=0)
    found = measure_state(CPU, shape)
    if found["resident_growth"] is None:
        pytest.skip("this system does not tell what the process holds")
    assert found["resident_growth"] > 0.9 * found["state_bytes"]
    assert found["peak_growth"] >= found["resident_growth"]


def test_too_large_a_state_is_left_out_with_the_reason():
    found = measure_state(CPU, replace(THREE_BILLION, depth=1000, width=65_536, heads=0, kv_heads=0))
    assert not found["measured"] and "GB" in found["reason"]
