"""Nibble registers: one signed byte b = 16*r + m that holds a coarse register and the momentum of the same weight.

r in [-7, 7] is the register: the weight is 0 for |r| <= 2 and the sign of r beyond, so five units of r are worth one
leading trit. m in [-7, 7] is the momentum: MOMENTUM_LEVELS[|m|] with the sign of m, in units kept elsewhere. Because
16*2 + 7 <= 40 < 16*3 - 7, the rule of five-trit registers (b > 40 is +1, b < -40 is -1) reads the very same trit from b
whatever m is: decoding, packing and audits need not know which kind of register they look at.
"""

import torch
from torch import Tensor

NIBBLE_LEAD = 5  # what one unit of the leading trit is worth in units of r
NIBBLE_LIMIT = 7  # of r and of m

MOMENTUM_LEVELS = (0.0, 0.5, 1.125, 1.875, 2.75, 3.75, 5.125, 7.0)
"""What |m| stands for: near the levels of least squared error for 32 values of a Laplace or t5 distribution over their
largest (Lloyd's method). All of them, the middles between them and their distances are exact in float32."""


def split_nibbles(register: Tensor) -> tuple[Tensor, Tensor]:
    """b -> (r, m): r = floor((b + 8) / 16), m = b - 16*r. int8 in, two int8 tensors of the same shape out."""
    # b + 8 could leave int8; the fourth bit of b says the same.
    coarse = (register >> 4) + ((register >> 3) & 1)
    return coarse, register - (coarse << 4)


def join_nibbles(coarse: Tensor, momentum: Tensor) -> Tensor:
    """(r, m) -> b = 16*r + m, the inverse of `split_nibbles`; any integer tensors of one shape in, int8 out."""
    return coarse.mul(16).add_(momentum).to(torch.int8)


def level_values(momentum: Tensor) -> Tensor:
    """m -> what it stands for, float32 of the same shape: exact."""
    levels = torch.tensor(MOMENTUM_LEVELS, device=momentum.device)
    return levels[momentum.abs().int()] * momentum.sign()


def nearest_level(value: Tensor) -> Tensor:
    """The m whose level lies nearest to each value, the one nearer to 0 where two do; int8."""
    levels = torch.tensor(MOMENTUM_LEVELS, device=value.device)
    size = torch.bucketize(value.abs(), (levels[1:] + levels[:-1]) / 2)
    return (size * value.sign()).to(torch.int8)


def random_level(value: Tensor, bits: Tensor) -> Tensor:
    """The m of one of the two levels next to each value, of |value| <= 7, so that their mean is the value; int8.

    bits: int16, as many, evenly spread.
    """
    levels = torch.tensor(MOMENTUM_LEVELS, device=value.device)
    size = value.abs()
    low = torch.bucketize(size, levels[1:-1], right=True)
    gaps = levels[1:] - levels[:-1]
    above = (size - levels[low]) * 65536.0 > (bits.view(value.shape).int() & 0xFFFF) * gaps[low]
    return ((low + above) * value.sign()).to(torch.int8)


def to_nibbles(register: Tensor) -> Tensor:
    """Five-trit registers -> nibble registers with the same leading trits and no momentum; int8, same shape."""
    size = register.to(torch.int16).abs_().add_(7).bitwise_right_shift_(4).clamp_(max=NIBBLE_LIMIT)
    return (register.sign() * size * 16).to(torch.int8)
