"""The graph over bytes: which edges there are, against a search; messages against the dense formula; causality."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tritwise.nn import FloatLinear, TritGraph, rms_norm, tensor_roles
from tritwise.nn.graph import neighbours, recurrences


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def searched(ids: list[list[int]], order: int, most: int) -> list[tuple[int, int]]:
    """Edges found by looking at every pair of places."""
    found, time = [], len(ids[0])
    for row, line in enumerate(ids):
        for t in range(order - 1, time):
            gram = line[t - order + 1 : t + 1]
            same = [s for s in range(order - 1, t) if line[s - order + 1 : s + 1] == gram]
            found += [(row * time + s + 1, row * time + t) for s in same[::-1][:most]]
    return sorted(found)


@given(
    ids=st.integers(1, 24).flatmap(
        lambda time: st.lists(st.lists(st.integers(0, 2), min_size=time, max_size=time), min_size=1, max_size=3)
    ),
    order=st.integers(1, 4),
    most=st.integers(1, 3),
)
@settings(max_examples=60, deadline=None)
def test_recurrences_are_those_a_search_finds(ids, order, most):
    source, target = recurrences(torch.tensor(ids), order, most)
    assert source.shape == target.shape == (most * len(ids) * len(ids[0]),)
    assert torch.equal(source < 0, target < 0)
    real = sorted((s, t) for s, t in zip(source.tolist(), target.tolist(), strict=True) if s >= 0)
    assert real == searched(ids, order, most)


def test_large_ids_do_not_collide():
    ids = torch.tensor([[287, 0, 1, 286, 287, 0, 2]])
    source, target = recurrences(ids, 3, 1)
    assert bool((source == -1).all()) and bool((target == -1).all())
    source, target = recurrences(ids, 2, 1)
    assert [(s, t) for s, t in zip(source.tolist(), target.tolist(), strict=True) if s >= 0] == [(2, 5)]


def test_neighbours_stay_in_their_row():
    assert neighbours(2, 3, 1).tolist() == [-1, 0, 1, -1, 3, 4]
    assert neighbours(2, 3, 2).tolist() == [-1, -1, 0, -1, -1, 3]
    assert neighbours(1, 2, 5).tolist() == [-1, -1]


def test_messages_against_the_formula():
    torch.manual_seed(0)
    layer = TritGraph(8, reach=2, orders=(2, 3), most=2, linear=FloatLinear)
    ids = torch.tensor([list(b"abcabcab"), list(b"aaaabbbb")])
    x = normal(2, 8, 8)
    weight = layer.message.weight.double().view(4, 8, 8)
    sent = rms_norm(x).double().view(16, 8)
    expected = x.double().reshape(16, 8).clone()
    for relation, edges in enumerate(
        [[(t - 1, t) for t in range(16) if t % 8], [(t - 2, t) for t in range(16) if t % 8 > 1]]
        + [searched(ids.tolist(), order, 2) for order in (2, 3)]
    ):
        for t in range(16):
            sources = [s for s, to in edges if to == t]
            for s in sources:
                expected[t] += weight[relation] @ sent[s] / len(sources)
    torch.testing.assert_close(layer(x, ids).double().view(16, 8), expected, rtol=1e-5, atol=1e-5)


def test_the_past_alone_sends():
    torch.manual_seed(0)
    layer, ids, x = TritGraph(16, reach=1, orders=(1, 3)), torch.randint(0, 3, (2, 30)), normal(2, 30, 16)
    before = layer(x, ids)
    other, y = ids.clone(), x.clone()
    other[:, 17:], y[:, 17:] = torch.randint(0, 3, (2, 13)), normal(2, 13, 16, seed=5)
    after = layer(y, other)
    assert torch.equal(before[:, :17], after[:, :17]) and not torch.equal(before[:, 17:], after[:, 17:])


def test_roles_and_refusals():
    layer = TritGraph(16)
    assert set(tensor_roles(layer).values()) == {"matrix", "scale"} and layer.message.blocks == 2
    with pytest.raises(ValueError, match="a graph needs an edge"):
        TritGraph(16, reach=0, orders=())
