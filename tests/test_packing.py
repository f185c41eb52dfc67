"""Packing trits into bytes: golden bytes, round trips of any shape, and refusal of what is no packed stream."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tritwise.registers import (
    PACKINGS,
    init_registers,
    leading_trit,
    make_key,
    pack_base3,
    pack_twobit,
    packed_bytes,
    unpack_base3,
    unpack_twobit,
)

NAMES = sorted(PACKINGS)
SIZES = {"base3": 5, "twobit": 4}
TRIT = st.integers(-1, 1)


def trits(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int8)


def hexed(packed: torch.Tensor) -> str:
    return bytes(packed.tolist()).hex()


# Files depend on these bytes; they must never change.
GOLDEN = [
    ([], "", ""),
    ([0], "79", "55"),
    ([1], "7a", "56"),
    ([-1], "78", "54"),
    ([0, 0, 0, 0, 1], "ca", "5556"),
    ([-1, -1, -1, -1, -1], "00", "0054"),
    ([1, 1, 1, 1, 1], "f2", "aa56"),
    ([1, 0, -1, 0, 1], "c2", "4656"),
    ([-1, 0, 1, 1, 0, -1, -1, 0, 1, 1, 0, -1, 1], "9ce17f", "a4411a56"),
]


@pytest.mark.parametrize(("values", "base3", "twobit"), GOLDEN)
def test_golden_bytes(values, base3, twobit):
    assert hexed(pack_base3(trits(values))) == base3
    assert hexed(pack_twobit(trits(values))) == twobit
    assert unpack_base3(torch.tensor(list(bytes.fromhex(base3)), dtype=torch.uint8), len(values)).tolist() == values
    assert unpack_twobit(torch.tensor(list(bytes.fromhex(twobit)), dtype=torch.uint8), len(values)).tolist() == values


@settings(deadline=None)
@given(st.lists(TRIT, max_size=60))
def test_bytes_follow_the_formula(values):
    for name, place in (("base3", 3), ("twobit", 4)):
        size = SIZES[name]
        padded = values + [0] * (-len(values) % size)
        groups = [padded[n : n + size] for n in range(0, len(padded), size)]
        packed = PACKINGS[name].pack(trits(values))
        assert packed.dtype == torch.uint8
        assert packed.tolist() == [sum((t + 1) * place**k for k, t in enumerate(group)) for group in groups]


@settings(deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=4), st.integers(0, 2**32), st.sampled_from(NAMES))
def test_round_trip_of_any_shape(shape, seed, name):
    original = leading_trit(init_registers(tuple(shape), make_key(seed)))
    packed = PACKINGS[name].pack(original)
    assert packed.shape == (packed_bytes(original.numel(), name),)
    back = PACKINGS[name].unpack(packed, original.numel())
    assert back.dtype == torch.int8
    assert torch.equal(back.view(shape), original)


@pytest.mark.parametrize("name", NAMES)
def test_every_byte_there_is(name):
    """All codes of a full group, there and back; all other bytes are refused."""
    pack, unpack = PACKINGS[name].pack, PACKINGS[name].unpack
    codes = set()
    for code in range(256):
        byte = torch.tensor([code], dtype=torch.uint8)
        try:
            values = unpack(byte, SIZES[name])
        except ValueError:
            continue
        assert torch.equal(pack(values), byte)
        codes.add(tuple(values.tolist()))
    assert len(codes) == 3 ** SIZES[name]


@pytest.mark.parametrize("name", NAMES)
def test_a_short_last_group_is_padded_with_zero_trits(name):
    pack = PACKINGS[name].pack
    for length in range(12):
        values = [1, -1, 0, 1, 1, -1, -1, 0, 0, 1, -1, 1][:length]
        full = values + [0] * (-length % SIZES[name])
        assert torch.equal(pack(trits(values)), pack(trits(full)))


@pytest.mark.parametrize("name", NAMES)
def test_order_is_row_major_whatever_the_strides(name):
    grid = leading_trit(init_registers((6, 7), make_key(1)))
    assert torch.equal(PACKINGS[name].pack(grid.T), PACKINGS[name].pack(grid.T.contiguous()))
    assert torch.equal(PACKINGS[name].pack(grid[:, ::2]), PACKINGS[name].pack(grid[:, ::2].contiguous()))


@pytest.mark.parametrize("name", NAMES)
def test_packing_changes_nothing_and_shares_nothing(name):
    """The table of base3 is kept between calls; what was unpacked may be written to."""
    values = leading_trit(init_registers((100,), make_key(2)))
    kept = values.clone()
    packed = PACKINGS[name].pack(values)
    assert torch.equal(values, kept)
    PACKINGS[name].unpack(packed, 100).fill_(7)
    assert torch.equal(PACKINGS[name].unpack(packed, 100), kept)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("wrong", [[0, 2], [-2], [121, 0, 0], [-128], [127], [0] * 9 + [-41]])
def test_other_numbers_are_not_packed(name, wrong):
    with pytest.raises(ValueError, match="leading trits"):
        PACKINGS[name].pack(trits(wrong))


@pytest.mark.parametrize("code", [243, 250, 255])
def test_base3_refuses_bytes_that_are_no_code(code):
    packed = torch.tensor([0, 242, code, 121], dtype=torch.uint8)
    with pytest.raises(ValueError, match="242"):
        unpack_base3(packed, 20)


@pytest.mark.parametrize("code", [0b00000011, 0b00001100, 0b00110000, 0b11000000, 0xFF])
def test_twobit_refuses_the_code_three(code):
    packed = torch.tensor([0b10101010, 0, code], dtype=torch.uint8)
    with pytest.raises(ValueError, match="code 3"):
        unpack_twobit(packed, 12)


@pytest.mark.parametrize("name", NAMES)
def test_a_stream_of_the_wrong_length_is_refused(name):
    packed = PACKINGS[name].pack(trits([1] * 20))
    unpack, size = PACKINGS[name].unpack, SIZES[name]
    for count in (0, 20 - size, 21, 1000):
        with pytest.raises(ValueError, match="cut off"):
            unpack(packed, count)
    with pytest.raises(ValueError, match="cut off"):
        unpack(packed[:-1], 20)
    assert unpack(packed, 20 - size + 1).tolist() == [1] * (20 - size + 1)
    assert unpack(packed[:0], 0).shape == (0,)


def test_bits_a_trit():
    assert packed_bytes(1_000_000) * 8 / 1_000_000 == 1.6
    assert packed_bytes(1_000_000, "twobit") * 8 / 1_000_000 == 2.0
    assert {name: PACKINGS[name].trits_per_byte for name in PACKINGS} == SIZES
    assert [packed_bytes(n) for n in (0, 1, 5, 6)] == [0, 1, 1, 2]
    assert [packed_bytes(n, "twobit") for n in (0, 1, 4, 5)] == [0, 1, 1, 2]
