"""Momentum and register moves: bit for bit against plain Python, unbiased, and safe with any gradient."""

import math
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tritwise import ops
from tritwise.registers import Key, leading_trit, make_key, random_bits16

OPS = torch.ops.tritwise
FLOOR, CEILING = -126, 120


def f32(value: float) -> float:
    """The float32 nearest to `value`. Sums, products and quotients of two float32 are rounded right through double."""
    return struct.unpack("f", struct.pack("f", value))[0]


def rounded(fixed: int, bits: int) -> int:
    return (fixed + bits + 32768) // 65536


def clamped(value: int, limit: int) -> int:
    return max(-limit, min(limit, value))


def accumulate_oracle(
    momentum: list[list[int]], exponents: list[int], grad: list[list[float]], decay: float, key: Key
) -> tuple[list[list[int]], list[int]]:
    """The rule on plain numbers, row by row."""
    bits = random_bits16(sum(map(len, momentum)), key).tolist()
    out, out_exponents = [], []
    for m_row, e, g_row in zip(momentum, exponents, grad, strict=True):
        coefficient = f32(2.0**e * f32(decay))
        values = [f32(f32(m * coefficient) + g) for m, g in zip(m_row, g_row, strict=True)]
        share = f32(max(map(abs, values)) / 127)
        exponent = math.frexp(share)[1] if share else FLOOR  # share = f * 2**exponent, 1/2 <= f < 1
        exponent = max(FLOOR, min(CEILING, exponent))
        row = []
        for value in values:
            fixed = round(f32(f32(value * 2.0**-exponent) * 65536))
            row.append(clamped(rounded(clamped(fixed, 127 * 65536), bits.pop(0)), 127))
        out.append(row)
        out_exponents.append(exponent)
    return out, out_exponents


def state(rows: int, columns: int, seed: int = 0, spread: int = 20) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    momentum = torch.randint(-127, 128, (rows, columns), dtype=torch.int8, generator=generator)
    exponent = torch.randint(-spread - 10, spread - 10, (rows, 1), dtype=torch.int8, generator=generator)
    return momentum, exponent


def fresh(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(rows, columns, dtype=torch.int8), torch.full((rows, 1), FLOOR, dtype=torch.int8)


def meaning(momentum: Tensor, exponent: Tensor) -> Tensor:
    return momentum.double() * torch.exp2(exponent.double())


def normal(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# Everything here is asked of every backend that this machine can run.
OPERATION = "update"
pytestmark = pytest.mark.usefixtures("each_backend")


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (13, 7), (3, 257)])
@pytest.mark.parametrize("decay", [0.95, 1.0, 0.0])
@pytest.mark.parametrize("size", [1.0, 1e-6, 1e4])
def test_momentum_is_the_oracle_bit_for_bit(shape, decay, size, poisoned):
    momentum, exponent = state(*shape)
    grad = normal(*shape) * size
    kept, key = grad.clone(), make_key(3, 5, 7)
    expected = accumulate_oracle(momentum.tolist(), exponent[:, 0].tolist(), grad.tolist(), decay, key)
    taken = ops.accumulate_momentum(momentum, exponent, grad, decay, key)
    assert taken.dtype == torch.bool and taken.shape == () and taken.item() is True
    assert (momentum.tolist(), exponent[:, 0].tolist()) == expected
    assert momentum.dtype == exponent.dtype == torch.int8 and torch.equal(grad, kept)


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(-127, 127),
            st.one_of(st.just(0.0), st.floats(-(2.0**100), 2.0**100, width=32), st.floats(-1, 1, width=32)),
        ),
        min_size=1,
        max_size=6,
    ),
    st.integers(FLOOR, CEILING),
    st.sampled_from([1.0, 0.95, 0.5]),
    st.integers(0, 9),
)
def test_any_row_is_the_oracle_bit_for_bit(row, e, decay, seed):
    momentum, exponent = torch.tensor([[m for m, _ in row]], dtype=torch.int8), torch.tensor([[e]], dtype=torch.int8)
    grad = torch.tensor([[g for _, g in row]])
    expected = accumulate_oracle(momentum.tolist(), [e], grad.tolist(), decay, make_key(seed))
    assert ops.accumulate_momentum(momentum, exponent, grad, decay, make_key(seed))
    assert (momentum.tolist(), exponent[:, 0].tolist()) == expected


