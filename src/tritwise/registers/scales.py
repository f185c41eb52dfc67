"""Scale exponents: one int8 E stands for the scale 2**(E/8), rounded to bfloat16.

Because the value is bf16-exact, trit * scale is exact in bf16, fp16 (within its range) and fp32: what is trained is
what ships, in any of those types. Eight steps an octave are steps of 9 %. E covers 2**-16 … 2**15.875.
"""

import functools
import math

import torch
from torch import Tensor

EXPONENTS_PER_OCTAVE = 8
EXPONENT_LIMIT = 127


@torch.compiler.assume_constant_result  # a compiler takes the table as it is, and does not see how it was made
def scale_table(device: torch.device | str = "cpu") -> Tensor:
    """All 256 scales as float32 [256]; entry E + 128 is bf16(2**(E/8)). Kept per device; do not change it."""
    return _table(device)


@functools.cache
def _table(device: torch.device | str) -> Tensor:
    # 2.0 ** (E / 8) is computed by Python in double precision: no device's own exp2 takes part.
    values = [2.0 ** (e / EXPONENTS_PER_OCTAVE) for e in range(-128, 128)]
    with torch.inference_mode(False):  # kept for whoever comes next, who may want it in autograd
        return torch.tensor(values, dtype=torch.float64).to(torch.bfloat16).to(torch.float32).to(device)


def scale_values(exponent: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The scales that int8 exponents stand for: same shape, `dtype` (exact in float32 and bfloat16)."""
    return scale_table(exponent.device)[exponent.to(torch.int64) + 128].to(dtype)


def exponent_for(scale: float) -> int:
    """The exponent E whose 2**(E/8) is nearest to `scale` in ratio, clamped to +-127. ValueError if scale <= 0."""
    if not scale > 0 or math.isinf(scale):
        raise ValueError(f"a scale must be positive and finite, not {scale}; give the absolute size you want")
    exponent = round(EXPONENTS_PER_OCTAVE * math.log2(scale))
    return max(-EXPONENT_LIMIT, min(EXPONENT_LIMIT, exponent))


EVIDENCE_PER_EXPONENT = 256


def move_exponents(
    exponent: Tensor, evidence: Tensor, direction: Tensor, octaves: float | Tensor, bits: Tensor
) -> tuple[Tensor, Tensor]:
    """The exponents and their evidence after a step of `octaves` * direction; new int8 tensors of shape [N].

    exponent, evidence: int8 [N], together the number exponent + evidence / 256, in 1/8 octaves; direction: float32 [N].
    octaves: a number, or a float64 0-d tensor. Rounded stochastically to 1/256 of a step of E, with `bits`, int16
    [N] of `random_bits16`. A step of E is 9 %: rounded to whole ones, slow learning would be lost in the noise
    of the rounding. Clamped to +-127 exponents.
    """
    most = 2 * EXPONENT_LIMIT * EVIDENCE_PER_EXPONENT
    moved = direction.double().mul_(octaves * EXPONENTS_PER_OCTAVE * EVIDENCE_PER_EXPONENT).clamp_(-most, most)
    steps = (moved.mul_(1 << 16).round_().to(torch.int64) + bits + (1 << 15)) >> 16
    limit = EXPONENT_LIMIT * EVIDENCE_PER_EXPONENT
    total = (exponent.to(torch.int64) * EVIDENCE_PER_EXPONENT + evidence + steps).clamp_(-limit, limit)
    whole = (total + EVIDENCE_PER_EXPONENT // 2) >> 8
    return whole.to(torch.int8), (total - whole * EVIDENCE_PER_EXPONENT).to(torch.int8)
