"""What TritOptimizer keeps: integers only; saved and loaded without a difference; micro-batches and sparse rows."""

import copy
import io
import json

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tritwise.models import ByteLM, ModelConfig
from tritwise.nn import TritEmbedding, TritLinear, TritModule, trit_modules
from tritwise.optim import TritOptimizer

KEYS = {"momentum", "row_exponent", "scale_momentum", "scale_row_exponent", "scale_evidence"}
SHAPE = ModelConfig(width=32, depth=1, ctx=8, ngrams=2, ngram_rows=64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def give(layer: TritModule, grad: Tensor) -> None:
    """Let backward hand exactly `grad` to the layer's port."""
    assert layer.port is not None
    (layer.port * grad).sum().backward()


def linear(inputs: int = 24, outputs: int = 8) -> TritLinear:
    torch.manual_seed(0)
    return TritLinear(inputs, outputs)


def table(rows: int = 10, columns: int = 6, **options) -> TritEmbedding:
    torch.manual_seed(0)
    return TritEmbedding(rows, columns, sparse=True, **options)


def value(optimizer: TritOptimizer, layer: TritModule) -> Tensor:
    """The momentum that the integers stand for, float64."""
    state = optimizer.state[layer.register]
    return state["momentum"].double() * 2.0 ** state["row_exponent"].double()


def unit(optimizer: TritOptimizer, layer: TritModule) -> Tensor:
    """One quantisation step of each row of the momentum, float64 [rows, 1]."""
    return 2.0 ** optimizer.state[layer.register]["row_exponent"].double()


def train(model: ByteLM, optimizer: TritOptimizer, first: int, last: int, micro_batches: int = 1) -> None:
    for step in range(first, last):
        for micro in range(micro_batches):
            generator = torch.Generator().manual_seed(100 * step + micro)
            ids = torch.randint(256, (2, 9), generator=generator)
            (model.loss(ids[:, :-1], ids[:, 1:]) / micro_batches).backward()
        optimizer.step()


def build(**options) -> tuple[ByteLM, TritOptimizer]:
    torch.manual_seed(0)
    model = ByteLM(SHAPE)
    return model, TritOptimizer(model, rate=0.05, **options)


def everything(model: ByteLM, optimizer: TritOptimizer) -> dict[str, Tensor]:
    """All registers, exponents and optimizer state by name."""
    found = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for index, values in optimizer.state_dict()["state"].items():
        found |= {f"{index}.{key}": tensor for key, tensor in values.items()}
    return found


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


# --- what is kept ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale_rate", [0.0, 0.1])
def test_all_state_is_int8_and_two_bytes_a_weight(scale_rate):
    model, optimizer = build(scale_rate=scale_rate)
    train(model, optimizer, 0, 2, micro_batches=2)
    for _, layer in trit_modules(model):
        state = optimizer.state[layer.register]
        assert set(state) == (KEYS if scale_rate else {"momentum", "row_exponent"})
        assert {tensor.dtype for tensor in state.values()} == {torch.int8}
        assert state["momentum"].shape == layer.register.shape
        assert state["row_exponent"].shape == (layer.register.shape[0], 1)
        if scale_rate:
            assert state["scale_momentum"].shape == (1, layer.exponent.numel())


def test_no_float_lasts_beyond_the_step():
    model, optimizer = build(scale_rate=0.1)
    train(model, optimizer, 0, 1)
    assert all(layer.port is not None and layer.port.grad is None for _, layer in trit_modules(model))
    kept = [*model.parameters(), *(t for state in optimizer.state.values() for t in state.values())]
    assert not any(tensor.is_floating_point() for tensor in kept)
    assert not any(isinstance(v, Tensor) for group in optimizer.param_groups for k, v in group.items() if k != "params")


def test_one_momentum_on_the_way_to_the_step_holds_no_second_gradient():
    """Between backward and step the only trace of a gradient is the int8 momentum."""
    layer = linear()
    optimizer = TritOptimizer(layer)
    give(layer, normal(8, 24))
    held = [v for v in vars(optimizer).values() if isinstance(v, dict | list)]
    flat = [t for v in held for t in (v.values() if isinstance(v, dict) else v) if isinstance(t, Tensor)]
    assert all(tensor.dtype == torch.bool and tensor.numel() <= 2 for tensor in flat) and flat  # weights and scales


# --- saving and loading ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("interval", "micro_batches", "row_memory"), [(1, 1, 0.0), (2, 3, 0.9)])
def test_a_resumed_run_equals_an_uninterrupted_one(interval, micro_batches, row_memory):
    options = {"scale_rate": 0.1, "interval": interval, "row_memory": row_memory, "seed": 7}
    whole, its_optimizer = build(**options)
    train(whole, its_optimizer, 0, 6, micro_batches)

    model, optimizer = build(**options)
    train(model, optimizer, 0, 3, micro_batches)
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    resumed, its_state = build(**options)
    resumed.load_state_dict(weights)
    its_state.load_state_dict(state)
    train(resumed, its_state, 3, 6, micro_batches)
    assert_equal(everything(resumed, its_state), everything(whole, its_optimizer))
    assert its_state.step_count == 6


def test_rows_of_matrices_remember_their_squares_in_two_bytes():
    model, optimizer = build(row_memory=0.9)
    train(model, optimizer, 0, 3)
    other, plain = build()
    train(other, plain, 0, 3)
    moved = 0
    for (_, layer), (_, same) in zip(trit_modules(model), trit_modules(other), strict=True):
        level = optimizer.state[layer.register].get("row_level")
        assert (level is not None) == (layer.role == "matrix") and "row_level" not in plain.state[same.register]
        if level is not None:
            assert level.dtype == torch.int16 and level.shape == (layer.register.shape[0], 1)
            assert (level > -10240).all()
            moved += int((layer.register != same.register).sum())
    assert moved > 0
    old = plain.state_dict()
    for group in old["param_groups"]:
        del group["row_memory"]  # of before there was one
    plain.load_state_dict(old)
    train(other, plain, 3, 4)


def test_settings_come_back_from_the_state():
    model, optimizer = build(seed=7, momentum=0.8, roles={"head": {"rate": 0.5, "interval": 2}})
    train(model, optimizer, 0, 2)
    optimizer.refuse()
    optimizer.step()
    other, fresh = build(seed=8)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert fresh.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
    assert (fresh.step_count, fresh.skipped) == (3, 1)
    # They are also what is used: both go on alike, from equal registers.
    other.load_state_dict(model.state_dict())
    train(model, optimizer, 3, 5)
    train(other, fresh, 3, 5)
    assert_equal(everything(other, fresh), everything(model, optimizer))


def test_settings_changed_after_loading_are_used():
    """Loading makes new group dicts: gradients must be taken with the settings in those."""
    layers = [linear(), linear()]
    optimizers = [TritOptimizer(layer, momentum=0.9) for layer in layers]
    for layer, optimizer in zip(layers, optimizers, strict=True):
        give(layer, normal(8, 24))
        optimizer.step()
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizers[1].param_groups[0]["momentum"] = 0.0
    for layer in layers:
        give(layer, torch.zeros(8, 24))
    assert value(optimizers[0], layers[0]).norm() > 0 and value(optimizers[1], layers[1]).norm() == 0


def test_the_state_is_plain_json_and_int8_tensors():
    """So that a checkpoint is safetensors and JSON, and nothing needs pickle."""
    model, optimizer = build(scale_rate=0.1)
    train(model, optimizer, 0, 2)
    state = optimizer.state_dict()
    tensors = {f"{index}.{key}": tensor for index, values in state["state"].items() for key, tensor in values.items()}
    read = safetensors.torch.load(safetensors.torch.save(tensors))
    groups = json.load(io.StringIO(json.dumps(state["param_groups"])))
    rebuilt: dict[int, dict[str, Tensor]] = {}
    for name, tensor in read.items():
        index, key = name.split(".")
        rebuilt.setdefault(int(index), {})[key] = tensor
    other, fresh = build(scale_rate=0.1)
    other.load_state_dict(model.state_dict())
    fresh.load_state_dict({"state": rebuilt, "param_groups": groups})
    train(model, optimizer, 2, 4)
    train(other, fresh, 2, 4)
    assert_equal(everything(other, fresh), everything(model, optimizer))


def test_schedulers_go_on_after_loading():
    def run(resume: bool) -> dict[str, Tensor]:
        model, optimizer = build()
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)
        for step in range(6):
            if resume and step == 3:
                saved = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict(), model.state_dict()))
                model, optimizer = build()
                scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)
                for target, state in zip((optimizer, scheduler, model), saved, strict=True):
                    target.load_state_dict(state)
            train(model, optimizer, step, step + 1)
            scheduler.step()
        return everything(model, optimizer)

    assert_equal(run(resume=True), run(resume=False))


