"""Stepper: a step as one call, with the bits of a loop written by hand, whether eager, compiled or a recorded graph."""

import copy
import functools
import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tritwise.train.stepper as stepper_module
from tritwise import ops
from tritwise.bench.entries import PARTS
from tritwise.models import ByteLM, ModelConfig
from tritwise.nn import TritLinear, decoded, trit_modules, use_fp8
from tritwise.ops import gpu
from tritwise.optim import Muon, TritOptimizer
from tritwise.train.optimizers import float_optimizers
from tritwise.train.stepper import Stepper
from tritwise.train.warm import warm_up

SHAPE = ModelConfig(width=32, depth=1, ctx=16, column_scales=True)
TRIT = {"trit": {}, "compact": {"compact": True}, "steadied": {"row_memory": 0.9}, "nesterov": {"nesterov": True}}
RULES = (*TRIT, "adamw", "muon")


@pytest.fixture
def quick_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.compile without code generation: the traced graphs, forward and backward, run as they are."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager", fullgraph=True))
    yield
    torch._dynamo.reset()


def build(rule: str, device: str = "cpu", **settings: Any) -> tuple[ByteLM, list[torch.optim.Optimizer]]:
    torch.manual_seed(0)
    model = ByteLM(ModelConfig(**SHAPE.__dict__ | {"weights": "trit" if rule in TRIT else "float"})).to(device)
    if rule in TRIT:
        return model, [TritOptimizer(model, 0.05, **TRIT[rule], **settings)]
    return model, float_optimizers(model, rule, 0.02)


def batches(count: int, device: str = "cpu") -> list[tuple[Tensor, Tensor]]:
    ids = torch.randint(0, 256, (count, 4, 17), generator=torch.Generator().manual_seed(1)).to(device)
    return [(row[:, :-1], row[:, 1:]) for row in ids]


