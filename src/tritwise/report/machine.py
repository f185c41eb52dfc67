"""What a machine is called in tables."""

from collections.abc import Mapping
from typing import Any


def machine_name(made: Mapping[str, Any]) -> str:
    """The GPU, or the processor and how many threads were used, of a manifest, a record or a row."""
    if made["device"] != "cpu":
        return made["device"]
    return f"{made['cpu']}, {made['threads']} thread{'s' * (made['threads'] > 1)}"
