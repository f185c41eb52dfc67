"""Counter-based randomness: an independent implementation, golden words, and what a good hash must not show."""

import math
import random
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tritwise.registers import (
    Key,
    Place,
    keys_at,
    make_key,
    random_bits16,
    random_bits16_many,
    random_words,
    rows_of_places,
)
from tritwise.registers import random as random_module


def splitmix(state: int) -> int:
    """One output of splitmix64 for the given state, as published."""
    z = (state + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31


def key_of(*parts: int) -> tuple[int, int]:
    """(first, second) as unsigned numbers."""
    state = 0
    for part in parts:
        state = splitmix(state ^ part % 2**64)
    return state % 2**32, state // 2**32


def word(index: int, first: int, second: int) -> int:
    """The documented formula on unsigned Python ints."""
    x = (index * 0x9E3779B1 + first) % 2**32
    x ^= x >> 16
    x = x * 0x21F0AAAD % 2**32
    x ^= x >> 15
    x ^= second % 2**32
    x = x * 0xD35A2D97 % 2**32
    return x ^ x >> 15


def unsigned(words: torch.Tensor) -> list[int]:
    return [w % 2**32 for w in words.tolist()]


# Golden words: format and training runs depend on them, they must never change.
GOLDEN_KEYS = {
    (0, 0, 0, 0): (0xAAC80268, 0x2130748A),
    (1234, 0, 0, 0): (0x2572DE08, 0x4CB30A9C),
    (-1, 7, 3, 2): (0xC7D14A94, 0x32743622),
    (2**63, 2**40, 99, 1): (0x6F0E1F39, 0xD7E58371),
}
GOLDEN_WORDS = {
    (0, 0, 0, 0): [0xADF1D44F, 0xC230D604, 0x2A041BEE, 0x422E024C],
    (1234, 0, 0, 0): [0xD8580B0E, 0xEC409DB0, 0x82DC98E5, 0xAE5997C9],
    (-1, 7, 3, 2): [0xC448AADF, 0x1A971ED0, 0xE0025B7E, 0xD65A5DC8],
    (2**63, 2**40, 99, 1): [0x44AE1D47, 0xDEA37663, 0x505B071C, 0x59BE10D2],
}
GOLDEN_HALVES = [2830, -10152, -25168, -5056, -26395, -32036, -26679]  # key (1234, 0, 0, 0)

PARTS = st.tuples(*[st.one_of(st.integers(0, 9), st.integers(-(2**70), 2**70))] * 4)


def test_splitmix_of_this_file_gives_the_published_outputs():
    # The first three outputs of splitmix64 seeded with 1234567.
    states = [1234567 + k * 0x9E3779B97F4A7C15 for k in range(3)]
    assert [splitmix(s) for s in states] == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_golden_words():
    for parts, expected in GOLDEN_KEYS.items():
        key = make_key(*parts)
        assert (key.first % 2**32, key.second % 2**32) == expected == key_of(*parts)
        assert unsigned(random_words(4, key)) == GOLDEN_WORDS[parts]
        assert [word(i, *expected) for i in range(4)] == GOLDEN_WORDS[parts]
    assert random_bits16(7, make_key(1234)).tolist() == GOLDEN_HALVES


@given(PARTS)
def test_keys_are_two_signed_32_bit_numbers(parts):
    key = make_key(*parts)
    assert all(-(2**31) <= part < 2**31 for part in key)
    assert (key.first % 2**32, key.second % 2**32) == key_of(*parts)


@settings(deadline=None)
@given(PARTS, st.integers(0, 70))
def test_words_are_the_documented_hash(parts, count):
    words = random_words(count, make_key(*parts))
    assert words.dtype == torch.int32 and words.shape == (count,)
    assert unsigned(words) == [word(i, *key_of(*parts)) for i in range(count)]


@pytest.mark.parametrize("key", [Key(0, 0), Key(-1, -1), Key(2**31 - 1, -(2**31)), Key(-(2**31), 1)])
def test_words_of_extreme_keys(key):
    assert unsigned(random_words(50, key)) == [word(i, *key) for i in range(50)]


def test_words_far_out():
    words = random_words(300_001, make_key(9))
    for index in (65_535, 65_536, 131_071, 262_144, 299_999, 300_000):
        assert words[index].item() % 2**32 == word(index, *key_of(9, 0, 0, 0))


@settings(deadline=None)
@given(st.integers(1, 3000), st.integers(0, 3000))
def test_the_first_words_of_a_longer_draw_are_the_same(count, more):
    key = make_key(5)
    assert torch.equal(random_words(count + more, key)[:count], random_words(count, key))
    assert torch.equal(random_bits16(count + more, key)[:count], random_bits16(count, key))


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 8, 101])
def test_halves_low_first(count):
    key = make_key(-3, 1, 2)
    halves = random_bits16(count, key)
    assert halves.dtype == torch.int16 and halves.shape == (count,)
    words = [word(i // 2, *key_of(-3, 1, 2, 0)) for i in range(count)]
    assert [h % 2**16 for h in halves.tolist()] == [w >> 16 if i % 2 else w % 2**16 for i, w in enumerate(words)]


def test_negative_and_huge_seeds_count_modulo_64_bits():
    assert make_key(-1) == make_key(2**64 - 1) == make_key(2**100 - 1)
    distinct = [-(2**63), -(2**31), -2, -1, 0, 1, 2**31, 2**32, 2**32 + 1, 2**53, 2**63 - 1]
    assert len({make_key(seed) for seed in distinct}) == len(distinct)


def test_no_two_uses_share_a_key():
    keys = {make_key(*parts) for parts in product((0, 1, 2, -1), range(20), range(20), range(6))}
    assert len(keys) == 4 * 20 * 20 * 6
    # 32 bits of a key alone would collide by birthday; both halves must take part.
    assert len({k.first for k in keys}) > 9590 and len({k.second for k in keys}) > 9590


def test_draws_change_nothing_that_is_kept():
    key = make_key(4)
    first = random_words(100, key)
    kept = first.clone()
    first.zero_()
    random_bits16(100, key).zero_()
    assert torch.equal(random_words(100, key), kept)


def test_a_counter_made_in_inference_mode_serves_training():
    key = make_key(4)
    expected = random_words(50, key)
    random_module._counters.clear()
    with torch.inference_mode():
        random_words(50, key)
    again = random_words(50, key)
    assert torch.equal(again, expected) and not again.is_inference()


COUNT = 1 << 15
KEYS = [make_key(seed, step, tensor) for seed, step, tensor in ((0, 0, 0), (1, 0, 0), (0, 999, 3), (-5, 2**40, 17))]


def bits_of(words: torch.Tensor) -> torch.Tensor:
    """[n] int32 -> [n, 32] of 0 and 1."""
    return words.unsqueeze(1).bitwise_right_shift(torch.arange(32, dtype=torch.int32)).bitwise_and(1)


def assert_fair(ones: torch.Tensor, count: int) -> None:
    """Every entry of `ones` is the number of heads of `count` fair coins, within 5 sigma."""
    assert ones.double().sub(count / 2).abs().max().item() < 5 * math.sqrt(count) / 2


@pytest.mark.parametrize("key", KEYS)
def test_every_bit_is_fair_and_bits_are_pairwise_independent(key):
    bits = bits_of(random_words(COUNT, key)).double()
    assert_fair(bits.sum(0), COUNT)
    signs = bits * 2 - 1
    correlation = signs.T @ signs / math.sqrt(COUNT)
    assert (correlation - torch.diag(correlation.diag())).abs().max().item() < 5


@pytest.mark.parametrize("key", KEYS)
def test_bytes_and_halves_are_uniform(key):
    words = random_words(4 * COUNT, key)
    for shift in (0, 8, 16, 24):
        counts = torch.bincount(words.bitwise_right_shift(shift).bitwise_and(255), minlength=256)
        chi_square = float(((counts - 512) ** 2 / 512).sum())
        assert abs(chi_square - 255) < 5 * math.sqrt(2 * 255)
    halves = random_bits16(4 * COUNT, key).double()
    assert abs(halves.mean().item() + 0.5) < 5 * 65536 / math.sqrt(12 * 4 * COUNT)
    assert halves.min().item() < -32700 and halves.max().item() > 32700


@pytest.mark.parametrize("lag", [1, 2, 3, 64, 1024])
def test_neighbouring_indices_are_independent(lag):
    words = random_words(COUNT + lag, make_key(11))
    differing = bits_of(words[lag:] ^ words[:-lag])
    assert_fair(differing.sum(0), COUNT)
    values = words.double() / 2**31
    assert abs((values[lag:] * values[:-lag]).mean().item()) < 5 / 3 / math.sqrt(COUNT)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (make_key(0, 0), make_key(0, 1)),
        (make_key(0, 500), make_key(0, 501)),
        (make_key(0, 0, 0), make_key(0, 0, 1)),
        (make_key(0, 0, 0, 0), make_key(0, 0, 0, 1)),
        (make_key(0), make_key(1)),
        (make_key(0, 1, 0), make_key(0, 0, 1)),
        (make_key(0, 0, 1, 0), make_key(0, 0, 0, 1)),
        (make_key(0), make_key(-1)),
    ],
    ids=["step", "late step", "tensor", "stream", "seed", "step for tensor", "tensor for stream", "negative"],
)
@pytest.mark.parametrize("offset", [0, 1])
def test_neighbouring_keys_are_independent(one, other, offset):
    words = random_words(COUNT, one)[offset:] ^ random_words(COUNT, other)[: COUNT - offset]
    differing = bits_of(words)
    assert_fair(differing.sum(0), COUNT - offset)
    assert_fair(differing.sum().view(1), 32 * (COUNT - offset))