def state_of(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Every parameter and every tensor of the optimizers' state."""
    found = {name: p.detach().clone() for name, p in model.named_parameters()}
    for number, optimizer in enumerate(optimizers):
        for index, values in optimizer.state_dict()["state"].items():
            found |= {f"{number}.{index}.{key}": t.clone() for key, t in values.items() if isinstance(t, Tensor)}
    return found


def run(rule: str, steps: int, device: str = "cpu", **how: bool) -> tuple[list[float], dict[str, Tensor]]:
    model, optimizers = build(rule, device)
    stepper = Stepper(model, optimizers, **how)
    losses = []
    for number, batch in enumerate(batches(steps, device)):
        slow_down(optimizers, number)
        losses.append(stepper.step(*batch).clone())
    return torch.stack(losses).tolist(), state_of(model, optimizers)


def slow_down(optimizers: Sequence[torch.optim.Optimizer], step: int) -> None:
    """Rates change at every step, as a schedule's do."""
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group.setdefault("initial_lr", group["lr"])
        group["lr"] = group["initial_lr"] / (1 + step)


def run_by_hand(rule: str, steps: int) -> tuple[list[float], dict[str, Tensor]]:
    model, optimizers = build(rule)
    losses = []
    for number, (ids, targets) in enumerate(batches(steps)):
        slow_down(optimizers, number)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = model.loss(ids, targets)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
    return losses, state_of(model, optimizers)


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize("rule", RULES)
def test_eager_is_the_loop_by_hand(rule):
    (losses, state), (expected, by_hand) = run(rule, 4), run_by_hand(rule, 4)
    assert losses == expected and len(set(losses)) == 4
    assert_equal(state, by_hand)


@pytest.mark.parametrize("rule", RULES)
def test_compiled_has_the_same_bits(rule, quick_compiler):
    (losses, state), (expected, by_hand) = run(rule, 3, compile=True), run_by_hand(rule, 3)
    assert losses == expected
    assert_equal(state, by_hand)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1  # and it was compiled


@pytest.mark.parametrize("checkpoint", [False, True])
def test_compiled_blocks_of_every_depth_share_what_is_compiled(quick_compiler, checkpoint):
    """Bits of eager steps at every depth, one code for layers of a kind, nothing compiled where scores are taken."""
    found, ids = [], torch.randint(256, (2, 17), generator=torch.Generator().manual_seed(2))
    for blocks in (False, True):
        torch.manual_seed(0)
        shape = ModelConfig(width=32, depth=4, ctx=16, prelude=1, coda=1, loops=3, **PARTS | {"exclusive": 2})
        model = ByteLM(shape, checkpoint=checkpoint)
        stepper = Stepper(model, [TritOptimizer(model, rate=0.02)], blocks=blocks)
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        losses = [float(stepper.step_over([(ids[:, :-1], ids[:, 1:])], loops)) for loops in (1, 2, 3, 1)]
        made = torch._dynamo.utils.counters["stats"]["unique_graphs"] - before
        # The first layer, and repeats or not that are exclusive or not; what is before the layers, and the last norm.
        assert made == (5 + 3) * blocks
        with torch.inference_mode():
            found.append([*losses, *model(ids[:1, :7]).flatten().tolist()])
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == made and model.compiled is None
    assert found[0] == found[1]


def test_the_loss_is_a_tensor_without_a_graph_and_gradients_are_let_go_of():
    model, optimizers = build("adamw")
    stepper = Stepper(model, optimizers)
    loss = stepper.step(*batches(1)[0])
    assert loss.shape == () and loss.dtype == torch.float32 and not loss.requires_grad
    assert math.log(256) - 1 < loss.item() < math.log(256) + 1
    assert all(p.grad is None for p in model.parameters())


def test_every_optimizer_steps():
    model, optimizers = build("muon")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    Stepper(model, optimizers).step(*batches(1)[0])
    assert [name for name, p in model.named_parameters() if torch.equal(p, before[name])] == []


def test_a_graph_away_from_a_gpu_is_refused():
    with pytest.raises(ValueError, match="a CUDA graph cannot be recorded on cpu; leave out graph"):
        Stepper(*build("trit"), graph=True)


class Replayed:
    """What a recording does, without a GPU: the same pass again at every call, and the updates of the same layers."""

    def __init__(
        self, model: Any, loss: Any, batch: tuple[Any, ...], booth: object, updates: Sequence[TritOptimizer] = ()
    ) -> None:
        self.model, self.loss, self.batch, self.updates = model, loss, batch, list(updates)
        self.port_grads: dict[Any, Tensor] = {}
        self.phases = [optimizer.phase for optimizer in updates]

    def __call__(self, batch: tuple[Any, ...]) -> Tensor:
        assert [part.shape for part in batch] == [part.shape for part in self.batch]
        layers = [layer for _, layer in trit_modules(self.model)]
        consumers = [layer.consumer for layer in layers]
        for p in self.model.parameters():
            p.grad = None
        for layer in layers:
            layer.consumer = None
        loss = self.loss(*batch)
        loss.backward()
        for layer, consumer in zip(layers, consumers, strict=True):
            self.port_grads[layer], layer.port.grad, layer.consumer = layer.port.grad, None, consumer
        for optimizer, phase in zip(self.updates, self.phases, strict=True):
            assert (optimizer.step_count - 1) % optimizer.phases == phase  # before_replay has counted this step
            with optimizer.ahead(-1), optimizer.recording():
                optimizer.consume(list(self.port_grads), list(self.port_grads.values()))
                optimizer.step()
        return loss.detach()


@pytest.mark.parametrize(("rule", "steady"), [*((rule, False) for rule in RULES), ("trit", True)])
def test_every_shape_has_a_recording_until_there_are_too_many(rule, steady, monkeypatch):
    """Recordings of two shapes or phases and eager steps of others in turn: the bits of eager steps alone."""
    monkeypatch.setattr(stepper_module, "_Recording", Replayed)
    monkeypatch.setattr(stepper_module, "_Booth", lambda device: None)
    monkeypatch.setattr(stepper_module, "MOST_RECORDED", 2)
    found = []
    for recorded in (True, False):
        model, optimizers = build(rule, **({} if rule in ("adamw", "muon") else {"interval": 2}))
        stepper = Stepper(model, optimizers, steady=steady)
        stepper._record = recorded
        losses = []
        for length, (ids, targets) in zip((16, 8, 16, 12, 8, 12), batches(6), strict=True):
            losses.append(float(stepper.step(ids[:, :length], targets[:, :length])))
        assert len(stepper._replays) == (2 if recorded else 0)
        found.append((losses, state_of(model, optimizers)))
    assert found[0][0] == found[1][0]
    assert_equal(found[0][1], found[1][1])


@pytest.mark.parametrize("how", [{}, {"compile": True}, {"blocks": True}])
def test_what_a_recording_holds_decodes_once_and_is_an_eager_step(how, quick_compiler, monkeypatch):
    """The pass itself, on a CPU, where nothing is recorded."""
    calls: list[int] = []
    decode_many = ops.decode_many
    monkeypatch.setattr(ops, "decode_many", lambda *given: calls.append(len(given[0])) or decode_many(*given))
    (model, (optimizer,)), (other, eager) = build("trit"), build("trit")
    stepper, expected = Stepper(model, [optimizer], **how), Stepper(other, eager)
    layers = [layer for _, layer in trit_modules(model)]
    for layer in layers:
        layer.consumer = None
    for number, batch in enumerate(batches(3)):
        held = SimpleNamespace(_model=model, _layers=layers, _floats=[], _loss_of=stepper._loss, _batch=batch)
        held.updates = []
        loss = stepper_module._Recording._run(held)
        assert calls == [5] * (number + 1)  # the head, and four matrices of a block
        assert all(layer.operand == ops.Operand() for layer in layers if isinstance(layer, TritLinear))
        stepper_module._deliver([optimizer], held.port_grads)
        optimizer.step()
        assert torch.equal(loss, expected.step(*batch)) and not loss.requires_grad
    assert len(calls) == 3, "eager steps decode nothing ahead"
    assert_equal(state_of(model, [optimizer]), state_of(other, eager))


@pytest.mark.parametrize("how", [{"compile": True}, {"blocks": True}])
def test_what_was_compiled_for_recordings_does_not_stand_in_the_way_of_eager_steps(how, quick_compiler):
    """The first block reads the model's input twice and the others do not: torch then looks for what they share."""
    torch.manual_seed(0)
    model = ByteLM(ModelConfig(**SHAPE.__dict__ | {"depth": 3, "input_mix": True}))
    loss_of, (batch, *_) = stepper_module.loss_of(model, **how), batches(1)
    losses, before = [], torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for context in (decoded, nullcontext, decoded):
        with context(model, torch.float32) if context is decoded else context():
            losses.append(loss_of(*batch))
            losses[-1].backward()
    assert losses[0] == losses[1] == losses[2]
    made = torch._dynamo.utils.counters["stats"]["unique_graphs"] - before
    assert made == (2 * 2 + 2 if how.get("blocks") else 2)  # embeddings and the last norm read nothing decoded


def spoiled(
    rule: str, device: str, there: bool, records: bool = False, **how: Any
) -> tuple[Stepper, list[int], dict[str, Tensor]]:
    """Six guarded steps of which the third and fifth have a gradient that is no number; what `settle` counts by then.
    there: it is the device that holds them back. records: Muon its moves."""
    model, optimizers = build(rule, device)
    for optimizer in optimizers:
        if isinstance(optimizer, Muon):
            optimizer.records_moves = records
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["weight_decay"] = 0.1
    stepper = Stepper(model, optimizers, guard=True, clip=0.5, **how)
    if device == "cpu":
        stepper._held = torch.zeros(()) if there else None  # type: ignore[assignment]
    assert (stepper._held is not None) is there
    spoils: list[float] = []
    model.head.weight.register_hook(lambda grad: grad + spoil)
    spoil, counts = torch.zeros((), device=device), []
    for number, batch in enumerate(batches(6, device)):
        slow_down(optimizers, number)
        spoil.fill_(math.nan if number in (2, 4) else 0.0)
        before = state_of(model, optimizers)
        spoils.append(float(stepper.step(*batch)))
        after = state_of(model, optimizers)
        same = [name for name in before if torch.equal(before[name], after[name])]
        assert len(same) == (len(before) if number in (2, 4) else 0)
        stepper.settle()
        counts.append(optimizers[0].param_groups[0].get("skipped", 0))
    assert all(map(math.isfinite, spoils)) and len(set(spoils)) == 6
    return stepper, counts, state_of(model, optimizers)


@pytest.mark.parametrize("rule", ["adamw", "muon"])
def test_what_is_no_number_is_held_back_on_the_device_as_by_the_host(rule):
    (_, told, expected), (stepper, counts, found) = (spoiled(rule, "cpu", there) for there in (False, True))
    assert told == counts == [0, 0, 1, 1, 2, 2]
    assert {optimizer.param_groups[0]["skipped"] for optimizer in stepper.optimizers} == {2}
    assert_equal(found, expected)


# On a GPU


@pytest.mark.gpu
def test_recordings_of_several_shapes_share_one_state():
    found = []
    for graph in (True, False):
        model, optimizers = build("trit", "cuda")
        stepper = Stepper(model, optimizers, graph=graph)
        losses = []
        for length, (ids, targets) in zip((16, 8, 16, 12, 8, 12), batches(6, "cuda"), strict=True):
            slow_down(optimizers, len(losses))
            losses.append(float(stepper.step(ids[:, :length], targets[:, :length])))
        assert len(stepper._replays) == (3 if graph else 0)
        found.append((losses, state_of(model, optimizers)))
    assert found[0][0] == found[1][0]
    assert_equal(found[0][1], found[1][1])


@pytest.mark.gpu
@pytest.mark.parametrize("rule", RULES)
def test_a_graph_gives_the_state_of_eager_steps(rule):
    (losses, state), (expected, eager) = (run(rule, 10, "cuda", graph=graph) for graph in (True, False))
    assert losses == expected and len(set(losses)) == 10
    assert_equal(state, eager)


@pytest.mark.gpu
@pytest.mark.parametrize("how", [{"graph": True}, {"records": True}])
@pytest.mark.parametrize("own", [{}, {"row_memory": 0.9, "interval": 4}, {"roles": {"embedding": {"scale_rate": 0.5}}}])
@pytest.mark.parametrize(
    "shape",
    [
        {"group": 64},
        {"group": 1 << 16},
        {"group": 64, "column_scales": False},
        {"group": 64, "ngrams": 3, "ngram_rows": 600},  # of which a step uses a part
        {"group": 64, "ngrams": 3, "ngram_rows": 600, "ngram_width": 32, "ngram_dropout": 0.2},
    ],
)
def test_scales_that_learn_fast_have_the_bits_of_eager_steps(shape, own, how):
    """A recorded step takes the scales of all layers at once, an eager one those of each; several to a row, or one."""
    found = []
    for given in (how, {}):
        torch.manual_seed(0)
        settings = SHAPE.__dict__ | {"width": 192, "depth": 3} | shape
        model = ByteLM(ModelConfig(**settings)).to("cuda")
        optimizer = TritOptimizer(model, 0.05, **{"scale_rate": 0.2, "momentum": 0.5} | own)
        optimizer.records_moves = given.get("records", False)
        before = [e.clone() for _, layer in trit_modules(model) for e in layer.exponents()]
        stepper, losses, flips = Stepper(model, [optimizer], graph=given.get("graph", False)), [], []
        assert stepper.records_whole_steps is given.get("graph", False)
        for number, batch in enumerate(batches(8, "cuda")):
            slow_down([optimizer], number)
            losses.append(float(stepper.step(*batch)))
            flips.append(optimizer.flips)
        after = [e for _, layer in trit_modules(model) for e in layer.exponents()]
        assert all(not torch.equal(a, b) for a, b in zip(after, before, strict=True))
        found.append((losses, flips, state_of(model, [optimizer])))
    assert found[0][:2] == found[1][:2]
    assert_equal(found[0][2], found[1][2])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [{}, {"group": 64}, {"group": 1 << 16}, {"group": 1 << 16, "fp8": 512}])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_recording_that_decodes_ahead_has_the_bits_of_one_that_does_not(shape, dtype, checkpoint, monkeypatch):
    found, launched, launch = [], [], gpu.launch

    def watched(kernel: Any, *given: Any, **constants: Any) -> None:
        launched.append(kernel.fn.__name__)
        launch(kernel, *given, **constants)

    monkeypatch.setattr(gpu, "launch", watched)
    for ahead in (True, False):
        launched.clear()
        monkeypatch.setattr(stepper_module, "decoded", decoded if ahead else lambda *_: nullcontext())
        torch.manual_seed(0)
        settings = SHAPE.__dict__ | {"width": 192, "depth": 3, "group": 256} | shape
        least = settings.pop("fp8", None)
        model = ByteLM(ModelConfig(**settings), dtype, checkpoint=checkpoint).to("cuda")
        assert least is None or use_fp8(model, least) == 9
        optimizer = TritOptimizer(model, 0.05)
        stepper, losses = Stepper(model, [optimizer], graph=True), []
        for number, batch in enumerate(batches(6, "cuda")):
            slow_down([optimizer], number)
            losses.append(float(stepper.step(*batch)))
        assert launched.count("decode_many") == 4 * ahead  # while it was recorded, and before
        others = launched.count("decode") + launched.count("trits_float8")
        assert (others <= 8) is ahead  # those of rows of the embedding
        found.append((losses, state_of(model, [optimizer])))
    assert found[0][0] == found[1][0] and len(set(found[0][0])) == 6
    assert_equal(found[0][1], found[1][1])


