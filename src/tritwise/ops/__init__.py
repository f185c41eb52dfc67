"""One folder per operation. `reference.py` is the torch oracle; faster backends stand beside it behind the same op.

Every operation is registered in the `tritwise` namespace of torch.library with a schema and a fake implementation, so
torch.compile sees one opaque node, and which backend runs is decided when it runs (`backends.py`).

    linear      y = x W^T, its input gradient, weight gradient and gradients of scales; W = trit * scale. linear_fp8:
                the same with x and dL/dy rounded to float8 for large products. linear_decoded: either, with what
                decode_many has made of many matrices before. grouped_product: rows in runs, each with a matrix of its
                own, which stacked_weights decodes
    embedding   rows of W, and the weight gradient
    update      momentum (int8, stochastic rounding) and the move of registers
    scales      the move of scale exponents, with their directions
    nibble      the update for registers that hold their momentum in the same byte
    direction   momentum -> a step of unit RMS: Newton-Schulz, row/column, sign, rms
    graph       rows that travel along edges and are added up where they arrive
    combine     what the experts of a mixture made, weighed and added up
    heads       queries and keys of attention, normalised and turned by their positions; what attention found, without
                what lies along a position's own value; and the gradients
    activation  relu squared, normalised, columns scaled: what stands between the matrices of an MLP, and its gradient

update, scales, nibble and direction have `_many` forms for a list of tensors, and so have gradients of scales: a whole
model in a few launches on a GPU.
"""

from tritwise.ops.activation import relu_squared_norm, relu_squared_norm_grad
from tritwise.ops.backends import backend, backend_table, backends_of
from tritwise.ops.combine import combine
from tritwise.ops.direction import LEVEL_FLOOR, direction, direction_many
from tritwise.ops.embedding import embedding
from tritwise.ops.float8 import unit_factor
from tritwise.ops.graph import edge_sum, gather_add
from tritwise.ops.heads import turned_heads, turned_heads_grad, without_own, without_own_grad
from tritwise.ops.linear import (
    linear,
    linear_column_grad,
    linear_column_grads,
    linear_scale_grad,
    linear_scale_grads,
)
from tritwise.ops.linear.decoded import decode_many, linear_decoded
from tritwise.ops.linear.fp8 import LEAST as FP8_LEAST
from tritwise.ops.linear.fp8 import linear_fp8, refuses_fp8, rounds_fp8
from tritwise.ops.linear.grouped import grouped_product, stacked_weights
from tritwise.ops.linear.operands import Operand
from tritwise.ops.nibble import (
    accumulate_nibble,
    accumulate_nibble_many,
    momentum_of,
    momentum_of_many,
    move_nibbles,
    move_nibbles_many,
)
from tritwise.ops.scales import move_scales_many
from tritwise.ops.update import (
    accumulate_momentum,
    accumulate_momentum_many,
    move_registers,
    move_registers_many,
)

__all__ = [
    "FP8_LEAST",
    "LEVEL_FLOOR",
    "Operand",
    "accumulate_momentum",
    "accumulate_momentum_many",
    "accumulate_nibble",
    "accumulate_nibble_many",
    "backend",
    "backend_table",
    "backends_of",
    "combine",
    "decode_many",
    "direction",
    "direction_many",
    "edge_sum",
    "embedding",
    "gather_add",
    "grouped_product",
    "linear",
    "linear_column_grad",
    "linear_column_grads",
    "linear_decoded",
    "linear_fp8",
    "linear_scale_grad",
    "linear_scale_grads",
    "momentum_of",
    "momentum_of_many",
    "move_nibbles",
    "move_nibbles_many",
    "move_registers",
    "move_registers_many",
    "move_scales_many",
    "refuses_fp8",
    "relu_squared_norm",
    "relu_squared_norm_grad",
    "rounds_fp8",
    "stacked_weights",
    "turned_heads",
    "turned_heads_grad",
    "unit_factor",
    "without_own",
    "without_own_grad",
]
