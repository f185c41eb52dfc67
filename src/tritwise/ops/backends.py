"""Which implementation of an operation runs: `with backend("…")` > TRITWISE_BACKEND > priority.

Asked for and impossible raises with the reason. Operations that have no backend of the name asked for are chosen
automatically: then the next one in priority is taken and the fallback is said once. `backend_table()` reports what was
chosen, for the run's manifest.
"""

import contextlib
import contextvars
import os
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import NamedTuple

import torch

from tritwise.errors import UserError

ENVIRONMENT = "TRITWISE_BACKEND"


class Backend(NamedTuple):
    """One implementation: a module with the operation's functions, the device types it is made for (none: all), and a
    function that gives the reason why it cannot run on a device (None: it can)."""

    name: str
    module: ModuleType
    priority: int
    devices: tuple[str, ...]
    refuses: Callable[[torch.device], str | None]


_backends: dict[str, dict[str, Backend]] = {}  # operation -> name -> backend, highest priority first
_chosen: dict[str, str] = {}
_warned: set[tuple[str, str]] = set()
_asked: contextvars.ContextVar[str | None] = contextvars.ContextVar("tritwise_backend", default=None)


def implement(
    operation: str,
    name: str,
    module: ModuleType,
    *,
    priority: int = 0,
    devices: tuple[str, ...] = (),
    refuses: Callable[[torch.device], str | None] = lambda device: None,
) -> None:
    """Add an implementation of `operation`. Higher priority is tried first when nobody asks for a name.

    A backend made for other `devices` is passed over in silence then; one that refuses its own device says why.
    """
    table = _backends.get(operation, {}) | {name: Backend(name, module, priority, devices, refuses)}
    _backends[operation] = dict(sorted(table.items(), key=lambda entry: -entry[1].priority))


def backends_of(operation: str) -> list[str]:
    """Names of the implementations of `operation`, highest priority first."""
    return list(_backends[operation])


def backend_table() -> dict[str, str]:
    """Operation -> name of the backend that last ran, for the manifest; operations that have not run are left out."""
    return dict(sorted(_chosen.items()))


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Ask for one backend by name within the block. UserError at once if no operation has a backend of that name."""
    _check_name(name)
    token = _asked.set(name)
    try:
        yield
    finally:
        _asked.reset(token)


def _check_name(name: str) -> None:
    known = sorted({b for table in _backends.values() for b in table})
    if name not in known:
        raise UserError(f"there is no backend {name!r}; choose one of: {', '.join(known)}")


def choose(operation: str, device: torch.device) -> ModuleType:
    """The module that runs `operation` on `device` now. UserError if the backend asked for cannot."""
    table = _backends[operation]
    asked = _asked.get() or os.environ.get(ENVIRONMENT) or None
    if asked is not None:
        _check_name(asked)
        found = table.get(asked)
        # A backend need not implement every operation; the rest are chosen as if nobody had asked.
        if found is not None:
            reason = found.refuses(device)
            if reason:
                raise UserError(f"backend {asked!r} cannot run {operation} on {device}: {reason}")
            _chosen[operation] = asked
            return found.module
    for candidate in table.values():
        if candidate.devices and device.type not in candidate.devices:
            continue
        reason = candidate.refuses(device)
        if reason is None:
            _chosen[operation] = candidate.name
            return candidate.module
        mark = (candidate.name, reason)
        if mark not in _warned:  # once, not once for each operation
            _warned.add(mark)
            warnings.warn(f"{operation} falls back from {candidate.name} on {device}: {reason}", stacklevel=2)
    raise UserError(f"no backend can run {operation} on {device}; use a CPU or CUDA device")
