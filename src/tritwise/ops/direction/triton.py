"""Directions on a GPU: all matrices of one shape at once, Newton-Schulz in float16 on the matrix units.

Rows and columns are made equal by kernels that read int8 (`kernels.py`); Newton-Schulz is torch's batched products,
three a step. A step multiplies small singular values by up to 3.4, and with them the rounding of what it is given.
bfloat16 then is 1 to 7 % off the reference on matrices of low rank, which gradients resemble; float16 is three bits
finer and as fast, and good for two steps: before the last two x stays in float32, or is read from int8 again. Its
narrower range is no matter here: everything is a multiple of a matrix of known norm. Sums are in float32. Away from a
GPU everything is float32.
"""

import functools
import importlib
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from tritwise.ops import gpu
from tritwise.ops.direction.reference import TINY, A, B, C
from tritwise.ops.update.reference import power_of_two

STRIP = 16  # rows whose squares one program adds up for each column
SQUARES = 4096  # such sums that one program adds up at a time
STRETCH = 4096  # rows of which a program thinks at a time
ROUGH = 2  # steps of Newton-Schulz that may round x to float16
ROUNDS = 2  # how often rows and columns are divided by their RMS, as in the reference


@functools.cache
def _kernels() -> ModuleType:
    return importlib.import_module("tritwise.ops.direction.kernels")


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
    split = method in ("newton_schulz", "balanced")
    groups: dict[tuple[int, int], list[int]] = {}  # rows and columns of one matrix -> who consists of such
    for number, momentum in enumerate(momenta):
        rows, columns = momentum.shape
        groups.setdefault((rows // blocks[number] if split else rows, columns), []).append(number)
    out, levels = [torch.empty(m.shape, dtype=torch.float32, device=m.device) for m in momenta], list(row_levels)
    with gpu.Branches(momenta[0].device) as branches:
        for (rows, columns), members in groups.items():
            if rows * columns == 0:
                continue
            with branches.branch():
                counts = tuple(blocks[n] if split else 1 for n in members)
                momentum_MOI = torch.cat([momenta[n].reshape(-1, rows, columns) for n in members])
                turned_MOI = _turned(momentum_MOI, [row_exponents[n] for n in members], method, steps)
                level_MO = torch.cat([levels[n].reshape(-1, rows) for n in members]) if levels else None
                scale_MO, level_MO = _row_scales(turned_MOI, level_MO, memory, counts)
                if level_MO is not None:
                    for n, level in zip(members, level_MO.split(list(counts)), strict=True):
                        levels[n] = level
                _spread(turned_MOI, scale_MO, [out[n] for n in members], counts)
    return out, levels


def _turned(momentum_MOI: Tensor, exponents: Sequence[Tensor], method: str, steps: int) -> Tensor:
    """The directions before they are brought to unit RMS: float32, or float16 after Newton-Schulz on a GPU. exponents:
    of rows, in order, [rows, 1] each; most methods divide rows by their RMS anyway."""
    if method == "sign":
        return momentum_MOI.to(torch.float32).sign_()
    half = torch.float16 if momentum_MOI.is_cuda else torch.float32
    if method == "row_column":
        return _Balanced(momentum_MOI, 1.0).weighed(torch.float32)
    if method == "balanced":
        size = _size(momentum_MOI)
        equal = _Balanced(momentum_MOI, size)
        low = equal.weighed(half)
        if steps == 0:
            return low
        kept = half if steps - 1 <= ROUGH else torch.float32
        return _iterated(equal.weighed(kept, A, _product(*_factors(low, size))), steps - 1, size, half)
    relative_MO1 = torch.cat(list(exponents)).view(*momentum_MOI.shape[:2], 1).to(torch.int32)
    relative_MO1 = (relative_MO1 - relative_MO1.amax(dim=1, keepdim=True)).clamp_(min=-126)
    value_MOI = momentum_MOI * power_of_two(relative_MO1)
    return value_MOI if method == "rms" else newton_schulz(value_MOI, steps, half)


class _Balanced:
    """int8 [M, O, I] with rows and columns brought to equal RMS as the reference's row_column does it, then each matrix
    to the Frobenius norm `size`: the factors that do it. A matrix of zeros stays one."""

    def __init__(self, momentum_MOI: Tensor, size: float) -> None:
        matrices, rows, columns = momentum_MOI.shape
        device, strips = momentum_MOI.device, -(-rows // STRIP)
        self._momentum_MOI, self._shape = momentum_MOI, (rows, columns)
        self._row_MO = torch.empty(matrices, rows, dtype=torch.float32, device=device)
        self._column_MI = torch.empty(matrices, columns, dtype=torch.float32, device=device)
        square_MSI = torch.empty(matrices, strips, columns, dtype=torch.float32, device=device)
        across = min(gpu.power_of_two_above(columns), 256)
        down = max(1, 2048 // across)
        self._tile = {"BLOCK_R": down, "BLOCK_C": across}
        self._tiles = -(-rows // down), -(-columns // across)
        span = gpu.power_of_two_above(strips)
        parts = {"STRIPS": span, "BLOCK": max(1, min(across, SQUARES // span))}
        run, self._full_M = _kernels(), torch.zeros(matrices, dtype=torch.int32, device=device)
        for number in range(ROUNDS):
            given = (momentum_MOI, self._column_MI if number else None, self._row_MO, square_MSI, *self._shape)
            sums = {"SPAN": columns, "STRIP": STRIP, "BLOCK": across}
            gpu.launch(run.row_factors, matrices * strips, device, *given, **sums)
            given = (square_MSI, self._column_MI, self._full_M if number + 1 == ROUNDS else None, rows, columns, strips)
            gpu.launch(run.column_factors, matrices * -(-columns // parts["BLOCK"]), device, *given, **parts)
        self._size = size

    def weighed(self, dtype: torch.dtype, times: float = 1.0, plus: Tensor | None = None) -> Tensor:
        """The balanced matrices times a number, plus float32 [M, O, I] or nothing, rounded once to `dtype`."""
        momentum_MOI = self._momentum_MOI
        out_MOI = torch.empty(momentum_MOI.shape, dtype=dtype, device=momentum_MOI.device)
        gpu.launch(
            _kernels().weigh,
            len(momentum_MOI) * self._tiles[0] * self._tiles[1],
            momentum_MOI.device,
            *(momentum_MOI, self._row_MO, self._column_MI, self._full_M, self._size * times),
            *(plus, out_MOI, *self._shape),
            **self._tile,
        )
        return out_MOI


def _size(x: Tensor) -> int:
    """The norm at which matrices [M, O, I] are iterated: near the square root of the shorter side, singular values are
    near 1 and a Gram matrix has a diagonal near 1: where float16 is fine, and far below its largest number."""
    return 1 << min(min(x.shape[1:]).bit_length() // 2, 6)


def newton_schulz(x: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """The reference's iteration on float32 x [matrices, rows, columns], times a power of two, as `dtype`."""
    size = _size(x)
    norm_M = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
    return _iterated(x / ((norm_M + TINY) / size), steps, size, dtype)


def _iterated(x: Tensor, steps: int, size: int, dtype: torch.dtype) -> Tensor:
    """`steps` of x <- A x + B (x x^T) x + C (x x^T)^2 x on [M, O, I] of norm `size`, which stands for 1; `dtype` out.

    Products are of matrices in `dtype`. The Gram matrix is that of the shorter side: no matrix is transposed.
    """
    for left in range(steps, 0, -1):
        low = x.to(dtype)
        x = torch.bmm(*_factors(low, size, A)) if left <= ROUGH else _product(*_factors(low, size)).add_(x, alpha=A)
    return x.to(dtype)


def _factors(x: Tensor, size: int, plus: float = 0.0) -> tuple[Tensor, Tensor]:
    """Two matrices whose product is what a step adds to A x, and `plus` times x: on the diagonal of the small one it
    costs no pass over x."""
    tall = x.shape[1] > x.shape[2]
    gram = torch.bmm(x.mT, x) if tall else torch.bmm(x, x.mT)
    factor = torch.baddbmm(gram, gram, gram, beta=B / size**2, alpha=C / size**4)
    if plus:
        factor.diagonal(dim1=1, dim2=2).add_(plus)
    return (x, factor) if tall else (factor, x)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b as float32: on a GPU the sums are float32 anyway, and not rounding them costs no time."""
    if a.is_cuda and a.dtype is not torch.float32:
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a, b).float()


def _row_scales(
    x: Tensor, level_MO: Tensor | None, memory: float, counts: tuple[int, ...]
) -> tuple[Tensor, Tensor | None]:
    """What the rows of x [M, O, I] are multiplied by, float32 [M, O], so that counts[0] matrices have unit RMS
    together, then the next counts[1], …; with levels, int16, rows are steadied first, and what comes after these is
    given too."""
    rows, columns = x.shape[1:]
    norm_MO = torch.linalg.vector_norm(x, dim=2, dtype=torch.float32)
    scale_MO, after_MO = torch.empty_like(norm_MO), None if level_MO is None else torch.empty_like(level_MO)
    table = gpu.upload([(sum(counts[:n]), count) for n, count in enumerate(counts)], x.device)
    span = gpu.power_of_two_above(max(counts) * rows)
    given = norm_MO, level_MO, after_MO, scale_MO, table, memory, rows, columns
    gpu.launch(_kernels().row_scales, len(counts), x.device, *given, SPAN=span, BLOCK=min(span, STRETCH))
    return scale_MO, after_MO


def _spread(x: Tensor, scale_MO: Tensor, out: Sequence[Tensor], counts: Sequence[int]) -> None:
    """x [M, O, I] with its rows scaled into float32 tensors, of which the first takes counts[0] matrices, and so on. An
    operation's results must not share memory, so each has its own; one launch fills them all."""
    size = x.shape[1] * x.shape[2]
    addresses = [[o.data_ptr() + 4 * size * n for o, count in zip(out, counts, strict=True) for n in range(count)]]
    table_M = gpu.upload(addresses, x.device)[0]
    programs = len(addresses[0]) * -(-size // gpu.ELEMENTS)
    given = x, scale_MO, table_M, size, x.shape[2]
    gpu.launch(_kernels().spread, programs, x.device, *given, BLOCK=gpu.ELEMENTS)
