"""The ternary linear in float8: exact where float8 is, close elsewhere, the weight gradient untouched, and refusals."""

import contextlib
import functools
import importlib
import math
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from tritwise import ops
from tritwise.models import ByteLM, ModelConfig
from tritwise.nn import TritLinear, decoded, trit_modules, use_fp8
from tritwise.ops.float8 import rounded
from tritwise.ops.linear.fp8 import rounded_unit
from tritwise.registers import leading_trit, scale_values

OPERATION = "linear"
fp8 = importlib.import_module("tritwise.ops.linear.fp8")  # `tritwise.ops.linear` is a function
pytestmark = pytest.mark.usefixtures("each_backend")


def integers(*shape: int, limit: int = 7, seed: int = 0) -> Tensor:
    return torch.randint(-limit, limit + 1, shape, generator=torch.Generator().manual_seed(seed)).float()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def register_of(rows: int, columns: int) -> Tensor:
    return integers(rows, columns, limit=121, seed=9).to(torch.int8)


def exponents(rows: int, value: int = -16) -> Tensor:
    return torch.full((rows, 1), value, dtype=torch.int8)  # 2 ** (value / 8)


def open_port(register: Tensor) -> Tensor:
    return torch.zeros(1, device=register.device).as_strided(register.shape, (0, 0)).requires_grad_()


def run(how: Callable, x: Tensor, upstream: Tensor, register: Tensor, exponent: Tensor) -> tuple[Tensor, ...]:
    """y, dL/dx and dL/dW."""
    x, port = x.clone().requires_grad_(), open_port(register)
    y = how(x, register, exponent, 256, port)
    y.backward(upstream)
    assert x.grad is not None and port.grad is not None
    return y.detach(), x.grad, port.grad


rounding = functools.partial(ops.linear_fp8, least=16)


def exact(x: Tensor, register: Tensor, exponent: Tensor, group: int, port: Tensor) -> Tensor:
    """What float8 rounds: the same product in float64, with the weight's gradient through the port."""
    weight = leading_trit(register).double() * scale_values(exponent, torch.float64) + port.double()
    return (x.double() @ weight.T).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("leading", [(3,), (2, 5)])
def test_numbers_that_float8_holds_come_out_exact(dtype, leading):
    """Small integers times a power of two, the largest of each row being one that gives a scale without rounding."""
    register, exponent = register_of(32, 48), exponents(32)
    x, upstream = integers(*leading, 48), integers(*leading, 32, seed=1)
    x[..., 0], upstream[..., 0] = 7.0, 7.0  # 7 / 448 = 1 / 64
    found = run(rounding, x.to(dtype), upstream.to(dtype), register, exponent)
    expected = run(exact, x, upstream, register, exponent)
    assert found[0].dtype == found[1].dtype == dtype and found[2].dtype == torch.float32
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.float(), b.to(dtype).float() if b is not expected[2] else b)


def test_other_numbers_come_out_close_and_the_weight_gradient_as_ever():
    generator = torch.Generator().manual_seed(0)
    register, exponent = register_of(64, 128), torch.randint(-20, 9, (64, 1), generator=generator, dtype=torch.int8)
    size = 10 ** torch.rand(40, 1, generator=generator)
    x, upstream = (size * torch.randn(40, n, generator=generator) for n in (128, 64))
    found, expected = (run(how, x, upstream, register, exponent) for how in (rounding, exact))
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


@pytest.mark.parametrize("columns", [16, 48, 768, 3072, 8192])
def test_rows_of_unit_rms_need_no_search_for_their_largest_number(columns):
    """Not even a row whose whole RMS is in one number leaves the range; what lies further out ends at its edge."""
    x = torch.randn(6, columns, generator=torch.Generator().manual_seed(0))
    x /= x.square().mean(dim=1, keepdim=True).sqrt()
    x[0], x[1] = 0.0, 0.0
    x[0, 3], x[1, 3] = columns**0.5, -100 * columns**0.5
    low, scale = rounded_unit(x)
    assert low.dtype == torch.float8_e4m3fn and scale.shape == (6, 1) and len(scale.unique()) == 1
    back = low.float() * scale
    assert ((back - x).abs() <= x.abs() / 16 + 7e-5 * columns**0.5)[[0, 2, 3, 4, 5]].all()
    assert back[1, 3] == -448 * scale[0] and math.log2(scale[0]).is_integer()
    exact, _ = rounded(x[2:])
    assert float((back[2:] - x[2:]).norm() / x[2:].norm()) < 0.03 and exact.dtype == low.dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "columns", "rounds"),
    [
        (64, 32, (True, False)),
        (32, 64, (False, True)),
        (64, 48, (True, True)),
        (32, 32, (False, False)),
        (8, 64, (False, False)),  # too few rows for a matrix unit
    ],
)
@pytest.mark.parametrize("unit", [False, True])
def test_only_what_pays_is_rounded(rows, columns, rounds, unit, dtype):
    """x where it is multiplied often enough, by many outputs; dL/dy by many inputs. The rest has the bits of `linear`,
    and so has the gradient of the weight."""
    generator = torch.Generator().manual_seed(0)
    register, exponent = register_of(rows, columns), exponents(rows, -5)
    rounds = (rounds[0] or (unit and rows >= 24), rounds[1])  # x of unit RMS from half as many outputs on
    assert ops.rounds_fp8(register, 48, unit) == rounds
    x, upstream = (torch.randn(2, 5, n, generator=generator).to(dtype) for n in (columns, rows))
    found = run(functools.partial(ops.linear_fp8, least=48, unit=unit), x, upstream, register, exponent)
    expected = run(ops.linear, x, upstream, register, exponent)
    for a, b, rounded_too in zip(found, expected, (*rounds, False), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b) is not rounded_too
        assert (a - b).norm() < 0.04 * b.norm()


