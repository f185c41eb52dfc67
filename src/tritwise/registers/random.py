"""Counter-based randomness: 32 random bits for (seed, step, tensor, stream, index), the same on every device.

There is no generator state. A draw is a hash of where and when it is used, so a resumed run equals an uninterrupted
one bit for bit and every rank of a distributed run draws the same bits without talking. All arithmetic is modulo
2**32, which int32 does on every backend.

Sources: the key is mixed with splitmix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014);
the word hash is the two-multiply xorshift finaliser with the constants 0x21f0aaad and 0xd35a2d97, published by the
hash-prospector project as having the least known bias of its shape.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_MASK64 = (1 << 64) - 1


class Key(NamedTuple):
    """Two signed 32-bit numbers that stand for (seed, step, tensor, stream). Plain ints, so kernels take them as is;
    or 0-d int64 tensors out of `keys_at`, where a device knows the step and the host does not."""

    first: int | Tensor
    second: int | Tensor


class Place(NamedTuple):
    """What a key is made of: see `make_key`."""

    seed: int
    step: int
    tensor: int
    stream: int


def _splitmix64(state: int) -> int:
    state = (state + 0x9E3779B97F4A7C15) & _MASK64
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK64
    return state ^ (state >> 31)


def _signed32(value: int) -> int:
    return value - (1 << 32) if value & (1 << 31) else value


def make_key(seed: int, step: int = 0, tensor: int = 0, stream: int = 0) -> Key:
    """The key of one tensor at one step. `stream` separates uses of the same tensor (initial values, momentum, …)."""
    state = 0
    for part in (seed, step, tensor, stream):
        state = _splitmix64(state ^ (part & _MASK64))
    return Key(_signed32(state & 0xFFFFFFFF), _signed32(state >> 32))


def rows_of_places(places: Sequence[Place]) -> list[tuple[int, int, int]]:
    """What `keys_at` needs of places besides the step: rows of signed 64-bit numbers."""
    return [(_signed64(_splitmix64(place.seed & _MASK64)), place.tensor, place.stream) for place in places]


def keys_at(step: Tensor, rows_N3: Tensor) -> Tensor:
    """The keys of N places at a step that only the device knows: int64 [N, 2], each as `make_key` has it.

    step: int64 0-d; rows_N3: int64, from `rows_of_places`; all on one device.
    """
    state_N, tensor_N, stream_N = rows_N3.unbind(1)
    for part in (step, tensor_N, stream_N):
        state_N = _splitmix64_each(state_N ^ part)
    return torch.stack(((state_N << 32) >> 32, state_N >> 32), dim=1)


def _splitmix64_each(state_N: Tensor) -> Tensor:
    state_N = state_N + _signed64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        state_N = (state_N ^ _shifted(state_N, shift)) * _signed64(factor)
    return state_N ^ _shifted(state_N, 31)


def _shifted(x_N: Tensor, count: int) -> Tensor:
    """x >> count without its sign: torch's shift of int64 keeps it."""
    return (x_N >> count) & ((1 << (64 - count)) - 1)


def _signed64(value: int) -> int:
    return value - (1 << 64) if value & (1 << 63) else value


_counters: dict[tuple[torch.device, int], Tensor] = {}


def _counter(count: int, device: torch.device) -> Tensor:
    """0, 1, … count-1 as int32. The longest one asked for is kept per device: it is the same at every step."""
    size = 1 << max(count - 1, 1).bit_length()
    kept = _counters.get((device, size))
    if kept is None:
        kept = _counters[(device, size)] = torch.arange(size, dtype=torch.int32, device=device)
    return kept[:count]


def random_words(count: int, key: Key, device: torch.device | str = "cpu") -> Tensor:
    """`count` words of 32 random bits for indices 0 … count-1, as int32 [count] on `device`.

    word(i) = mix(i * 0x9E3779B1 + key.first) where
    mix(x): x ^= x >>> 16; x *= 0x21f0aaad; x ^= x >>> 15; x ^= key.second; x *= 0xd35a2d97; x ^= x >>> 15.
    Shifts are logical; products are modulo 2**32.
    """
    return _mixed(_counter(count, torch.device(device)) * _signed32(0x9E3779B1), key.first, key.second)


