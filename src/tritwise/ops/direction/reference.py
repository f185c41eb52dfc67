"""The oracle of the directions, in float32 torch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tritwise.ops.update.reference import power_of_two

# Muon's quintic: it trades exact convergence for slope, so three steps already lift small singular values a lot.
A, B, C = 3.4445, -4.7750, 2.0315
TINY = 1e-30  # keeps a zero momentum at zero
LEVELS = 1024  # steps of a row's level in an octave
LEVEL_FLOOR = -32768  # the level of a row of which nothing is remembered: 2**-32, as good as zero


def newton_schulz(x: Tensor, steps: int, *, through_gram: bool = True) -> Tensor:
    """`steps` of x <- A x + B (x x^T) x + C (x x^T)^2 x on [..., rows, columns], after dividing by the Frobenius norm.

    Wide enough matrices are iterated through their Gram matrix g = x x^T (all polynomials in g commute, so the
    iterates share its eigenvectors) and x is multiplied once at the end: 4 m^2 n + 22 m^3 operations, not 36 m^2 n.
    In bfloat16 that swamps small singular values after the third step: through_gram=False iterates x itself.
    """
    transposed = x.shape[-2] > x.shape[-1]
    if transposed:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + TINY)
    gram = x @ x.mT
    if x.shape[-1] < 2 * x.shape[-2] or not through_gram:
        for step in range(steps):
            gram = x @ x.mT if step else gram
            x = torch.add(A * x, (B * gram + C * (gram @ gram)) @ x)
    else:
        product = None
        for step in range(steps):
            factor = B * gram + C * (gram @ gram)
            factor.diagonal(dim1=-2, dim2=-1).add_(A)
            product = factor if product is None else factor @ product
            if step + 1 < steps:
                gram = factor @ (factor @ gram)
        x = product @ x if product is not None else x
    return x.mT if transposed else x


def unit_rms(x: Tensor) -> Tensor:
    """x divided by the root mean square of all its elements."""
    return x / (x.square().mean().sqrt() + TINY)


def row_column(x: Tensor) -> Tensor:
    """Rows and columns divided by their RMS in turn, twice: close to equal RMS in every row and column."""
    for _ in range(2):
        x = x / (x.square().mean(dim=-1, keepdim=True).sqrt() + TINY)
        x = x / (x.square().mean(dim=-2, keepdim=True).sqrt() + TINY)
    return x


def remembered(level: Tensor, square: Tensor, memory: float) -> tuple[Tensor, Tensor]:
    """The running mean square of rows after one more, float32 and at least 2**-32, and its level, int16, for the level
    from before and the squares, of one shape."""
    mean = torch.exp2(level.float() / LEVELS) * memory + square * (1.0 - memory)
    after = (torch.log2(mean) * LEVELS).round_().clamp_(LEVEL_FLOOR, -LEVEL_FLOOR - 1)
    return mean, after.to(torch.int16)


def direction_many(
    momenta: Sequence[Tensor],
    row_exponents: Sequence[Tensor],
    method: str,
    steps: int,
    blocks: Sequence[int],
    row_levels: Sequence[Tensor],
    memory: float,
) -> tuple[list[Tensor], list[Tensor]]:
    """See `tritwise.ops.direction.direction_many`; the levels that come after these as well."""
    parts = zip(momenta, row_exponents, blocks, strict=True)
    directions, levels = [_turned(m, e, method, steps, count) for m, e, count in parts], []
    for number, level_O1 in enumerate(row_levels):
        turned_OI = directions[number]
        mean_O1, after_O1 = remembered(level_O1, turned_OI.square().mean(dim=1, keepdim=True), memory)
        directions[number] = unit_rms(turned_OI / mean_O1.sqrt())
        levels.append(after_O1)
    return directions, levels


def _turned(momentum: Tensor, row_exponent: Tensor, method: str, steps: int, blocks: int) -> Tensor:
    value_OI = momentum.to(torch.float32)
    if method == "sign":
        return unit_rms(value_OI.sign_())
    rows, columns = value_OI.shape
    if method == "balanced":
        turned_OI = newton_schulz(row_column(value_OI.view(blocks, rows // blocks, columns)), steps)
        return unit_rms(turned_OI.reshape(rows, columns)).contiguous()
    if method == "row_column":  # each row is divided by its own RMS: its exponent would cancel
        return unit_rms(row_column(value_OI))
    # Relative to the largest row exponent of a matrix nothing overflows; rows 2**126 below it are as good as zero.
    matrices = blocks if method == "newton_schulz" else 1
    exponent_MR = row_exponent.to(torch.int32).view(matrices, rows // matrices)
    relative_MR = (exponent_MR - exponent_MR.amax(dim=1, keepdim=True)).clamp_(min=-126)
    value_OI = value_OI.mul_(power_of_two(relative_MR).view(rows, 1))
    if method == "rms":
        return unit_rms(value_OI)
    turned_OI = newton_schulz(value_OI.view(blocks, rows // blocks, columns), steps).reshape(rows, columns)
    return unit_rms(turned_OI).contiguous()  # a tall matrix comes back as a transposed view
