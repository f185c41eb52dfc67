"""What `tritwise bench kernels` runs: every ternary operation on made inputs, with the least work that it must do.

A case makes its inputs from a seed on the device, so that two backends get the same ones, and counts from shapes the
bytes that must be read and written once and the operations of its products. Both are what a perfect kernel would need,
not what ours does: passes that a kernel makes over intermediate results are its own affair.

Suffixes: N rows of activations, O outputs, I inputs, G groups of inputs, V entries of a table, D channels.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tritwise import ops
from tritwise.ops import nibble
from tritwise.ops.backends import choose
from tritwise.ops.linear import tilelang
from tritwise.registers import LEAD, Key, make_key

OPS = torch.ops.tritwise
GROUP = 256  # inputs that share a scale
RATE = 0.03
STEPS = 3  # of Newton-Schulz

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One kernel at one shape.

    operation  whose backend is chosen (ops/backends.py)
    make       inputs, from a seeded generator on the device
    run        what is timed
    moved      bytes that must be read and written; flops: operations of its matrix products
    plain      the nearest thing that torch itself has for float weights, or None
    changes    which inputs `run` changes: they are results too
    backend    asked for by name; None: what is chosen by itself
    """

    operation: str
    kernel: str
    shape: str
    make: Callable[[torch.Generator], Inputs]
    run: Callable[[Inputs], Any]
    moved: float
    flops: float = 0.0
    plain: Callable[[Inputs], Any] | None = None
    changes: tuple[str, ...] = ()
    backend: str | None = None


def make_cases(device: torch.device, dtype: torch.dtype, widths: list[int], rows: int, blocks: int) -> Iterator[Case]:
    """All cases. widths: of the models whose matrices are multiplied; the update works on `blocks` blocks of the last.
    rows: of activations, the bytes of a micro-batch. dtype: of activations."""
    for width in widths:
        for outputs, inputs in ((3 * width, width), (4 * width, width), (width, 4 * width)):
            yield from _linear_cases(device, dtype, rows, outputs, inputs)
    width = widths[-1]
    yield from _linear_cases(device, dtype, rows, 256, width)
    yield from _embedding_cases(device, rows, width)
    yield from _update_cases(device, width, blocks)
    yield from _nibble_cases(device, width, blocks)
    yield from _scale_cases(width, blocks)
    yield from _direction_cases(device, width, blocks)
    yield from _graph_cases(rows, width, dtype)
    yield from _combine_cases(rows, width, dtype)
    yield from _activation_cases(rows, 4 * width, dtype)
    yield from _heads_cases(rows, width, dtype)


