"""A model that must fit into a number of bytes: an estimate before training, and the best way that fits after it."""

from pathlib import Path
from typing import Any

import zstandard

from tritwise.errors import UserError
from tritwise.models import Arb, ByteLM
from tritwise.nn import TritVector, trit_modules
from tritwise.registers import packed_bytes
from tritwise.ship.artifact import ArtifactInfo, tables_of, write_artifact
from tritwise.ship.container import OverBudgetError
from tritwise.ship.floats import METHODS, SEARCHED, float_estimate
from tritwise.ship.quantise import SMALL

AUTO = "auto"
WAYS = (AUTO, *METHODS)
"""How float weights may ship: each way of `ship.floats`, or the best of int8, int7 and int6 that fits."""

HEADER = 2_048  # a header's own bytes, without the list of layers
A_LAYER = 100  # bytes that a header spends on a layer


def estimate(model: ByteLM | Arb, method: str = AUTO, small: int = SMALL, tokenizer: bytes = b"") -> dict[str, int]:
    """Bytes by stream that `model` will ship in, "header" and "total" among them, told from its shape alone.

    Ternary: never less than it will be, and close, as trits do not compress. Float: about; auto is the smallest way.
    """
    if model.config.weights == "trit":
        layers = [layer for _, layer in trit_modules(model)]
        matrices = [layer for layer in layers if not isinstance(layer, TritVector)]
        sizes = {
            "trits": packed_bytes(sum(layer.weight_trits * layer.register.numel() for layer in matrices)),
            "scales": sum(exponent.numel() for layer in matrices for exponent in layer.exponents()),
            "vectors": sum(layer.register.numel() for layer in layers if isinstance(layer, TritVector)),
            "header": HEADER + A_LAYER * len(layers),
        }
    else:
        sizes = float_estimate(model, SEARCHED[-1] if method == AUTO else method, small) | {"header": HEADER}
    if tables := 4 * sum(table.numel() for table in tables_of(model)):
        sizes["tables"] = tables
    if tokenizer:
        sizes["tokenizer"] = len(zstandard.compress(tokenizer))
    return sizes | {"total": sum(sizes.values())}


def require_room(model: ByteLM | Arb, budget: int) -> None:
    """Raises OverBudgetError if ternary weights alone need more than `budget` bytes: no training will make them fit."""
    if budget and model.config.weights == "trit":
        sizes = estimate(model)
        over = sizes["trits"] - budget
        if over > 0:
            raise OverBudgetError(
                f"the model's trits take {sizes['trits']:,} bytes, {over:,} over the budget of {budget:,}; "
                "make width or depth smaller"
            )


def ship_within(
    model: ByteLM | Arb,
    path: Path,
    about: dict[str, Any],
    budget: int = 0,
    method: str = AUTO,
    small: int = SMALL,
    tokenizer: bytes = b"",
) -> tuple[ArtifactInfo, str]:
    """Write the artifact, of at most `budget` bytes (0: any number), and say how: base3, or the way of `WAYS` taken.

    Raises UserError if it does not fit, with the bytes that are too many; nothing is written then.
    """
    if model.config.weights == "trit" or method == "none":  # the latter is refused there
        return write_artifact(model, path, about, budget=budget, tokenizer=tokenizer), "base3"
    if method not in WAYS:
        raise UserError(f"there is no way {method!r} to ship float weights; choose one of {', '.join(WAYS)}")
    ways = SEARCHED if method == AUTO else (method,)
    rest: dict[str, Any] = {"small": small, "budget": budget, "tokenizer": tokenizer}
    for way in ways[:-1]:
        try:
            return write_artifact(model, path, about, method=way, **rest), way
        except OverBudgetError:
            continue
    return write_artifact(model, path, about, method=ways[-1], **rest), ways[-1]
