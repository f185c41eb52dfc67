"""The ternary linear in TileLang: W is decoded inside the product and never lies in memory. Only if asked for by name.

`TRITWISE_BACKEND=tilelang`, or `with backend("tilelang")`; it needs the extra `tilelang` and a compiler. It serves
bfloat16 and float16 and groups of whole rows or of multiples of 64 inputs; for others, for gradients of weights and of
scales, and for float8 the "triton" backend's functions run. A first call of each shape compiles, for seconds.
"""

import functools
import importlib
import importlib.util
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from tritwise.ops import gpu
from tritwise.ops.linear import triton
from tritwise.ops.linear.operands import Operand
from tritwise.registers import LEAD, scale_table

DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}  # as TileLang calls them
SPAN = 64  # columns of a tile of W, which has one scale a row: DEPTH of the kernels

decode, trits_float8 = triton.decode, triton.trits_float8
weight_grad, scale_grad, column_grad = triton.weight_grad, triton.scale_grad, triton.column_grad
scale_grads, column_grads = triton.scale_grads, triton.column_grads


@functools.cache
def _kernels() -> ModuleType:
    return importlib.import_module("tritwise.ops.linear.tilelang_kernels")


@functools.cache
def refuses(device: torch.device) -> str | None:
    """Why the "tilelang" backend cannot run on `device`, or None. The first call compiles and runs a small kernel."""
    if device.type != "cuda":
        return "it runs on CUDA devices only"
    if importlib.util.find_spec("tilelang") is None:
        return "tilelang is not installed; pip install 'tritwise[tilelang]'"
    if torch.cuda.get_device_capability(device) < gpu.BFLOAT16:
        return (
            f"{torch.cuda.get_device_name(device)} is older than compute capability {gpu.BFLOAT16[0]}.{gpu.BFLOAT16[1]}"
        )
    if reason := gpu.refuses(device):
        return f"what it leaves to triton cannot run: {reason}"
    try:
        if _kernels().compiler() is None:
            return "TileLang finds no compiler; pip install 'tilelang[nvcc]', or set CUDA_HOME to CUDA's toolkit"
        right = _self_test(device)
    except Exception as error:  # a library that is missing, a compiler that is too old: whatever it is
        return f"TileLang cannot compile or run: {type(error).__name__}: {' '.join(str(error).split())[-200:]}"
    return None if right else "TileLang's kernel gives wrong results on this machine; report this as a bug"


def _self_test(device: torch.device) -> bool:
    register = torch.tensor([[121, 41, 40, 0, -40, -41, -121]], dtype=torch.int8, device=device)
    exponent = torch.tensor([[8]], dtype=torch.int8, device=device)
    x = torch.eye(7, dtype=torch.bfloat16, device=device)
    return _product(x, register, exponent, 256, turned=False).flatten().tolist() == [
        2.0,
        2.0,
        0.0,
        0.0,
        0.0,
        -2.0,
        -2.0,
    ]


def forward(x: Tensor, register: Tensor, exponent: Tensor, group: int, lead: int = LEAD) -> Tensor:
    """y [..., O] = x [..., I] W^T."""
    if reason := _leaves(x, register, exponent, group, lead):
        _say(reason)
        return triton.forward(x, register, exponent, group, lead)
    return _product(x, register, exponent, group, turned=False)


def input_grad(grad: Tensor, register: Tensor, exponent: Tensor, group: int, lead: int = LEAD) -> Tensor:
    """dL/dx [..., I] = dL/dy [..., O] W."""
    if reason := _leaves(grad, register, exponent, group, lead):
        _say(reason)
        return triton.input_grad(grad, register, exponent, group, lead)
    return _product(grad, register, exponent, group, turned=True)


def decode_many(registers: Sequence[Tensor], *_: Any) -> list[Operand]:
    """Nothing ahead of the products: they decode by themselves."""
    return [Operand()] * len(registers)


def _leaves(x: Tensor, register: Tensor, exponent: Tensor, group: int, lead: int) -> str | None:
    """Why these are left to the "triton" backend, or None."""
    if lead != LEAD:
        return "it serves weights of one trit"
    if x.dtype not in DTYPES:
        return f"it serves bfloat16 and float16, not {str(x.dtype).removeprefix('torch.')}"
    if not gpu.is_served(register, exponent, group):
        return "it serves registers and exponents of int8, of which there are some"
    if exponent.shape[1] > 1 and group % SPAN:
        return f"it serves groups of whole rows or of multiples of {SPAN} inputs, not of {group}"
    if x.data_ptr() % 16 or register.data_ptr() % 16:
        return "it serves memory that begins at a multiple of 16 bytes"
    return None


@functools.cache
def _say(reason: str) -> None:
    warnings.warn(f"linear falls back from tilelang to triton: {reason}", stacklevel=3)


def _product(x: Tensor, register: Tensor, exponent: Tensor, group: int, turned: bool) -> Tensor:
    """x W^T, or x W if `turned`, by the kernel."""
    outputs, inputs = register.shape
    depth, width = (outputs, inputs) if turned else (inputs, outputs)
    groups = exponent.shape[1]
    # By way of one dimension: a dimension of size 1 may have any stride, which TileLang does not take.
    x_NK, register_OI, exponent_OG = (
        given.detach().reshape(-1).contiguous().view(-1, columns)
        for given, columns in ((x, depth), (register, inputs), (exponent, groups))
    )
    y = torch.empty(*x.shape[:-1], width, dtype=x.dtype, device=x.device)
    if x.numel():
        with gpu.on(x.device):
            kernel = _kernels().product(outputs, inputs, inputs if groups == 1 else group, DTYPES[x.dtype], turned)
            kernel(x_NK, register_OI, exponent_OG, scale_table(x.device), y.view(-1, width))
    return y
