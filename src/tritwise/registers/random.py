"""Counter-based randomness: 32 random bits for (seed, step, tensor, stream, index), the same on every device.

There is no generator state. A draw is a hash of where and when it is used, so a resumed run equals an uninterrupted
one bit for bit and every rank of a distributed run draws the same bits without talking. All arithmetic is modulo
2**32, which int32 does on every backend.

Sources: the key is mixed with splitmix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014);
the word hash is the two-multiply xorshift finaliser with the constants 0x21f0aaad and 0xd35a2d97, published by the
hash-prospector project as having the least known bias of its shape.
"""

from typing import NamedTuple

import torch
from torch import Tensor

_MASK64 = (1 << 64) - 1


class Key(NamedTuple):
    """Two signed 32-bit numbers that stand for (seed, step, tensor, stream). Plain ints, so kernels take them as is."""

    first: int
    second: int


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
    x = _counter(count, torch.device(device)) * _signed32(0x9E3779B1)
    x.add_(key.first)
    shifted = torch.empty_like(x)
    for shift, mask, secret, factor in (
        (16, 0xFFFF, 0, 0x21F0AAAD),
        (15, 0x1FFFF, key.second, _signed32(0xD35A2D97)),
    ):
        torch.bitwise_right_shift(x, shift, out=shifted)  # arithmetic shift; the mask makes it logical
        shifted.bitwise_and_(mask)
        x.bitwise_xor_(shifted)
        if secret:
            x.bitwise_xor_(secret)
        x.mul_(factor)
    torch.bitwise_right_shift(x, 15, out=shifted)
    return x.bitwise_xor_(shifted.bitwise_and_(0x1FFFF))


def random_bits16(count: int, key: Key, device: torch.device | str = "cpu") -> Tensor:
    """`count` draws of 16 random bits as int16 [count], each uniform over -32768 … 32767.

    Element i is half i % 2 (low half first) of word i // 2: one hash serves two elements.
    """
    return random_words((count + 1) // 2, key, device).view(torch.int16)[:count]


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
