"""Memory of a training step: what checkpointing and a chunked loss save, and leave as it was; the account by role."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tritwise.files import read_json
from tritwise.loading import load
from tritwise.models import ByteLM, ModelConfig
from tritwise.nn import trit_modules
from tritwise.optim import TritOptimizer
from tritwise.registers import leading_trit
from tritwise.train import audit, load_run, train
from tritwise.train.checkpoint import CheckpointStore, _safetensors
from tritwise.train.device import dtype_called, record_moves, speed_of
from tritwise.train.memory import Kept, activation_bytes, gradient_bytes, memory_by_role
from tritwise.train.optimizers import float_optimizers
from tritwise.train.restore import pack_state, unpack_state
from tritwise.train.stepper import Stepper

SHAPE = ModelConfig(width=32, depth=3, ctx=16, ngrams=2, ngram_rows=64)
SMALL = {"depth": 1, "ngrams": 1}
BATCH, TIME, VOCAB = 5, 16, 256
SAVING = {"checkpoint": True, "loss_chunk": 24}  # which does not divide the 80 positions of a batch


def build(
    weights: str = "trit", dtype: torch.dtype = torch.float32, shape: dict[str, int] | None = None, **how: Any
) -> ByteLM:
    torch.manual_seed(0)
    return ByteLM(ModelConfig(**SHAPE.__dict__ | {"weights": weights} | (shape or {})), dtype, **how)


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    ids = torch.randint(VOCAB, (count, BATCH, TIME + 1), generator=torch.Generator().manual_seed(1))
    return [(row[:, :-1], row[:, 1:]) for row in ids]


BATCH_1 = batches(1)[0]


def gradients(
    model: ByteLM, loss_of: Callable[[Tensor, Tensor], Tensor] | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of one batch, and the gradient of every weight, each of which must come exactly once."""
    received: list[tuple[nn.Module, Tensor]] = []
    for _, layer in trit_modules(model):
        layer.consumer = lambda layer, grad: received.append((layer, grad))
    loss = (loss_of or model.loss)(*BATCH_1)
    loss.backward()
    layers = dict(trit_modules(model))
    assert len(received) == len(layers) == len(dict(received))
    found = {name: dict(received)[layer] for name, layer in layers.items()}
    return loss.detach(), found | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