def test_a_state_of_another_model_is_refused():
    _, optimizer = build()
    with pytest.raises(ValueError, match="parameter group"):
        TritOptimizer(linear()).load_state_dict(optimizer.state_dict())


# --- micro-batches --------------------------------------------------------------------------------------------------


@given(count=st.integers(1, 8), seed=st.integers(0, 50), decay=st.sampled_from([0.0, 0.9]))
@settings(max_examples=30, deadline=None)
def test_micro_batches_give_the_momentum_of_the_whole_batch(count, seed, decay):
    """Each addition rounds by less than one step of the row, and steps only grow: count + 1 of them bound the error."""
    layer, previous = linear(), normal(8, 24, seed=1000)
    optimizer = TritOptimizer(layer, momentum=decay)
    give(layer, previous)
    optimizer.step()
    before = value(optimizer, layer)
    grads = [normal(8, 24, seed=100 * seed + micro) for micro in range(count)]
    largest = torch.zeros(8, 1).double()
    for grad in grads:
        give(layer, grad / count)
        largest = torch.maximum(largest, unit(optimizer, layer))
    exact = decay * before + sum(grad.double() for grad in grads) / count
    assert ((value(optimizer, layer) - exact).abs() <= (count + 1) * largest).all()


def test_micro_batches_of_a_model_give_the_momentum_of_one_big_batch():
    count, ids = 4, torch.randint(256, (4, 9), generator=torch.Generator().manual_seed(3))
    (big, big_optimizer), (model, optimizer) = build(), build()
    big.loss(ids[:, :-1], ids[:, 1:]).backward()
    largest = {layer: torch.zeros(1).double() for _, layer in trit_modules(model)}
    for row in ids:
        (model.loss(row[None, :-1], row[None, 1:]) / count).backward()
        for layer in largest:
            largest[layer] = torch.maximum(largest[layer], unit(optimizer, layer))
    for (_, one), (_, other) in zip(trit_modules(big), trit_modules(model), strict=True):
        bound = (count + 1) * torch.maximum(largest[other], unit(big_optimizer, one))
        assert ((value(big_optimizer, one) - value(optimizer, other)).abs() <= bound + 1e-9).all()


