"""Directions: what momentum becomes before it moves registers, always scaled to unit RMS.

newton_schulz   the nearest orthogonal matrix, by three steps of the quintic iteration (Muon, Jordan et al. 2024);
                three beat five for ternary weights by 0.03 bpb
balanced        row_column, then newton_schulz: one loud row or column cannot outvote the rest of its matrix
row_column      rows, then columns, divided by their RMS (twice): cheap, and keeps rare rows alive
rms             the momentum itself over its RMS: for vectors and scales
sign            the sign of the momentum
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tritwise.ops import gpu
from tritwise.ops.backends import choose, implement
from tritwise.ops.direction import reference, triton
from tritwise.ops.library import define

METHODS = ("newton_schulz", "balanced", "row_column", "rms", "sign")

implement("direction", "reference", reference)
implement("direction", "triton", triton, priority=20, devices=("cuda",), refuses=gpu.refuses)


def _direction(momentum: Tensor, row_exponent: Tensor, method: str, steps: int, blocks: int) -> Tensor:
    return choose("direction", momentum.device).direction(momentum, row_exponent, method, steps, blocks)


def _direction_many(
    momenta: list[Tensor], row_exponents: list[Tensor], method: str, steps: int, blocks: list[int]
) -> list[Tensor]:
    module = choose("direction", momenta[0].device)
    if hasattr(module, "direction_many"):
        return module.direction_many(momenta, row_exponents, method, steps, blocks)
    parts = zip(momenta, row_exponents, blocks, strict=True)
    return [module.direction(m, e, method, steps, count) for m, e, count in parts]


_direction_op = define(
    "direction(Tensor momentum, Tensor row_exponent, str method, int steps, int blocks) -> Tensor",
    _direction,
    lambda momentum, row_exponent, method, steps, blocks: torch.empty_like(momentum, dtype=torch.float32),
)
_direction_many_op = define(
    "direction_many(Tensor[] momenta, Tensor[] row_exponents, str method, int steps, int[] blocks) -> Tensor[]",
    _direction_many,
    lambda momenta, row_exponents, method, steps, blocks: [
        torch.empty_like(m, dtype=torch.float32, memory_format=torch.contiguous_format) for m in momenta
    ],
)


def direction(
    momentum: Tensor, row_exponent: Tensor, method: str = "newton_schulz", steps: int = 3, blocks: int = 1
) -> Tensor:
    """momentum int8 [O, I] and row_exponent int8 [O, 1] -> the direction, float32 [O, I], unit RMS (zero stays zero).

    steps: Newton-Schulz iterations. blocks: the rows are this many matrices one above the other (query, key, value),
    each given its own direction. ValueError for an unknown method.
    """
    _check(method)
    return _direction_op(momentum, row_exponent, method, steps, blocks)


def direction_many(
    momenta: Sequence[Tensor],
    row_exponents: Sequence[Tensor],
    method: str = "newton_schulz",
    steps: int = 3,
    blocks: Sequence[int] | int = 1,
) -> list[Tensor]:
    """`direction` of each of several matrices on one device (at least one), in the same order.

    blocks: one number for each, or one for all. On a GPU matrices of one shape are turned together, Newton-Schulz
    in float16; while that lasts it takes about 10 bytes for each weight, the result's 4 included: give a large
    model in parts. ValueError for an unknown method.
    """
    _check(method)
    counts = [blocks] * len(momenta) if isinstance(blocks, int) else list(blocks)
    return _direction_many_op(list(momenta), list(row_exponents), method, steps, counts)


def _check(method: str) -> None:
    if method not in METHODS:
        raise ValueError(f"there is no direction {method!r}; choose one of {', '.join(METHODS)}")
