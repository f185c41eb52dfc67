# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportInvalidTypeForm=false
"""The product with a ternary weight as a TileLang program, and its compilation. Imported on first use (`tilelang.py`).

One program serves both directions. Each block makes a tile of y: tiles of x and of registers come to shared memory two
steps ahead, registers become weights on their way through the threads, and the matrix units add up in float32.
What lies outside a matrix is read as zero and not written.

Suffixes: N rows of activations, O outputs, I inputs, G groups of inputs; K what the product sums over, M the columns of
y: I and O, or turned O and I.
"""

import functools
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("TILELANG_PRINT_ON_COMPILATION", "0")  # read when tilelang is imported

import tilelang
import tilelang.language as T
from tilelang.contrib.cc import get_cplus_compiler
from tilelang.env import CUDA_HOME
from tilelang.jit.adapter.nvrtc import is_nvrtc_available

from tritwise.registers import LEAD

TILE = 128  # rows of y in a block, and its columns
DEPTH = 64  # of K in a step
STAGES = 2  # steps whose tiles are on their way
THREADS = 256
HALF = LEAD // 2  # registers beyond it lead with 1 or -1
# Warps that only fetch would have to hand over scales, which are no plain tile in memory.
PASSES = {tilelang.PassConfigKey.TL_DISABLE_WARP_SPECIALIZED: True}


def program(outputs: int, inputs: int, group: int, dtype: str, turned: bool) -> Any:
    """y [N, M] = x [N, K] W^T, or x W if `turned`, for any N. A group is a multiple of DEPTH, or there is but one."""
    n = T.dynamic("n")
    groups = -(-inputs // group)
    depth, width = (outputs, inputs) if turned else (inputs, outputs)
    # A tile of W lies in one group, so that each of its rows has one scale.
    across = DEPTH if turned and groups > 1 and group % TILE else TILE
    rows, columns = (DEPTH, across) if turned else (across, DEPTH)

    @T.prim_func
    def ternary_product(
        x_NK: T.Tensor((n, depth), dtype),
        register_OI: T.Tensor((outputs, inputs), "int8"),
        exponent_OG: T.Tensor((outputs, groups), "int8"),
        scales: T.Tensor((256,), "float32"),
        y_NM: T.Tensor((n, width), dtype),
    ):
        with T.Kernel(T.ceildiv(n, TILE), T.ceildiv(width, across), threads=THREADS) as (block_n, block_m):
            x = T.alloc_shared((TILE, DEPTH), dtype)
            arrived = T.alloc_shared((rows, columns), "int8")
            register = T.alloc_fragment((rows, columns), "int8")
            scale = T.alloc_fragment((rows,), "float32")
            decoded = T.alloc_fragment((rows, columns), dtype)
            weight = T.alloc_shared((rows, columns), dtype)
            total = T.alloc_fragment((TILE, across), "float32")
            T.clear(total)
            for step in T.Pipelined(T.ceildiv(depth, DEPTH), num_stages=STAGES):
                row = (step if turned else block_m) * rows
                column = (block_m if turned else step) * columns
                T.copy(x_NK[block_n * TILE, step * DEPTH], x)
                T.copy(register_OI[row, column], arrived)
                T.copy(arrived, register)
                for r in T.Parallel(rows):
                    scale[r] = scales[T.cast(exponent_OG[row + r, column // group], "int32") + 128]
                for r, c in T.Parallel(rows, columns):
                    trit = T.cast(register[r, c] > HALF, "float32") - T.cast(register[r, c] < -HALF, "float32")
                    decoded[r, c] = T.cast(trit * scale[r], dtype)
                T.copy(decoded, weight)
                T.gemm(x, weight, total, transpose_B=not turned)
            T.copy(total, y_NM[block_n * TILE, block_m * across])

    return ternary_product


def compiler() -> str | None:
    """TileLang's name of the way from CUDA source to a kernel on this machine; None: there is no compiler.

    "tvm_ffi" takes nvcc and a C++ compiler; "nvrtc" does without, and takes cuda-python and CUDA's headers.
    """
    home = Path(CUDA_HOME or "/usr/local/cuda")
    if (home / "bin" / "nvcc").exists() and get_cplus_compiler():
        return "tvm_ffi"
    return "nvrtc" if is_nvrtc_available and (home / "include" / "cuda_fp16.h").exists() else None


@functools.cache
def product(outputs: int, inputs: int, group: int, dtype: str, turned: bool) -> Any:  # pragma: no cover - on a GPU only
    """`program`, compiled for the current GPU: a function of x, register, exponent, scales and y."""
    return tilelang.compile(
        program(outputs, inputs, group, dtype, turned),
        target="cuda",
        execution_backend=compiler(),
        pass_configs=PASSES,
    )
