"""The "triton" backend: integers bit-equal to the reference on the CPU, floats within fixed errors.

The same tests run on two devices: on CPU tensors in Triton's interpreter, which must be chosen before Triton is
imported and therefore has a process of its own (`test_in_the_interpreter`), and on a GPU with -m gpu.
"""

import importlib.util
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tritwise import ops
from tritwise.ops import gpu
from tritwise.ops.activation import triton as activation_triton
from tritwise.ops.combine import triton as combine_triton
from tritwise.ops.direction import METHODS
from tritwise.ops.direction import triton as direction_triton
from tritwise.ops.direction.reference import newton_schulz, unit_rms
from tritwise.ops.embedding import triton as embedding_triton
from tritwise.ops.float8 import times_as_float8
from tritwise.ops.graph import triton as graph_triton
from tritwise.ops.heads import triton as heads_triton
from tritwise.ops.linear import reference, triton
from tritwise.ops.scales import triton as scales_triton
from tritwise.registers import Key, make_key

INTERPRETED = os.environ.get(gpu.INTERPRET) == "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
not_interpreted = pytest.mark.skipif(INTERPRETED, reason="is about a process without the interpreter")
in_the_interpreter = pytest.mark.skipif(not INTERPRETED, reason="runs in a process of its own")
on_each_device = pytest.mark.parametrize(
    "device", [*(["cpu"] if INTERPRETED else []), pytest.param("cuda", marks=pytest.mark.gpu)]
)
SHAPES = [(1, 1), (3, 7), (1, 2100), (21, 130), (6, 64), (5, 1000)]  # the last: several tiles both ways
OPS = torch.ops.tritwise


def int8(low: int, high: int, shape: tuple[int, ...], seed: int) -> Tensor:
    """int8 uniform over low … high."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high + 1, shape, dtype=torch.int16, generator=generator).to(torch.int8)


def normal(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def floats(shape: tuple[int, ...], seed: int, low: int = 0, high: int = 0) -> Tensor:
    """float32 normal numbers times 2**low … 2**high; some rows and elements are zero."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, dtype=torch.float64, generator=generator)
    x *= torch.exp2(torch.randint(low, high + 1, shape, generator=generator).double())
    x[torch.rand(shape, generator=generator) < 0.05] = 0
    x[torch.rand(shape[0], generator=generator) < 0.1] = 0
    return x.float()


def placed(value: Any, device: str) -> Any:
    """A copy of a tensor, or of those in a list, on `device`; other things as they are."""
    if isinstance(value, list):
        return [placed(v, device) for v in value]
    return value.to(device, copy=True) if isinstance(value, Tensor) else value


def results(name: str, device: str, run: Callable[..., Any], *arguments: Any) -> list[Tensor]:
    """What `run` returns under the backend `name`, then its tensor arguments after it; all on the CPU."""
    copies = placed(list(arguments), device)
    with ops.backend(name):
        returned = run(*copies)
    every: list[Tensor] = []
    for value in (returned, *copies):
        every += [v for v in (value if isinstance(value, list | tuple) else [value]) if isinstance(v, Tensor)]
    return [tensor.detach().cpu() for tensor in every]


def assert_same_bits(device: str, run: Callable[..., Any], *arguments: Any) -> list[Tensor]:
    """Triton on `device` and the reference on the CPU return and leave behind the same types and bits."""
    found = results("triton", device, run, *arguments)
    for a, b in zip(found, results("reference", "cpu", run, *arguments), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        views = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
        assert torch.equal(a.contiguous().view(views.get(a.dtype, a.dtype)), b.view(views.get(b.dtype, b.dtype)))
    return found


def assert_close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert found.shape == expected.shape
    assert (found.double() - expected.double()).norm() <= tolerance * expected.double().norm()


# ---- accumulation


@on_each_device
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("low", "high", "decay"), [(-9, 2, 0.9), (-149, -120, 1.0), (-20, 126, 0.9)])
def test_accumulation(device, shape, decay, low, high, poisoned):
    grad = floats(shape, 0, low, high)
    grad[grad.isinf()] = 1.0
    momentum, exponent = int8(-127, 127, shape, 1), int8(max(low, -126), min(high, 118), (shape[0], 1), 2)
    taken, *_ = assert_same_bits(device, ops.accumulate_momentum, momentum, exponent, grad, decay, make_key(3))
    assert taken.shape == () and bool(taken)


@on_each_device
@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 70),
    seed=st.integers(0, 2**32 - 1),
    decay=st.floats(0, 1),
    sizes=st.tuples(st.integers(-150, 127), st.integers(-150, 127)).map(sorted),
    key=st.tuples(st.integers(-(2**31), 2**31 - 1), st.integers(-(2**31), 2**31 - 1)),
)
def test_accumulation_of_any_state(device, rows, columns, seed, decay, sizes, key):
    momentum, exponent = int8(-128, 127, (rows, columns), seed), int8(-128, 127, (rows, 1), seed)
    grad = floats((rows, columns), seed, sizes[0], sizes[1])
    assert_same_bits(device, ops.accumulate_momentum, momentum, exponent, grad, decay, Key(*key))


