"""The ternary linear in float8: exact where float8 is, close elsewhere, the weight gradient untouched, and refusals."""

import functools

import pytest
import torch
from torch import Tensor, nn

from tritwise import ops
from tritwise.models import ByteLM, ModelConfig
from tritwise.nn import TritLinear, use_fp8
from tritwise.ops.linear.fp8 import rounded
from tritwise.registers import leading_trit

OPERATION = "linear"
pytestmark = pytest.mark.usefixtures("each_backend")


def integers(*shape: int, limit: int = 7, seed: int = 0) -> Tensor:
    return torch.randint(-limit, limit + 1, shape, generator=torch.Generator().manual_seed(seed)).float()


def register_of(rows: int, columns: int) -> Tensor:
    return integers(rows, columns, limit=121, seed=9).to(torch.int8)


def open_port(rows: int, columns: int) -> Tensor:
    return torch.zeros(1).as_strided((rows, columns), (0, 0)).requires_grad_()


def run(how, x: Tensor, upstream: Tensor, register: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    x, port = x.clone().requires_grad_(), open_port(*register.shape).to(x.device).detach().requires_grad_()
    y = how(x, register, scale, port)
    y.backward(upstream)
    assert x.grad is not None and port.grad is not None
    return y.detach(), x.grad, port.grad


def exact(x: Tensor, register: Tensor, scale: Tensor, port: Tensor) -> Tensor:
    """What float8 rounds: the same product in float64, with the weight's gradient through the port."""
    weight = leading_trit(register).double() * scale.double()[:, None] + port.double()
    return (x.double() @ weight.T).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("leading", [(3,), (2, 5)])
def test_numbers_that_float8_holds_come_out_exact(dtype, leading):
    """Small integers times a power of two, the largest of each row being one that gives a scale without rounding."""
    register, scale = register_of(32, 48), torch.full((32,), 0.25)
    x, upstream = integers(*leading, 48), integers(*leading, 32, seed=1)
    x[..., 0], upstream[..., 0] = 7.0, 7.0  # 7 / 448 = 1 / 64
    found = run(ops.linear_fp8, x.to(dtype), upstream.to(dtype), register, scale)
    expected = run(exact, x, upstream, register, scale)
    assert found[0].dtype == found[1].dtype == dtype and found[2].dtype == torch.float32
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.float(), b.to(dtype).float() if b is not expected[2] else b)


def test_other_numbers_come_out_close_and_the_weight_gradient_as_ever():
    generator = torch.Generator().manual_seed(0)
    register, scale = register_of(64, 128), torch.rand(64, generator=generator) + 0.1
    size = 10 ** torch.rand(40, 1, generator=generator)
    x, upstream = (size * torch.randn(40, n, generator=generator) for n in (128, 64))
    found, expected = (run(how, x, upstream, register, scale) for how in (ops.linear_fp8, exact))
    for a, b in zip(found[:2], expected[:2], strict=True):
        error = float((a - b).norm() / b.norm())
        assert 1e-4 < error < 0.04  # e4m3 is 2 % off at the RMS, and it is at work
    assert torch.equal(found[2], torch.ops.tritwise.linear_weight_grad(upstream, x))


def test_rounding_keeps_every_row_in_range():
    x = torch.tensor([[1e-30, -2e-30], [3e30, 1e30], [0.0, 0.0], [448.0, -1.0]])
    low, scale = rounded(x)
    assert low.dtype == torch.float8_e4m3fn and low.float().isfinite().all()
    back = low.float() * scale
    assert (back - x).abs().max(dim=1).values.le(x.abs().max(dim=1).values / 16 + 1e-13).all()


def test_without_a_port_there_is_no_weight_gradient():
    register, scale, x = register_of(16, 16), torch.ones(16), integers(2, 16).requires_grad_()
    ops.linear_fp8(x, register, scale).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("turned", [False, True])
def test_trits_are_exact(turned):
    register = torch.arange(-121, 122, dtype=torch.int8).repeat(70, 1)[:, :200]
    found = torch.ops.tritwise.trits_float8(register, turned)
    expected = leading_trit(register).float()
    assert found.dtype == torch.float8_e4m3fn and found.is_contiguous()
    assert torch.equal(found.float(), expected.T if turned else expected)
    torch.library.opcheck(torch.ops.tritwise.trits_float8.default, (register, turned))


def test_layers_use_it_once_told_and_learn_their_scales():
    torch.manual_seed(0)
    model = ByteLM(ModelConfig(width=64, depth=1, ctx=16, column_scales=True))
    ids = torch.randint(0, 256, (2, 16))
    before = model(ids)
    assert use_fp8(model) == 4
    after = model(ids)
    assert not torch.equal(before, after) and (before - after).norm() < 0.1 * before.norm()
    model.loss(ids, ids).backward()
    assert all(layer.port.grad.isfinite().all() for layer in model.modules() if isinstance(layer, TritLinear))


def test_it_can_be_traced():
    torch._dynamo.reset()
    model = ByteLM(ModelConfig(width=64, depth=1, ctx=16))
    use_fp8(model)
    ids = torch.randint(0, 256, (2, 16))
    compiled = functools.partial(torch.compile, backend="aot_eager", fullgraph=True)(model.loss)
    assert torch.allclose(compiled(ids, ids), model.loss(ids, ids), rtol=1e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (TritLinear(512, 64), "one scale for each row"),
        (TritLinear(20, 16), "multiples of 16"),
        (TritLinear(32, 24, group=32), "multiples of 16"),
    ],
)
def test_what_does_not_fit_is_refused(layer, reason):
    assert reason in (ops.refuses_fp8(layer.register, layer.exponent) or "")
    model = nn.Sequential(TritLinear(32, 32), layer)
    with pytest.raises(ValueError, match=reason):
        use_fp8(model)
    assert not any(m.fp8 for m in model)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [32, 300, 1000])
def test_the_matrix_units_give_what_the_cpu_gives(rows):
    register, scale = register_of(64, 96), torch.full((64,), 0.25)
    x, upstream = integers(rows, 96), integers(rows, 64, seed=1)
    x[:, 0], upstream[:, 0] = 7.0, 7.0
    given = x.bfloat16(), upstream.bfloat16(), register, scale
    found = run(ops.linear_fp8, *(t.cuda() for t in given))
    for a, b in zip(found, run(exact, x, upstream, register, scale), strict=True):
        assert torch.equal(a.cpu().float(), b.to(a.dtype).float())