@pytest.mark.parametrize("silent", range(4))
@pytest.mark.parametrize("sparse", [False, True])
def test_every_micro_batch_contributes(silent, sparse):
    """The gradients of three of four micro-batches are zero: the fourth is all there is, whichever it is."""
    layer = table(8, 24) if sparse else linear()
    optimizer, grad = TritOptimizer(layer, momentum=0.9), normal(8, 24)
    for micro in range(4):
        give(layer, grad if micro == silent else torch.zeros(8, 24))
    assert (value(optimizer, layer) - grad.double()).abs().max() <= 2 * unit(optimizer, layer).max()


def test_momentum_decays_once_a_step_however_many_micro_batches():
    layer = linear()
    optimizer = TritOptimizer(layer, momentum=0.5)
    grad = torch.full((8, 24), 64.0)  # sums of these and their halves are exact in int8
    give(layer, grad)
    optimizer.step()
    for _ in range(3):
        give(layer, torch.zeros(8, 24))
    assert torch.equal(value(optimizer, layer), torch.full((8, 24), 32.0).double())
    optimizer.step()
    give(layer, torch.zeros(8, 24))
    assert torch.equal(value(optimizer, layer), torch.full((8, 24), 16.0).double())


def test_micro_batches_draw_their_own_bits():
    """Were the bits the same at each micro-batch, the errors of equal gradients would add up, not average out."""
    layer, count = linear(200, 50), 16
    optimizer = TritOptimizer(layer, momentum=0.9)
    grad = torch.full((50, 200), 0.3)
    grad[:, 0] = 127.0 / count  # so that a step of the row stays 1 until the end
    for _ in range(count):
        give(layer, grad)
    error = (value(optimizer, layer) - count * grad)[:, 1:]
    # Independent roundings: a deviation of at most sqrt(16) / 2 steps each; the same bits would reach 16 * 0.46.
    assert error.std() < 2.1 and error.mean().abs() < 5 * 2.1 / error.numel() ** 0.5


def test_scale_gradients_accumulate_too():
    layer = TritLinear(16, 8, group=4)
    optimizer, exact = TritOptimizer(layer, scale_rate=0.1, momentum=0.9), torch.zeros(8, 4).double()
    eye = torch.eye(16)
    weight = layer(eye).T.detach().double()
    for micro in range(3):
        grad = normal(8, 16, seed=micro)
        give(layer, grad)
        exact += (grad.double() * weight).view(8, 4, 4).sum(2)
    state = optimizer.state[layer.register]
    step = 2.0 ** state["scale_row_exponent"].double()
    found = state["scale_momentum"].double().view(8, 4) * step
    assert ((found - exact).abs() <= 4 * step).all() and exact.abs().max() > 20 * step


# --- sparse rows ----------------------------------------------------------------------------------------------------


