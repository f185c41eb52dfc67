"""The ternary linear on a GPU: a kernel decodes the weight in one pass, and torch's matrix library multiplies."""

import functools
import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tritwise.ops import gpu
from tritwise.ops.float8 import FLOAT8
from tritwise.ops.linear import reference
from tritwise.ops.linear.operands import Operand, operand
from tritwise.registers import LEAD, scale_table

TILE = 64  # rows and columns that one program turns, or decodes of many matrices
STRIP = 128  # rows that one program sums up for the gradients of columns
COLUMNS = 128  # whose strips one program adds up


@functools.cache
def _kernels() -> ModuleType:
    return importlib.import_module("tritwise.ops.linear.kernels")


@functools.cache
def _operand_kernels() -> ModuleType:
    return importlib.import_module("tritwise.ops.linear.operand_kernels")


def decode(register: Tensor, exponent: Tensor, group: int, dtype: torch.dtype, lead: int = LEAD) -> Tensor:
    """The weight W = round(R / lead) * scale as `dtype` [O, I], with the reference's bits."""
    if dtype not in gpu.FLOATS or not gpu.is_served(register, exponent, group):
        return reference.decode(register, exponent, group, dtype, lead)
    return gpu.decode(register, exponent, group, dtype, lead=lead)


def forward(x: Tensor, register: Tensor, exponent: Tensor, group: int, lead: int = LEAD) -> Tensor:
    """y [..., O] = x [..., I] W^T."""
    return torch.nn.functional.linear(x, decode(register, exponent, group, x.dtype, lead))


def input_grad(grad: Tensor, register: Tensor, exponent: Tensor, group: int, lead: int = LEAD) -> Tensor:
    """dL/dx [..., I] = dL/dy [..., O] W."""
    return grad @ decode(register, exponent, group, grad.dtype, lead)


def weight_grad(grad: Tensor, x: Tensor) -> Tensor:
    """dL/dW [O, I] float32 = sum over rows of dL/dy^T x, kept in the float32 that the matrix units sum in."""
    if grad.is_cuda and grad.dtype in (torch.bfloat16, torch.float16):  # pragma: no cover - on a GPU only
        grad_NO, x_NI = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        return torch.mm(grad_NO.T, x_NI, out_dtype=torch.float32)
    return reference.weight_grad(grad, x)


def scale_grad(weight_grad: Tensor, register: Tensor, exponent: Tensor, group: int, lead: int = LEAD) -> Tensor:
    """Sum of dL/dW * W over each group, float32 [O, G]."""
    return scale_grads([weight_grad], [register], [exponent], [group], [lead])[0]


def column_grad(weight_grad: Tensor, register: Tensor, exponent: Tensor, group: int, lead: int = LEAD) -> Tensor:
    """Sum of dL/dW * W over each column, float32 [I]."""
    return column_grads([weight_grad], [register], [exponent], [group], [lead])[0]