def test_the_exponent_is_the_least_that_fits():
    for peak, expected in ((126.9, 0), (127.0, 1), (127.1, 1), (63.6, 0), (63.4, -1), (1.0, -6), (1e-3, -16), (254, 2)):
        momentum, exponent = fresh(2, 3)
        grad = torch.tensor([[peak, 0.0, peak / 2], [-peak, peak / 3, 0.0]])
        ops.accumulate_momentum(momentum, exponent, grad, 0.95, make_key(0))
        assert exponent.tolist() == [[expected]] * 2
        assert peak * 2.0**-expected < 127.01 and peak * 2.0 ** -(expected - 1) >= 127  # none lower fits
        assert momentum.abs().amax(dim=1).min().item() >= 63  # seven bits are in use


def test_each_row_has_its_own_exponent():
    momentum, exponent = fresh(5, 64)
    sizes = torch.tensor([[1e-20], [1e-6], [1.0], [1e6], [1e20]])
    grad = normal(5, 64) * sizes
    ops.accumulate_momentum(momentum, exponent, grad, 0.95, make_key(0))
    assert torch.unique(exponent).numel() == 5
    error = (meaning(momentum, exponent) - grad.double()).abs().amax(dim=1)
    assert (error <= torch.exp2(exponent[:, 0].double())).all()


def test_the_expected_momentum_is_exact():
    """Mean over keys within 5 sigma of decay * momentum + grad, for each element and for all together."""
    momentum, exponent = state(3, 5, spread=2)
    grad = normal(3, 5) * 10 * torch.exp2(exponent.float())
    exact = meaning(momentum, exponent) * f32(0.95) + grad.double()
    draws, total = 1500, torch.zeros(3, 5, dtype=torch.float64)
    for n in range(draws):
        m, e = momentum.clone(), exponent.clone()
        ops.accumulate_momentum(m, e, grad, 0.95, make_key(0, n))
        total += meaning(m, e)
    unit = torch.exp2(e.double())
    share = (exact / unit) % 1
    sigma = (share * (1 - share) / draws).sqrt()
    error = (total / draws - exact) / unit
    assert (error.abs() <= 5 * sigma + 2**-15).all()
    assert abs(error.sum().item()) <= 5 * sigma.square().sum().sqrt().item() + 15 * 2**-15


@pytest.mark.parametrize("count", [2, 8, 32])
def test_micro_batches_add_up(count):
    """With decay 1 the momentum is the sum of the gradients: each addition is off by less than one unit, unbiased."""
    rows, columns = 8, 200
    grads = [normal(rows, columns, seed=100 + n) + 0.3 for n in range(count)]
    momentum, exponent = fresh(rows, columns)
    largest = torch.full((rows, 1), -127.0, dtype=torch.float64)
    for n, grad in enumerate(grads):
        ops.accumulate_momentum(momentum, exponent, grad, 1.0, make_key(0, 0, 0, n))
        largest = torch.maximum(largest, exponent.double())
    exact = torch.stack(grads).double().sum(0)
    error = (meaning(momentum, exponent) - exact) / torch.exp2(largest)
    assert error.abs().max().item() < count
    spread = math.sqrt(count) / 2  # at most half a unit a draw
    assert error.square().mean().sqrt().item() < spread
    assert abs(error.mean().item()) < 5 * spread / math.sqrt(rows * columns)


def test_zero_gradients():
    momentum, exponent = fresh(3, 4)
    assert ops.accumulate_momentum(momentum, exponent, torch.zeros(3, 4), 0.95, make_key(0))
    assert momentum.count_nonzero() == 0 and (exponent == FLOOR).all()
    # What was there decays, in proportion and not by steps of a unit, until nothing is left.
    momentum, exponent = state(3, 4)
    momentum[:, 0] = 127
    before = meaning(momentum, exponent)
    for n in range(10):
        ops.accumulate_momentum(momentum, exponent, torch.zeros(3, 4), 0.5, make_key(0, n))
    assert torch.allclose(meaning(momentum, exponent)[:, 0], before[:, 0] * 2.0**-10, rtol=0.1)
    for n in range(10, 150):
        ops.accumulate_momentum(momentum, exponent, torch.zeros(3, 4), 0.5, make_key(0, n))
    assert momentum.count_nonzero() == 0 and (exponent == FLOOR).all()


def test_a_row_of_zeros_does_not_stand_above_tiny_rows():
    """Its exponent is the floor, or the direction of rows of 1e-25 would leave the range of float32."""
    momentum, exponent = fresh(3, 4)
    grad = torch.full((3, 4), 1e-25)
    grad[1] = 0
    ops.accumulate_momentum(momentum, exponent, grad, 0.95, make_key(0))
    assert exponent[1].item() == FLOOR < exponent[0].item()
    for method in ("newton_schulz", "row_column", "rms", "sign"):
        u = ops.direction(momentum, exponent, method)
        assert u[1].count_nonzero() == 0
        assert u.square().mean().sqrt().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("size", [1e30, 1e-35, 1e-38, 1.6e38])
