"""The torch.library namespace `tritwise`, and one helper that defines an operation in it."""

from collections.abc import Callable
from typing import Any

import torch

LIBRARY = torch.library.Library("tritwise", "DEF")


def define(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Define `schema`, with `run` for every device and `fake` for shapes only. Returns the callable torch op."""
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"tritwise::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.tritwise, name).default