def scale_grads(
    weight_grads: Sequence[Tensor],
    registers: Sequence[Tensor],
    exponents: Sequence[Tensor],
    groups: Sequence[int],
    leads: Sequence[int],
) -> list[Tensor]:
    """`scale_grad` of each of several matrices: one launch for all whose groups are of one width and lead."""
    out: list[Tensor] = []
    lots: dict[tuple[int, int, int], list[_Matrix]] = {}
    for g, r, e, group, lead in zip(weight_grads, registers, exponents, groups, leads, strict=True):
        if not _sums(g, r, e, group):
            out.append(reference.scale_grad(g, r, e, group, lead))
            continue
        out.append(torch.empty(e.shape, dtype=torch.float32, device=r.device))
        span = min(group, r.shape[1])
        block = min(gpu.power_of_two_above(span), 1024)
        down = max(1, 2048 // block)
        matrix = _Matrix(
            g.contiguous(), r.contiguous(), e.contiguous(), out[-1], group, -(-len(r) // down) * e.shape[1]
        )
        lots.setdefault((span, block, lead), []).append(matrix)
    for (span, block, lead), lot in lots.items():
        constants = {"LEAD": lead, "SPAN": span, "BLOCK_R": max(1, 2048 // block), "BLOCK_C": block}
        _launch(_kernels().scale_grad, _kernels().scale_grads, lot, constants)
    return out


def column_grads(
    weight_grads: Sequence[Tensor],
    registers: Sequence[Tensor],
    exponents: Sequence[Tensor],
    groups: Sequence[int],
    leads: Sequence[int],
) -> list[Tensor]:
    """`column_grad` of each of several matrices: one launch for the strips of all of one lead that are wide enough."""
    out: list[Tensor] = []
    lots: dict[tuple[int, int], list[_Matrix]] = {}
    sums: list[tuple[Tensor, Tensor]] = []  # of strips, and where their sum goes
    for g, r, e, group, lead in zip(weight_grads, registers, exponents, groups, leads, strict=True):
        if not _sums(g, r, e, group):
            out.append(reference.column_grad(g, r, e, group, lead))
            continue
        rows, columns = r.shape
        strips, block = -(-rows // STRIP), min(gpu.power_of_two_above(columns), 128)
        part_SI = torch.empty(strips, columns, dtype=torch.float32, device=r.device)
        out.append(torch.empty(columns, dtype=torch.float32, device=r.device))
        sums.append((part_SI, out[-1]))
        programs = -(-columns // block) * strips
        matrix = _Matrix(g.contiguous(), r.contiguous(), e.contiguous(), part_SI, group, programs)
        lots.setdefault((block, lead), []).append(matrix)
    for (block, lead), lot in lots.items():
        constants = {"LEAD": lead, "STRIP": STRIP, "BLOCK_R": 16, "BLOCK_C": block}
        _launch(_kernels().column_grad, _kernels().column_grads, lot, constants)
    if sums:
        _add_up(sums)
    return out


def _add_up(sums: Sequence[tuple[Tensor, Tensor]]) -> None:
    """The sum of each [strips, columns] over its strips into [columns]: one launch."""
    lines, programs, device = [], 0, sums[0][1].device
    for part_SI, out_I in sums:
        strips, columns = part_SI.shape
        lines.append([programs, part_SI.data_ptr(), 0, 0, out_I.data_ptr(), strips, columns, 0, 0, 0])
        programs += -(-columns // COLUMNS)
    table, many = gpu.upload(lines, device), max(gpu.power_of_two_above(len(lines)), 16)
    span = gpu.power_of_two_above(max(len(part_SI) for part_SI, _ in sums))
    gpu.launch(_kernels().strip_sums, programs, device, table, len(lines), TENSORS=many, SPAN=span, BLOCK=COLUMNS)


class _Matrix(NamedTuple):
    """What a kernel sums up, all contiguous, where to, and by how many programs."""

    weight_grad: Tensor
    register: Tensor
    exponent: Tensor
    out: Tensor
    group: int
    programs: int

    def sizes(self) -> tuple[int, ...]:
        """Rows, columns, groups and the width of a group."""
        return (*self.register.shape, self.exponent.shape[1], self.group)

    def aligned(self) -> bool:
        """Whether addresses and widths are such that loads can be wide."""
        places = [tensor.data_ptr() for tensor in self[:4]]
        return not any(number % 16 for number in (*places, self.register.shape[1], self.group))


def _sums(weight_grad: Tensor, register: Tensor, exponent: Tensor, group: int) -> bool:
    served = weight_grad.dtype is torch.float32 and weight_grad.shape == register.shape
    return served and weight_grad.device == register.device and gpu.is_served(register, exponent, group)


def _launch(of_one: Any, of_many: Any, lot: Sequence[_Matrix], constants: dict[str, int]) -> None:
    """One launch for all aligned matrices of a lot, and one for each other."""
    together = [matrix for matrix in lot if matrix.aligned()]
    scales = scale_table(lot[0].register.device)
    for matrix in lot:
        if len(together) < 2 or not matrix.aligned():
            gpu.launch(of_one, matrix.programs, scales.device, *matrix[:4], *matrix.sizes(), scales, **constants)
    if len(together) > 1:
        lines, programs = [], 0
        for matrix in together:
            lines.append([programs, *(tensor.data_ptr() for tensor in matrix[:4]), *matrix.sizes(), 0])
            programs += matrix.programs
        table, many = gpu.upload(lines, scales.device), max(gpu.power_of_two_above(len(lines)), 16)
        gpu.launch(of_many, programs, scales.device, table, scales, len(lines), TENSORS=many, **constants)


def trits_float8(register: Tensor, turned: bool) -> Tensor:
    """The leading trits as float8 e4m3: [O, I], or [I, O] if `turned`."""
    if register.dtype is not torch.int8 or register.numel() == 0:
        return reference.trits_float8(register, turned)
    rows, columns = register.shape
    out = torch.empty((columns, rows) if turned else (rows, columns), dtype=FLOAT8, device=register.device)
    gpu.launch(
        _kernels().trits_float8,
        -(-rows // TILE) * -(-columns // TILE),
        register.device,
        *(register.contiguous(), out.view(torch.uint8), rows, columns),
        TURNED=turned,
        BLOCK=TILE,
        num_warps=8,  # 16 bytes a thread: one load, one store
    )
    return out


def decode_many(
    registers: Sequence[Tensor],
    exponents: Sequence[Tensor],
    groups: Sequence[int],
    dtype: torch.dtype,
    rounds: Sequence[tuple[bool, bool]],
    leads: Sequence[int],
) -> list[Operand]:
    """The operand of each of several matrices: one launch for all of one lead that lie as its kernel wants them."""
    out: list[Operand] = []
    lots: dict[int, list[list[int]]] = {}  # by lead
    programs: dict[int, int] = {}
    given = zip(registers, exponents, groups, rounds, leads, strict=True)
    for r, e, group, (rounds_x, rounds_grad), lead in given:
        if dtype not in gpu.FLOATS or not _lies_well(r, e, group, rounds_grad):
            out.append(operand(decode, trits_float8, r, e, group, dtype, (rounds_x, rounds_grad), lead))
            continue
        rows, columns = r.shape
        new = functools.partial(torch.empty, device=r.device)
        made = Operand(
            None if rounds_x and rounds_grad else new(rows, columns, dtype=dtype),
            new(rows, columns, dtype=FLOAT8) if rounds_x else None,
            new(columns, rows, dtype=FLOAT8) if rounds_grad else None,
            new(rows, dtype=torch.float32) if rounds_x or rounds_grad else None,
        )
        out.append(made)
        written = made.weight, made.trits8, made.turned8, made.scale_O
        places = [0 if part is None else part.data_ptr() for part in written]
        first = programs.get(lead, 0)
        sizes = [rows, columns, min(group, columns)]
        lots.setdefault(lead, []).append([first, r.data_ptr(), e.data_ptr(), *places, *sizes])
        programs[lead] = first + -(-rows // TILE) * -(-columns // TILE)
    for lead, lines in lots.items():
        device = registers[0].device
        table, many = gpu.upload(lines, device), max(gpu.power_of_two_above(len(lines)), 16)
        constants = {"TENSORS": many, "TYPE": _operand_kernels().TYPES[dtype], "BLOCK": TILE, "LEAD": lead}
        # Each thread has 8 numbers: 16 bytes in bfloat16.
        gpu.launch(_operand_kernels().decode_many, programs[lead], device, table, len(lines), **constants, num_warps=16)
    return out


def _lies_well(register: Tensor, exponent: Tensor, group: int, turned: bool) -> bool:
    """Whether loads and stores of `decode_many` can be wide, and a tile has one scale a row."""
    if not gpu.is_served(register, exponent, group) or not (register.is_contiguous() and exponent.is_contiguous()):
        return False
    rows, columns = register.shape
    sides = register.data_ptr() | columns | (rows if turned else 0)
    return sides % 16 == 0 and (exponent.shape[1] == 1 or group % TILE == 0)