@pytest.mark.gpu
def test_a_recording_holds_the_update_and_is_made_anew_when_settings_change():
    (model, optimizers), (other, eager) = build("trit", "cuda"), build("trit", "cuda")
    steppers = Stepper(model, optimizers, graph=True), Stepper(other, eager)
    recordings = []
    for number, batch in enumerate(batches(6, "cuda")):
        for (optimizer,), stepper in zip((optimizers, eager), steppers, strict=True):
            if number == 3:
                optimizer.configure(momentum=0.5)
            if number == 5:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            stepper.step(*batch)
        recordings.append(next(iter(steppers[0]._replays.values())))
    assert recordings[0].updates == optimizers and len(set(map(id, recordings))) == 3
    assert_equal(state_of(model, optimizers), state_of(other, eager))


@pytest.mark.gpu
def test_every_depth_has_a_recording_and_they_share_one_state():
    """Recorded at every depth before the first step, then replayed back and forth: the bits of eager steps."""
    found = []
    for graph in (True, False):
        torch.manual_seed(0)
        shape = ModelConfig(width=64, depth=2, ctx=32, loops=3, loop_embedding=True, repeat_skip=True, gains=True)
        model = ByteLM(shape).to("cuda")
        optimizer = TritOptimizer(model, rate=0.02, interval=2)
        stepper = Stepper(model, [optimizer], graph=graph)
        data, losses, flips = batches(6, "cuda"), [], []
        if graph:
            assert stepper.records_whole_steps
            before = state_of(model, [])
            warm_up(stepper, model, [optimizer], data[:1], [1, 2, 0])
            assert_equal(state_of(model, []), before)
            assert len(stepper._replays) == 3 * 2 and optimizer.step_count == 0
        for (ids, targets), loops, factor in zip(data, (1, 1, 2, 0, 2, 0), (1.0, 0.9, 0.7, 0.5, 0.3, 0.1), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = 0.02 * factor
            losses.append(float(stepper.step_over([(ids, targets)], loops)))
            flips.append(optimizer.flips)
        found.append((losses, flips, state_of(model, [optimizer])))
    assert found[0][:2] == found[1][:2]
    assert_equal(found[0][2], found[1][2])


@pytest.mark.gpu
def test_in_a_graph_a_loss_that_is_no_number_is_skipped_and_counted():
    """The rotary table is read by the recording where it lies: NaN in it makes a whole batch no number."""
    model, optimizers = build("trit", "cuda", scale_rate=0.1)
    (optimizer,) = optimizers
    assert isinstance(optimizer, TritOptimizer)
    stepper = Stepper(model, optimizers, graph=True)
    one, two, three = batches(3, "cuda")
    stepper.step(*one)
    before, table = state_of(model, optimizers), model.rotary.cos.clone()
    model.rotary.cos.fill_(math.nan)
    assert stepper.step(*two).isnan()
    assert (optimizer.skipped, optimizer.step_count, optimizer.flips) == (1, 2, 0)
    kept = {name for name, tensor in state_of(model, optimizers).items() if torch.equal(tensor, before[name])}
    assert kept >= {name for name, _ in model.named_parameters()}
    model.rotary.cos.copy_(table)
    assert stepper.step(*three).isfinite()
    assert (optimizer.skipped, optimizer.step_count) == (1, 3) and optimizer.flips > 0


@pytest.mark.gpu
def test_in_a_graph_gradients_come_through_the_consumers():
    """Whoever is no TritOptimizer is handed every gradient of its layers, after the replay."""
    model, _ = build("trit", "cuda")
    received: dict[nn.Module, list[Tensor]] = {layer: [] for _, layer in trit_modules(model)}
    for layer in received:
        layer.consumer = lambda layer, grad: received[layer].append(grad.clone())
    stepper = Stepper(model, [], graph=True)
    one, two = batches(2, "cuda")
    for ids, targets in (one, two, one):
        stepper.step(ids, targets)
    for layer, grads in received.items():
        assert len(grads) == 3 and layer.port.grad is None
        assert grads[0].shape == layer.register.shape and grads[0].any()
        assert torch.equal(grads[0], grads[2]) and not torch.equal(grads[0], grads[1])


@pytest.mark.gpu
@pytest.mark.parametrize("rule", ["adamw", "muon"])
def test_a_gpu_holds_back_what_is_no_number(rule):
    """Recorded or not, moves of Muon too, with nobody waiting for it but those who count."""
    found = []
    for how in ({}, {"graph": True}):
        for records in (False, True):
            _, counts, state = spoiled(rule, "cuda", True, records, **how)
            assert counts == [0, 0, 1, 1, 2, 2]
            found.append(state)
    for state in found[1:]:
        assert_equal(state, found[0])