class Largest(TorchDispatchMode):
    """The most numbers in any float32 tensor that an operation made while this was entered."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, Tensor) and tensor.dtype == torch.float32:
                self.numbers = max(self.numbers, tensor.numel())
        return made


# What is kept for backward


def test_the_account_of_what_is_kept():
    """Of tanh and of the square their outputs and inputs are kept, each storage once, until backward is done."""
    weight = nn.Parameter(torch.ones(30))
    model = nn.Module()
    model.weight = weight
    with Kept(model) as kept:
        y = torch.tanh(torch.ones(30) * weight)  # keeps the ones, and the result
        z = (y * y).sum()  # keeps the result of tanh, twice more
        assert kept.now == kept.peak == 2 * 30 * 4
        z.backward()
    assert kept.now == 0 and kept.peak == 2 * 30 * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", ["trit", "float"])
def test_checkpointing_keeps_the_inputs_of_blocks_and_the_bits_of_gradients(weights, dtype):
    (loss, plain), (other, again) = (gradients(build(weights, dtype, checkpoint=flag)) for flag in (False, True))
    assert torch.equal(loss, other) and plain.keys() == again.keys()
    assert [name for name in plain if not torch.equal(plain[name], again[name])] == []
    kept = []
    for depth in (3, 4):
        model = build(weights, dtype, {"depth": depth}, checkpoint=True)
        with Kept(model, *BATCH_1) as account:
            model.loss(*BATCH_1)
        kept.append(account.peak)
    assert kept[1] - kept[0] == BATCH * TIME * SHAPE.width * dtype.itemsize  # a block more is one input more


@pytest.mark.parametrize("weights", ["trit", "float"])
@pytest.mark.parametrize("chunk", [1, 24, 79])
def test_a_chunked_loss_is_the_loss(weights, chunk):
    (loss, plain), (other, parts) = (gradients(build(weights, loss_chunk=size)) for size in (0, chunk))
    assert abs(loss - other) <= 1e-6
    assert plain.keys() == parts.keys()
    for name, grad in plain.items():
        assert (grad - parts[name]).norm() <= 1e-5 * grad.norm(), name


def test_a_chunk_as_long_as_the_batch_is_no_chunk():
    for chunk in (BATCH * TIME, 10**6):
        loss, found = gradients(build(loss_chunk=chunk))
        expected_loss, expected = gradients(build())
        assert torch.equal(loss, expected_loss)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_chunked_loss_never_holds_all_logits():
    for chunk, most in ((0, BATCH * TIME * VOCAB), (24, 24 * VOCAB)):
        model = build(loss_chunk=chunk)
        with Largest() as seen:
            model.loss(*BATCH_1).backward()
        # The other large tensors: hidden activations of the MLP, and the gradient of the head.
        assert seen.numbers == max(most, BATCH * TIME * 4 * SHAPE.width)


def test_activations_are_those_of_a_real_step():
    model = build()
    with Kept(model, *BATCH_1) as kept:
        model.loss(*BATCH_1).backward()
    assert kept.now == 0
    plain, checkpointed, chunked, both = (
        activation_bytes(build(**how), *BATCH_1)
        for how in ({}, {"checkpoint": True}, {"loss_chunk": 24}, {"checkpoint": True, "loss_chunk": 24})
    )
    assert plain == kept.peak
    inputs = BATCH * TIME * SHAPE.width * 4
    with Kept(model, *BATCH_1) as block:
        model.blocks[0](torch.zeros(BATCH, TIME, SHAPE.width, requires_grad=True), model.rotary)
    # Checkpointed: of three blocks one is there with all that it keeps, and the inputs of two; the first block's is
    # the result of a norm, which is kept in any case.
    assert plain - checkpointed == 2 * (block.peak - inputs)
    # Chunked: two float32 numbers a logit (of tanh and log-softmax) are kept, of 24 positions in the place of 80.
    assert plain - chunked == pytest.approx(2 * (80 - 24) * VOCAB * 4, rel=0.01)
    assert both < min(chunked, checkpointed)


def test_it_is_only_for_training():
    model = build(**SAVING).eval()
    with torch.no_grad():
        assert torch.equal(model(BATCH_1[0]), build().eval()(BATCH_1[0]))
        assert abs(model.loss(*BATCH_1) - build().loss(*BATCH_1)) <= 1e-6
        state = model.new_state(BATCH)
        together = torch.cat([model(BATCH_1[0][:, :7], state), model(BATCH_1[0][:, 7:], state)], dim=1)
    torch.testing.assert_close(together, model(BATCH_1[0]).detach(), rtol=1e-4, atol=1e-4)


# Training


def trained_for(steps: int, *, accum: int = 1, **how: Any) -> ByteLM:
    model = build(shape={"depth": 2, "ngrams": 1}, **how)
    stepper = Stepper(model, [TritOptimizer(model, rate=0.02)], accum, guard=True)
    rows = batches(steps * accum)
    for step in range(steps):
        stepper.step_over(rows[step * accum : (step + 1) * accum])
    return model


def registers(model: ByteLM) -> Tensor:
    return torch.cat([layer.register.flatten() for _, layer in trit_modules(model)])


def apart(one: ByteLM, other: ByteLM) -> float:
    """Share of the trits that differ."""
    return float((leading_trit(registers(one)) != leading_trit(registers(other))).float().mean())


@pytest.mark.parametrize("accum", [1, 2])
def test_checkpointed_training_has_the_same_bits(accum):
    assert torch.equal(*(registers(trained_for(20, accum=accum, checkpoint=flag)) for flag in (False, True)))


def test_training_in_all_ways_that_save_memory_stays_close():
    """A chunked loss adds the same products in another order, so gradients differ in their last bits. The registers are
    the same until the first rounding that falls the other way; from there on they part by a little at every step."""
    start, plain, saving = trained_for(0), trained_for(20), trained_for(20, **SAVING)
    assert apart(start, plain) > 0.2
    assert apart(plain, saving) < 0.1 * apart(start, plain)
    batch = batches(1)[0]
    before, losses = start.loss(*batch).item(), [model.loss(*batch).item() for model in (plain, saving)]
    assert losses[0] < before - 0.3 and losses == pytest.approx(losses[::-1], abs=0.03)


@pytest.fixture
def quick_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.compile without code generation: the traced graphs, forward and backward, run as they are."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager", fullgraph=True))
    yield
    torch._dynamo.reset()


def test_compiled_with_all_that_saves_memory(quick_compiler):
    how = {"checkpoint": True, "loss_chunk": 48}
    loss, found = gradients(build(shape=SMALL, **how))
    model = build(shape=SMALL, **how)
    other, compiled = gradients(model, torch.compile(model.loss, dynamic=False))
    assert torch.equal(loss, other) and found.keys() == compiled.keys()
    assert [name for name in found if not torch.equal(found[name], compiled[name])] == []


def test_a_compiled_run_is_an_eager_run(quick_compiler, small_config, tmp_path: Path, assert_same_state):
    for compile in ("auto", "false", "true"):
        train(small_config(compile=compile, accum=2, steps=4), tmp_path / compile)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    assert_same_state(tmp_path / "auto", tmp_path / "false")
    assert_same_state(tmp_path / "auto", tmp_path / "true")


def test_runs_that_save_memory_resume_to_the_bit(small_config, stop_at, tmp_path: Path, assert_same_state):
    changes = {"depth": 2, "checkpoint": "block", "loss_chunk": 24}
    train(small_config(**changes), tmp_path / "whole")
    assert train(small_config(**changes), tmp_path / "parts", display=stop_at(6))["interrupted"]
    train(small_config(**changes), tmp_path / "parts", resume=True)
    assert_same_state(tmp_path / "whole", tmp_path / "parts")


def test_a_resumed_run_may_turn_checkpointing_on(small_config, stop_at, tmp_path: Path, cli, assert_same_state):
    train(small_config(depth=2), tmp_path / "whole")
    train(small_config(depth=2), tmp_path / "parts", display=stop_at(6))
    assert cli("train", "--resume", "--out", tmp_path / "parts", "--set", "checkpoint=block").code == 0
    assert_same_state(tmp_path / "whole", tmp_path / "parts")


# Types and compiling


def test_the_type_of_activations_follows_the_device():
    cpu = torch.device("cpu")
    assert dtype_called("auto", cpu) == dtype_called("float32", cpu) == torch.float32
    assert dtype_called("bfloat16", cpu) == torch.bfloat16


def test_a_run_in_bfloat16(small_config, tmp_path: Path):
    result = train(small_config(dtype="bfloat16"), tmp_path)
    assert result["artifact"]["bpb_reread"] == result["val"]["bpb"]
    loaded = load(tmp_path)
    assert loaded.model.dtype == torch.bfloat16
    val = read_json(tmp_path / "config.json")["train"]["data"]
    assert loaded.score(val, split="val").nats == result["val"]["nats"]
    in_float = loaded.to("cpu", torch.float32).score(val, split="val").nats
    assert in_float != result["val"]["nats"] and in_float == pytest.approx(result["val"]["nats"], abs=0.02)


def test_compiling_is_for_gpus_unless_asked_for():
    assert speed_of("auto", build()) == speed_of("false", build()) == (False, False, False)
    assert speed_of("true", build()) == (True, False, False) and speed_of("blocks", build()) == (False, False, True)


def test_moves_are_recorded_where_steps_are_compiled_and_models_not_too_large(monkeypatch):
    optimizers = [TritOptimizer(build()), *float_optimizers(build(weights="float"), "muon", 0.01)]
    weights = sum(layer.register.numel() for layer in optimizers[0].layers)
    floats = sum(p.numel() for group in optimizers[1].param_groups for p in group["params"])
    found = []
    for less, compiled in ((0, True), (0, False), (1, True)):
        monkeypatch.setattr("tritwise.train.device.RECORDED", weights - less)
        monkeypatch.setattr("tritwise.train.device.RECORDED_FLOATS", floats - less)
        record_moves(optimizers, compiled)
        found.append([optimizer.records_moves for optimizer in optimizers[:2]])
    assert found == [[True] * 2, [False] * 2, [False] * 2] and not hasattr(optimizers[2], "records_moves")


@pytest.mark.gpu
@pytest.mark.parametrize("how", [{}, SAVING])
def test_on_a_gpu(how):
    """Recorded and replayed, over two micro-batches, gives the bits of eager steps."""
    found = []
    for graph in (False, True):
        model = build(dtype=torch.bfloat16, **how).to("cuda")
        assert speed_of("auto", model, accum=2) == (True, True, False)
        stepper = Stepper(model, [TritOptimizer(model, rate=0.02)], 2, graph=graph, guard=True)
        rows = [(ids.cuda(), targets.cuda()) for ids, targets in batches(8)]
        losses = [stepper.step_over(rows[n : n + 2]) for n in range(0, 8, 2)]
        assert torch.stack(losses).isfinite().all()
        found.append(registers(model))
        memory = memory_by_role(model, stepper.optimizers, together=graph)
        assert memory["activations"] is not None and memory["activations"] > 0
        assert memory["reserved"] is not None and memory["peak"] <= memory["reserved"]
    assert torch.equal(*found)


# The account by role


def test_memory_by_role_is_the_audit():
    model = build()
    optimizer = TritOptimizer(model, scale_rate=0.01)
    Stepper(model, [optimizer], guard=True).step_over([BATCH_1])
    report, found = audit(model, [optimizer]), memory_by_role(model, [optimizer], activations=123)
    roles = report["bytes_by_role"]
    assert found["registers"] == report["weights"] == roles["matrix"] + roles["embedding"] + roles["head"]
    assert found["momentum"] == roles["momentum"] and found["scales"] == roles["scale"]
    assert found["floats"] == 0 and found["activations"] == 123 and found["reserved"] is None
    assert found["tables"] == model.rotary.cos.nbytes + model.rotary.sin.nbytes
    assert found["gradients"] == 4 * VOCAB * SHAPE.width  # the largest layer: the embedding, or the head
    assert found["peak"] is not None and found["peak"] > found["registers"]
    assert gradient_bytes(model, together=True) == 4 * report["weights"]
    assert memory_by_role(model, [optimizer])["activations"] is None  # a CPU does not tell


def test_memory_of_floats():
    model = build("float")
    optimizers = float_optimizers(model, "adamw", 0.01)
    Stepper(model, optimizers, guard=True).step_over([BATCH_1])
    found, weights = memory_by_role(model, optimizers), sum(p.numel() for p in model.parameters())
    assert found["registers"] == found["momentum"] == found["scales"] == 0
    assert found["floats"] == audit(model, optimizers)["float_state_bytes"] >= 12 * weights
    assert found["gradients"] == 4 * weights


def test_a_run_says_what_memory_it_took(trained: Path, cli):
    told = read_json(trained / "audit.json")["memory"]
    assert told["registers"] == read_json(trained / "audit.json")["weights"]
    assert 100_000 < told["activations"] < told["peak"]
    shown = cli("audit", trained, "--json")
    assert shown.json["memory"] == told
    for role in ("registers", "momentum", "scales", "gradients", "activations", "peak"):
        assert f"{told[role]:,}" in shown.err, role


def test_a_run_without_an_end_still_shows_what_lasts(small_config, stop_at, tmp_path: Path, cli):
    train(small_config(), tmp_path, display=stop_at(6))
    found = cli("audit", tmp_path, "--json").json["memory"]
    assert found["registers"] > 0 and found["gradients"] > 0 and found["peak"] is None is found["activations"]


# Checkpoints


def test_the_file_of_tensors_is_the_library_s_and_holds_no_copy():
    saved = {
        "z": torch.arange(-128, 128).to(torch.int8).reshape(4, 64),
        'a"é': torch.randn(5, 3),
        "half": torch.randn(7).to(torch.float16),
        "brain": torch.randn(2, 2).to(torch.bfloat16),
        "double": torch.randn(1, dtype=torch.float64),
        "none": torch.empty(0, 4, dtype=torch.int16),
        "one": torch.tensor(7),
        "word": torch.tensor([1, 2], dtype=torch.int32),
        "byte": torch.arange(3, dtype=torch.uint8),
        "flag": torch.tensor([True, False]),
    }
    header, *pieces = list(_safetensors(saved))
    assert bytes(header) + b"".join(pieces) == safetensors.torch.save(saved)
    pieces = [np.frombuffer(piece, np.uint8) for piece in pieces if len(piece)]
    memory = [tensor.flatten().view(torch.uint8).numpy() for tensor in saved.values() if tensor.numel()]
    assert len(pieces) == len(memory) == sum(np.shares_memory(one, two) for one in pieces for two in memory)


def test_what_is_packed_is_live_and_what_is_unpacked_is_its_own(tmp_path: Path):
    model = build()
    optimizer = TritOptimizer(model)
    Stepper(model, [optimizer], guard=True).step_over([BATCH_1])
    tensors, meta = pack_state(model, [optimizer])
    assert tensors["model.head.register"].data_ptr() == model.head.register.data_ptr()
    momentum = optimizer.state[model.head.register]["momentum"]
    assert momentum.data_ptr() in {tensor.data_ptr() for tensor in tensors.values()}
    store = CheckpointStore(tmp_path)
    store.save(1, tensors, meta)
    checkpoint, other = store.load(), build()
    fresh = TritOptimizer(other)
    unpack_state(checkpoint, other, [fresh])
    pages = {tensor.data_ptr() for tensor in checkpoint.tensors.values()}
    assert torch.equal(fresh.state[other.head.register]["momentum"], momentum)
    held = [*other.state_dict().values(), *(t for values in fresh.state.values() for t in values.values())]
    assert len(held) == len(tensors) and not pages & {tensor.data_ptr() for tensor in held}


def test_a_loaded_run_computes_as_it_was_trained(small_config, tmp_path: Path):
    train(small_config(dtype="bfloat16", checkpoint="block", loss_chunk=8, steps=2), tmp_path)
    _, model, _, _ = load_run(tmp_path)
    assert (model.dtype, model.checkpoint, model.loss_chunk) == (torch.bfloat16, True, 8)