def test_huge_and_tiny_gradients(size):
    momentum, exponent = fresh(4, 33)
    grad = normal(4, 33).clamp(-1, 1) * size
    for n in range(5):
        # 0.2 keeps the sum of the largest below the largest float.
        assert ops.accumulate_momentum(momentum, exponent, grad, 0.2, make_key(0, n))
    exact = grad.double() * sum(0.2**n for n in range(5))
    unit = torch.exp2(exponent.double())
    assert exponent.min().item() >= FLOOR and exponent.max().item() <= CEILING
    inside = exact.abs() < 126 * unit
    assert ((meaning(momentum, exponent) - exact).abs() < 2 * unit)[inside].all()
    assert (momentum.abs() >= 126)[~inside].all() and torch.equal(momentum.sign()[~inside], grad.sign()[~inside])


def test_gradients_below_the_range_do_not_vanish_in_the_mean():
    """2**-126 is one unit of the lowest exponent; a tenth of it is drawn one time in ten."""
    momentum, exponent = fresh(10, 1000)
    ops.accumulate_momentum(momentum, exponent, torch.full((10, 1000), 2.0**-126 * 0.125), 0.95, make_key(0))
    assert (exponent == FLOOR).all()
    assert abs(momentum.double().mean().item() - 0.125) < 5 * math.sqrt(0.11 / 10_000)
    # The smallest float of all: its share of 127 is no float any more.
    momentum, exponent = fresh(1, 2)
    assert ops.accumulate_momentum(momentum, exponent, torch.full((1, 2), 2.0**-149), 0.95, make_key(0))
    assert exponent.item() == FLOOR


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [(0, 0), (4, 36), (2, 16), (3, 5)])
def test_gradients_that_are_not_finite_are_refused(bad, place):
    momentum, exponent = state(5, 37)
    kept = momentum.clone(), exponent.clone()
    grad = normal(5, 37)
    grad[place] = bad
    taken = ops.accumulate_momentum(momentum, exponent, grad, 0.95, make_key(0))
    assert taken.dtype == torch.bool and taken.shape == () and taken.item() is False
    assert torch.equal(momentum, kept[0]) and torch.equal(exponent, kept[1])


def test_infinities_that_cancel_and_sums_that_overflow_are_refused():
    for values in ([[math.inf, -math.inf]], [[math.nan, math.inf]]):
        momentum, exponent = fresh(1, 2)
        assert not ops.accumulate_momentum(momentum, exponent, torch.tensor(values), 0.95, make_key(0))
        assert momentum.count_nonzero() == 0
    momentum, exponent = torch.full((1, 2), 127, dtype=torch.int8), torch.full((1, 1), CEILING, dtype=torch.int8)
    kept = momentum.clone()
    assert not ops.accumulate_momentum(momentum, exponent, torch.full((1, 2), 3e38), 1.0, make_key(0))
    assert torch.equal(momentum, kept) and exponent.item() == CEILING
    # Numbers that are finite one by one are taken, whatever they add up to.
    momentum, exponent = fresh(2, 1000)
    assert ops.accumulate_momentum(momentum, exponent, torch.full((2, 1000), 1e38), 0.95, make_key(0))
    assert meaning(momentum, exponent).sub(1e38).abs().max().item() < 2.0**CEILING


def test_other_keys_draw_other_bits():
    results = []
    for key in (make_key(0, 1), make_key(0, 2), make_key(0, 1)):
        momentum, exponent = state(20, 20)
        ops.accumulate_momentum(momentum, exponent, normal(20, 20), 0.95, key)
        results.append(momentum)
    assert torch.equal(results[0], results[2]) and not torch.equal(results[0], results[1])


# Moves of registers and scale exponents.


def move_oracle(register: list[int], direction: list[float], rate: float, limit: int, key: Key) -> list[int]:
    bits = random_bits16(len(register), key).tolist()
    out = []
    for r, d, b in zip(register, direction, bits, strict=True):
        fixed = clamped(round(f32(d * f32(-rate * 65536))), 254 * 65536)
        out.append(clamped(r + rounded(fixed, b), limit))
    return out


