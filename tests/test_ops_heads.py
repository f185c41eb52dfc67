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
