"""Queries and keys, normalised and turned: against float64 autograd of the formula; torch.library's checks."""

import pytest
import torch
from torch import Tensor

from tritwise import ops
from tritwise.ops.heads.reference import EPS

OPS = torch.ops.tritwise

# Everything here is asked of every backend that this machine can run.
OPERATION = "heads"
pytestmark = pytest.mark.usefixtures("each_backend")

CASES = [(1, 1, 1, 1, 2), (2, 5, 3, 3, 8), (1, 4, 4, 2, 6), (2, 3, 7, 1, 64), (1, 3, 15, 15, 64), (1, 2, 2, 2, 130)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tables(time: int, size: int, start: int = 3) -> tuple[Tensor, Tensor]:
    angle = torch.arange(start, start + time)[:, None] * 100.0 ** (-torch.arange(0, size, 2) / size)
    return angle.cos(), angle.sin()


def formula(parts: Tensor, cos: Tensor, sin: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, by complex numbers."""
    count = (parts.shape[2] + heads) // 2
    x = parts[:, :, :count]
    a, b = (x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()).chunk(2, dim=-1)
    turned = torch.complex(a, b) * torch.complex(cos, sin)[:, None]
    turned = torch.cat((turned.real, turned.imag), dim=-1)
    return turned[:, :, :heads], turned[:, :, heads:], parts[:, :, count:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize(("batch", "time", "heads", "keys", "size"), CASES)
def test_value_and_gradient_against_autograd(batch, time, heads, keys, size, heads_first, dtype, poisoned):
    parts = (normal(batch, time, heads + 2 * keys, size) * 3).to(dtype)
    cos, sin = tables(time, size)
    grads = [normal(batch, time, count, size, seed=count + n).to(dtype) for n, count in enumerate((heads, keys, keys))]
    if heads_first:  # as attention lays them
        grads = [grad.transpose(1, 2).contiguous().transpose(1, 2) for grad in grads]
    kept = [t.clone() for t in (parts, *grads)]
    q, k = ops.turned_heads(parts, cos, sin, heads)
    grad = ops.turned_heads_grad(*grads, parts, cos, sin)
    assert all(torch.equal(a, b) for a, b in zip((parts, *grads), kept, strict=True))
    parts64 = parts.double().requires_grad_()
    expected = formula(parts64, cos.double(), sin.double(), heads)
    (grad64,) = torch.autograd.grad(expected, parts64, [g.double() for g in grads])
    # A gradient is a difference; its error goes with its terms.
    inverse = 1 / (parts64.square().mean(-1, keepdim=True) + EPS).sqrt()
    term = torch.cat([g.double() for g in grads], dim=2)
    term = torch.cat((term[:, :, : heads + keys] * inverse[:, :, : heads + keys], term[:, :, heads + keys :]), dim=2)
    tolerance = 2e-6 if dtype is torch.float32 else 2**-7
    for found, exact in ((q, expected[0]), (k, expected[1])):
        assert found.dtype == dtype and found.is_contiguous() and found.shape == exact.shape
        assert (found.double() - exact).norm() <= tolerance * exact.norm()
    assert grad.dtype == dtype and grad.is_contiguous() and grad.shape == parts.shape
    assert (grad.double() - grad64).norm() <= tolerance * term.norm()
    assert torch.equal(grad[:, :, heads + keys :], grads[2])


def left_formula(y: Tensor, v: Tensor, scale: Tensor | None) -> Tensor:
    """What lies across one's own value, by the projection on it as a matrix."""
    n = y / (y.square().mean(dim=(2, 3), keepdim=True) + EPS).sqrt()
    own = torch.stack([v[:, :, head * v.shape[2] // y.shape[2]] for head in range(y.shape[2])], dim=2)
    onto = own[..., :, None] * own[..., None, :] / own.square().sum(-1).clamp_min(EPS)[..., None, None]
    left = (n - (onto @ n[..., None])[..., 0]).flatten(2)
    return left if scale is None else left * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("batch", "time", "heads", "keys", "size"), CASES)
def test_own_values_against_autograd(batch, time, heads, keys, size, scaled, dtype, poisoned):
    """As attention gives them: heads before positions, and values that are a part of what the projection gave."""
    y = (3 * normal(batch, heads, time, size)).to(dtype).transpose(1, 2)
    v = normal(batch, time, heads + 2 * keys, size, seed=1).to(dtype)[:, :, heads + keys :]
    v[0, 0, 0] = 1e-5  # so short that it is taken for longer
    scale = normal(heads * size, seed=2).abs().to(dtype) if scaled else None
    upstream, kept = normal(batch, time, heads * size, seed=3).to(dtype), (y.clone(), v.clone())
    left = ops.without_own(y, v, scale)
    grads = ops.without_own_grad(upstream, y, v, scale)
    assert torch.equal(y, kept[0]) and torch.equal(v, kept[1])
    exact = [t.double().requires_grad_() for t in (y, v)]
    expected = left_formula(*exact, None if scale is None else scale.double())
    expected_grads = torch.autograd.grad(expected, exact, upstream.double())
    # Differences: their errors go with their terms. Short values have steep gradients.
    g = upstream.double() if scale is None else upstream.double() * scale.double()
    n = exact[0] / (exact[0].square().mean(dim=(2, 3), keepdim=True) + EPS).sqrt()
    g, inverse = g.view(y.shape), (n / exact[0]).nan_to_num()
    shortest = exact[1].square().sum(-1).clamp_min(EPS).sqrt().amin()
    tolerance = 3e-6 if dtype is torch.float32 else 2**-7
    assert left.dtype == dtype and left.is_contiguous() and left.shape == (batch, time, heads * size)
    factor = n.flatten(2) if scale is None else n.flatten(2) * scale.double()
    assert (left.double() - expected).norm() <= tolerance * factor.norm()
    assert (grads[0].double() - expected_grads[0]).norm() <= 2 * tolerance * (g * inverse).norm()
    assert (grads[1].double() - expected_grads[1]).norm() <= 4 * tolerance * (g.norm() * n.norm() / shortest)
    for grad, given in zip(grads, (y, v), strict=True):
        assert grad.dtype == dtype and grad.is_contiguous() and grad.shape == given.shape


def test_of_nothing_nothing_is_left_and_no_value_takes_nothing():
    y, v = normal(2, 3, 2, 8), normal(2, 3, 2, 8, seed=1)
    y[0], v[1] = 0, 0
    left = ops.without_own(y, v)
    assert left[0].count_nonzero() == 0 and left[1].square().mean(-1).allclose(torch.ones(3), atol=1e-4)
    for grad in ops.without_own_grad(torch.ones_like(left), y, v):
        assert grad.isfinite().all()
    assert (
        ops.without_own(y[:0], v[:0]).shape == (0, 3, 16)
        and ops.without_own(y.double(), v.double()).dtype == torch.float64
    )


def test_what_a_kernel_is_not_made_for():
    """Doubles, no positions, very many heads, and gradients whose last dimension does not lie together."""
    (cos, sin), parts = tables(3, 8), normal(2, 3, 6, 8)
    wide = ops.turned_heads(parts.double(), cos.double(), sin.double(), 2)
    assert wide[0].dtype == torch.float64
    for found, expected in zip(wide, ops.turned_heads(parts, cos, sin, 2), strict=True):
        assert torch.allclose(found.float(), expected, atol=1e-6)
    assert ops.turned_heads(parts[:0], cos, sin, 2)[1].shape == (0, 3, 2, 8)
    many = normal(1, 2, 300, 64)
    found = ops.turned_heads(many, *tables(2, 64), 100)
    exact = formula(many.double(), *(t.double() for t in tables(2, 64)), 100)
    assert all((a.double() - b).abs().max() < 1e-4 for a, b in zip(found, exact, strict=False))
    grads = [normal(2, 3, 2, 8, seed=n) for n in range(3)]
    turned = [grad.transpose(0, 3).contiguous().transpose(0, 3) for grad in grads]
    assert torch.equal(*(ops.turned_heads_grad(*some, parts, cos, sin) for some in (grads, turned)))


def test_opcheck():
    (cos, sin), parts = tables(3, 8), normal(2, 3, 6, 8)
    torch.library.opcheck(OPS.turned_heads.default, (parts, cos, sin, 2))
    grads = [normal(2, 3, 2, 8, seed=n) for n in range(3)]
    torch.library.opcheck(OPS.turned_heads_grad.default, (*grads, parts, cos, sin))
    for scale in (None, torch.ones(16)):
        torch.library.opcheck(OPS.without_own.default, (grads[0], grads[1], scale))
        torch.library.opcheck(OPS.without_own_grad.default, (normal(2, 3, 16), grads[0], grads[1], scale))
