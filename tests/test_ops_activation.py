"""The squared ReLU with a norm as one operation: against float64 autograd of the formula; torch.library's checks."""

import os

import pytest
import torch
from torch import Tensor

from tritwise import ops
from tritwise.ops import gpu
from tritwise.ops.activation.reference import EPS
from tritwise.ops.float8 import FLOAT8, LARGEST, times_as_float8

OPS = torch.ops.tritwise
INTERPRETED = os.environ.get(gpu.INTERPRET) == "1"

# Everything here is asked of every backend that this machine can run.
OPERATION = "activation"
pytestmark = pytest.mark.usefixtures("each_backend")

SHAPES = [(1, 1), (7,), (5, 130), (2, 3, 64), (3, 2100), (4, 1024)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def formula(h: Tensor, scale: Tensor | None, leak: float) -> Tensor:
    square = torch.nn.functional.leaky_relu(h, leak).square()
    y = square / (square.square().mean(-1, keepdim=True) + EPS).sqrt()
    return y if scale is None else y * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("leak", [0.0, 0.5])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_value_and_gradient_against_autograd(shape, scaled, leak, dtype, poisoned):
    h, upstream = (normal(*shape, seed=seed).to(dtype) for seed in (0, 1))
    scale = normal(shape[-1], seed=2).abs().to(dtype) if scaled else None
    kept = h.clone(), upstream.clone()
    y, inverse, _ = ops.relu_squared_norm(h, scale, leak)
    grad = ops.relu_squared_norm_grad(upstream, h, inverse, scale, leak)
    assert y.dtype == grad.dtype == dtype and y.shape == grad.shape == h.shape
    assert inverse.dtype == torch.float32 and inverse.shape == h.shape[:-1]
    assert torch.equal(h, kept[0]) and torch.equal(upstream, kept[1])
    h64 = h.double().requires_grad_()
    y64 = formula(h64, None if scale is None else scale.double(), leak)
    (grad64,) = torch.autograd.grad(y64, h64, upstream.double())
    # A gradient is a difference; its error goes with its terms, of which the first is the gradient without the norm's.
    square = formula(h64, None if scale is None else scale.double(), leak) / formula(h64, None, leak).clamp_min(1e-30)
    term = 2 * upstream.double() * square * inverse.double()[..., None] * torch.nn.functional.leaky_relu(h64, leak)
    tolerance = 3e-6 if dtype is torch.float32 else 2**-7
    assert (y.double() - y64).norm() <= tolerance * y64.norm()
    assert (grad.double() - grad64).norm() <= tolerance * term.norm()


def test_rows_far_from_one_another():
    """Each row has a norm of its own; of a row of zeros nothing comes but zeros."""
    h = normal(3, 40) * torch.tensor([[0.0], [1e-3], [30.0]])
    y, inverse, _ = ops.relu_squared_norm(h)
    grad = ops.relu_squared_norm_grad(torch.ones_like(h), h, inverse)
    assert y[0].count_nonzero() == grad[0].count_nonzero() == 0 and inverse[0] == pytest.approx(EPS**-0.5)
    assert y[2].square().mean().sqrt().item() == pytest.approx(1, abs=1e-5)
    assert (y.double() - formula(h.double(), None, 0.0)).abs().max() < 1e-5


def test_what_a_kernel_is_not_made_for():
    """Doubles, nothing at all, very long rows, and tensors that do not lie as they are read."""
    h, upstream = normal(4, 6), normal(4, 6, seed=1)
    y, inverse, _ = ops.relu_squared_norm(h.double(), None, 0.5)
    assert y.dtype == inverse.dtype == torch.float64
    assert torch.allclose(y.float(), ops.relu_squared_norm(h, None, 0.5)[0], atol=1e-6)
    assert ops.relu_squared_norm(h[:0])[0].shape == (0, 6)
    long = normal(1, 20_000)
    assert (ops.relu_squared_norm(long)[0].double() - formula(long.double(), None, 0.0)).abs().max() < 1e-4
    turned, (_, inverse, _) = h.T.contiguous().T, ops.relu_squared_norm(h)
    assert torch.equal(ops.relu_squared_norm(turned)[0], ops.relu_squared_norm(h)[0])
    grads = [ops.relu_squared_norm_grad(g, x, inverse) for g, x in ((upstream, h), (upstream.T.contiguous().T, turned))]
    assert torch.equal(*grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scaled", [False, True])
def test_what_it_rounds_has_the_bits_of_rounding_what_it_gives(scaled, dtype, poisoned):
    """Numbers too small for float8, ties, and those beyond its range are among them."""
    h = (normal(5, 1030) * torch.tensor([[1e-3], [1.0], [30.0], [0.0], [1.0]])).to(dtype)
    h[4, 3] = 1e3  # of unit RMS almost alone
    scale = (8 * normal(1030, seed=2).abs()).to(dtype) if scaled else None
    for factor in (8.0, 2.0**-7):
        y, _, low = ops.relu_squared_norm(h, scale, 0.5, factor)
        assert low.dtype == FLOAT8 and torch.equal(y, ops.relu_squared_norm(h, scale, 0.5)[0])
        apart = (low.view(torch.uint8).int() - times_as_float8(y, factor).view(torch.uint8).int()).abs()
        # The interpreter rounds ties away from zero, and loses what carries into the exponent.
        assert apart.max() <= 8 * INTERPRETED and (apart > 0).sum() <= apart.numel() / 8
        assert scaled is False or factor < 1 or low.float().max() == LARGEST
    assert ops.relu_squared_norm(h)[2].shape == (0,)
    h[0, 0] = float("nan")
    assert INTERPRETED or ops.relu_squared_norm(h, scale, 0.5, 8.0)[2][0].isnan().all()


@pytest.mark.parametrize("factor", [0.0, 8.0])
@pytest.mark.parametrize("scaled", [False, True])
def test_opcheck(scaled, factor):
    h, scale = normal(4, 6), normal(6, seed=2) if scaled else None
    torch.library.opcheck(OPS.relu_squared_norm.default, (h, scale, 0.5, factor))
    inverse = ops.relu_squared_norm(h, scale, 0.5)[1]
    torch.library.opcheck(OPS.relu_squared_norm_grad.default, (normal(4, 6, seed=1), h, inverse, scale, 0.5))
