"""Directions on a GPU: all matrices of one shape at once, Newton-Schulz in float16 on the matrix units.

Newton-Schulz multiplies small singular values by up to 41, and with them the rounding of its first products. bfloat16
then is 1 to 7 % off the reference on matrices of low rank, which gradients resemble; float16 is three bits finer and as
fast. Its narrower range is no matter here: everything is a multiple of a matrix of known norm. Sums are in float32.
Away from a GPU everything is float32. There is no kernel of our own: torch's batched products do
the work.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from tritwise.ops.direction.reference import TINY, A, B, C, row_column
from tritwise.ops.update.reference import power_of_two


def direction(momentum: Tensor, row_exponent: Tensor, method: str, steps: int, blocks: int) -> Tensor:
    """See `tritwise.ops.direction.direction`."""
    return direction_many([momentum], [row_exponent], method, steps, [blocks])[0]


def direction_many(
    momenta: Sequence[Tensor], row_exponents: Sequence[Tensor], method: str, steps: int, blocks: Sequence[int]
) -> list[Tensor]:
    """See `tritwise.ops.direction.direction_many`."""
    split = method in ("newton_schulz", "balanced")
    groups: dict[tuple[int, int], list[int]] = {}  # rows and columns of one matrix -> who consists of such
    for number, momentum in enumerate(momenta):
        rows, columns = momentum.shape
        groups.setdefault((rows // blocks[number] if split else rows, columns), []).append(number)
    out = [torch.empty(m.shape, dtype=torch.float32, device=m.device) for m in momenta]
    for (rows, columns), members in groups.items():
        counts = tuple(blocks[n] if split else 1 for n in members)
        momentum_MOI = torch.cat([momenta[n].reshape(-1, rows, columns) for n in members])
        exponent_MO1 = torch.cat([row_exponents[n].reshape(-1, rows, 1) for n in members])
        turned_MOI = _unit_rms(_turned(momentum_MOI, exponent_MO1, method, steps), counts)
        # An operation's results must not share memory, so they are copied out; one launch does all.
        parts = [p.view(out[n].shape) for n, p in zip(members, turned_MOI.split(counts), strict=True)]
        torch._foreach_copy_([out[n] for n in members], parts)  # pyright: ignore[reportPrivateImportUsage]
    return out


def _turned(momentum_MOI: Tensor, exponent_MO1: Tensor, method: str, steps: int) -> Tensor:
    """The directions before they are brought to unit RMS."""
    if method == "sign":
        return momentum_MOI.to(torch.float32).sign_()
    half = torch.float16 if momentum_MOI.is_cuda else torch.float32
    if method in ("row_column", "balanced"):
        equal_MOI = row_column(momentum_MOI.to(torch.float32))
        return newton_schulz(equal_MOI, steps, half) if method == "balanced" else equal_MOI
    relative_MO1 = exponent_MO1.to(torch.int32)
    relative_MO1 = (relative_MO1 - relative_MO1.amax(dim=1, keepdim=True)).clamp_(min=-126)
    value_MOI = momentum_MOI * power_of_two(relative_MO1)
    if method == "rms":
        return value_MOI
    return newton_schulz(value_MOI, steps, half)


def newton_schulz(x: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """The reference's iteration on float32 x [matrices, rows, columns], times a power of two. Changes x.

    Products are of matrices in `dtype`; x itself stays in float32. The term A x, which carries the small singular
    values, is then never rounded: that alone brings the error from 1 % to a fifth of it or less. The Gram matrix is
    that of the shorter side, so that no matrix is transposed.
    """
    tall = x.shape[1] > x.shape[2]
    # With norm `size` near the square root of the shorter side, singular values are near 1 and a Gram matrix has a
    # diagonal near 1: where float16 is fine, and far below its largest number.
    size = 1 << min(min(x.shape[1:]).bit_length() // 2, 6)
    x = x.div_((torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True) + TINY) / size)
    for _ in range(steps):
        low = x.to(dtype)
        factor = _quintic(_gram(low, tall), size)
        more = _product(low, factor) if tall else _product(factor, low)
        x.mul_(A).add_(more)  # only now: in float32 `low` is x
    return x


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b as float32: on a GPU the sums are float32 anyway, and not rounding them costs no time."""
    if a.is_cuda and a.dtype is not torch.float32:
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a, b).float()


def _gram(x: Tensor, tall: bool) -> Tensor:
    return torch.bmm(x.mT, x) if tall else torch.bmm(x, x.mT)


def _quintic(gram: Tensor, size: int) -> Tensor:
    """B g + C g^2, what a step adds to A, where `gram` is size^2 g."""
    return torch.baddbmm(gram, gram, gram, beta=B / size**2, alpha=C / size**4)


def _unit_rms(x: Tensor, counts: tuple[int, ...]) -> Tensor:
    """x [matrices, O, I] as float32, over the RMS that counts[0] matrices have together, then the next counts[1], …"""
    square_M = torch.linalg.vector_norm(x, dim=(1, 2), dtype=torch.float32).square()
    if max(counts) > 1:
        square_M = (_together(counts, x.device) * square_M).sum(dim=1)
    size_M = (square_M / (x.shape[1] * x.shape[2])).sqrt() + TINY
    return x / size_M[:, None, None]


@functools.lru_cache(maxsize=64)
def _together(counts: tuple[int, ...], device: torch.device) -> Tensor:
    """[matrices, matrices]: 1/n between the n matrices that belong together, else 0."""
    return torch.block_diag(*(torch.full((n, n), 1.0 / n) for n in counts)).to(device)