def test_one_flipped_bit_of_the_index_flips_half_the_word():
    """Avalanche, over random places: the mean over all pairs of bits within 5 sigma, every pair within a wide band."""
    count = 4096
    words = random_words(1 << 18, make_key(21))
    start = torch.tensor(random.Random(0).sample(range(1 << 18), count))
    for bit in range(18):
        ones = bits_of(words[start] ^ words[start ^ (1 << bit)]).sum(0)
        assert_fair(ones.sum().view(1), 32 * count)
        assert ones.double().div(count).sub(0.5).abs().max().item() < 0.1


def test_one_flipped_bit_of_the_seed_flips_half_the_key():
    flips = []
    for bit in range(64):
        for seed in range(50):
            one, other = make_key(seed), make_key(seed ^ (1 << bit))
            flips += [((a ^ b) % 2**32).bit_count() for a, b in zip(one, other, strict=True)]
    assert abs(sum(flips) / len(flips) - 16) < 5 * math.sqrt(8 / len(flips))


# --- many tensors at once, and a step that only the device knows


@given(
    st.integers(0, 2**63 - 1),
    st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**40), st.integers(-(2**31), 2**31)), min_size=1),
)
@settings(max_examples=50, deadline=None)
def test_keys_at_a_step_on_the_device_are_those_of_the_host(step, places):
    rows = torch.tensor(rows_of_places([Place(seed, -7, tensor, stream) for seed, tensor, stream in places]))
    found = keys_at(torch.tensor(step), rows)
    assert found.tolist() == [list(make_key(seed, step, tensor, stream)) for seed, tensor, stream in places]


@pytest.mark.parametrize("counts", [[1], [4, 1, 7], [2, 2], [3, 300, 5, 1]])
def test_bits_of_many_tensors_are_those_of_each(counts):
    keys = [make_key(3, 1, tensor) for tensor in range(len(counts))]
    expected = torch.cat([random_bits16(count, key) for count, key in zip(counts, keys, strict=True)])
    assert torch.equal(random_bits16_many(counts, keys, torch.device("cpu")), expected)
    table = torch.tensor([list(key) for key in keys])
    assert torch.equal(random_bits16_many(counts, table, torch.device("cpu")), expected)
