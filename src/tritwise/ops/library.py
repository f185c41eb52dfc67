"""The torch.library namespace `tritwise`, a helper that defines an operation in it, and how keys pass a schema."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from tritwise.registers import Key

LIBRARY = torch.library.Library("tritwise", "DEF")


def define(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Define `schema`, with `run` for every device and `fake` for shapes only. Returns the callable torch op."""
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"tritwise::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.tritwise, name).default


def flat_keys(keys: Sequence[Key]) -> list[int]:
    """Keys as the ints that a schema can hold: two for each."""
    return [int(number) for key in keys for number in key]


def keys_of(flat: Sequence[int]) -> list[Key]:
    """The inverse of `flat_keys`."""
    return [Key(*pair) for pair in zip(flat[::2], flat[1::2], strict=True)]
