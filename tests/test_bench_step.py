"""The engine's benchmarks, in small: steps in turns, kernels against their limits, the search for the largest model."""

import functools
import gc
import importlib.util
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tritwise.bench import capacity
from tritwise.bench.capacity import LEAST, Probe, ask, measure_capacity, search, take_probe
from tritwise.bench.hardware import measure_hardware
from tritwise.bench.kernel_bench import measure_kernels
from tritwise.bench.memory import THREE_BILLION
from tritwise.bench.phases import Clock, PhaseTimer, update_spans
from tritwise.bench.rules import RULES
from tritwise.bench.runner import ENTRIES, Batches, Runner
from tritwise.bench.sizes import SIZES, Size, build_quickly, flops_of, shape_of, size_called, weights_of
from tritwise.bench.step import measure_steps
from tritwise.errors import UserError, is_out_of_memory
from tritwise.files import read_json, write_json
from tritwise.models import ByteLM, ModelConfig
from tritwise.nn import trit_modules
from tritwise.ops import backends
from tritwise.optim import TritOptimizer

CPU = torch.device("cpu")
SMALL = Size("small", ModelConfig(width=32, depth=3, ctx=16), batch=2, mode="eager")


@pytest.fixture(autouse=True, scope="module")
def quick_collections() -> Iterator[None]:
    """What was imported is not searched for garbage again and again: a benchmark collects before every measurement."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


# --- sizes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "weights"), [("19m", 19_136_512), ("124m", 120_717_312), ("1.3b", 1_309_671_424), ("3b", 2_989_752_320)]
)
def test_presets_have_the_weights_they_are_named_after(name, weights):
    size = size_called(name)
    assert weights_of(size.config) == weights
    assert size.bytes_a_step == (32_768 if name == "19m" else 65_536)


def test_the_weights_are_those_of_a_real_model():
    model = ByteLM(replace(SMALL.config, weights="float"))
    assert weights_of(SMALL.config) == sum(p.numel() for p in model.parameters())


def test_operations_are_counted_by_hand():
    # One block of width 2: 12 * 4 weights and 256 * 2 of the head; attention 6 * 2 * ctx for a byte.
    shape = ModelConfig(width=2, depth=1, ctx=8, heads=1)
    assert flops_of(shape, 10) == 10 * (6 * (48 + 512) + 6 * 2 * 8)


def test_shapes_follow_the_weights():
    for weights in (1e6, 1e8, 3e9, 3e10):
        shape = shape_of(weights, 1024)
        assert weights_of(shape) == pytest.approx(weights, rel=0.2 if weights < 1e8 else 0.02)
        assert 40 <= shape.width / shape.depth <= 100
    assert weights_of(THREE_BILLION) == pytest.approx(weights_of(SIZES["3b"].config), rel=1e-3)
    assert weights_of(shape_of(1, 8)) == weights_of(ModelConfig(width=64, depth=1))


def test_float8_is_measured_where_it_pays():
    settings = {"rate": 0.01, "fp8": True}
    shape = replace(SMALL.config, mlp_ratio=32, group=1 << 16)
    model, _ = build_quickly(RULES["ours"], shape, settings, torch.float32, CPU)
    used = {name for name, layer in model.named_modules() if getattr(layer, "fp8_least", None) is not None}
    assert used == {f"blocks.{number}.mlp.{name}" for number in range(3) for name in ("up", "down")}
    with pytest.raises(UserError, match=r"ours cannot be set up: .* wide enough .*; leave fp8 off"):
        build_quickly(RULES["ours"], SMALL.config, settings, torch.float32, CPU)


@pytest.mark.parametrize("rule", ["ours", "adamw-bf16"])
def test_blocks_built_quickly_are_all_different(rule):
    model, optimizers = build_quickly(RULES[rule], SMALL.config, {"rate": 0.01}, torch.float32, CPU)
    assert len(model.blocks) == model.config.depth == 3
    named = dict(model.named_parameters())
    for name in ("attention.qkv", "mlp.up", "mlp.down"):
        one, two, three = (next(p for n, p in named.items() if n.startswith(f"blocks.{i}.{name}")) for i in range(3))
        for a, b in ((one, two), (one, three), (two, three)):
            assert (a == b).float().mean() < 0.2 and torch.equal(a.flatten().sort()[0], b.flatten().sort()[0])
    trained = {p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    assert trained >= {p for name, p in named.items() if "exponent" not in name}
    assert all(group["initial_lr"] > 0 for optimizer in optimizers for group in optimizer.param_groups)


def test_compact_registers_are_made_from_registers_once():
    plain, compact = (
        build_quickly(RULES["ours"], SMALL.config, {"rate": 0.01, "compact": flag}, torch.float32, CPU)[0]
        for flag in (False, True)
    )
    for (_, one), (_, two) in zip(trit_modules(plain), trit_modules(compact), strict=True):
        assert torch.equal(one.trits(), two.trits()) and not torch.equal(one.register, two.register)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: size_called("124"), "did you mean 124m"),
        (lambda: replace(SMALL, batch=0), "batch is 0"),
        (lambda: replace(SMALL, mode="fast"), "mode is 'fast'"),
        (lambda: replace(SMALL, mode="graph", accum=2), "choose blocks"),
    ],
)
def test_sizes_that_cannot_be_are_refused(make, named):
    with pytest.raises(UserError, match=named):
        make()


# --- phases and runners ---------------------------------------------------------------------------------------------


def runner(entry: str = "adamw", **changes: Any) -> Runner:
    size = replace(SMALL, **changes)
    return Runner(ENTRIES[entry], size, Batches(size, CPU), CPU, torch.float32)


def weights(model: ByteLM) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("phased", [False, True])
def test_micro_batches_add_up_to_one_step(phased):
    parts = runner(batch=1, accum=3)
    batches = parts._batches[0]
    by_hand = runner(batch=1, accum=3)
    sum(by_hand.model.loss(*batch) for batch in batches).backward()  # type: ignore[union-attr]
    for optimizer in by_hand.optimizers:
        optimizer.step()
    if phased:
        PhaseTimer(parts.model, parts.optimizers).step_on(batches)
    else:
        parts.step()
    expected = weights(by_hand.model)
    assert all(torch.allclose(p, expected[name], rtol=1e-5, atol=1e-7) for name, p in weights(parts.model).items())
    assert all(p.grad is None for p in parts.model.parameters())


@pytest.mark.parametrize(("mode", "records"), [("eager", False), ("blocks", True)])
def test_a_runner_records_moves_where_blocks_are_compiled(mode, records):
    (optimizer,) = runner("ours", mode=mode).optimizers
    assert isinstance(optimizer, TritOptimizer) and optimizer.records_moves is records


def test_batches_come_round_again():
    batches = Batches(SMALL, CPU, count=2)
    assert torch.equal(batches[0][0][0], batches[2][0][0]) and not torch.equal(batches[0][0][0], batches[1][0][0])


def test_checkpointing_changes_no_loss():
    losses = []
    for flag in (False, True):
        one = runner("ours", checkpoint=flag)
        assert one.model.checkpoint is flag
        for _ in range(3):
            one.step()
        losses.append([float(loss) for loss in one.losses])
    assert losses[0] == losses[1]


@pytest.fixture
def quick_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.compile without code generation."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    yield
    torch._dynamo.reset()


def test_all_blocks_share_what_is_compiled(quick_compiler):
    losses = []
    for mode in ("eager", "blocks"):
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        one = runner("ours", mode=mode)
        for _ in range(2):
            one.step()
        losses.append([float(loss) for loss in one.losses])
        made = torch._dynamo.utils.counters["stats"]["unique_graphs"] - before
        assert made == (3 if mode == "blocks" else 0)  # embeddings, a block, the last norm
    assert losses[0] == losses[1]


def test_spans_of_updates_are_noted_and_optimizers_left_as_they_were():
    one = runner("ours")
    with update_spans(one.optimizers, Clock(CPU)) as spans:
        one.step()
        layers = len(list(trit_modules(one.model)))
        assert len(spans) == layers + 1  # every gradient, and the step
        assert all(later >= sooner for sooner, later in spans)
    one.step()
    assert len(spans) == layers + 1


def test_hardware_is_measured():
    found = measure_hardware(CPU, torch.float32, short=True)
    assert found["copy_bytes_per_s"] > 1e7 and found["matmul_flops_per_s"] > 1e7 and found["matmul_dtype"] == "float32"


# --- steps ----------------------------------------------------------------------------------------------------------


def test_contenders_take_turns(tmp_path):
    said: list[str] = []
    path = tmp_path / "step.json"
    size = replace(SMALL, config=replace(SMALL.config, mlp_ratio=32, group=1 << 16))  # float8 has something to do
    found = measure_steps(size, rounds=2, steps=1, together=True, short=True, out=path, tell=said.append)
    assert found == read_json(path) and found["side_by_side"] is True
    assert [line.split(":")[0] for line in said] == list(ENTRIES) * 2
    rows = {row["contender"]: row for row in found["rows"]}
    rival = rows["adamw-bf16"]
    assert rival["ratio"] == 1
    for row in rows.values():
        assert row["error"] is None and len(row["step_ms_rounds"]) == 2
        assert row["step_ms"] == pytest.approx(sum(row["step_ms_rounds"]) / 2)
        assert row["ratio"] == pytest.approx(row["tokens_per_s"] / rival["tokens_per_s"])
        assert row["mfu"] == pytest.approx(row["tflops"] * 1e12 / found["hardware"]["matmul_flops_per_s"])
        assert set(row["phases_ms"]) == {"forward", "backward", "update"} and 0 < row["update_share"] < 1
        assert row["weights"] == weights_of(size.config) and row["last_loss"] < row["first_loss"]
        every = row["settings"].get("interval", 1)  # steps come in rounds of so many
        assert row["steps_taken"] == 2 + 2 * 2 * every + 1 + every  # warm-up, turns with as many more, phases
    assert 2.0 < rows["ours"]["bytes_per_weight"] < 2.2 and 1.0 < rows["ours-compact"]["bytes_per_weight"] < 1.2
    assert rows["ours"]["float_state_bytes"] == 0 and rows["adamw"]["bytes_per_weight"] == pytest.approx(12, abs=0.01)


def test_one_model_at_a_time_is_built_for_every_turn(monkeypatch):
    built = []
    real = Runner.__init__
    monkeypatch.setattr(Runner, "__init__", lambda self, entry, *rest: built.append(entry) or real(self, entry, *rest))
    found = measure_steps(SMALL, ["adamw", "ours"], rounds=2, steps=1, together=False, short=True)
    assert [entry.rule for entry in built] == ["adamw", "ours"] * 2 and found["side_by_side"] is False
    assert all(len(row["step_ms_rounds"]) == 2 and row["phases_ms"] for row in found["rows"])
    assert all(row["ratio"] is None for row in found["rows"])  # the rival does not take part


@pytest.mark.parametrize("together", [True, False])
def test_who_fails_does_not_stop_the_others(monkeypatch, together):
    real = Runner.turn

    def turn(self, steps):
        if "muon" in str(self.optimizers).lower():
            raise RuntimeError("CUDA out of memory. Tried to allocate")
        return real(self, steps)

    monkeypatch.setattr(Runner, "turn", turn)
    found = measure_steps(SMALL, ["muon", "adamw"], rounds=2, steps=1, together=together, short=True)
    muon, adamw = found["rows"]
    assert muon["error"] == "out of memory" and muon["step_ms"] is None and muon["state_bytes"] > 0
    assert adamw["error"] is None and len(adamw["step_ms_rounds"]) == 2


@pytest.mark.parametrize(("brief", "turns"), [(0.0, 1), (math.inf, 5)])
@pytest.mark.parametrize("together", [True, False])
def test_no_turn_begins_when_the_time_is_up(together, brief, turns, monkeypatch):
    """But for brief ones of models that are there."""
    monkeypatch.setattr("tritwise.bench.step.BRIEF", brief)
    found = measure_steps(SMALL, ["adamw", "muon"], rounds=5, steps=1, together=together, short=True, seconds=0)
    assert [len(row["step_ms_rounds"]) for row in found["rows"]] == ([turns, 0] if together else [0, 0])
    assert "time was up" in found["rows"][1]["error"]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"names": ["adam"]}, "did you mean adamw"),
        ({"names": []}, "no contender"),
        ({"rounds": 0}, "rounds is 0"),
        ({"size": replace(SMALL, mode="graph")}, "needs a GPU"),
    ],
)
def test_steps_that_cannot_be_measured_are_refused(changes, named):
    with pytest.raises(UserError, match=named):
        measure_steps(**{"size": SMALL} | changes)


def test_step_on_the_command_line(tmp_path, cli):
    flags = ["--width", 32, "--depth", 1, "--ctx", 8, "--batch", 1, "--rounds", 1, "--steps", 1, "--device", "cpu"]
    done = cli("bench", "step", *flags, "--contenders", "ours,adamw-bf16", "--out", tmp_path / "a.json", "--json")
    assert done.code == 0 and done.json == read_json(tmp_path / "a.json")
    for words in ("28,672 weights", "8 bytes a step", "ms/step", "MFU", "GB/s", "TFLOP/s", "ours"):
        assert words in done.err
    assert "no contender" in cli("bench", "step", "--contenders", "", "--device", "cpu").err


# --- kernels --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kernels(tmp_path_factory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("kernels") / "kernels.json"
    found = measure_kernels(widths=(32,), rows=40, calls=2, short=True, out=path)
    assert found == read_json(path)
    return found


def test_every_operation_is_measured_and_right(kernels):
    assert {row["operation"] for row in kernels["rows"]} == set(backends._backends)
    names = {row["kernel"] for row in kernels["rows"]}
    assert names >= {"decode", "forward", "input_grad", "weight_grad", "scale_grad", "embedding", "embedding_grad"}
    assert names >= {"accumulate_many", "move_many", "accumulate_nibbles", "move_nibbles", "momentum_of_many"}
    for row in kernels["rows"]:
        assert row["correct"] and (row["exact"] is True or row["error"] <= 1e-2)
        integers = row["kernel"].startswith(("accumulate", "move"))
        assert row["exact"] is (True if integers else None) and (row["error"] is None) is integers
        assert row["gap"] == pytest.approx(row["ms"] / row["limit_ms"]) and row["limit_ms"] > 0
        assert row["speedup"] == pytest.approx(row["reference_ms"] / row["ms"])
    assert kernels["left_out"] == 0 and kernels["backends"]["update"] == "cpu"


def test_limits_are_counted_from_shapes(kernels):
    rows = {(row["kernel"], row["shape"]): row for row in kernels["rows"]}
    forward = rows["forward", "40 x 32 -> 128"]
    assert forward["flops"] == 2 * 40 * 32 * 128 and forward["plain_ms"] > 0
    assert forward["bytes"] == 4 * 40 * 32 + 4 * 40 * 128 + 32 * 128 + 128
    weights = 12 * 32 * 32
    assert rows["move_many", "4 matrices, 0.0M"]["bytes"] == 6 * weights
    per_second = kernels["hardware"]["copy_bytes_per_s"]
    assert rows["move_many", "4 matrices, 0.0M"]["limit_ms"] == pytest.approx(6000 * weights / per_second)
    # Four matrices of a block, qkv being three: products of 32 x 32 and 32 x 128.
    square, wide = 3 * 6 * 32**3, 3 * (4 * 32 * 32 * 128 + 2 * 32**3)
    assert rows["direction_many balanced", "4 matrices, 0.0M"]["flops"] == 4 * square + 2 * wide


def test_a_wrong_kernel_is_found(monkeypatch, cli):
    from tritwise.ops.linear import cpu
    from tritwise.ops.update import cpu as update

    right, move = cpu.decode, update.move_registers
    monkeypatch.setattr(cpu, "decode", lambda *given: right(*given) * 1.02)
    flags = ["--widths", 16, "--rows", 4, "--calls", 1, "--device", "cpu"]
    done = cli("bench", "kernels", *flags, "--only", "decode", "--json")
    assert done.code == 2 and "not right" in done.err and "WRONG" in done.err

    def off_by_one(register, *given):
        flips = move(register, *given)
        register[0, 0] += 1
        return flips

    monkeypatch.setattr(update, "move_registers", off_by_one)
    (row,) = measure_kernels(widths=(16,), rows=4, calls=1, short=True, only="move_many")["rows"]
    assert row["exact"] is False and not row["correct"]


def test_kernels_that_cannot_be_measured_are_refused(cli):
    with pytest.raises(UserError, match="no kernel's name holds 'matmul'"):
        measure_kernels(only="matmul")
    assert "no whole numbers" in cli("bench", "kernels", "--widths", "a,b").err
    found = measure_kernels(widths=(16,), rows=4, calls=1, short=True, seconds=0)
    assert len(found["rows"]) == 1 and found["left_out"] > 10


# --- capacity -------------------------------------------------------------------------------------------------------


def fits_below(most: float) -> Callable[[float], dict[str, Any]]:
    """What `ask` would tell if the memory held `most` weights."""

    def try_size(size: float) -> dict[str, Any]:
        shape = shape_of(size, 64)
        found = weights_of(shape)
        return {"weights": found, "width": shape.width, "depth": shape.depth, "fits": found <= most, "reason": "full"}

    return try_size


def weigh(size: float) -> int:
    return weights_of(shape_of(size, 64))


@pytest.mark.parametrize("first", [1e6, 1e9, 1e12])
@pytest.mark.parametrize("most", [7e8, 2.87e10])
def test_the_search_closes_in(first, most):
    found = search(first, weigh, fits_below(most), tolerance=0.05, until=math.inf)
    assert found["complete"] and found["largest"]["weights"] <= most < found["fails"]
    assert found["fails"] / found["largest"]["weights"] <= 1.06
    sizes = [probe["weights"] for probe in found["probes"]]
    assert len(set(sizes)) == len(sizes) < 25


def test_the_search_ends_where_shapes_are_coarse_or_nothing_fits():
    found = search(1e6, weigh, fits_below(7e5), tolerance=1e-6, until=math.inf)
    assert found["complete"] and found["largest"]["weights"] <= 7e5 < found["fails"]
    found = search(1e6, weigh, fits_below(0), tolerance=0.05, until=math.inf)
    assert found["complete"] and found["largest"] is None and found["probes"][-1]["weights"] < 2 * LEAST


def test_the_search_heeds_the_time():
    found = search(1e6, weigh, fits_below(1e9), tolerance=0.05, until=0.0)
    assert not found["complete"] and len(found["probes"]) == 1 and found["largest"]
    late = {"weights": 1, "fits": False, "timed_out": True}
    found = search(1e6, weigh, lambda size: late, tolerance=0.05, until=math.inf)
    assert not found["complete"] and found["largest"] is None and found["fails"] is None


PROBE = Probe(ENTRIES["ours"], 1e5, ctx=16, batch=1, limit=None, device="cpu")


def test_a_probe_takes_real_steps():
    found = take_probe(PROBE)
    assert found["fits"] and found["reason"] is None and len(found["losses"]) == PROBE.steps
    assert found["losses"][-1] < found["losses"][0] and found["weights"] == weigh(1e5)
    assert 2.0 < found["state_bytes"] / found["weights"] < 2.1 and found["step_seconds"] > 0


def test_a_loss_that_does_not_fall_does_not_count():
    found = take_probe(replace(PROBE, entry=ENTRIES["adamw"]._replace(rate=1e6)))
    assert not found["fits"] and found["reason"] == "the loss did not fall"


def test_any_other_failure_is_told(monkeypatch):
    monkeypatch.setattr(capacity, "Batches", lambda *_, **__: [][1])
    with pytest.raises(IndexError):
        take_probe(PROBE)
    assert is_out_of_memory(MemoryError()) and not is_out_of_memory(RuntimeError("shape mismatch"))


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is one of Linux")
def test_a_probe_that_runs_out_of_memory_harms_nobody():
    # 16 bytes a weight in 60 MB: 20 million weights cannot be, and this process stays unlimited.
    found = ask(replace(PROBE, entry=ENTRIES["adamw"], weights=2e7, limit=60_000_000), patience=60)
    assert not found["fits"] and found["reason"] == "out of memory" and found["seconds"] > 0
    assert torch.ones(20_000_000).sum() == 20_000_000


def test_a_probe_that_takes_too_long_is_ended():
    found = ask(PROBE, patience=0)
    assert found["timed_out"] and not found["fits"] and "not done" in found["reason"] and found["seconds"] < 30


def test_capacity_on_the_command_line(monkeypatch, cli, tmp_path):
    asked: list[Probe] = []

    def answer(probe: Probe, patience: float) -> dict[str, Any]:
        asked.append(probe)
        assert probe.limit is not None
        found = fits_below(probe.limit / probe.entry.held)(probe.weights)
        more = {"losses": [6.0, 3.0], "peak_bytes": 10**6, "step_seconds": 1.0, "seconds": 2.0}
        return found | more

    monkeypatch.setattr(capacity, "ask", answer)
    flags = ["--memory-limit-gb", 4, "--device", "cpu", "--out", tmp_path / "c.json"]
    done = cli("bench", "capacity", *flags, "--json")
    assert done.code == 0 and done.json == read_json(tmp_path / "c.json")
    rows = {row["contender"]: row["largest"]["weights"] for row in done.json["rows"]}
    assert rows["ours-compact"] > rows["ours"] > 3 * rows["adamw-bf16"] > 5 * rows["adamw"]
    assert {probe.limit for probe in asked} == {4_000_000_000} and "RLIMIT_AS" in done.err
    measure_capacity(["ours"], seconds=1e-9)  # without a limit, what is free
    assert asked[-1].limit and asked[-1].limit > 1_000_000
    refused = cli("bench", "capacity", "--memory-limit-gb", 0, "--device", "cpu")
    assert refused.code == 2 and "above 0" in refused.err


# --- the study ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def study() -> ModuleType:
    path = Path(__file__).resolve().parent.parent / "benchmarks/engine_study.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_study_says_what_was_met(study, tmp_path):
    step = {
        "contender": "ours",
        "ratio": 1.2,
        "update_share": 0.2,
        "first_loss": 6,
        "last_loss": 3,
        "device_bytes": 7e9,
    }
    for stage in ("step-19m", "step-1.3b", "memory-3b"):
        names = ("ours", "ours-fp8", "ours-turns-fp8")
        write_json(tmp_path / f"{stage}.json", {"rows": [step | {"contender": name} for name in names]})
    write_json(tmp_path / "capacity.json", {"rows": [{"contender": "ours", "largest": {"weights": 29e9}}]})
    scores = [("triton", 2.0), ("reference", 2.01), ("triton", 2.02), ("reference", 2.03)]
    write_json(tmp_path / "quality.json", {"rows": [{"backend": name, "val_bpb": bpb} for name, bpb in scores]})
    met = {(line["stage"], line["bound"]): line["met"] for line in study.summary(tmp_path)}
    assert met["step-19m", "at least"] and met["step-1.3b", "at least"] and met["memory-3b", "at most"]
    assert met["step-1.3b", "at most"] is False and met["step-124m", "at least"] is None
    assert met["capacity", "at least"] and met["quality", "at most"]


def test_the_study_ends_a_stage_that_hangs(study):
    began = time.monotonic()
    told = study.run_limited([sys.executable, "-c", "print('begun', flush=True); import time; time.sleep(60)"], 1.0)
    assert told["code"] is None and "begun" in told["said"] and time.monotonic() - began < 20
    assert sum(stage.share for stage in study.STAGES.values()) == pytest.approx(1)


# --- the profile ----------------------------------------------------------------------------------------------------


def test_gaps_are_where_no_kernel_runs_on_any_stream(benchmark_script):
    gaps_of = benchmark_script("step_profile").gaps_of
    spans = [
        (30.0, 31.0, "late"),
        (0.0, 10.0, "long"),
        (2.0, 4.0, "within"),
        (9.0, 12.0, "overlaps"),
        (15.0, 20.0, "b"),
    ]
    assert gaps_of(spans) == [(3.0, 12.0, "overlaps", "b"), (10.0, 20.0, "b", "late")]
    assert gaps_of([]) == gaps_of(spans[:1]) == []


@pytest.mark.parametrize("who", ["ours", "recurrent-ternary:2", "recurrent-float"])
def test_a_profile_says_where_the_time_went(benchmark_script, who):
    script = benchmark_script("step_profile")
    if who == "ours":
        step, mode = script.contender("tiny", who, CPU, "shakespeare")
        assert mode == "eager"
    else:
        step, mode = script.contestant(150_000, who, CPU, "shakespeare", {"compile": "false"})
        assert mode == "false"
    found = script.profiled(step, CPU, 1)
    gaps = [gap["ms"] for gap in found["gaps"]]
    assert found["wall_ms"] > 0 and found["kernels"] and 0 < len(gaps) <= 12
    assert gaps == sorted(gaps, reverse=True) and 0 < sum(gaps) <= found["idle_ms"] * 1.0001
    assert sum(wait["ms"] for wait in found["waits"]) <= found["idle_ms"] * 1.0001
    assert all(gap["at_ms"] >= 0 and gap["after"] and gap["before"] for gap in found["gaps"])
