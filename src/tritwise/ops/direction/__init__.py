"""Directions: what momentum becomes before it moves registers, always scaled to unit RMS.

newton_schulz   the nearest orthogonal matrix, by three steps of the quintic iteration (Muon, Jordan et al. 2024);
                three beat five for ternary weights by 0.03 bpb
row_column      rows, then columns, divided by their RMS (twice): cheap, and keeps rare rows alive
rms             the momentum itself over its RMS: for vectors and scales
sign            the sign of the momentum
"""

import torch
from torch import Tensor

from tritwise.ops.backends import choose, implement
from tritwise.ops.direction import reference
from tritwise.ops.library import define

METHODS = ("newton_schulz", "row_column", "rms", "sign")

implement("direction", "reference", reference)


def _direction(momentum: Tensor, row_exponent: Tensor, method: str, steps: int, blocks: int) -> Tensor:
    return choose("direction", momentum.device).direction(momentum, row_exponent, method, steps, blocks)


_direction_op = define(
    "direction(Tensor momentum, Tensor row_exponent, str method, int steps, int blocks) -> Tensor",
    _direction,
    lambda momentum, row_exponent, method, steps, blocks: torch.empty_like(momentum, dtype=torch.float32),
)


def direction(
    momentum: Tensor, row_exponent: Tensor, method: str = "newton_schulz", steps: int = 3, blocks: int = 1
) -> Tensor:
    """momentum int8 [O, I] and row_exponent int8 [O, 1] -> the direction, float32 [O, I], unit RMS (zero stays zero).

    steps: Newton-Schulz iterations. blocks: the rows are this many matrices one above the other (query, key, value),
    each given its own direction. ValueError for an unknown method.
    """
    if method not in METHODS:
        raise ValueError(f"there is no direction {method!r}; choose one of {', '.join(METHODS)}")
    return _direction_op(momentum, row_exponent, method, steps, blocks)