def lead(register: int) -> int:
    return (register > 40) - (register < -40)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(-121, 121), st.floats(-50, 50, width=32)), min_size=1, max_size=30),
    st.one_of(st.floats(0, 200), st.just(0.81)),
    st.sampled_from([121, 127]),
    st.integers(0, 9),
)
def test_moves_are_the_oracle_bit_for_bit(pairs, rate, limit, seed):
    before = [r for r, _ in pairs]
    register = torch.tensor(before, dtype=torch.int8)
    direction = torch.tensor([d for _, d in pairs], dtype=torch.float32)
    expected = move_oracle(before, direction.tolist(), rate, limit, make_key(seed))
    flips = ops.move_registers(register, direction, rate, make_key(seed), limit)
    assert register.tolist() == expected
    assert flips.dtype == torch.int64 and flips.shape == ()
    assert flips.item() == sum(lead(a) != lead(b) for a, b in zip(before, expected, strict=True))


@pytest.mark.parametrize("shape", [(1, 1), (1, 11), (13, 7), (2, 3, 5), (301,)])
def test_any_shape(shape, poisoned):
    generator = torch.Generator().manual_seed(0)
    register = torch.randint(-121, 122, shape, dtype=torch.int8, generator=generator)
    direction, before = normal(*shape), register.flatten().tolist()
    kept = direction.clone()
    ops.move_registers(register, direction, 20.0, make_key(1, 2))
    expected = move_oracle(before, direction.flatten().tolist(), 20.0, 121, make_key(1, 2))
    assert register.shape == shape and register.flatten().tolist() == expected
    assert torch.equal(direction, kept)


def test_strides_do_not_matter():
    """Random bits belong to an index, not to a place in memory."""
    register, direction = state(9, 14)[0].clamp(-121, 121), normal(14, 9).T
    whole, contiguous = register.clone(), direction.contiguous()
    ops.move_registers(register, direction, 5.0, make_key(1))
    ops.move_registers(whole, contiguous, 5.0, make_key(1))
    assert torch.equal(register, whole)


@pytest.mark.parametrize(("options", "limit"), [({}, 121), ({"limit": 127}, 127)])
def test_registers_stay_within_their_limit(options, limit):
    register = torch.arange(-121, 122, dtype=torch.int8)
    for sign in (1, -1):
        moved = register.clone()
        ops.move_registers(moved, torch.full((243,), -sign * 1e30), 1.0, make_key(0), **options)
        assert (moved == sign * limit).all()  # a step reaches from one end to the other
        flips = ops.move_registers(moved, torch.full((243,), -sign * 3.0), 1.0, make_key(0), **options)
        assert (moved == sign * limit).all() and flips.item() == 0


def test_a_step_goes_against_the_direction():
    register = torch.tensor([0, 0, 40, -40, 121], dtype=torch.int8)
    flips = ops.move_registers(register, torch.tensor([1.0, -1.0, -1.0, 1.0, 81.0]), 1.0, make_key(0))
    assert register.tolist() == [-1, 1, 41, -41, 40]
    assert flips.item() == 3


def test_rate_zero_moves_nothing():
    register = torch.arange(-121, 122, dtype=torch.int8)
    for n in range(20):
        assert ops.move_registers(register, normal(243), 0.0, make_key(n)).item() == 0
    assert register.tolist() == list(range(-121, 122))


@pytest.mark.parametrize("rate", [0.81, 0.01, 3.7])
def test_the_expected_move_is_exact(rate):
    direction = torch.linspace(-2, 2, 31)
    draws, total = 1500, torch.zeros(31, dtype=torch.float64)
    for n in range(draws):
        register = torch.zeros(31, dtype=torch.int8)
        ops.move_registers(register, direction, rate, make_key(0, n))
        total += register.double()
    exact = -rate * direction.double()
    share = exact % 1
    sigma = (share * (1 - share) / draws).sqrt()
    error = total / draws - exact
    assert (error.abs() <= 5 * sigma + 2**-15).all()
    assert abs(error.sum().item()) <= 5 * sigma.square().sum().sqrt().item() + 31 * 2**-15


def test_flips_are_counted_over_the_whole_matrix():
    register = state(300, 200)[0].clamp(-121, 121)
    before = leading_trit(register)
    flips = ops.move_registers(register, normal(300, 200), 30.0, make_key(0))
    assert flips.item() == (before != leading_trit(register)).sum().item() > 1000


def test_opcheck():
    momentum, exponent = state(5, 7)
    torch.library.opcheck(OPS.accumulate_momentum.default, (momentum, exponent, normal(5, 7), 0.95, 11, -12))
    torch.library.opcheck(OPS.accumulate_momentum.default, (momentum, exponent, normal(5, 7) / 0, 0.95, 11, -12))
    torch.library.opcheck(OPS.move_registers.default, (momentum, normal(5, 7), 3.0, 121, 11, -12))
    torch.library.opcheck(OPS.move_registers.default, (exponent, normal(5, 1), 3.0, 127, 11, -12))