@on_each_device
def test_peaks_at_every_power_of_two_get_the_same_exponent(device):
    # peak / 127 just below, at and above each power of two; then the smallest floats there are.
    peaks = 127 * torch.exp2(torch.arange(-149, 121).double()).float()
    around = torch.stack((torch.nextafter(peaks, torch.tensor(0.0)), peaks, torch.nextafter(peaks, 2 * peaks)))
    tiny = torch.tensor([1e-45, 3e-45, 1e-38, 1.1754944e-38, 0.0])
    grad = torch.cat((around.view(-1), tiny)).view(-1, 1)
    momentum, exponent = torch.zeros(len(grad), 1, dtype=torch.int8), torch.zeros(len(grad), 1, dtype=torch.int8)
    _, _, found, _ = assert_same_bits(device, ops.accumulate_momentum, momentum, exponent, grad, 1.0, make_key(1))
    assert found.unique().numel() > 240


@on_each_device
@pytest.mark.parametrize(
    ("bad", "at"), [(float("nan"), (0, 0)), (float("inf"), (9, 519)), (float("-inf"), (5, 64)), (3e38, (9, 130))]
)
def test_what_is_not_finite_is_refused_and_changes_nothing(device, bad, at):
    momentum, exponent, grad = int8(-127, 127, (10, 520), 0), int8(-9, 9, (10, 1), 1), normal(10, 520)
    if bad == 3e38:  # finite, but the sum is not
        momentum[at], exponent[at[0]] = 100, 120
    grad[at] = bad
    taken, m, e, _ = assert_same_bits(device, ops.accumulate_momentum, momentum, exponent, grad, 1.0, make_key(3))
    assert not bool(taken) and torch.equal(m, momentum) and torch.equal(e, exponent)


@on_each_device
def test_many_tensors_of_mixed_shapes(device, poisoned):
    shapes = [*SHAPES[:-2], SHAPES[-1], (257, 130) if device == "cuda" else (67, 130)]  # the interpreter is slow
    momenta = [int8(-127, 127, shape, n) for n, shape in enumerate(shapes)]
    exponents = [int8(-9, 9, (shape[0], 1), n) for n, shape in enumerate(shapes)]
    grads = [floats(shape, n, -3, 3) for n, shape in enumerate(shapes)]
    keys = [make_key(n) for n in range(len(shapes))]
    for go in (torch.tensor(True), torch.tensor(False)):
        rates = [0.5, 9.0, 30.0, 81.0, 0.0, 2.0]
        flips, *_ = assert_same_bits(device, ops.move_registers_many, momenta, grads, rates, keys, 127, go)
        assert bool(flips.sum()) is bool(go)
    grads[3][20, 77] = float("nan")
    taken, *_ = assert_same_bits(device, ops.accumulate_momentum_many, momenta, exponents, grads, 0.9, keys)
    assert taken.tolist() == [True, True, True, False, True, True]


# ---- moves


@on_each_device
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("rate", "limit"), [(9.7, 121), (0.01, 127), (1e6, 121)])
def test_moves(device, shape, rate, limit):
    register, direction = int8(-limit, limit, shape, 5), floats(shape, 6, -3, 4)
    flips, *_ = assert_same_bits(device, ops.move_registers, register, direction, rate, make_key(7), limit)
    assert flips.dtype == torch.int64 and flips.shape == ()


@on_each_device
@settings(max_examples=15, deadline=None)
@given(
    direction=st.lists(st.floats(allow_nan=False, width=32), min_size=1, max_size=40),
    rate=st.one_of(st.floats(0, 1e3), st.sampled_from([1 / 65536, 81.0])),
    key=st.tuples(st.integers(-(2**31), 2**31 - 1), st.integers(-(2**31), 2**31 - 1)),
)
def test_any_move(device, direction, rate, key):
    x = torch.tensor(direction)
    if rate * 65536 < 1e-45 and x.isinf().any():
        x = x.clamp(-3e38, 3e38)  # 0 times infinity is not a number, and which integer that becomes is not defined
    assert_same_bits(device, ops.move_registers, int8(-128, 127, x.shape, 1), x, rate, Key(*key))


# ---- linear


