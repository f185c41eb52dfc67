"""The arithmetic of trits: registers, packing, scale exponents and counter-based randomness. No kernels, no layers.

Everything here is exact integer arithmetic, the same bits on every device. Floats appear only as the values a scale
exponent stands for (bf16-exact) and as the real number that stochastic rounding is given.
"""

from tritwise.registers.nibble import NIBBLE_LEAD, NIBBLE_LIMIT, join_nibbles, split_nibbles, to_nibbles
from tritwise.registers.packing import (
    PACKINGS,
    pack_base3,
    pack_twobit,
    packed_bytes,
    unpack_base3,
    unpack_twobit,
)
from tritwise.registers.random import (
    WEYL_STEP,
    Key,
    Place,
    keys_at,
    make_key,
    random_bits16,
    random_bits16_many,
    random_words,
    rows_of_places,
    weyl_bits16,
    weyl_turn,
)
from tritwise.registers.register import (
    EVIDENCE_LIMIT,
    LEAD,
    REGISTER_LIMIT,
    evidence,
    init_registers,
    join,
    leading_trit,
    move,
    to_trits,
    zero_fraction,
)
from tritwise.registers.rounding import FRACTION_BITS, round_stochastic, to_fixed_point
from tritwise.registers.scales import (
    EXPONENT_LIMIT,
    EXPONENTS_PER_OCTAVE,
    exponent_for,
    move_exponents,
    scale_table,
    scale_values,
)

__all__ = [
    "EVIDENCE_LIMIT",
    "EXPONENTS_PER_OCTAVE",
    "EXPONENT_LIMIT",
    "FRACTION_BITS",
    "LEAD",
    "NIBBLE_LEAD",
    "NIBBLE_LIMIT",
    "PACKINGS",
    "REGISTER_LIMIT",
    "WEYL_STEP",
    "Key",
    "Place",
    "evidence",
    "exponent_for",
    "init_registers",
    "join",
    "join_nibbles",
    "keys_at",
    "leading_trit",
    "make_key",
    "move",
    "move_exponents",
    "pack_base3",
    "pack_twobit",
    "packed_bytes",
    "random_bits16",
    "random_bits16_many",
    "random_words",
    "round_stochastic",
    "rows_of_places",
    "scale_table",
    "scale_values",
    "split_nibbles",
    "to_fixed_point",
    "to_nibbles",
    "to_trits",
    "unpack_base3",
    "unpack_twobit",
    "weyl_bits16",
    "weyl_turn",
    "zero_fraction",
]