def test_large_is_1024_if_nobody_says_otherwise():
    assert ops.FP8_LEAST == 1024
    assert ops.rounds_fp8(register_of(1024, 16)) == (True, False) and ops.rounds_fp8(register_of(1008, 1040))[1]
    assert ops.rounds_fp8(register_of(512, 16), unit=True) == (True, False)
    assert not any(ops.rounds_fp8(register_of(511, 1023), unit=True))
    assert not any(ops.rounds_fp8(register_of(1023, 1023)))


@pytest.mark.parametrize(("rows", "columns"), [(64, 32), (32, 64), (64, 64)])
def test_nothing_new_is_kept_for_backward(rows, columns):
    register, exponent, x = register_of(rows, columns), exponents(rows), integers(6, columns).requires_grad_()
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        ops.linear_fp8(x, register, exponent, port=open_port(register), least=48)
    assert set(kept) == {x.data_ptr(), register.data_ptr(), exponent.data_ptr()}


def test_without_a_port_there_is_no_weight_gradient():
    register, x = register_of(16, 16), integers(2, 16).requires_grad_()
    rounding(x, register, exponents(16)).sum().backward()
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
    assert use_fp8(model, least=16) == 4
    after = model(ids)
    assert not torch.equal(before, after) and (before - after).norm() < 0.1 * before.norm()
    model.loss(ids, ids).backward()
    assert all(layer.port.grad.isfinite().all() for layer in model.modules() if isinstance(layer, TritLinear))
    for no_gradients in (torch.no_grad, torch.inference_mode):
        with no_gradients():
            assert torch.equal(model(ids), before), "what is scored and sampled is exact"


def test_layers_that_gain_nothing_are_left_alone():
    model = ByteLM(ModelConfig(width=32, depth=1, ctx=16))
    assert use_fp8(model, least=80) == 3  # of 96 x 32, 32 x 32, 128 x 32 and 32 x 128
    left = [layer for layer in model.modules() if isinstance(layer, TritLinear) and layer.fp8_least is None]
    assert [layer.role for layer in left] == ["matrix", "head"] and left[0] is model.blocks[0].attention.out
    narrow = nn.Sequential(TritLinear(32, 64), TritLinear(40, 40, group=8))  # of which the second could not
    assert use_fp8(narrow, least=64) == 1


def gradients(model: ByteLM, loss_of: Callable, ids: Tensor) -> list[Tensor]:
    """The loss, and the gradient of every ternary layer."""
    loss = loss_of(ids, ids)
    loss.backward()
    found = [layer.port.grad.clone() for _, layer in trit_modules(model)]
    for _, layer in trit_modules(model):
        layer.port.grad = None
    return [loss.detach(), *found]