def test_rows_that_were_not_used_stay_as_they_are():
    layer = table(group=2)
    optimizer = TritOptimizer(layer, rate=0.3, scale_rate=0.5)
    upstream = normal(10, 6)

    def use(*rows: int) -> None:
        ids = torch.tensor(rows)
        (layer(ids) * upstream[ids]).sum().backward()
        optimizer.step()

    use(*range(10))  # every row has momentum now
    state = optimizer.state[layer.register]
    kept = [t.clone() for t in (layer.register, layer.exponent, state["momentum"], state["row_exponent"])]
    use(2, 7, 7)
    now = [layer.register, layer.exponent, state["momentum"], state["row_exponent"]]
    others = [row for row in range(10) if row not in (2, 7)]
    for before, after in zip(kept, now, strict=True):
        assert torch.equal(before[others], after[others])
    for row in (2, 7):
        assert not torch.equal(kept[0][row], layer.register[row]) and not torch.equal(kept[2][row], now[2][row])
    assert not torch.equal(kept[1][[2, 7]], layer.exponent[[2, 7]])


def test_a_dense_embedding_moves_all_rows():
    torch.manual_seed(0)
    layer = TritEmbedding(10, 6)
    optimizer = TritOptimizer(layer, rate=0.3)
    for rows in ([0, 1, 2], [5]):
        before = layer.register.clone()
        ids = torch.tensor(rows)
        (layer(ids) * normal(10, 6)[ids]).sum().backward()
        optimizer.step()
    # The momentum of the first step still moves rows 0 to 2 at the second.
    assert (layer.register != before).any(dim=1).tolist() == [True] * 3 + [False] * 2 + [True] + [False] * 4


def test_a_row_decays_once_when_a_step_first_uses_it():
    """Micro-batches on overlapping rows: row 0 in the first, row 1 in both, row 2 in the second, row 3 in none."""
    layer = table(4, 6)
    optimizer = TritOptimizer(layer, momentum=0.5)
    give(layer, torch.full((4, 6), 64.0))
    optimizer.step()
    for rows in ([0, 1], [1, 2]):
        grad = torch.zeros(4, 6)
        grad[rows] = 16.0
        give(layer, grad)
    expected = torch.tensor([32 + 16, 32 + 16 + 16, 32 + 16, 64]).double()[:, None].expand(4, 6)
    assert torch.equal(value(optimizer, layer), expected)
    before = layer.register.clone()
    optimizer.step()
    assert (layer.register != before).any(dim=1).tolist() == [True, True, True, False]
    give(layer, torch.cat((torch.full((1, 6), 8.0), torch.zeros(3, 6))))  # the next step decays again
    assert value(optimizer, layer)[:, 0].tolist() == [24 + 8, 64, 48, 64]


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=6), min_size=1, max_size=4), st.integers(0, 9))
@settings(max_examples=30, deadline=None)
def test_sparse_accumulation_is_dense_accumulation_on_the_rows_used(batches, seed):
    layer = table()
    optimizer, previous = TritOptimizer(layer, momentum=0.9), normal(10, 6, seed=500)
    give(layer, previous)
    optimizer.step()
    before, exact, largest = value(optimizer, layer), torch.zeros(10, 6).double(), unit(optimizer, layer)
    for micro, rows in enumerate(batches):
        ids, upstream = torch.tensor(rows), normal(len(rows), 6, seed=100 * seed + micro)
        (layer(ids) * upstream).sum().backward()
        exact.index_add_(0, ids, upstream.double())
        largest = torch.maximum(largest, unit(optimizer, layer))
    used = torch.zeros(10, 1).bool()
    used[torch.tensor([row for rows in batches for row in rows])] = True
    expected = torch.where(used, 0.9 * before, before) + exact
    assert ((value(optimizer, layer) - expected).abs() <= (len(batches) + 1) * largest * used + 1e-12).all()


@pytest.mark.parametrize("direction", ["newton_schulz", "balanced", "row_column", "rms", "sign"])
def test_a_sparse_table_whose_gradient_is_zero_does_not_move(direction):
    layer = table()
    optimizer = TritOptimizer(layer, rate=0.3, scale_rate=0.5, roles={"embedding": {"direction": direction}})
    give(layer, normal(10, 6))
    optimizer.step()
    before = layer.register.clone(), layer.exponent.clone(), value(optimizer, layer)
    (layer(torch.tensor([1, 2])) * 0).sum().backward()
    optimizer.step()
    after = layer.register, layer.exponent, value(optimizer, layer)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert optimizer.flips == 0 and optimizer.step_count == 2


def test_a_sparse_table_learns():
    layer, target = table(), normal(10, 6)
    optimizer = TritOptimizer(layer, rate=0.05)
    first = (layer(torch.arange(10)) - target).square().mean().item()
    for step in range(60):
        ids = torch.randint(10, (4,), generator=torch.Generator().manual_seed(step))
        (layer(ids) - target[ids]).square().mean().backward()
        optimizer.step()
    assert (layer(torch.arange(10)) - target).square().mean().item() < 0.5 * first