def _mixed(x: Tensor, first: int | Tensor, second: int | Tensor) -> Tensor:
    """The hash of int32 x, in place: see `random_words`. Keys may be int32 tensors of its shape."""
    x.add_(first)
    shifted = torch.empty_like(x)
    for shift, mask, secret, factor in (
        (16, 0xFFFF, 0, 0x21F0AAAD),
        (15, 0x1FFFF, second, _signed32(0xD35A2D97)),
    ):
        torch.bitwise_right_shift(x, shift, out=shifted)  # arithmetic shift; the mask makes it logical
        shifted.bitwise_and_(mask)
        x.bitwise_xor_(shifted)
        if isinstance(secret, Tensor) or secret:
            x.bitwise_xor_(secret)
        x.mul_(factor)
    torch.bitwise_right_shift(x, 15, out=shifted)
    return x.bitwise_xor_(shifted.bitwise_and_(0x1FFFF))


def words_at(index: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """32 random bits for each index, int32 of any shape, under a key of two int32 0-d tensors; int32 of that shape.

    The mix of `random_words` of index ^ first. Nothing is written in place and nothing kept, so it may stand in a
    function that is compiled or recorded; a compiler that knows the indices cannot draw a product of them out of range.
    """
    x = index ^ first
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x21F0AAAD
    x = (x ^ ((x >> 15) & 0x1FFFF) ^ second) * _signed32(0xD35A2D97)
    return x ^ ((x >> 15) & 0x1FFFF)


def random_bits16(count: int, key: Key, device: torch.device | str = "cpu") -> Tensor:
    """`count` draws of 16 random bits as int16 [count], each uniform over -32768 … 32767.

    Element i is half i % 2 (low half first) of word i // 2: one hash serves two elements.
    """
    return random_words((count + 1) // 2, key, device).view(torch.int16)[:count]


@functools.lru_cache(maxsize=256)
def _layout(counts: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Of words for tensors of `counts` elements, one after the other: whose each is and which of its owner's, both
    [words]; and where each element's 16 bits lie among the halves of all words, [elements]."""
    words = [(count + 1) // 2 for count in counts]
    owner_W = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(words))
    number_W = torch.cat([torch.arange(many, dtype=torch.int32) for many in words])
    firsts = [2 * sum(words[:tensor]) for tensor in range(len(counts))]
    half_N = torch.cat([torch.arange(count) + first for count, first in zip(counts, firsts, strict=True)])
    return owner_W.to(device), number_W.to(device), half_N.to(device)


def random_bits16_many(counts: Sequence[int], keys: Sequence[Key] | Tensor, device: torch.device) -> Tensor:
    """`random_bits16` of several tensors, of counts[i] elements under keys[i] each, one after the other: int16 [sum].

    keys: or int64 [tensors, 2] on the device. A dozen calls however many tensors there are.
    """
    owner_W, number_W, half_N = _layout(tuple(counts), device)
    keys_T2 = keys if isinstance(keys, Tensor) else torch.tensor([list(key) for key in keys], device=device)
    first_W, second_W = keys_T2.to(torch.int32)[owner_W].unbind(1)
    words_W = _mixed(number_W * _signed32(0x9E3779B1), first_W, second_W)
    return words_W.view(torch.int16)[half_N]


# Odd, so that 2**16 steps visit every number once. Of the numbers whose share of 2**16 has no quotient above 3 in its
# continued fraction this is the nearest to the golden ratio's, 40503.5. 40503 has an 18 there, so that it all but comes
# back after 233 steps: the sums of 1000 roundings of 0.075 have a standard deviation of 1.9 with it and 0.8 with this.
WEYL_STEP = 40521


def weyl_turn(phase: int) -> int:
    """How far the Weyl sequence has gone at step `phase`: phase * WEYL_STEP modulo 2**16, in 0 … 65535."""
    return phase * WEYL_STEP & 0xFFFF


def weyl_bits16(count: int, key: Key, phase: int, device: torch.device | str = "cpu") -> Tensor:
    """`count` draws of 16 bits as int16 [count] that are spread evenly over the steps, not only over the elements.

    key: the same at every step, so made without one; phase: how many draws were made with it before, any int.
    Element i is (random_bits16(i) + phase * WEYL_STEP) modulo 2**16: across elements it is as random as its base, and
    over the phases it is a Weyl sequence, which visits every value once in 2**16 steps and leaves no large gap in
    between. So the roundings of a number that changes slowly add up to the truth within about one unit (standard
    deviation 0.8 after 1000 steps), where those of independent draws walk away like the square root of the steps.
    Source: H. Weyl, "Über die Gleichverteilung von Zahlen mod. Eins", Mathematische Annalen 77, 1916.
    """
    turn = weyl_turn(phase)
    return random_bits16(count, key, device).add_(turn - 0x10000 if turn & 0x8000 else turn)
