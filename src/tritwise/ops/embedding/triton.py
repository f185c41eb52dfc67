"""The ternary embedding on a GPU: a kernel gathers and decodes rows in one pass; the gradient has fixed bits."""

import functools
import importlib
from types import ModuleType

import torch
from torch import Tensor

from tritwise.ops import gpu
from tritwise.ops.embedding import reference
from tritwise.registers import LEAD

ROWS = 512  # up to which a table is small: the product grows with them, the sort that is its alternative does not
PARTS = {torch.float32: 3, torch.float16: 2, torch.bfloat16: 1}  # bfloat16s that hold a number
# It takes 246 registers, where all is aligned.
TILE = {"BLOCK_V": 256, "BLOCK_C": 64, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3}
# Tokens and columns that a program adds at a time: of 32,768 tokens a frequent row has hundreds, most have few or none.
RUN = {"BLOCK_N": 32, "BLOCK_C": 256}
NAMED = torch.iinfo(torch.int16).max  # rows that are sorted by two bytes of their numbers; more take four
PROGRAMS = 128  # that fill a GPU: one on each of its 132 processors
SUMMED = 1024  # numbers that one program adds up over the splits


@functools.cache
def _kernels() -> ModuleType:
    return importlib.import_module("tritwise.ops.embedding.kernels")


def forward(
    ids: Tensor, register: Tensor, exponent: Tensor, group: int, dtype: torch.dtype, lead: int = LEAD
) -> Tensor:
    """W[ids] as `dtype` [..., D]. On a GPU an id outside the table gives a row of NaN: to look would be to wait."""
    served = ids.dtype is torch.int64 and ids.numel() > 0 and ids.device == register.device and dtype in gpu.FLOATS
    if not served or not gpu.is_served(register, exponent, group):
        return reference.forward(ids, register, exponent, group, dtype, lead)
    rows = register.shape[0]
    if ids.is_cpu and not bool(((ids >= 0) & (ids < rows)).all()):
        return reference.forward(ids, register, exponent, group, dtype, lead)  # says which id it is
    flat = ids.reshape(-1).contiguous()
    return gpu.decode(register, exponent, group, dtype, flat, lead).view(*ids.shape, register.shape[1])


def weight_grad(grad: Tensor, ids: Tensor, rows: int) -> Tensor:
    """dL/dW [V, D] float32: each row is the sum of the gradients of its uses, in the same order every time.

    The reference's index_add_ adds by atomics on a GPU, in any order. Of a small table the gradient is a product, in
    two launches; for a large one the ids are sorted, and a program adds up the tokens of each row. An id outside the
    table adds nothing to it.
    """
    grad_ND, ids_N = grad.reshape(-1, grad.shape[-1]), ids.reshape(-1)
    if _multiplies(grad_ND, ids_N, rows):
        return _product(grad_ND.contiguous(), ids_N.contiguous(), rows)
    if grad_ND.numel() == 0 or rows == 0:
        return grad.new_zeros(rows, grad.shape[-1], dtype=torch.float32)
    return _of_sorted((grad_ND if grad_ND.dtype in PARTS else grad_ND.float()).contiguous(), ids_N, rows)


def _of_sorted(grad_ND: Tensor, ids_N: Tensor, rows: int) -> Tensor:
    """Sums over runs of equal ids, in the order of the tokens."""
    columns, device = grad_ND.shape[1], grad_ND.device
    short = torch.int16 if rows < NAMED else torch.int32  # each byte of them is sorted by
    sorted_N, order_N = torch.sort(ids_N.clamp(-1, rows).to(short), stable=True)
    starts_V1 = torch.searchsorted(sorted_N, torch.arange(rows + 1, dtype=short, device=device))
    out_VD = torch.empty(rows, columns, dtype=torch.float32, device=device)
    block = min(gpu.power_of_two_above(columns), RUN["BLOCK_C"])
    programs = rows * -(-columns // block)
    given = grad_ND, order_N, starts_V1, out_VD, columns
    gpu.launch(_kernels().run_sums, programs, device, *given, **RUN | {"BLOCK_C": block})
    return out_VD


def _multiplies(grad_ND: Tensor, ids_N: Tensor, rows: int) -> bool:
    """Whether the gradient is taken as a product."""
    served = grad_ND.dtype in PARTS and ids_N.dtype is torch.int64 and grad_ND.device == ids_N.device
    if not served or not 0 < rows <= ROWS or grad_ND.numel() == 0:
        return False
    return not grad_ND.is_cuda or torch.cuda.get_device_capability(grad_ND.device) >= gpu.BFLOAT16


def _product(grad_ND: Tensor, ids_N: Tensor, rows: int) -> Tensor:
    """The one-hot matrix of the ids [V, N] times grad: sums over spans of tokens, then the sum of these."""
    (tokens, columns), device = grad_ND.shape, grad_ND.device
    tile = TILE | {
        "NARROW": device.type == "cuda",
        "BLOCK_V": min(max(gpu.power_of_two_above(rows), 16), TILE["BLOCK_V"]),  # no side of a product is shorter
        "BLOCK_C": min(max(gpu.power_of_two_above(columns), 16), TILE["BLOCK_C"]),
    }
    tiles = -(-rows // tile["BLOCK_V"]) * -(-columns // tile["BLOCK_C"])
    # The power of two below what gives each processor one program: few lengths, each of which is compiled for.
    span = max(gpu.power_of_two_above(tokens * tiles // PROGRAMS + 1) // 2, 4 * tile["BLOCK_N"])
    splits = -(-tokens // span)
    part_SVD = torch.empty(splits, rows, columns, dtype=torch.float32, device=device)
    given = grad_ND, ids_N, part_SVD, tokens, rows, columns
    gpu.launch(_kernels().row_sums, tiles * splits, device, *given, PARTS=PARTS[grad_ND.dtype], SPAN=span, **tile)
    if splits == 1:
        return part_SVD[0]
    out_VD = torch.empty(rows, columns, dtype=torch.float32, device=device)
    given, most = (part_SVD, out_VD, splits, out_VD.numel()), gpu.power_of_two_above(splits)
    programs = -(-out_VD.numel() // SUMMED)
    gpu.launch(_kernels().split_sums, programs, device, *given, SPAN=most, BLOCK=SUMMED)
    return out_VD
