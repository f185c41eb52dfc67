"""One folder per operation. `reference.py` is the torch oracle; faster backends stand beside it behind the same op.

Every operation is registered in the `tritwise` namespace of torch.library with a schema and a fake implementation, so
torch.compile sees one opaque node, and which backend runs is decided when it runs (`backends.py`).

    linear      y = x W^T, its input gradient, weight gradient and scale gradient; W = trit * scale
    embedding   rows of W, and the weight gradient
    update      momentum (int8, stochastic rounding) and the move of registers and scale exponents
    direction   momentum -> a step of unit RMS: Newton-Schulz, row/column, sign, rms
"""

from tritwise.ops.backends import backend, backend_table, backends_of
from tritwise.ops.direction import direction
from tritwise.ops.embedding import embedding
from tritwise.ops.linear import linear, linear_scale_grad
from tritwise.ops.update import accumulate_momentum, move_registers

__all__ = [
    "accumulate_momentum",
    "backend",
    "backend_table",
    "backends_of",
    "direction",
    "embedding",
    "linear",
    "linear_scale_grad",
    "move_registers",
]
