"""Message passing: sums along edges against a dense matrix in float64, gradients, absent edges, fixed bits."""

import pytest
import torch
from torch import Tensor

from tritwise import ops

OPS = torch.ops.tritwise

# Everything here is asked of every backend that this machine can run.
OPERATION = "graph"
pytestmark = pytest.mark.usefixtures("each_backend")

SHAPES = [(1, 1, 1, 1), (7, 5, 3, 20), (4, 9, 130, 30), (30, 2, 5, 200), (3, 4, 2, 0)]  # sources, targets, C, edges


def normal(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def edges(count: int, sources: int, targets: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random edges, a tenth of which do not exist."""
    generator = torch.Generator().manual_seed(seed)
    source = torch.randint(-1 - sources // 9, sources, (count,), generator=generator).clamp(min=-1)
    return source, torch.randint(-1 - targets // 9, targets, (count,), generator=generator).clamp(min=-1)


def adjacency(source: Tensor, target: Tensor, sources: int, targets: int) -> Tensor:
    """How many edges lead from each source to each target, float64 [R, N]."""
    counts = torch.zeros(targets, sources, dtype=torch.float64)
    for s, t in zip(source.tolist(), target.tolist(), strict=True):
        if s >= 0 and t >= 0:
            counts[t, s] += 1
    return counts


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 2e-6) -> None:
    assert found.shape == expected.shape
    assert (found.double() - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize(("sources", "targets", "columns", "count"), SHAPES)
def test_edge_sums_and_gradients_against_a_matrix(sources, targets, columns, count, poisoned):
    source, target = edges(count, sources, targets)
    x, upstream = normal(sources, columns).requires_grad_(), normal(targets, columns, seed=3)
    y = ops.edge_sum(x, source, target, targets)
    (x_grad,) = torch.autograd.grad(y, x, upstream)
    matrix = adjacency(source, target, sources, targets)
    assert_close(y.detach(), matrix @ x.detach().double())
    assert_close(x_grad, matrix.T @ upstream.double())
    assert y.dtype == x_grad.dtype == torch.float32
    assert torch.equal(y.detach().abs().sum(1) == 0, matrix.sum(1) == 0)  # a row without edges is zero


@pytest.mark.parametrize(("sources", "targets", "columns", "count"), SHAPES)
def test_gather_add_and_gradients_against_a_matrix(sources, targets, columns, count, poisoned):
    index, _ = edges(targets, sources, targets)
    base, x = normal(targets, columns).requires_grad_(), normal(sources, columns, seed=5).requires_grad_()
    upstream = normal(targets, columns, seed=3)
    y = ops.gather_add(base, x, index)
    base_grad, x_grad = torch.autograd.grad(y, (base, x), upstream)
    matrix = adjacency(index, torch.arange(targets), sources, targets)
    assert_close(y.detach(), base.detach().double() + matrix @ x.detach().double(), 1e-7)
    assert torch.equal(base_grad, upstream)
    assert_close(x_grad, matrix.T @ upstream.double())


def test_edges_are_added_in_their_order():
    """1e8 + 1 - 1e8 is 0 in float32 in this order alone: a sum with other bits would show."""
    x = torch.tensor([[1.0], [1e8], [-1e8]])
    for order, expected in (([1, 0, 2], 0.0), ([1, 2, 0], 1.0)):
        y = ops.edge_sum(x, torch.tensor(order), torch.zeros(3, dtype=torch.int64), 1)
        assert y.item() == expected


def test_bfloat16_edges_are_summed_in_float32():
    x = torch.ones(1000, 2, dtype=torch.bfloat16)
    y = ops.edge_sum(x, torch.arange(1000), torch.zeros(1000, dtype=torch.int64), 2)
    assert y.dtype == torch.bfloat16 and y.tolist() == [[1000.0] * 2, [0.0] * 2]  # bf16 alone would stop at 256


def test_edges_change_nothing_they_read():
    x, base = normal(6, 4), normal(5, 4)
    source, target = edges(9, 6, 5)
    kept = x.clone(), base.clone(), source.clone(), target.clone()
    ops.edge_sum(x, source, target, 5)
    ops.gather_add(base, x, source[:5])
    assert all(torch.equal(a, b) for a, b in zip((x, base, source, target), kept, strict=True))


def test_edges_of_views_and_doubles():
    """What a kernel is not made for gives the same numbers."""
    x, (source, target) = normal(4, 6).T, edges(12, 6, 5)
    y = ops.edge_sum(x, source, target, 5)
    assert torch.equal(y, ops.edge_sum(x.contiguous(), source, target, 5))
    assert_close(ops.edge_sum(x.double(), source, target, 5), y.double(), 1e-6)
    assert_close(
        ops.gather_add(y.double(), x.double(), target[:5].clamp(max=5)), ops.gather_add(y, x, target[:5]).double(), 1e-6
    )


def test_opcheck_of_edges():
    source, target = edges(12, 6, 5)
    torch.library.opcheck(OPS.edge_sum.default, (normal(6, 7).requires_grad_(), source, target, 5))
    torch.library.opcheck(OPS.gather_add.default, (normal(5, 7).requires_grad_(), normal(6, 7), source[:5]))
    torch.library.opcheck(OPS.gather_add.default, (normal(5, 7), normal(6, 7).requires_grad_(), source[:5]))