def test_it_can_be_traced_and_computed_again():
    """In one piece, forward and backward, where some products are rounded and some are not, and in backward anew."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = ByteLM(ModelConfig(width=32, depth=1, ctx=16))
    use_fp8(model, least=64)
    ids = torch.randint(0, 256, (2, 16))
    plain = gradients(model, model.loss, ids)
    model.checkpoint = True
    again = gradients(model, model.loss, ids)
    traced = gradients(model, torch.compile(model.loss, backend="aot_eager", fullgraph=True), ids)
    for one, two, three in zip(plain, again, traced, strict=True):
        assert torch.equal(one, two) and torch.allclose(one, three, rtol=1e-5, atol=1e-6)
    torch._dynamo.reset()


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("how", ["eager", "checkpoint", "aot_eager"])
def test_what_an_mlp_multiplies_is_rounded_where_it_is_made(how, ahead, monkeypatch):
    """On a GPU by the operation before, on a CPU by a pass of its own: the same bits, loss and gradients."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = ByteLM(ModelConfig(width=32, depth=2, ctx=16, column_scales=True, leak=0.5), checkpoint=how == "checkpoint")
    use_fp8(model, least=48)
    loss = torch.compile(model.loss, backend=how, fullgraph=True) if how == "aot_eager" else model.loss
    ids = torch.randint(0, 256, (2, 16))
    monkeypatch.setattr("tritwise.nn.norm.fuses", lambda x: True)
    factors: list[float] = []
    made = ops.relu_squared_norm
    monkeypatch.setattr(ops, "relu_squared_norm", lambda *given: factors.append(given[3]) or made(*given))
    with decoded(model, torch.float32) if ahead else contextlib.nullcontext():
        found = gradients(model, loss, ids)
        assert factors and set(factors) == {ops.unit_factor(128)}
        with torch.no_grad():
            assert model.loss(ids, ids).isfinite() and factors[-1] == 0
        torch._dynamo.reset()
        monkeypatch.setattr(TritLinear, "unit_factor", 0.0)
        expected = gradients(model, loss, ids)
    assert factors[-1] == 0 and all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (TritLinear(512, 64), "a single scale; set group=65536"),
        (TritLinear(24, 16), "multiples of 16, not [(]16, 24[)]; choose another width"),
        (TritLinear(32, 24, group=32), "multiples of 16"),
    ],
)
def test_what_does_not_fit_is_refused(layer, reason):
    model = nn.Sequential(TritLinear(32, 32), layer)
    with pytest.raises(ValueError, match=f"float8 is not for this model: .*{reason}"):
        use_fp8(model, least=16)
    assert all(m.fp8_least is None for m in model)


def test_a_model_of_small_layers_is_refused():
    for model in (nn.Sequential(TritLinear(32, 32), TritLinear(512, 64)), nn.Linear(2048, 2048)):
        with pytest.raises(ValueError, match=r"no ternary matrix is wide enough.*, from 512 rows on; leave fp8 off"):
            use_fp8(model)


def test_a_gpu_without_the_units_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU of 2020")
    for capability, reason in (((8, 0), "GPU of 2020 has no matrix units for float8; leave fp8 off"), ((8, 9), None)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        there = SimpleNamespace(shape=(64, 64), is_cuda=True, device="cuda")
        assert ops.refuses_fp8(there, exponents(64)) == reason  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("least", [16, 80, 112])  # both products, one of them, none
@pytest.mark.parametrize("rows", [32, 300, 1000])
def test_the_matrix_units_give_what_the_cpu_gives(rows, least):
    register, exponent = register_of(64, 96), exponents(64)
    x, upstream = integers(rows, 96), integers(rows, 64, seed=1)
    x[:, 0], upstream[:, 0] = 7.0, 7.0
    given = x.bfloat16(), upstream.bfloat16(), register, exponent
    found = run(functools.partial(ops.linear_fp8, least=least), *(t.cuda() for t in given))
    for a, b in zip(found, run(exact, x, upstream, register, exponent), strict=True):
        assert torch.equal(a.cpu().float(), b.to(a.dtype).float())


@pytest.mark.gpu
def test_a_gpu_compiles_it():
    """Sums are rounded at other places than in eager mode, and some numbers to another neighbour in float8."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = ByteLM(ModelConfig(width=64, depth=1, ctx=16), torch.bfloat16, checkpoint=True).cuda()
    assert use_fp8(model, least=128) == 4
    ids = torch.randint(0, 256, (8, 16)).cuda()
    plain = gradients(model, model.loss, ids)
    traced = gradients(model, torch.compile(model.loss, fullgraph=True, dynamic=False), ids)
    for one, other in zip(plain, traced, strict=True):
        assert (one - other).norm() < 0.1 * one.norm()
    torch._dynamo.reset()


@pytest.mark.parametrize("unit", [False, True])
def test_a_cpu_without_scaled_products_has_the_same_numbers(unit, monkeypatch):
    """As torch 2.11; but for what sums in another order round otherwise in bfloat16."""
    register, exponent, x, upstream = register_of(64, 48), exponents(64), normal(5, 48), normal(5, 64, seed=1)
    how, found = functools.partial(ops.linear_fp8, least=16, unit=unit), []
    for has in (True, False):
        monkeypatch.setattr(fp8, "_CPU_SCALES_ROWS", has and fp8._CPU_SCALES_ROWS)
        found.append(run(how, x, upstream, register, exponent))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1 / 128, atol=1e-6)
