"""How numbers are rounded to float8 (e4m3) for fast matrix units: row by row, or by one factor for rows of unit RMS."""

import functools
import math

import torch
from torch import Tensor

FLOAT8 = torch.float8_e4m3fn
LONG = 1 << 18  # numbers of a vector that is `filled` once
LARGEST = 448.0  # of e4m3


def rounded(x_NI: Tensor) -> tuple[Tensor, Tensor]:
    """x as float8 [N, I] and the float32 scales [N, 1] that give x back to within 1/16 of each number's size."""
    scale_N1 = x_NI.abs().amax(dim=-1, keepdim=True).float().clamp(min=1e-12) / LARGEST
    return (x_NI.float() / scale_N1).to(FLOAT8), scale_N1


@functools.cache
def filled(device: torch.device, value: float) -> Tensor:
    """float32 [LONG] of one number, made once: of it are the scales of rows and columns that all have the same one. A
    product wants them as a vector, and a kernel for each product would fill it anew."""
    return torch.full((LONG,), value, dtype=torch.float32, device=device)


def unit_factor(columns: int) -> float:
    """What rows of about unit RMS are multiplied by before they are rounded, a power of two: the largest number that
    such a row can hold, sqrt(columns), stays in the range of e4m3."""
    return 2.0 ** math.floor(math.log2(LARGEST / math.sqrt(columns)))


def times_as_float8(x: Tensor, factor: float) -> Tensor:
    """x * factor as float8, of the same shape; numbers beyond its range end at its largest."""
    return (x * factor).clamp(-LARGEST, LARGEST).to(FLOAT8)
