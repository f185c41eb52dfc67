"""TritOptimizer with compact=True: register and momentum in one byte, the same trits, half the state."""

import copy

import pytest
import torch
from torch import Tensor, nn

from tritwise.nn import TritEmbedding, TritLinear, TritModule, trit_modules
from tritwise.optim import TritOptimizer
from tritwise.registers import leading_trit, split_nibbles


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layers_of(model: nn.Module) -> list[TritModule]:
    return [layer for _, layer in trit_modules(model)]


def build(**settings) -> tuple[nn.ModuleList, TritOptimizer]:
    torch.manual_seed(0)
    model = nn.ModuleList([TritLinear(70, 24, blocks=3), TritLinear(24, 70, group=8), TritEmbedding(9, 40)])
    return model, TritOptimizer(model, 0.05, compact=True, **settings)


def train(model: nn.Module, optimizer: TritOptimizer, first: int, last: int) -> None:
    for step in range(first, last):
        for micro in range(2):
            grads = [normal(*layer.register.shape, seed=10 * step + micro) for layer in layers_of(model)]
            optimizer.consume(layers_of(model), grads)
        optimizer.step()


def everything(model: nn.Module, optimizer: TritOptimizer) -> dict[str, Tensor]:
    found = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for name, layer in trit_modules(model):
        found |= {f"{name}.{key}": t.clone() for key, t in optimizer.state.get(layer.register, {}).items()}
    return found


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def test_the_trits_stay_and_the_state_is_one_byte_a_weight():
    torch.manual_seed(0)
    plain = TritLinear(256, 128)
    layer = copy.deepcopy(plain)
    optimizer = TritOptimizer(layer, 0.05, compact=True)
    assert torch.equal(layer.trits(), plain.trits()) and not split_nibbles(layer.register)[1].any()
    optimizer.consume([layer], [normal(128, 256)])
    assert torch.equal(layer.trits(), plain.trits()) and split_nibbles(layer.register)[1].any()  # momentum alone
    optimizer.step()
    state = optimizer.state[layer.register]
    assert {key: (t.dtype, tuple(t.shape)) for key, t in state.items() if key[:5] != "scale"} == {
        "row_exponent": (torch.int8, (128, 1)),
        "group_exponent": (torch.int8, (128, 8)),
    }
    kept = [layer.register, layer.exponent, *state.values()]
    assert sum(t.numel() * t.element_size() for t in kept) <= 1.06 * layer.register.numel()
    assert 0 < optimizer.flips == int((layer.trits() != plain.trits()).sum()) and not torch.equal(
        leading_trit(layer.register), plain.trits()
    )


@pytest.mark.parametrize("direction", ["newton_schulz", "balanced", "row_column", "sign"])
def test_steps_lower_the_loss(direction):
    torch.manual_seed(0)
    layer, x = TritLinear(24, 24), normal(64, 24)
    target = x @ normal(24, 24, seed=1).T / 24**0.5
    optimizer = TritOptimizer(layer, rate=0.03, direction=direction, compact=True)

    def loss() -> Tensor:
        return (layer(x) - target).square().mean()

    first = loss().item()
    for _ in range(40):
        loss().backward()
        optimizer.step()
    assert loss().item() < 0.7 * first


@pytest.mark.parametrize("interval", [1, 2])
def test_a_resumed_run_equals_an_uninterrupted_one(interval):
    whole, its_optimizer = build(scale_rate=0.1, interval=interval, seed=7)
    train(whole, its_optimizer, 0, 6)
    model, optimizer = build(scale_rate=0.1, interval=interval, seed=7)
    train(model, optimizer, 0, 3)
    resumed, fresh = build(scale_rate=0.1, interval=interval, seed=7)
    resumed.load_state_dict(copy.deepcopy(model.state_dict()))
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(resumed, fresh, 3, 6)
    assert_equal(everything(resumed, fresh), everything(whole, its_optimizer))


@pytest.mark.parametrize("together", [1 << 25, 2000])
def test_layers_that_move_in_lots_have_the_bits_of_layers_that_move_alone(together, monkeypatch):
    """Tensors that say they are on a GPU move in lots."""
    alone = build(scale_rate=0.0)
    train(*alone, 0, 3)
    monkeypatch.setattr(Tensor, "is_cuda", property(lambda tensor: True))
    monkeypatch.setattr("tritwise.optim.moving._TOGETHER", together)
    lots = build(scale_rate=0.0)
    train(*lots, 0, 3)
    assert_equal(everything(*lots), everything(*alone))


def test_a_gradient_that_is_no_number_moves_nothing():
    model, optimizer = build(scale_rate=0.1)
    train(model, optimizer, 0, 2)
    before = [(layer.trits(), split_nibbles(layer.register)[0], layer.exponent.clone()) for layer in layers_of(model)]
    grads = [normal(*layer.register.shape, seed=99) for layer in layers_of(model)]
    grads[1][3, 5] = float("nan")
    optimizer.consume(layers_of(model), grads)
    optimizer.step()
    for layer, kept in zip(layers_of(model), before, strict=True):
        now = (layer.trits(), split_nibbles(layer.register)[0], layer.exponent)
        assert all(torch.equal(a, b) for a, b in zip(now, kept, strict=True))
    assert (optimizer.skipped, optimizer.flips) == (1, 0)


def test_a_sparse_layer_cannot_be_compact():
    with pytest.raises(ValueError, match="a sparse layer cannot be compact; make it with sparse=False"):
        TritOptimizer(TritEmbedding(9, 6, sparse=True), compact=True)
    with pytest.raises(ValueError, match="a sparse layer cannot have nesterov; make it with sparse=False"):
        TritOptimizer(TritEmbedding(9, 6, sparse=True), nesterov=True)
    with pytest.raises(ValueError, match="a sparse layer cannot have nesterov"):
        TritOptimizer(TritEmbedding(9, 6, sparse=True)).configure(nesterov=True)
    with pytest.raises(ValueError, match="nesterov needs a momentum of its own byte"):
        TritOptimizer(TritEmbedding(9, 6), compact=True).configure(nesterov=True)
