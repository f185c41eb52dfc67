"""Directions: what momentum becomes before it moves registers, always scaled to unit RMS.

newton_schulz   the nearest orthogonal matrix, by three steps of the quintic iteration (Muon, Jordan et al. 2024);
                three beat five for ternary weights by 0.03 bpb
balanced        row_column, then newton_schulz: one loud row or column cannot outvote the rest of its matrix
row_column      rows, then columns, divided by their RMS (twice): cheap, and keeps rare rows alive
rms             the momentum itself over its RMS: for vectors and scales
sign            the sign of the momentum

Rows may be steadied: each is divided by the root of a running mean of its squares, as NorMuon does (Li et al. 2025), so
that a row which is loud for a while does not learn more than the others. What is remembered is an int16 a row, its
level: the logarithm of that mean in steps of 1/1024 octave, LEVEL_FLOOR while there is none.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tritwise.ops import gpu
from tritwise.ops.backends import choose, implement
from tritwise.ops.direction import reference, triton
from tritwise.ops.direction.reference import LEVEL_FLOOR
from tritwise.ops.library import define

__all__ = ["LEVEL_FLOOR", "METHODS", "direction", "direction_many"]

METHODS = ("newton_schulz", "balanced", "row_column", "rms", "sign")

implement("direction", "reference", reference)
implement("direction", "triton", triton, priority=20, devices=("cuda",), refuses=gpu.refuses)


def _direction_many(
    momenta: list[Tensor],
    row_exponents: list[Tensor],
    method: str,
    steps: int,
    blocks: list[int],
    row_levels: list[Tensor],
    memory: float,
) -> tuple[list[Tensor], Tensor]:
    run = choose("direction", momenta[0].device).direction_many
    directions, levels = run(momenta, row_exponents, method, steps, blocks, row_levels, memory)
    flat = [level.reshape(-1) for level in levels] or [momenta[0].new_empty(0, dtype=torch.int16)]
    return directions, torch.cat(flat)


_direction_many_op = define(
    "direction_many(Tensor[] momenta, Tensor[] row_exponents, str method, int steps, int[] blocks, "
    "Tensor[] row_levels, float memory) -> (Tensor[], Tensor)",
    _direction_many,
    lambda momenta, row_exponents, method, steps, blocks, row_levels, memory: (
        [torch.empty_like(m, dtype=torch.float32, memory_format=torch.contiguous_format) for m in momenta],
        momenta[0].new_empty(sum(level.numel() for level in row_levels), dtype=torch.int16),
    ),
)


def direction(
    momentum: Tensor,
    row_exponent: Tensor,
    method: str = "newton_schulz",
    steps: int = 3,
    blocks: int = 1,
    row_level: Tensor | None = None,
    memory: float = 0.95,
) -> Tensor:
    """momentum int8 [O, I] and row_exponent int8 [O, 1] -> the direction, float32 [O, I], unit RMS (zero stays zero).

    steps: Newton-Schulz iterations. blocks: the rows are this many matrices one above the other (query, key, value),
    each given its own direction. row_level: int16 [O, 1], rows are steadied and it changes in place; memory: the decay
    of its mean. ValueError for an unknown method.
    """
    levels = None if row_level is None else [row_level]
    return direction_many([momentum], [row_exponent], method, steps, blocks, levels, memory)[0]


def direction_many(
    momenta: Sequence[Tensor],
    row_exponents: Sequence[Tensor],
    method: str = "newton_schulz",
    steps: int = 3,
    blocks: Sequence[int] | int = 1,
    row_levels: Sequence[Tensor] | None = None,
    memory: float = 0.95,
    go: Tensor | None = None,
) -> list[Tensor]:
    """`direction` of each of several matrices on one device (at least one), in the same order.

    blocks: one number for each, or one for all. go: a bool 0-d tensor on the device, or None; where it is False no
    level changes. On a GPU matrices of one shape are turned together, Newton-Schulz in float16; while that lasts it
    takes about 10 bytes for each weight, the result's 4 included: give a large model in parts.
    ValueError for an unknown method.
    """
    _check(method)
    counts = [blocks] * len(momenta) if isinstance(blocks, int) else list(blocks)
    levels = list(row_levels or [])
    directions, after_N = _direction_many_op(list(momenta), list(row_exponents), method, steps, counts, levels, memory)
    if levels:
        if go is not None:
            after_N = torch.where(go, after_N, torch.cat([level.view(-1) for level in levels]))
        parts = after_N.split([level.numel() for level in levels])
        views = [part.view(level.shape) for part, level in zip(parts, levels, strict=True)]
        torch._foreach_copy_(levels, views)  # pyright: ignore[reportPrivateImportUsage]
    return directions


def _check(method: str) -> None:
    if method not in METHODS:
        raise ValueError(f"there is no direction {method!r}; choose one of {', '.join(METHODS)}")
