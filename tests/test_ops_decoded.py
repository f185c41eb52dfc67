"""Matrices decoded ahead of their products: the bits of each decoded by itself, and the same numbers from products."""

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tritwise import ops
from tritwise.ops.float8 import filled
from tritwise.ops.linear import reference
from tritwise.registers import leading_trit, scale_values

OPERATION = "linear"
pytestmark = pytest.mark.usefixtures("each_backend")

BOTH, FORWARD, BACKWARD, NEITHER = (True, True), (True, False), (False, True), (False, False)
MATRICES = [  # rows, columns, group, what is rounded
    (48, 80, 1 << 16, BOTH),
    (128, 96, 96, BACKWARD),
    (64, 256, 256, FORWARD),
    (3, 64, 64, NEITHER),
    (70, 192, 64, NEITHER),  # three groups to a row
    (130, 208, 128, NEITHER),  # the last tile and the last group are cut off both ways
    (80, 128, 32, NEITHER),  # two groups in a tile
    (19, 130, 64, NEITHER),  # rows that begin anywhere
    (1, 1, 5, NEITHER),
    (16, 16, 16, BOTH),
]


def int8(*shape: int, seed: int, low: int = -121, high: int = 121) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high + 1, shape, dtype=torch.int16, generator=generator).to(torch.int8)