@on_each_device
@pytest.mark.parametrize(
    ("columns", "group"),
    [(256, 256), (130, 256), (600, 256), (130, 64), (128, 64), (1536, 512), (81, 40), (80, 40), (13, 5), (1, 1)],
)
@pytest.mark.parametrize(
    ("dtype", "lead"), [(torch.float32, 81), (torch.bfloat16, 81), (torch.float16, 81), (torch.bfloat16, 27)]
)
def test_decoding(device, columns, group, dtype, lead, poisoned):
    register, exponent = int8(-128, 127, (19, columns), 3), int8(-128, 127, (19, -(-columns // group)), 4)
    expected = reference.decode(register, exponent, group, dtype, lead)
    found = triton.decode(register.to(device), exponent.to(device), group, dtype, lead).cpu()
    integer = torch.int32 if dtype is torch.float32 else torch.int16
    assert found.dtype == dtype and torch.equal(found.view(integer), expected.view(integer))


@on_each_device
def test_every_register_with_every_exponent(device):
    register = torch.arange(-128, 128, dtype=torch.int16).to(torch.int8).repeat(256, 1)
    exponent = torch.arange(-128, 128, dtype=torch.int16).to(torch.int8).view(256, 1)
    for dtype in (torch.float32, torch.bfloat16):
        for lead in (81, 27, 9, 3, 1):
            found = triton.decode(register.to(device), exponent.to(device), 256, dtype, lead).cpu()
            assert torch.equal(found, reference.decode(register, exponent, 256, dtype, lead))


@on_each_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("leading", [(70,), (2, 3), ()])
def test_linear_and_its_gradients(device, dtype, leading):
    register, exponent = int8(-121, 121, (31, 300), 0), int8(-20, 8, (31, 2), 1)
    x, upstream = normal(*leading, 300).to(dtype), normal(*leading, 31, seed=3).to(dtype)

    def run(x: Tensor, register: Tensor, exponent: Tensor, upstream: Tensor) -> list[Tensor]:
        x, port = x.requires_grad_(), torch.zeros(1, device=x.device).expand(31, 300).requires_grad_()
        y = ops.linear(x, register, exponent, 256, port)
        y.backward(upstream)
        assert x.grad is not None and port.grad is not None and port.grad.dtype == torch.float32
        return [y, x.grad, port.grad]

    expected = results("reference", "cpu", run, *(v.float() for v in (x,)), register, exponent, upstream.float())
    found = results("triton", device, run, x, register, exponent, upstream)
    for a, b in zip(found[:3], expected[:3], strict=True):
        assert_close(a, b, 2e-6 if dtype == torch.float32 else 2**-8)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [0, 1, 700])
def test_a_weight_gradient_is_not_rounded_to_bfloat16(rows):
    grad, x = normal(rows, 31).bfloat16(), normal(rows, 300, seed=3).bfloat16()
    with ops.backend("triton"):
        found = OPS.linear_weight_grad(grad.cuda(), x.cuda())
    assert found.dtype == torch.float32
    assert_close(found.cpu(), grad.double().T @ x.double(), 1e-5)


@on_each_device
@pytest.mark.parametrize(("columns", "group"), [(256, 256), (130, 256), (600, 256), (2500, 4096), (130, 64), (13, 5)])
@pytest.mark.parametrize("lead", [81, 27])
def test_scale_gradients(device, columns, group, lead, poisoned):
    register, exponent = int8(-121, 121, (19, columns), 0), int8(-20, 8, (19, -(-columns // group)), 1)
    arguments = (normal(19, columns), register, exponent, group, lead)
    expected = reference.scale_grad(arguments[0].double(), *arguments[1:])
    found = results("triton", device, ops.linear_scale_grad, *arguments)[0]
    assert found.dtype == torch.float32
    assert_close(found, expected, 1e-5)


@on_each_device
@pytest.mark.parametrize("turned", [False, True])
def test_trits_as_float8(device, turned):
    for rows, columns in ((1, 1), (70, 130), (64, 9)):
        register = int8(-121, 121, (rows, columns), 0)
        found, *_ = results("triton", device, OPS.trits_float8, register, turned)
        assert torch.equal(found.float(), reference.trits_float8(register, turned).float())


@on_each_device
@pytest.mark.parametrize(("rows", "columns", "group"), [(19, 256, 256), (130, 130, 64), (257, 13, 5), (1, 1, 256)])
@pytest.mark.parametrize("lead", [81, 27])
def test_column_gradients(device, rows, columns, group, lead, poisoned):
    register, exponent = int8(-121, 121, (rows, columns), 0), int8(-20, 8, (rows, -(-columns // group)), 1)
    arguments = (normal(rows, columns), register, exponent, group, lead)
    expected = reference.column_grad(arguments[0].double(), *arguments[1:])
    found = results("triton", device, ops.linear_column_grad, *arguments)[0]
    assert found.dtype == torch.float32
    assert_close(found, expected, 1e-5)


@on_each_device
def test_gradients_of_scales_of_many_have_the_bits_of_each(device, poisoned):
    """A step that is recorded takes all matrices at once, another one by one."""
    large = [(600, 768, 256), (1030, 256, 256)] if device == "cuda" else [(260, 400, 256), (390, 256, 256)]
    sizes = [*large, (33, 768, 256), (48, 2048, 4096), (40, 70, 64), (64, 2048, 4096)]
    registers = [int8(-121, 121, size[:2], n) for n, size in enumerate(sizes)]
    exponents = [int8(-20, 8, (rows, -(-columns // group)), rows) for rows, columns, group in sizes]
    grads, groups = [normal(*size[:2], seed=n) for n, size in enumerate(sizes)], [size[2] for size in sizes]
    leads = [81, 81, 27, 81, 27, 27]
    for many, one in (
        (ops.linear_scale_grads, ops.linear_scale_grad),
        (ops.linear_column_grads, ops.linear_column_grad),
    ):
        found = results("triton", device, many, grads, registers, exponents, groups, leads)
        for number, matrix in enumerate(zip(grads, registers, exponents, groups, leads, strict=True)):
            assert torch.equal(found[number], results("triton", device, one, *matrix)[0])


# ---- embedding


@on_each_device
@pytest.mark.parametrize(
    ("rows", "columns", "group", "shape"),
    [(1, 1, 256, (2, 3)), (256, 13, 256, (2, 50)), (11, 130, 4, (11,)), (17, 600, 256, (4,)), (9, 7, 3, (0,))],
)
def test_embedding_rows(device, rows, columns, group, shape, poisoned):
    register, exponent = int8(-128, 127, (rows, columns), 0), int8(-20, 8, (rows, -(-columns // group)), 1)
    ids = torch.randint(0, rows, shape, generator=torch.Generator().manual_seed(7))
    for dtype in (torch.float32, torch.bfloat16):
        for lead in (81, 27, 9):
            assert_same_bits(device, ops.embedding, ids, register, exponent, group, None, dtype, lead)


@on_each_device
@pytest.mark.parametrize(("count", "rows"), [(300, 9), (5000, 256), (5000, 900)])
def test_embedding_gradients_are_the_same_every_time(device, count, rows):
    times, count = (3, count) if device == "cuda" else (1, min(count, 2500))
    ids = torch.randint(0, rows, (count,), generator=torch.Generator().manual_seed(7)) ** 3 % rows  # some are common
    grad = normal(count, 40)
    first, *_ = results("triton", device, OPS.embedding_weight_grad, grad, ids, rows)
    for _ in range(times):
        assert torch.equal(results("triton", device, OPS.embedding_weight_grad, grad, ids, rows)[0], first)
    expected = torch.zeros(rows, 40, dtype=torch.float64).index_add_(0, ids, grad.double())
    assert_close(first, expected, 1e-6)
    assert first.dtype == torch.float32 and torch.equal(first == 0, expected == 0)


@on_each_device
@pytest.mark.parametrize(
    ("count", "rows", "columns", "dtype"),
    [
        (1, 1, 1, torch.float32),
        (700, 300, 70, torch.float32),  # two tiles down and across, several splits
        (1100, 512, 130, torch.bfloat16),
        (600, 33, 20, torch.float16),
        (65, 256, 64, torch.float64),  # is not multiplied
        (900, 513, 300, torch.bfloat16),
        (400, 600, 3, torch.float32),  # more rows than 16 bits can name
        (0, 600, 5, torch.float32),
    ],
)
def test_embedding_gradients_of_any_shape(device, count, rows, columns, dtype, poisoned, monkeypatch):
    """Numbers of all sizes lose nothing in the parts that they are cut into; an id outside the table adds nothing."""
    ids = torch.randint(0, rows, (count,), generator=torch.Generator().manual_seed(7))
    grad = floats((count, columns), 4, -14, 8).to(dtype)
    if device == "cpu" or dtype is not torch.float64:
        ids[1:4] = torch.tensor([-1, rows, 2**32])[: max(count - 1, 0)]
    if count == 400:  # as if these were too many: a program for each of 40,000 took an interpreter minutes
        monkeypatch.setattr(embedding_triton, "NAMED", 500)
    found, *_ = results("triton", device, OPS.embedding_weight_grad, grad, ids, rows)
    inside = (ids >= 0) & (ids < rows)
    expected = torch.zeros(rows, columns, dtype=torch.float64).index_add_(0, ids[inside], grad.double()[inside])
    assert_close(found, expected, 1e-6)
    assert found.dtype == torch.float32 and torch.equal(found == 0, expected == 0)


@pytest.mark.gpu
def test_embedding_gradients_of_more_rows_than_16_bits_can_name():
    ids = torch.randint(0, 40_000, (4000,), generator=torch.Generator().manual_seed(7)).cuda()
    grad = normal(4000, 30).cuda()
    expected = torch.zeros(40_000, 30, dtype=torch.float64, device="cuda").index_add_(0, ids, grad.double())
    found = OPS.embedding_weight_grad(grad, ids, 40_000)
    assert_close(found, expected, 1e-6)
    assert all(torch.equal(OPS.embedding_weight_grad(grad, ids, 40_000), found) for _ in range(3))


@on_each_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_an_embedding_gradient_that_is_not_finite_stays_so(device, bad, dtype):
    """So that the optimizer refuses it; whether other rows are spoilt as well does not matter to that."""
    grad, ids = normal(70, 20).to(dtype), torch.arange(70) % 9
    grad[33, 7] = bad
    found, *_ = results("triton", device, OPS.embedding_weight_grad, grad, ids, 9)
    assert not bool(found[33 % 9, 7].isfinite()) and bool(found[:, :7].isfinite().all())


@pytest.mark.gpu
@pytest.mark.parametrize("wrong", [9, 10**6, -1])
def test_an_id_outside_the_table_gives_no_number(wrong):
    ids = torch.tensor([3, wrong, 8]).cuda()
    with ops.backend("triton"):
        y = ops.embedding(ids, int8(-121, 121, (9, 40), 0).cuda(), int8(0, 9, (9, 1), 1).cuda())
    assert y[1].isnan().all() and y[[0, 2]].isfinite().all()


# ---- directions


@on_each_device
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("rank", "steadied"), [(None, False), (2, False), (2, True)])
def test_directions_are_close(device, method, rank, steadied):
    """Gradients are close to low rank, where the rounding of a matrix product is amplified most."""
    shapes = [(60, 20), (20, 20), (40, 100), (100, 20), (20, 20), (1, 7), (300, 40)]
    blocks = [3, 1, 2, 1, 2, 1, 1]
    momenta, exponents = [], []
    for n, (rows, columns) in enumerate(shapes):
        value = normal(rows, columns, seed=n)
        if rank is not None:
            value = normal(rows, rank, seed=n) @ normal(rank, columns, seed=n + 50)
        momenta.append((value / value.abs().amax(dim=1, keepdim=True) * 127).round().to(torch.int8))
        if n % 2:
            momenta[-1][:1], momenta[-1][:, 2] = 0, 0  # a row and a column that nothing has reached
        exponents.append(int8(-9, -2, (rows, 1), n))
    tolerance = 1e-2 if device == "cuda" and method in ("newton_schulz", "balanced") else 1e-5
    both = []
    for backend, place in (("triton", device), ("reference", "cpu")):
        # Rows of which nothing, little and much is remembered.
        levels = [torch.tensor([ops.LEVEL_FLOOR, -3000, 2000, 5]).repeat(len(m))[: len(m)].short() for m in momenta]
        levels = [level.view(-1, 1).to(place) for level in levels] if steadied else []
        given = [m.to(place) for m in momenta], [e.to(place) for e in exponents]
        with ops.backend(backend):
            both.append(([u.cpu() for u in ops.direction_many(*given, method, 3, blocks, levels, 0.9)], levels))
    for a, b in zip(both[0][0], both[1][0], strict=True):
        assert_close(a, b, 1.2 * tolerance if steadied else tolerance)
    for a, b in zip(both[0][1], both[1][1], strict=True):
        assert (a.cpu().int() - b.int()).abs().max() <= (1 if tolerance < 1e-3 else 60)


# ---- graphs and mixtures


@on_each_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [3, 130, 1100])
def test_messages_have_the_same_bits(device, dtype, columns, poisoned):
    """Sums in the order of the edges, one rounding each: forward and backward. (The interpreter cuts off bfloat16.)"""
    generator = torch.Generator().manual_seed(0)
    source, target = (torch.randint(-1, count, (90,), generator=generator) for count in (40, 30))
    x, base = normal(40, columns).to(dtype), normal(30, columns, seed=3).to(dtype)

    def run(x: Tensor, base: Tensor, source: Tensor, target: Tensor) -> list[Tensor]:
        x = x.requires_grad_()
        y = ops.gather_add(ops.edge_sum(x, source, target, 30), x, source[:30])
        return [y, *torch.autograd.grad(y, x, base)]

    if dtype is torch.float32:
        assert_same_bits(device, run, x, base, source, target)
    else:
        sides = (("triton", device), ("reference", "cpu"))
        both = (results(name, on, run, x, base, source, target) for name, on in sides)
        for found, expected in zip(*both, strict=True):
            assert_close(found, expected, 2**-7)


@on_each_device
@pytest.mark.parametrize(("columns", "k"), [(3, 1), (130, 4), (1100, 2)])
def test_combinations(device, columns, k, poisoned):
    slot = torch.randperm(30 * k, generator=torch.Generator().manual_seed(0)).view(30, k)
    x, gate, upstream = normal(30 * k, columns), normal(30, k, seed=1), normal(30, columns, seed=3)
    assert_same_bits(device, ops.combine, x, slot, gate)
    found, expected = (
        results(name, on, OPS.combine_grads, upstream, x, slot, gate)
        for name, on in (("triton", device), ("reference", "cpu"))
    )
    for a, b in zip(found[:2], expected[:2], strict=True):
        assert_close(a, b, 1e-6)


@on_each_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (7, 130), (3, 4096), (2, 10_000)])
def test_squared_relus(device, rows, columns, scaled, dtype, poisoned):
    h, grad = (normal(rows, columns, seed=seed).to(dtype) for seed in (0, 1))
    scale = normal(columns).abs().to(dtype) if scaled else None
    sides = (("triton", device), ("reference", "cpu"))
    (y, inverse, low, *_), (y_cpu, inverse_cpu, *_) = (
        results(name, on, ops.relu_squared_norm, h, scale, 0.5, 16.0) for name, on in sides
    )
    apart = (low.view(torch.uint8).int() - times_as_float8(y, 16.0).view(torch.uint8).int()).abs()
    # The interpreter rounds ties away from zero, and loses what carries into the exponent.
    assert apart.max() <= (8 if device == "cpu" else 0) and (apart > 0).sum() <= 1 + apart.numel() / 8
    if device == "cuda":
        _, _, low, *_ = results("triton", device, ops.relu_squared_norm, h * torch.nan, scale, 0.5, 16.0)
        assert low.isnan().all()
    given = grad, h, inverse_cpu, scale, 0.5
    found, expected = (results(name, on, ops.relu_squared_norm_grad, *given)[0] for name, on in sides)
    tolerance = 1e-5 if dtype is torch.float32 else 2**-7
    assert_close(inverse, inverse_cpu, 1e-6)
    assert_close(y, y_cpu, tolerance)
    assert_close(found, expected, tolerance)


@on_each_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "keys", "size"), [(1, 1, 2), (3, 3, 64), (6, 2, 40), (15, 15, 64)])
def test_turned_heads(device, heads, keys, size, dtype, poisoned):
    parts, angle = normal(2, 5, heads + 2 * keys, size).to(dtype), normal(5, size // 2, seed=1)
    tables = angle.cos(), angle.sin()
    grads = [normal(2, count, 5, size, seed=3 + n).to(dtype) for n, count in enumerate((heads, keys, keys))]
    sides = (("triton", device), ("reference", "cpu"))

    def gradient(q_grad: Tensor, k_grad: Tensor, v_grad: Tensor, *others: Tensor) -> Tensor:
        """Of gradients that lie as attention gives them: heads before positions."""
        return ops.turned_heads_grad(*(g.transpose(1, 2) for g in (q_grad, k_grad, v_grad)), *others)

    tolerance = 1e-5 if dtype is torch.float32 else 2**-7
    both = (results(name, on, ops.turned_heads, parts, *tables, heads)[:2] for name, on in sides)
    for found, expected in zip(*both, strict=True):
        assert_close(found, expected, tolerance)
    found, expected = (results(name, on, gradient, *grads, parts, *tables)[0] for name, on in sides)
    assert_close(found, expected, tolerance)
    assert torch.equal(found[:, :, heads + keys :], grads[2].transpose(1, 2))


@on_each_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("heads", "size"), [(1, 2), (3, 64), (7, 40), (15, 64)])
def test_own_values(device, heads, size, scaled, dtype, poisoned):
    y, every = normal(2, heads, 5, size).to(dtype), normal(2, 5, 3 * heads, size, seed=1).to(dtype)
    scale = normal(heads * size, seed=3).abs().to(dtype) if scaled else None
    upstream, sides = normal(2, 5, heads * size, seed=4).to(dtype), (("triton", device), ("reference", "cpu"))

    def left(y: Tensor, every: Tensor, scale: Tensor | None) -> Tensor:
        return ops.without_own(y.transpose(1, 2), every[:, :, 2 * heads :], scale)

    def gradients(upstream: Tensor, y: Tensor, every: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
        return ops.without_own_grad(upstream, y.transpose(1, 2), every[:, :, 2 * heads :], scale)

    tolerance = 1e-5 if dtype is torch.float32 else 2**-7
    found, expected = (results(name, on, left, y, every, scale)[0] for name, on in sides)
    assert_close(found, expected, tolerance)
    both = (results(name, on, gradients, upstream, y, every, scale)[:2] for name, on in sides)
    for found, expected in zip(*both, strict=True):
        assert_close(found, expected, tolerance)


# ---- what kernels are not made for


@on_each_device
def test_the_reference_serves_what_the_kernels_do_not(device):
    """Nothing at all, and types that only a test has: the same bits, from the reference's own code."""
    m, e, x, key = int8(-9, 9, (3, 8), 0), int8(-3, 3, (3, 1), 1), normal(3, 8).double(), make_key(4)
    assert_same_bits(
        device, ops.accumulate_momentum_many, [m, m[:0]], [e, e[:0]], [x.float(), x[:0].float()], 0.9, [key] * 2
    )
    assert_same_bits(device, ops.accumulate_momentum, m, e, x, 0.9, key)
    assert_same_bits(device, ops.move_registers, m, x, 9.0, key)
    ids = torch.tensor([2, 0, 2], dtype=torch.int32)
    assert_same_bits(device, ops.embedding, ids, m, e)
    for run, arguments in ((ops.linear, (x, m, e)), (ops.linear_scale_grad, (x, m, e, 256))):
        found, expected = (
            results(name, on, run, *arguments)[0] for name, on in (("triton", device), ("reference", "cpu"))
        )
        assert_close(found, expected, 1e-6)


@on_each_device
def test_no_newton_schulz_steps_leave_the_momentum(device):
    for shape in ((4, 20), (20, 4), (6, 6)):
        m, e = int8(-99, 99, shape, 0), torch.zeros(shape[0], 1, dtype=torch.int8)
        found = results("triton", device, ops.direction, m, e, "newton_schulz", 0)[0]
        assert_close(found, m.double() / m.double().square().mean().sqrt(), 2e-3 if device == "cuda" else 1e-5)


@pytest.mark.parametrize(("steps", "tolerance"), [(3, 5e-3), (5, 3e-2)])
@pytest.mark.parametrize("shape", [(40, 100), (50, 40), (128, 128), (256, 64)])
def test_half_precision_newton_schulz_is_close(shape, steps, tolerance):
    """What a GPU computes, in the CPU's float16: docs/LOG.md quotes these bounds."""
    value = normal(shape[0], 4) @ normal(4, shape[1], seed=1) + 0.01 * normal(*shape, seed=2)
    exact = unit_rms(newton_schulz(value.double(), steps))
    found = unit_rms(direction_triton.newton_schulz(value[None].clone(), steps, torch.float16)[0].double())
    assert_close(found, exact, tolerance)


# ---- where it runs


@needs_triton
@not_interpreted
@pytest.mark.timeout(900)
def test_in_the_interpreter(in_interpreter):
    """Every test above on CPU tensors, those of lists of tensors, and torch's own checks of the operations."""
    names = (
        "triton",
        "triton_tables",
        "ops_many",
        "ops_scales",
        "ops_linear",
        "ops_decoded",
        "ops_embedding",
        "ops_graph",
        "ops_combine",
        "ops_activation",
        "ops_heads",
    )
    files = [Path(__file__).with_name(f"test_{name}.py") for name in names]
    some = "test_triton or (triton and (many or ops_scales or opcheck or matrix or autograd or products or rounds))"
    printed = in_interpreter(files, some)
    (passed,) = re.findall(r"(\d+) passed", printed)
    assert int(passed) > 120
    reasons = set(re.findall(r"^SKIPPED .*?: (.*)$", printed, flags=re.MULTILINE))
    assert reasons <= {"is about a process without the interpreter"}


@needs_triton
@not_interpreted
def test_kernels_compile_for_a_gpu_that_is_not_here(tmp_path, monkeypatch):
    """To the instructions that keep bits: no fused multiply-add and no flushing of small numbers to zero."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    directions = importlib.import_module("tritwise.ops.direction.kernels")
    pointers = {"go": "*i1", "ids": "*i64", "table": "*i64", "flips_T": "*i64", "taken_T": "*i8"}
    pointers |= dict.fromkeys(("register", "exponent"), "*i8")
    pointers |= dict.fromkeys(("source", "first", "index", "slot"), "*i64")
    pointers |= dict.fromkeys(("scales", "weight", "weight_grad", "out"), "*fp32")
    pointers |= dict.fromkeys(("base", "gate", "grad", "x_grad", "gate_grad", "parts"), "*fp32")
    pointers |= dict.fromkeys(("peak_R", "old_R", "refused_T"), "*i32")
    pointers |= {"momentum": "*i8", "addresses": "*i64"}
    pointers |= dict.fromkeys(("squares", "row_factor", "column_factor", "scale", "plus", "x", "norm"), "*fp32")
    pointers |= {"level": "*i16", "after": "*i16", "full": "*i32", "size": "fp32", "memory": "fp32"}
    tiles = {"TENSORS": 16, "BLOCK_R": 4, "BLOCK_C": 512, "ALIGNED": True}
    block = {"BLOCK_R": 8, "BLOCK_C": 256}
    pointers |= dict.fromkeys(("step", "places", "keys"), "*i64") | {"rates": "*fp64"}
    messages, mixture, tables = graph_triton._kernels(), combine_triton._kernels(), gpu._table_kernels()
    embeddings = embedding_triton._kernels()
    products = {"BLOCK_V": 256, "BLOCK_C": 64, "BLOCK_N": 64, "SPAN": 2048, "NARROW": True}
    scales, linear, operands = scales_triton._kernels(), triton._kernels(), triton._operand_kernels()
    pointers |= {"square_T": "*i64", "still": "*i1", "octaves": "*fp64"}
    ones = dict.fromkeys(("time", "heads", "kv_heads", "half"), 1)  # as a launch makes them constants
    pointers |= dict.fromkeys(("order", "starts"), "*i64")
    pointers |= {"low": "*fp8e4nv", "factor": "fp32"}
    pointers |= {"h": "*bf16", "inverses": "*fp32", "leak": "fp32"} | dict.fromkeys(("cos", "sin"), "*fp32")
    pointers |= dict.fromkeys(("q", "k", "qkv", "q_grad", "k_grad", "v_grad", "y", "v", "y_grad"), "*bf16")
    for name, constants in (
        ("edge_sum", {"BLOCK": 256}),
        ("gather_add", {"BLOCK": 256}),
        ("forward", {"K": 2, "BLOCK": 256}),
        ("backward", {"K": 2, "SPAN": 512, "BLOCK": 256}),
        ("peaks", tiles),
        ("requantise", tiles),
        ("move", {"TENSORS": 16, "BLOCK": 2048, "ALIGNED": True}),
        ("keys_at", {"BLOCK": 256}),
        ("fill", {"BLOCK": 256}),
        ("fill", {"BLOCK": 256, "rates": None}),
        ("scale_squares", {"TENSORS": 16, "BLOCK": 2048}),
        ("move_scales", {"TENSORS": 16, "BLOCK": 2048}),
        ("move_scales", {"TENSORS": 16, "BLOCK": 2048} | dict.fromkeys(("still", "go", "octaves", "keys"))),
        *(
            (name, constants | {"LEAD": lead})
            for lead in (81, 27)
            for name, constants in (
                ("decode", {"BLOCK_R": 16, "BLOCK_C": 256, "UNIFORM": True}),
                ("scale_grad", {"SPAN": 256, "BLOCK_R": 8, "BLOCK_C": 256}),
                ("scale_grads", {"TENSORS": 16, "SPAN": 256, "BLOCK_R": 8, "BLOCK_C": 256}),
                ("column_grad", {"STRIP": 128, "BLOCK_R": 16, "BLOCK_C": 128}),
                ("column_grads", {"TENSORS": 16, "STRIP": 128, "BLOCK_R": 16, "BLOCK_C": 128}),
                *(("decode_many", {"TENSORS": 64, "TYPE": kind, "BLOCK": 64}) for kind in operands.TYPES.values()),
            )
        ),
        ("strip_sums", {"TENSORS": 16, "SPAN": 16, "BLOCK": 128}),
        ("trits_float8", {"TURNED": True, "BLOCK": 64}),
        ("row_sums", products | {"PARTS": 3}),
        ("row_sums", products | {"PARTS": 1}),
        ("split_sums", {"SPAN": 16, "BLOCK": 1024}),
        ("run_sums", {"BLOCK_N": 32, "BLOCK_C": 256}),
        ("run_sums", {"BLOCK_N": 32, "BLOCK_C": 1, "columns": 1}),
        ("row_factors", {"SPAN": 600, "STRIP": 16, "BLOCK": 256}),
        ("row_factors", {"SPAN": 600, "STRIP": 16, "BLOCK": 256, "column_factor": None, "rows": 1, "columns": 1}),
        ("column_factors", {"STRIPS": 2, "BLOCK": 64}),
        ("column_factors", {"STRIPS": 512, "BLOCK": 8}),
        ("column_factors", {"STRIPS": 2, "BLOCK": 64, "full": None, "rows": 1, "columns": 1, "strips": 1}),
        ("weigh", block),
        ("weigh", block | {"plus": None, "rows": 1, "columns": 1}),
        ("row_scales", {"BLOCK": 256, "SPAN": 512}),
        ("row_scales", {"BLOCK": 256, "SPAN": 512, "level": None, "after": None, "rows": 1, "columns": 1}),
        ("spread", {"BLOCK": 2048}),
        *((name, {"BLOCK": 4096}) for name in ("relu_squared_norm", "relu_squared_norm_grad")),
        ("turned_heads", {"ROWS": 32, "HALF": 32}),
        ("turned_heads_grad", {"ROWS": 32, "VALUES": 16, "HALF": 32}),
        *((name, {"ROWS": 16, "SIZE": 64}) for name in ("without_own", "without_own_grad")),
        *((name, {"ROWS": 1, "SIZE": 64, "heads": 1, "scale": None}) for name in ("without_own", "without_own_grad")),
        ("turned_heads", {"ROWS": 2, "HALF": 1} | ones),
        ("turned_heads_grad", {"ROWS": 2, "VALUES": 1, "HALF": 1, "q_time": 1, "k_head": 1} | ones),
        *((name, {"BLOCK": 1, "columns": 1}) for name in ("relu_squared_norm", "relu_squared_norm_grad")),
        ("relu_squared_norm", {"BLOCK": 1024, "scale": None, "low": None}),
        ("relu_squared_norm_grad", {"BLOCK": 1024, "scale": None}),
    ):
        rooms = gpu.kernels(), tables, scales, linear, operands, directions, messages, mixture, embeddings
        rooms += activation_triton._kernels(), heads_triton._kernels()
        kernel = next(getattr(room, name) for room in rooms if hasattr(room, name))
        types = {a: "constexpr" if a in constants else pointers.get(a, "i32") for a in kernel.arg_names}
        source = ASTSource(kernel, types, {(kernel.arg_names.index(a),): v for a, v in constants.items()})
        made = compile_kernel(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": False})
        assert re.search(r"st\.global|atom\.global|red\.global", made.asm["ptx"])
        exact = any(hasattr(room, name) for room in rooms[:5])  # directions are floats, and may be a rounding off
        assert not exact or not re.findall(r"\bfma\b|\.ftz", made.asm["ptx"])


@needs_triton
@not_interpreted
@pytest.mark.parametrize(
    ("one", "constants"),
    [
        ("scale_grad", {"LEAD": 81, "SPAN": 256, "BLOCK_R": 8, "BLOCK_C": 256}),
        ("scale_grad", {"LEAD": 27, "SPAN": 700, "BLOCK_R": 2, "BLOCK_C": 1024}),
        ("column_grad", {"LEAD": 81, "STRIP": 128, "BLOCK_R": 16, "BLOCK_C": 128}),
        ("column_grad", {"LEAD": 27, "STRIP": 128, "BLOCK_R": 16, "BLOCK_C": 128}),
    ],
)
def test_many_matrices_are_summed_in_the_order_of_one(one, constants, tmp_path, monkeypatch):
    """A sum's order follows from how its tile lies in the threads, which follows from what is known to be aligned."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {"table": "*i64", "register": "*i8", "exponent": "*i8"}
    types |= dict.fromkeys(("weight_grad", "out", "scales"), "*fp32")
    places = []
    for name, own in ((one, {}), (one, {"groups": 1}), (f"{one}s", {"TENSORS": 16})):
        kernel, fixed = getattr(triton._kernels(), name), constants | own
        known = [a for a in (*types, "columns", "group") if a in kernel.arg_names]
        hints = {(kernel.arg_names.index(a),): [["tt.divisibility", 16]] for a in known}
        signature = {a: "constexpr" if a in fixed else types.get(a, "i32") for a in kernel.arg_names}
        values = {(kernel.arg_names.index(a),): v for a, v in fixed.items()}
        source = ASTSource(kernel, signature, values, hints)
        made = compile_kernel(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": False})
        layouts = dict(re.findall(r"^(#blocked\d*) = (.*)$", made.asm["ttgir"], flags=re.MULTILINE))
        (summed,) = re.findall(r"\}\) : \(tensor<\w+xf32, (#blocked\d*)>\)", made.asm["ttgir"])
        places.append(layouts[summed])
    assert len(set(places)) == 1 and "sizePerThread = [1, 16]" in places[0]


@not_interpreted
def test_reasons_to_refuse(monkeypatch):
    why = gpu.refuses.__wrapped__
    assert "TRITON_INTERPRET=1" in why(torch.device("cpu"))
    assert why(torch.device("mps")) == "it runs on CUDA devices only"
    monkeypatch.setenv(gpu.INTERPRET, "1")
    assert "unset it" in why(torch.device("cuda"))

    def missing() -> None:
        raise ImportError("No module named 'triton'")

    monkeypatch.setattr(gpu, "kernels", missing)
    assert why(torch.device("cpu")) == "triton is not installed; run pip install triton"

    def broken(*_: Any) -> bool:
        raise RuntimeError("no C compiler\nin PATH")

    monkeypatch.setattr(gpu, "kernels", lambda: None)
    monkeypatch.setattr(gpu, "_self_test", broken)
    assert why(torch.device("cpu")) == "Triton cannot compile or run: RuntimeError: no C compiler in PATH"
    monkeypatch.setattr(gpu, "_self_test", lambda device: False)
    assert "wrong results" in why(torch.device("cpu"))
    monkeypatch.setattr(gpu, "_self_test", lambda device: True)
    assert why(torch.device("cpu")) is None


@not_interpreted
def test_an_old_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GTX 1080")
    assert gpu.refuses.__wrapped__(torch.device("cuda")) == "GTX 1080 is older than compute capability 7.0"


@not_interpreted
def test_it_is_the_choice_for_cuda_and_none_of_a_cpu():
    for operation in (
        "linear",
        "embedding",
        "update",
        "scales",
        "direction",
        "graph",
        "combine",
        "activation",
        "heads",
    ):
        assert ops.backends_of(operation)[0] == "triton"
        assert ops.backends._backends[operation]["triton"].devices == ("cuda",)


@in_the_interpreter
def test_on_a_cpu_it_must_be_asked_for():
    register, exponent = int8(-121, 121, (3, 7), 0), int8(-9, 9, (3, 1), 1)
    ops.linear(normal(2, 7), register, exponent)
    assert ops.backend_table()["linear"] != "triton"
    with ops.backend("triton"):
        ops.linear(normal(2, 7), register, exponent)
    assert ops.backend_table()["linear"] == "triton"
