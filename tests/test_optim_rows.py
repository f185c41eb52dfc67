"""Sparse layers that are worked on as a whole, as on a GPU, beside the same layers whose rows in use are gathered."""

import math

import pytest
import torch
from torch import Tensor, nn

from tritwise.nn import TritEmbedding, TritLinear
from tritwise.optim import TritOptimizer, rows
from tritwise.optim.rows import used_first


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def whole(monkeypatch):
    """A function that says from now on whether sparse layers are worked on as a whole."""

    def say(yes: bool) -> None:
        monkeypatch.setattr("tritwise.optim.book.in_place", lambda register: yes)

    return say


def gradient(layer: nn.Module, seed: int) -> Tensor:
    """One with rows of zeros, others at every seed."""
    found = normal(*layer.register.shape, seed=seed)
    found[normal(len(found), seed=100 + seed) < 0.3] = 0
    return found


def trained(
    steps: int, micros: int = 1, spoiled: int | None = None, device: str = "cpu", **options
) -> tuple[TritOptimizer, nn.ModuleList]:
    torch.manual_seed(0)
    tables = [TritEmbedding(40, 16, sparse=True, group=8), TritEmbedding(40, 16, sparse=True, group=8)]
    model = nn.ModuleList([*tables, TritEmbedding(40, 16), TritLinear(16, 40)])
    model[1].add_column_scales()
    model.to(device)
    optimizer = TritOptimizer(model, 0.1, scale_rate=0.2, **options)
    for step in range(steps):
        for micro in range(micros):
            grads = [gradient(layer, 10 * step + 3 * micro + n) for n, layer in enumerate(model)]
            if spoiled == step:
                grads[0][grads[0].any(dim=1).nonzero()[0, 0], 3] = math.nan
            optimizer.consume(list(model), [grad.to(device) for grad in grads])
        optimizer.step()
    return optimizer, model


def test_the_rows_in_use_come_first():
    used = torch.tensor([False, True, True, False, True])
    order = used_first(used)
    assert order.front_V.tolist() == [1, 2, 4, 0, 3] and order.place_V.tolist() == [3, 0, 1, 4, 2]
    assert order.share == pytest.approx(0.6)
    table = torch.arange(10).view(5, 2)
    front = order.front(table)
    assert front[:, 0].tolist() == [2, 4, 8, 0, 6]
    order.put_back(front + 100, table)
    assert table[:, 0].tolist() == [0, 102, 104, 6, 108]
    order.blank(front, 7)
    assert front.tolist() == [[2, 3], [4, 5], [8, 9], [7, 7], [7, 7]]
    for share, none in ((1.0, torch.ones(3).bool()), (0.0, torch.zeros(3).bool())):
        assert used_first(none).front_V.tolist() == [0, 1, 2] and used_first(none).share == share


@pytest.mark.parametrize("micros", [1, 3])
@pytest.mark.parametrize("spoiled", [None, 1])
def test_momentum_has_the_bits_of_gathered_rows(micros, spoiled, whole):
    """Rows that a first, a later, and no micro-batch uses; a gradient that is no number keeps a step from moving."""
    found = []
    for yes in (True, False):
        whole(yes)
        optimizer, model = trained(2, micros, spoiled, roles={"embedding": {"rate": 1e-9}})
        found.append([optimizer.state[layer.register] for layer in model])
        assert optimizer.skipped == (spoiled is not None)
    for own, other in zip(*found, strict=True):
        assert own.keys() == other.keys() and own["momentum"].any()
        # Of scales too, whose gradients follow from registers, that hardly move here.
        assert [name for name in own if not torch.equal(own[name], other[name])] == []


@pytest.mark.parametrize("direction", ["newton_schulz", "balanced", "row_column", "rms", "sign"])
@pytest.mark.parametrize("memory", [0.0, 0.9])
def test_registers_move_as_those_of_gathered_rows(direction, memory, whole):
    """But for what a float32 sum over other zeros may round otherwise, which turns few roundings to integers."""
    found, role = [], {"embedding": {"direction": direction, "row_memory": memory}}
    for yes in (True, False):
        whole(yes)
        optimizer, model = trained(4, roles=role)
        levels = [optimizer.state[layer.register].get("row_level") for layer in model[:3]]
        found.append(([layer.register.clone() for layer in model], levels, optimizer.flips))
    (own, own_levels, flips), (other, other_levels, expected) = found
    assert abs(flips - expected) <= 4 and expected > 50
    for one, two in zip(own, other, strict=True):
        assert ((one != two).float().mean() < 0.01) and ((one.int() - two.int()).abs() <= 2).all()
    for one, two in zip(own_levels, other_levels, strict=True):
        assert (one is None) == (two is None) == (not memory) and (one is None or torch.equal(one, two))
    torch.manual_seed(0)
    assert (own[0] != TritEmbedding(40, 16, sparse=True, group=8).register).float().mean() > 0.2


def test_rows_that_are_not_in_use_stay(whole):
    whole(True)
    optimizer, model = trained(1)
    layer = model[0]
    kept = [t.clone() for t in (layer.register, layer.exponent, *optimizer.state[layer.register].values())]
    grad = torch.zeros(40, 16)
    grad[[3, 17]] = normal(2, 16)
    optimizer.consume([layer], [grad])
    optimizer.step()
    now = (layer.register, layer.exponent, *optimizer.state[layer.register].values())
    others = [row for row in range(40) if row not in (3, 17)]
    for before, after in zip(kept, now, strict=True):
        if len(before) == 40:
            assert torch.equal(before[others], after[others])
    assert not torch.equal(kept[0][[3, 17]], layer.register[[3, 17]])
    before = layer.register.clone()
    optimizer.consume([layer], [torch.zeros(40, 16)])  # no row at all
    optimizer.step()
    assert torch.equal(before, layer.register) and optimizer.flips == 0


def test_a_model_with_sparse_layers_can_be_recorded_where_they_are_worked_on_as_a_whole(whole):
    layer = [TritEmbedding(9, 6, sparse=True), TritLinear(6, 9)]
    for yes in (True, False):
        whole(yes)
        assert TritOptimizer(layer, 0.1).recordable == yes
    assert not rows.in_place(layer[0].register)  # on a CPU


@pytest.mark.gpu
@pytest.mark.parametrize("micros", [1, 3])
def test_a_gpu_has_the_momentum_of_gathered_rows_on_a_cpu(micros):
    found = []
    for device in ("cuda", "cpu"):
        optimizer, model = trained(2, micros, device=device, roles={"embedding": {"rate": 1e-9}})
        found.append([optimizer.state[layer.register] for layer in model[:2]])
        assert rows.in_place(model[0].register) == (device == "cuda")
    for own, other in zip(*found, strict=True):
        for name in ("momentum", "row_exponent"):
            assert torch.equal(own[name].cpu(), other[name]), name