def normal(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def open_port(register: Tensor) -> Tensor:
    return torch.zeros(1, device=register.device).as_strided(register.shape, (0, 0)).requires_grad_()


def same(found: Tensor | None, expected: Tensor | None) -> bool:
    """Of one type and shape, and of the same bits; or both missing."""
    if found is None or expected is None:
        return found is expected
    assert found.dtype == expected.dtype and found.shape == expected.shape
    found, expected = found.cpu().contiguous(), expected.contiguous()
    return torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


def matrices(device: str = "cpu") -> tuple[list[Tensor], list[Tensor], list[int], list[tuple[bool, bool]]]:
    """Registers of every value and exponents of every value, groups, and what is rounded."""
    shapes = [(rows, columns, -(-columns // group)) for rows, columns, group, _ in MATRICES]
    registers = [int8(r, c, seed=n, low=-128, high=127).to(device) for n, (r, c, _) in enumerate(shapes)]
    exponents = [int8(r, g, seed=90 + n, low=-128, high=127).to(device) for n, (r, _, g) in enumerate(shapes)]
    return registers, exponents, [m[2] for m in MATRICES], [m[3] for m in MATRICES]


def check_bits(device: str, dtype: torch.dtype) -> None:
    registers, exponents, groups, rounds = matrices(device)
    units = [number % 2 == 0 for number in range(len(MATRICES))]
    leads = [81 if any(how) or number % 3 else 27 for number, how in enumerate(rounds)]  # float8 holds single trits
    assert leads.count(27) > 1
    found = ops.decode_many(registers, exponents, groups, dtype, rounds, units, leads)
    if ops.backend_table()["linear"] == "tilelang":  # which decodes within its products
        assert found == [ops.Operand()] * len(MATRICES)
        return
    parts = zip(found, registers, exponents, groups, rounds, units, leads, strict=True)
    for made, register, exponent, group, (rounds_x, rounds_grad), unit, lead in parts:
        r, e = register.cpu(), exponent.cpu()
        either = rounds_x or rounds_grad
        assert same(made.weight, None if rounds_x and rounds_grad else reference.decode(r, e, group, dtype, lead))
        assert same(made.trits8, leading_trit(r).to(torch.float8_e4m3fn) if rounds_x else None)
        assert same(made.turned8, leading_trit(r).T.to(torch.float8_e4m3fn) if rounds_grad else None)
        assert same(made.scale_O, scale_values(e)[:, 0] if either else None)
        assert all(part is None or part.is_contiguous() for part in made) and made.serves(dtype)
        assert made.serves(torch.int8) is (rounds_x and rounds_grad)
        # Vectors of one number are shared by all.
        assert made.ones is (filled(register.device, 1.0) if rounds_grad else None)
        worth = 1 / ops.unit_factor(r.shape[1])
        assert made.unit_x is (filled(register.device, worth) if rounds_x and unit else None)
        assert made.unit_x is None or (made.unit_x == worth).all()
    places = [part.data_ptr() for made in found for part in made[:4] if part is not None]
    assert len(set(places)) == len(places) == 8 + 3 + 3 + 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_many_matrices_have_the_bits_of_each(dtype, poisoned):
    check_bits("cpu", dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_many_matrices_on_a_gpu_have_the_bits_of_each(dtype, poisoned):
    check_bits("cuda", dtype)


def test_many_matrices_in_any_layout():
    registers, exponents, groups, rounds = matrices()
    strided = [r.T.contiguous().T for r in registers], [torch.stack((e, e), dim=2)[:, :, 0] for e in exponents]
    found = ops.decode_many(*strided, groups, torch.float32, rounds)
    expected = ops.decode_many(registers, exponents, groups, torch.float32, rounds)
    for one, other in zip(found, expected, strict=True):
        assert all(same(a, b) for a, b in zip(one, other, strict=True))
    assert not ops.Operand().serves(torch.float32) and ops.decode_many([], [], [], torch.float32, []) == []


def run(how: Callable[..., Tensor], x: Tensor, upstream: Tensor, register: Tensor) -> list[Tensor]:
    """y, dL/dx and dL/dW."""
    x, port = x.clone().requires_grad_(), open_port(register)
    y = how(x, port)
    y.backward(upstream)
    assert x.grad is not None and port.grad is not None and port.grad.shape == register.shape
    return [y.detach(), x.grad, port.grad]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("leading", [(), (5,), (2, 3)])
@pytest.mark.parametrize(("rows", "columns", "group"), [(48, 80, 256), (7, 13, 5), (64, 192, 64)])
def test_products_have_the_bits_of_those_that_decode(rows, columns, group, leading, dtype):
    register, exponent = int8(rows, columns, seed=0), int8(rows, -(-columns // group), seed=1, low=-20, high=8)
    x, upstream = normal(*leading, columns).to(dtype), normal(*leading, rows, seed=3).to(dtype)
    (made,) = ops.decode_many([register], [exponent], [group], dtype, [NEITHER])
    found = run(lambda x, port: ops.linear_decoded(x, made, port), x, upstream, register)
    expected = run(lambda x, port: ops.linear(x, register, exponent, group, port), x, upstream, register)
    assert all(same(a, b) for a, b in zip(found, expected, strict=True)) and all(t.any() for t in found)
    assert found[2].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize(
    ("rows", "columns", "rounds"),
    [(64, 48, BOTH), (64, 32, FORWARD), (32, 64, BACKWARD), (32, 32, NEITHER)],
)
def test_rounded_products_have_the_bits_of_those_that_decode(rows, columns, rounds, unit, dtype):
    register, exponent = int8(rows, columns, seed=0), int8(rows, 1, seed=1, low=-20, high=8)
    least = 48 if not unit or rounds[0] else 80  # where x is of unit RMS, half as many outputs are enough
    rounds = ops.rounds_fp8(register, least, unit)
    x, upstream = (normal(2, 5, n, seed=n).to(dtype) for n in (columns, rows))
    (made,) = ops.decode_many([register], [exponent], [256], dtype, [rounds])
    found = run(lambda x, port: ops.linear_decoded(x, made, port, unit), x, upstream, register)
    how = functools.partial(ops.linear_fp8, least=least, unit=unit)
    expected = run(lambda x, port: how(x, register, exponent, 256, port), x, upstream, register)
    assert all(same(a, b) for a, b in zip(found, expected, strict=True))
    exact = run(lambda x, port: ops.linear(x, register, exponent, 256, port), x, upstream, register)
    assert [same(a, b) for a, b in zip(found, exact, strict=True)] == [not rounds[0], not rounds[1], True]


def test_nothing_is_kept_or_made_that_nobody_asks_for():
    register, exponent, x = int8(8, 24, seed=0), int8(8, 1, seed=1, low=-20, high=8), normal(3, 24)
    (made,) = ops.decode_many([register], [exponent], [256], torch.float32, [NEITHER])
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        y = ops.linear_decoded(x.requires_grad_(), made)
    assert made.weight is not None and kept == [made.weight.data_ptr()]  # no x without a port
    y.sum().backward()
    assert torch.equal(x.grad, (torch.ones(3, 8) @ made.weight))
    port = open_port(register)
    ops.linear_decoded(x.detach(), made, port).sum().backward()
    assert torch.equal(port.grad, torch.ops.tritwise.linear_weight_grad(torch.ones(3, 8), x.detach()))
