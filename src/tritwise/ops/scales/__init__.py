"""How scale exponents move: each set of them by its momentum over that one's RMS, all sets of a model in one call.

A set is what one direction moves: the scales of a layer's rows, or of its columns. A step of an exponent is 9 %; what
is less is kept as evidence, in 1/256 steps.
"""

from collections.abc import Sequence

from torch import Tensor

from tritwise.ops import gpu
from tritwise.ops.backends import choose, implement
from tritwise.ops.library import define, flat_keys, keys_of
from tritwise.ops.scales import reference, triton
from tritwise.registers import Key

implement("scales", "reference", reference)
implement("scales", "triton", triton, priority=20, devices=("cuda",), refuses=gpu.refuses)


def _move(
    exponents: list[Tensor],
    evidences: list[Tensor],
    momenta: list[Tensor],
    octaves: list[float],
    keys: list[int],
    still: Tensor | None,
    go: Tensor | None,
    live_octaves: Tensor | None = None,
    live_keys: Tensor | None = None,
) -> None:
    run = choose("scales", exponents[0].device).move_scales_many
    run(exponents, evidences, momenta, octaves, keys_of(keys), still, go, live_octaves, live_keys)


_move_op = define(
    "move_scales_many(Tensor(a!)[] exponents, Tensor(b!)[] evidences, Tensor[] momenta, float[] octaves, int[] keys, "
    "Tensor? still, Tensor? go, Tensor? live_octaves=None, Tensor? live_keys=None) -> ()",
    _move,
    lambda *_, **__: None,
)


def move_scales_many(
    exponents: Sequence[Tensor],
    evidences: Sequence[Tensor],
    momenta: Sequence[Tensor],
    octaves: Sequence[float] | Tensor,
    keys: Sequence[Key] | Tensor,
    still: Tensor | None = None,
    go: Tensor | None = None,
) -> None:
    """exponent <- exponent - 8 * octaves * u for each of several sets (at least one), in place, stochastically rounded
    to 1/256; u is the set's momentum over its RMS, at most 8 in size, and zero where that is.

    exponents: int8, any shape, of N scales; evidences, momenta: int8 of as many (that all of a set's momentum is under
    one exponent makes no difference to u); all on one device. octaves: of a direction of 1, one number for each set.
    keys: one for each. Both may lie on the device, float64 [sets] and int64 [sets, 2], in a CUDA graph.
    still: bool [N of all sets], who stays; go: bool 0-d on the device, False if nothing moves.
    """
    live_octaves = octaves if isinstance(octaves, Tensor) else None
    live_keys = keys if isinstance(keys, Tensor) else None
    numbers = [0.0] * len(exponents) if isinstance(octaves, Tensor) else list(octaves)
    known = [0] * (2 * len(exponents)) if isinstance(keys, Tensor) else flat_keys(keys)
    given = list(exponents), list(evidences), list(momenta), numbers, known
    _move_op(*given, still, go, live_octaves, live_keys)