def _linear_cases(device: torch.device, dtype: torch.dtype, rows: int, outputs: int, inputs: int) -> Iterator[Case]:
    size, groups = dtype.itemsize, outputs * -(-inputs // GROUP)
    weights, shape = outputs * inputs, f"{rows} x {inputs} -> {outputs}"
    matrix = f"{outputs} x {inputs}"

    def make(generator: torch.Generator) -> Inputs:
        register_OI, exponent_OG = _weights(generator, outputs, inputs)
        return {
            "register": register_OI,
            "exponent": exponent_OG,
            "x": _normal(generator, rows, inputs).to(dtype),
            "grad": _normal(generator, rows, outputs).to(dtype),
            "weight": _normal(generator, outputs, inputs).to(dtype),
        }

    def make_gradient(generator: torch.Generator) -> Inputs:
        register_OI, exponent_OG = _weights(generator, outputs, inputs)
        return {"register": register_OI, "exponent": exponent_OG, "grad": _normal(generator, outputs, inputs)}

    def decode(given: Inputs) -> Tensor:
        return choose("linear", device).decode(given["register"], given["exponent"], GROUP, dtype)

    def forward(given: Inputs) -> Tensor:
        return OPS.linear(given["x"], given["register"], given["exponent"], GROUP, None, LEAD)

    def input_grad(given: Inputs) -> Tensor:
        return OPS.linear_input_grad(given["grad"], given["register"], given["exponent"], GROUP, LEAD)

    def weight_grad(given: Inputs) -> Tensor:
        return OPS.linear_weight_grad(given["grad"], given["x"])

    def scale_grad(given: Inputs) -> Tensor:
        return ops.linear_scale_grad(given["grad"], given["register"], given["exponent"], GROUP)

    product, x, y = 2.0 * rows * weights, rows * inputs * size, rows * outputs * size
    passed = x + y + weights + groups
    yield Case("linear", "decode", matrix, make_gradient, decode, weights * (1 + size) + groups)
    by_name = [] if dtype not in tilelang.DTYPES or tilelang.refuses(device) else ["tilelang"]
    for name in (None, *by_name):
        yield Case(
            *("linear", f"forward {name}" if name else "forward", shape, make, forward, passed, product),
            plain=lambda given: given["x"] @ given["weight"].T,
            backend=name,
        )
    yield Case(
        *("linear", "input_grad", shape, make, input_grad, passed, product),
        plain=lambda given: given["grad"] @ given["weight"],
    )
    yield Case(
        *("linear", "weight_grad", shape, make, weight_grad, x + y + 4 * weights, product),
        plain=lambda given: given["grad"].T @ given["x"],
    )
    yield Case("linear", "scale_grad", matrix, make_gradient, scale_grad, 5 * weights + 5 * groups)


def _embedding_cases(device: torch.device, rows: int, width: int) -> Iterator[Case]:
    entries, shape = 256, f"{rows} of 256 x {width}"

    def make(generator: torch.Generator) -> Inputs:
        register_VD, exponent_VG = _weights(generator, entries, width)
        ids = torch.randint(entries, (rows,), generator=generator, device=generator.device)
        grad_ND, weight_VD = _normal(generator, rows, width), _normal(generator, entries, width)
        return {"register": register_VD, "exponent": exponent_VG, "ids": ids, "grad": grad_ND, "weight": weight_VD}

    def forward(given: Inputs) -> Tensor:
        return ops.embedding(given["ids"], given["register"], given["exponent"], GROUP)

    def weight_grad(given: Inputs) -> Tensor:
        return OPS.embedding_weight_grad(given["grad"], given["ids"], entries)

    table = entries * width
    yield Case(
        *("embedding", "embedding", shape, make, forward, 8 * rows + table + 4 * rows * width),
        plain=lambda given: torch.nn.functional.embedding(given["ids"], given["weight"]),
    )
    yield Case("embedding", "embedding_grad", shape, make, weight_grad, 8 * rows + 4 * rows * width + 4 * table)


def _update_cases(device: torch.device, width: int, blocks: int) -> Iterator[Case]:
    shapes = _matrices(width, blocks)
    weights, rows = _total(shapes), sum(outputs for outputs, _, _ in shapes)
    shape, keys = f"{len(shapes)} matrices, {weights / 1e6:.1f}M", _keys(len(shapes))

    def make(generator: torch.Generator) -> Inputs:
        return {
            "registers": [_int8(generator, 121, o, i) for o, i, _ in shapes],
            "momenta": [_int8(generator, 126, o, i) for o, i, _ in shapes],
            "exponents": [_int8(generator, 8, o, 1) - 16 for o, _, _ in shapes],
            "grads": [_normal(generator, o, i) for o, i, _ in shapes],
        }

    def accumulate(given: Inputs) -> Tensor:
        return ops.accumulate_momentum_many(given["momenta"], given["exponents"], given["grads"], 0.9, keys)

    def move(given: Inputs) -> Tensor:
        return ops.move_registers_many(given["registers"], given["grads"], [RATE * LEAD] * len(shapes), keys)

    state = ("momenta", "exponents")
    yield Case("update", "accumulate_many", shape, make, accumulate, 6 * weights + 2 * rows, changes=state)
    yield Case("update", "move_many", shape, make, move, 6 * weights, changes=("registers",))


def _nibble_cases(device: torch.device, width: int, blocks: int) -> Iterator[Case]:
    shapes = _matrices(width, blocks)
    weights, rows = _total(shapes), sum(outputs for outputs, _, _ in shapes)
    groups = sum(o * -(-i // nibble.GROUP) for o, i, _ in shapes)
    shape, keys = f"{len(shapes)} matrices, {weights / 1e6:.1f}M", _keys(len(shapes))

    def make(generator: torch.Generator) -> Inputs:
        return {
            "registers": [16 * _int8(generator, 7, o, i) + _int8(generator, 7, o, i) for o, i, _ in shapes],
            "rows": [_int8(generator, 8, o, 1) - 16 for o, _, _ in shapes],
            "groups": [_int8(generator, 8, o, -(-i // nibble.GROUP)) - 8 for o, i, _ in shapes],
            "grads": [_normal(generator, o, i) for o, i, _ in shapes],
        }

    def accumulate(given: Inputs) -> Tensor:
        state = given["registers"], given["rows"], given["groups"]
        return ops.accumulate_nibble_many(*state, given["grads"], 0.9, keys, 1)

    def move(given: Inputs) -> Tensor:
        return ops.move_nibbles_many(given["registers"], given["grads"], [RATE] * len(shapes), keys, 1)

    def momentum(given: Inputs) -> list[Tensor]:
        return ops.momentum_of_many(given["registers"], given["rows"], given["groups"])

    state = ("registers", "rows", "groups")
    moved = 6 * weights + 2 * (rows + groups)
    yield Case("nibble", "accumulate_nibbles", shape, make, accumulate, moved, changes=state)
    yield Case("nibble", "move_nibbles", shape, make, move, 6 * weights, changes=("registers",))
    yield Case("nibble", "momentum_of_many", shape, make, momentum, 5 * weights + rows + groups)


def _scale_cases(width: int, blocks: int) -> Iterator[Case]:
    """Scales of the rows of all matrices, a set each."""
    rows = [outputs for outputs, _, _ in _matrices(width, blocks)]
    keys = _keys(len(rows))

    def make(generator: torch.Generator) -> Inputs:
        return {
            "exponents": [_int8(generator, 8, count, 1) - 40 for count in rows],
            "evidences": [_int8(generator, 120, 1, count) for count in rows],
            "momenta": [_int8(generator, 126, 1, count) for count in rows],
        }

    def move(given: Inputs) -> list[Tensor]:
        state = given["exponents"], given["evidences"], given["momenta"]
        ops.move_scales_many(*state, [0.005] * len(rows), keys)
        return []

    shape, state = f"{len(rows)} sets, {sum(rows):,}", ("exponents", "evidences")
    yield Case("scales", "move_scales_many", shape, make, move, 5 * sum(rows), changes=state)


def _direction_cases(device: torch.device, width: int, blocks: int) -> Iterator[Case]:
    shapes = _matrices(width, blocks)
    weights, rows = _total(shapes), sum(outputs for outputs, _, _ in shapes)
    counts = [count for _, _, count in shapes]
    shape = f"{len(shapes)} matrices, {weights / 1e6:.1f}M"

    def make(generator: torch.Generator) -> Inputs:
        return {
            "momenta": [_int8(generator, 126, o, i) for o, i, _ in shapes],
            "exponents": [_int8(generator, 2, o, 1) - 16 for o, _, _ in shapes],
        }

    def run(method: str) -> Callable[[Inputs], list[Tensor]]:
        return lambda given: ops.direction_many(given["momenta"], given["exponents"], method, STEPS, counts)

    flops = sum(count * _newton_schulz_flops(o // count, i) for o, i, count in shapes)
    for method in ("balanced", "newton_schulz", "row_column"):
        products = 0.0 if method == "row_column" else flops
        yield Case("direction", f"direction_many {method}", shape, make, run(method), 5 * weights + rows, products)


def _graph_cases(rows: int, width: int, dtype: torch.dtype) -> Iterator[Case]:
    edges, size = 4 * rows, width * dtype.itemsize
    shape = f"{edges} edges of {rows} x {width}"

    def make(generator: torch.Generator) -> Inputs:
        ends = torch.randint(rows, (2, edges), generator=generator, device=generator.device)
        x, base = (_normal(generator, rows, width).to(dtype) for _ in range(2))
        return {"x": x, "base": base, "source": ends[0], "target": ends[1]}

    def edge_sum(given: Inputs) -> Tensor:
        return ops.edge_sum(given["x"], given["source"], given["target"], rows)

    def gather_add(given: Inputs) -> Tensor:
        return ops.gather_add(given["base"], given["x"], given["source"][:rows])

    yield Case("graph", "edge_sum", shape, make, edge_sum, 16 * edges + 2 * rows * size)
    yield Case("graph", "gather_add", f"{rows} of {rows} x {width}", make, gather_add, rows * (8 + 3 * size))


def _combine_cases(rows: int, width: int, dtype: torch.dtype) -> Iterator[Case]:
    active, size = 2, dtype.itemsize
    shape = f"{active} of {rows} x {width}"

    def make(generator: torch.Generator) -> Inputs:
        slot = torch.randperm(active * rows, generator=generator, device=generator.device).view(rows, active)
        x, grad = _normal(generator, active * rows, width).to(dtype), _normal(generator, rows, width).to(dtype)
        return {"x": x, "slot": slot, "gate": _normal(generator, rows, active).to(dtype), "grad": grad}

    def combine(given: Inputs) -> Tensor:
        return ops.combine(given["x"], given["slot"], given["gate"])

    def gradients(given: Inputs) -> list[Tensor]:
        return list(OPS.combine_grads(given["grad"], given["x"], given["slot"], given["gate"]))

    read = active * rows * (8 + size + width * size)
    yield Case("combine", "combine", shape, make, combine, read + rows * width * size)
    written = active * rows * (size + width * size)
    yield Case("combine", "combine_grads", shape, make, gradients, read + rows * width * size + written)


def _activation_cases(rows: int, columns: int, dtype: torch.dtype) -> Iterator[Case]:
    shape, lies = f"{rows} x {columns}", rows * columns * dtype.itemsize

    def make(generator: torch.Generator) -> Inputs:
        h, grad = (_normal(generator, rows, columns).to(dtype) for _ in range(2))
        scale = _normal(generator, columns).abs().to(dtype)
        return {"h": h, "grad": grad, "scale": scale, "inverse": ops.relu_squared_norm(h, scale)[1]}

    def forward(given: Inputs) -> Tensor:
        return ops.relu_squared_norm(given["h"], given["scale"])[0]

    def gradient(given: Inputs) -> Tensor:
        return ops.relu_squared_norm_grad(given["grad"], given["h"], given["inverse"], given["scale"])

    def plain(given: Inputs) -> Tensor:
        square = torch.relu(given["h"]).square()
        return torch.nn.functional.rms_norm(square, square.shape[-1:], eps=1e-6) * given["scale"]

    yield Case("activation", "relu_squared_norm", shape, make, forward, 2.0 * lies, plain=plain)
    yield Case("activation", "relu_squared_norm_grad", shape, make, gradient, 3.0 * lies)


def _heads_cases(rows: int, width: int, dtype: torch.dtype) -> Iterator[Case]:
    size = 64
    heads = max(1, width // size)
    shape, part = f"{rows} x {heads} of {size}", rows * heads * size * dtype.itemsize

    def make(generator: torch.Generator) -> Inputs:
        parts = _normal(generator, 1, rows, 3 * heads, size).to(dtype)
        q_grad, k_grad, v_grad = (_normal(generator, 1, rows, heads, size).to(dtype) for _ in range(3))
        angle = _normal(generator, rows, size // 2)
        tables = {"cos": angle.cos(), "sin": angle.sin()}
        return {"parts": parts, "q_grad": q_grad, "k_grad": k_grad, "v_grad": v_grad} | tables

    def forward(given: Inputs) -> list[Tensor]:
        return list(ops.turned_heads(given["parts"], given["cos"], given["sin"], heads))

    def gradient(given: Inputs) -> Tensor:
        grads = given["q_grad"], given["k_grad"], given["v_grad"]
        return ops.turned_heads_grad(*grads, given["parts"], given["cos"], given["sin"])

    tables = 4 * rows * size
    yield Case("heads", "turned_heads", shape, make, forward, 4.0 * part + tables)
    yield Case("heads", "turned_heads_grad", shape, make, gradient, 8.0 * part + tables)


def _newton_schulz_flops(rows: int, columns: int) -> float:
    """Of STEPS steps: the Gram matrix and the product with x, 2 m m n each, and the Gram matrix's square, 2 m m m."""
    small, large = sorted((rows, columns))
    return STEPS * (4.0 * small**2 * large + 2.0 * small**3)


def _matrices(width: int, blocks: int) -> list[tuple[int, int, int]]:
    """(rows, columns, matrices in the rows) of the layers of some blocks: qkv, out, up, down."""
    return [(3 * width, width, 3), (width, width, 1), (4 * width, width, 1), (width, 4 * width, 1)] * blocks


def _total(shapes: list[tuple[int, int, int]]) -> int:
    return sum(outputs * inputs for outputs, inputs, _ in shapes)


def _keys(count: int) -> list[Key]:
    return [make_key(0, 1, number) for number in range(count)]


def _weights(generator: torch.Generator, outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
    return _int8(generator, 121, outputs, inputs), _int8(generator, 8, outputs, -(-inputs // GROUP)) - 40


def _int8(generator: torch.Generator, limit: int, *shape: int) -> Tensor:
    where = {"generator": generator, "device": generator.device}
    return torch.randint(-limit, limit + 1, shape, dtype=torch.int8, **where)


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device)
