"""Norms: forward and hand-written backward against autograd of the plain formula in float64."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tritwise.nn.norm as norm_module
from tritwise.nn import MLP, TritLinear, relu_squared_norm, rms_norm

EPS = 1e-6


def plain_rms(x: Tensor, hold: bool = False) -> Tensor:
    """The formula. hold: differentiate as if the root mean square were a constant."""
    square = x.square().mean(dim=-1, keepdim=True) + EPS
    return x / (square.detach() if hold else square).sqrt()


def plain_relu_squared(h: Tensor, hold: bool = False) -> Tensor:
    return plain_rms(torch.relu(h) ** 2, hold)


def fused(h: Tensor) -> Tensor:
    """What a GPU takes."""
    return norm_module._FusedReLUSquaredNorm.apply(h, 0.0, None, 0.0)[0]


NORMS = [(rms_norm, plain_rms), (relu_squared_norm, plain_relu_squared), (fused, plain_relu_squared)]
both = pytest.mark.parametrize(("norm", "plain"), NORMS, ids=["rms_norm", "relu_squared_norm", "fused"])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def value_and_grad(function: Callable[[Tensor], Tensor], x: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    y = function(x)
    (grad,) = torch.autograd.grad(y, x, upstream)
    return y.detach(), grad


def assert_agrees(norm, plain, x: Tensor, upstream: Tensor, tolerance: float = 2e-6) -> None:
    y, grad = value_and_grad(norm, x, upstream)
    y64, grad64 = value_and_grad(plain, x.double(), upstream.double())
    # The gradient is a difference; its error goes with its terms, of which this is the larger, not with what is left.
    _, term = value_and_grad(lambda x: plain(x, hold=True), x.double(), upstream.double())
    assert y.dtype == grad.dtype == x.dtype and y.shape == grad.shape == x.shape
    assert ((y.double() - y64).norm(dim=-1) <= tolerance * y64.norm(dim=-1)).all()
    assert ((grad.double() - grad64).norm(dim=-1) <= tolerance * term.norm(dim=-1)).all()


@both
@pytest.mark.parametrize("shape", [(5,), (1,), (4, 7), (2, 3, 64), (3, 1), (0, 4)])
@pytest.mark.parametrize("size", [1.0, 1e-3, 30.0])
def test_against_the_formula(norm, plain, shape, size):
    assert_agrees(norm, plain, normal(*shape) * size, normal(*shape, seed=1))


@both
@given(
    st.lists(st.floats(-50, 50, width=32).filter(lambda x: abs(x) > 1e-10), min_size=1, max_size=9),
    st.lists(st.floats(-3, 3, width=32).filter(lambda g: abs(g) > 1e-10), min_size=9, max_size=9),
)
@settings(max_examples=60, deadline=None)
def test_any_row(norm, plain, row, upstream):
    assert_agrees(norm, plain, torch.tensor([row]), torch.tensor([upstream[: len(row)]]), 1e-5)


@both
def test_the_oracle_itself_passes_gradcheck(norm, plain):
    assert torch.autograd.gradcheck(plain, normal(3, 5).double().add(0.1).requires_grad_())


@both
def test_zeros_stay_zeros_and_have_a_finite_gradient(norm, plain):
    x, upstream = torch.zeros(2, 6), normal(2, 6)
    y, grad = value_and_grad(norm, x, upstream)
    _, oracle = value_and_grad(plain, x.double(), upstream.double())
    assert y.count_nonzero() == 0
    assert torch.allclose(grad.double(), oracle, rtol=1e-5)  # 1000 * upstream for rms_norm, zero behind the square


def test_nothing_positive_gives_nothing():
    y, grad = value_and_grad(relu_squared_norm, -normal(3, 5).abs(), normal(3, 5, seed=1))
    assert y.count_nonzero() == 0 and grad.count_nonzero() == 0


@both
def test_bfloat16(norm, plain):
    x, upstream = normal(4, 200).bfloat16(), normal(4, 200, seed=1).bfloat16()
    assert_agrees(norm, plain, x, upstream, 2**-6)
    y = norm(100 * x).float()  # the sum of squares is far beyond bfloat16's eight bits
    assert torch.allclose(y.square().mean(-1).sqrt(), torch.ones(4), atol=2**-7)


@both
def test_inputs_and_gradients_that_are_not_contiguous(norm, plain):
    assert_agrees(norm, plain, normal(6, 5).T, normal(6, 5, seed=1).T)
    assert_agrees(norm, plain, normal(4, 2, 6)[:, 1], torch.ones(1).expand(4, 6))
    assert_agrees(norm, plain, normal(1, 6).expand(3, 6), normal(3, 6, seed=1))


@both
def test_the_output_has_unit_rms(norm, plain):
    y = norm(3 * normal(8, 100))
    assert torch.allclose(y.square().mean(-1).sqrt(), torch.ones(8), atol=1e-4)


@both
def test_neither_input_nor_upstream_gradient_is_changed(norm, plain):
    x, upstream = normal(3, 5).requires_grad_(), normal(3, 5, seed=1)
    kept_x, kept = x.detach().clone(), upstream.clone()
    y = norm(x)
    kept_y = y.detach().clone()
    y.backward(upstream)
    assert torch.equal(x.detach(), kept_x) and torch.equal(upstream, kept) and torch.equal(y.detach(), kept_y)


@both
def test_a_gradient_shared_with_another_branch(norm, plain):
    """x + norm(x) + norm(x): autograd hands the same gradient tensor to all three branches."""

    def shared(f):
        return lambda x, **options: x + f(x, **options) + f(x, **options)

    assert_agrees(shared(norm), shared(plain), normal(3, 5), normal(3, 5, seed=1))


@both
def test_the_graph_can_be_walked_twice(norm, plain):
    x = normal(3, 5).requires_grad_()
    y = norm(x).square().sum() + x.sum()
    first = torch.autograd.grad(y, x, retain_graph=True)[0].clone()
    assert torch.equal(torch.autograd.grad(y, x)[0], first)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_has_the_bits_of_eager(norm, plain, dtype):
    """Behind another function, whose gradient is wrong if what it is saved for is changed in place."""

    def function(x: Tensor) -> Tensor:
        return norm(1.5 * norm(x.sin()))

    torch._dynamo.reset()
    x, upstream = normal(4, 33).to(dtype), normal(4, 33, seed=1).to(dtype)
    eager = value_and_grad(function, x, upstream)
    compiled = value_and_grad(torch.compile(function, backend="aot_eager", fullgraph=True), x, upstream)
    assert eager[1].count_nonzero() > 30
    assert all(torch.equal(a, b) for a, b in zip(compiled, eager, strict=True))


@both
def test_second_derivatives_are_refused(norm, plain):
    x = normal(3, 5).requires_grad_()
    (grad,) = torch.autograd.grad(norm(x).square().sum() * x.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("leak", [0.0, 0.5])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_scales_of_columns_are_those_of_the_next_layer(device, leak):
    """Multiplied within or behind, by an MLP as by hand; no gradient reaches a scale."""
    torch.manual_seed(0)
    mlp = MLP(8, 24, linear=TritLinear, leak=leak).to(device)
    mlp.down.add_column_scales()
    mlp.down.column_exponent.copy_(torch.arange(-12, 12, dtype=torch.int8))
    x = normal(5, 8).to(device).requires_grad_()
    h, scale = mlp.up(x), mlp.down.column_scales(torch.float32)
    expected = mlp.down(relu_squared_norm(h, leak))
    assert not scale.requires_grad and not torch.equal(expected, mlp.down(relu_squared_norm(h, leak), scaled=True))
    for y in (mlp(x), mlp.down(norm_module._FusedReLUSquaredNorm.apply(h, leak, scale, 0.0)[0], scaled=True)):
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        grads = (torch.autograd.grad(z, x, torch.ones_like(z), retain_graph=True)[0] for z in (y, expected))
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)
