"""The settings of a TritOptimizer's groups: what roles have by default, what can be changed, and what cannot work."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from tritwise.nn import TritModule, trit_modules
from tritwise.ops.direction import METHODS
from tritwise.registers import LEAD

# Row/column beats Newton-Schulz where rows are symbols: a rare row gets its step whatever the others do.
ROLE_DEFAULTS: dict[str, dict[str, Any]] = {
    "embedding": {"direction": "row_column", "row_memory": 0.0},
    "head": {"direction": "row_column", "row_memory": 0.0},
    # A vector's register is its number: it moves a little at every step, and has neither a scale nor spare bits.
    "vector": {"direction": "rms", "interval": 1, "scale_rate": 0.0, "compact": False, "row_memory": 0.0},
}
ROLE_RATES = {"embedding": 2.0, "head": 2.0, "vector": 0.03}
"""Rates of roles over that of matrices, unless given: docs/RULE.md. A vector's register is a number, not evidence for a
trit: at the matrices' rate it would walk by .04 a step, which cost .14 bits a byte (docs/LOG.md)."""
SETTINGS = ("rate", "momentum", "nesterov", "scale_rate", "direction", "steps", "row_memory", "interval", "seed")
"""What `configure` changes."""


def groups_of(
    layers: nn.Module | Iterable[TritModule] | list[dict[str, Any]], roles: dict[str, dict[str, Any]], rate: float
) -> list[dict[str, Any]]:
    """One group per role, in the order in which roles appear, unless the caller made groups already."""
    if isinstance(layers, nn.Module):
        found = [layer for _, layer in trit_modules(layers)]
    else:
        listed = list(layers)
        if listed and all(isinstance(entry, dict) for entry in listed):
            if roles:
                raise ValueError("groups carry their own settings; put those of `roles` into the groups")
            return listed  # type: ignore[return-value]
        found = listed
    if not found:
        raise ValueError("there is no ternary layer to train; build the model with weights='trit'")
    groups: dict[str, list[Any]] = {}
    for layer in found:
        groups.setdefault(getattr(layer, "role", "matrix"), []).append(layer)
    unknown = set(roles) - set(groups)
    if unknown:
        raise ValueError(f"no layer has the role {sorted(unknown)[0]!r}; the model has {', '.join(groups)}")
    own = {role: {"lr": rate * factor} for role, factor in ROLE_RATES.items()}
    return [
        {"params": members, "role": role} | own.get(role, {}) | ROLE_DEFAULTS.get(role, {}) | roles.get(role, {})
        for role, members in groups.items()
    ]


def check(group: dict[str, Any]) -> None:
    """Raise ValueError for settings that cannot work."""
    for name in ("lr", "scale_rate"):
        if not 0 <= group[name] < float("inf"):
            raise ValueError(f"{'rate' if name == 'lr' else name} is {group[name]}; it must be 0 or more and finite")
    for name in ("momentum", "row_memory"):
        if not 0 <= group[name] < 1:
            raise ValueError(f"{name} is {group[name]}; it must be at least 0 and below 1")
    if group["direction"] not in METHODS:
        raise ValueError(f"there is no direction {group['direction']!r}; choose one of {', '.join(METHODS)}")
    if group["nesterov"] and group["compact"]:
        raise ValueError("nesterov needs a momentum of its own byte; leave compact or nesterov off")
    if group["steps"] < 1 or group["interval"] < 1:
        raise ValueError("steps and interval must be at least 1")


def roles_of(groups: list[dict[str, Any]]) -> str:
    """The roles of these groups, as a user is told of them."""
    return ", ".join(sorted({group["role"] for group in groups if "role" in group})) or "none: groups made by hand"


def reach(group: dict[str, Any]) -> tuple[float, float]:
    """How far a direction of 1 moves the registers of a group at a step, as its operation takes it, and its scales, in
    octaves: these follow the schedule of the rate, and at a rate of 0 they stay."""
    rate, initial = group["lr"] * group["interval"], group.get("initial_lr", group["lr"])
    octaves = group["scale_rate"] * rate / initial if initial else 0.0
    return rate if group["compact"] else rate * LEAD, octaves
