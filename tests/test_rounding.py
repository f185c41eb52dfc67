"""Stochastic rounding in fixed point: bit for bit against plain Python, always a neighbour, exactly unbiased."""

import math
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tritwise.registers import FRACTION_BITS, make_key, random_bits16, round_stochastic, to_fixed_point

BITS16 = st.integers(-(2**15), 2**15 - 1)
ALL_BITS16 = torch.arange(-(2**15), 2**15, dtype=torch.int16)


def f32(value: float) -> float:
    """The float32 nearest to `value`."""
    return struct.unpack("f", struct.pack("f", value))[0]


def fixed_oracle(x: float, scale: float, limit: int) -> int:
    # The product of two float32 numbers is exact in double, so f32 rounds it once, as the machine does.
    product = f32(x * f32(scale * 65536))
    return max(-limit * 65536, min(limit * 65536, round(product)))  # Python's round is half to even, as rint


def fixed(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def test_sixteen_fraction_bits():
    assert FRACTION_BITS == 16
    x = torch.tensor([1.0, -1.0, 2**-16, -(2**-16), 2**-17, 3 * 2**-17, 0.25, 100.5])
    grid = to_fixed_point(x)
    assert grid.dtype == torch.int32
    assert grid.tolist() == [65536, -65536, 1, -1, 0, 2, 16384, 6586368]  # halves go to the even neighbour
    assert to_fixed_point(torch.tensor([0.49999 * 2**-16])).item() == 0


FLOATS = st.one_of(
    st.floats(-300, 300, width=32),
    st.floats(-(2.0**100), 2.0**100, width=32),
    st.integers(-(2**24), 2**24).map(lambda n: n / 2**17),  # ties
)


@settings(deadline=None)
@given(
    st.lists(FLOATS, max_size=20),
    st.one_of(st.just(1.0), st.floats(-100, 100), st.floats(-1e-3, 1e-3)),
    st.integers(1, 255),
)
def test_fixed_point_is_the_oracle_bit_for_bit(values, scale, limit):
    x = torch.tensor(values, dtype=torch.float32)
    kept = x.clone()
    assert to_fixed_point(x, scale, limit).tolist() == [fixed_oracle(v, scale, limit) for v in values]
    assert torch.equal(x, kept)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(-255 * 65536, 255 * 65536), BITS16), max_size=20))
def test_rounding_is_the_oracle_bit_for_bit(pairs):
    values = [v for v, _ in pairs]
    rounded = round_stochastic(fixed(values), torch.tensor([b for _, b in pairs], dtype=torch.int16))
    assert rounded.dtype == torch.int32
    assert rounded.tolist() == [(v + b + 32768) // 65536 for v, b in pairs]
    for value, result in zip(values, rounded.tolist(), strict=True):
        assert result in (value // 65536, -(-value // 65536))  # one of its two neighbours, itself if it is whole


def test_shape_is_the_shape_of_the_numbers():
    numbers = to_fixed_point(torch.linspace(-3, 3, 12).view(3, 4))
    expected = [(v + b + 32768) // 65536 for v, b in zip(numbers.flatten().tolist(), range(12), strict=True)]
    rounded = round_stochastic(numbers, torch.arange(12, dtype=torch.int16))
    assert rounded.shape == (3, 4) and rounded.flatten().tolist() == expected
    assert rounded.data_ptr() == numbers.data_ptr()  # no second buffer


@pytest.mark.parametrize("limit", [1, 127, 254, 255])
def test_integers_are_exact_whatever_is_drawn(limit):
    whole = torch.arange(-limit, limit + 1)
    for draw in (-(2**15), -1, 0, 1, 2**15 - 1):
        bits = torch.full((len(whole),), draw, dtype=torch.int16)
        assert torch.equal(round_stochastic(to_fixed_point(whole.float(), limit=limit), bits), whole.int())


def test_limits():
    x = torch.tensor([math.inf, -math.inf, 1e30, -3.4e38, 127.5, -200.0])
    assert to_fixed_point(x).tolist() == [s * 127 * 65536 for s in (1, -1, 1, -1, 1, -1)]
    assert to_fixed_point(x, 1.0, 255).tolist()[:2] == [255 * 65536, -255 * 65536]
    assert to_fixed_point(x, -1.0, 3).tolist() == [-s * 3 * 65536 for s in (1, -1, 1, -1, 1, -1)]
    # Rounding cannot leave the limit: the largest number is whole.
    for draw in (-(2**15), 2**15 - 1):
        bits = torch.full((6,), draw, dtype=torch.int16)
        assert round_stochastic(to_fixed_point(x), bits).abs().max().item() == 127
    for limit in (0, 256, -1):
        with pytest.raises(AssertionError):
            to_fixed_point(x, limit=limit)


@pytest.mark.parametrize("value", [0, 1, -1, 32767, 32768, -32768, 65535, 65536, 40000, -12345, 254 * 65536 + 77])
def test_the_expected_value_over_all_draws_is_exact(value):
    rounded = round_stochastic(fixed([value] * 65536), ALL_BITS16)
    assert rounded.sum(dtype=torch.int64).item() == value
    assert set(rounded.tolist()) == {value // 65536, -(-value // 65536)}


def test_unbiased_over_keys():
    """The mean over many steps and tensors is the number itself, within 5 sigma of the coins, for each and for all."""
    numbers = torch.linspace(-2.5, 2.5, 41)
    grid = to_fixed_point(numbers)
    draws = 3000
    total = torch.zeros(41, dtype=torch.int64)
    for n in range(draws):
        total += round_stochastic(grid.clone(), random_bits16(41, make_key(1, step=n % 300, tensor=n // 300)))
    share = (grid % 65536).double() / 65536
    sigma = (share * (1 - share) / draws).sqrt()
    error = total.double() / draws - grid.double() / 65536
    assert (error.abs() <= 5 * sigma).all()
    assert abs(error.sum().item()) < 5 * math.sqrt(sigma.square().sum().item())


def test_small_numbers_are_not_lost():
    """A step of 1/1000 of a unit, 65536 times: with eight bits it would drift or vanish."""
    count = 1 << 16
    for size in (1e-3, -1e-3, 0.999):
        steps = round_stochastic(to_fixed_point(torch.full((count,), size)), random_bits16(count, make_key(6)))
        p = abs(size)
        assert abs(steps.double().mean().item() - size) < 5 * math.sqrt(p * (1 - p) / count) + 2**-17
