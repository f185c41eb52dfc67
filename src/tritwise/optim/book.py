"""What a TritOptimizer knows of each layer, and where a step reads what changes from step to step."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tritwise import ops
from tritwise.nn import TritModule
from tritwise.ops import nibble
from tritwise.ops.update.reference import EXPONENT_FLOOR
from tritwise.optim.groups import reach
from tritwise.optim.live import Live
from tritwise.optim.rows import Rows, gathered, in_place, used_first
from tritwise.optim.scales import make_scale_state
from tritwise.registers import Key, Place, make_key

NO_STEP = -1
"""In the key of a compact layer: its rounding counts steps by phase."""


class Book(torch.optim.Optimizer):
    """The part of a TritOptimizer that its other parts share: layers, their numbers and state, keys and rates."""

    _layers: dict[Tensor, TritModule]  # by their registers, as everything here
    _group_of: dict[Tensor, int]  # by index: load_state_dict puts new dicts in the place of the groups
    _number: dict[Tensor, int]
    _received: dict[Tensor, int]  # micro-batches since the last step
    _taken: list[Tensor]  # bool [tensors], whether a gradient was a number
    _touched: dict[Tensor, Tensor]  # bool [rows] of sparse layers
    _masks: dict[Tensor, Tensor]  # where those lie: at every step there, as recorded moves read them
    _lookahead: dict[Tensor, tuple[Tensor, Tensor]]  # momentum and row exponents for a direction, within a step
    _live: Live | None
    _records: bool

    @property
    def step_count(self) -> int:
        """Steps taken, the skipped ones included."""
        return self.param_groups[0]["step"]

    @contextmanager
    def _reading_the_device(self) -> Iterator[None]:
        self._numbers()
        self._records = True
        try:
            yield
        finally:
            self._records = False

    def _numbers(self) -> Live:
        """Where all recordings read the step's number and rates."""
        groups = len(self.param_groups)
        if self._live is None or len(self._live.rates) != groups:
            self._live = Live(next(iter(self._layers)).device, groups)
        return self._live

    def _tell(self) -> None:
        """Tell the device the step's number and rates."""
        self._numbers().write(self.step_count, [reach(group) for group in self.param_groups])

    def _keys(self, places: Sequence[Place]) -> list[Key] | Tensor:
        if self._records:
            assert self._live is not None
            return self._live.keys(places)
        return [make_key(*place) for place in places]

    def _phase(self, phase: int) -> int | Tensor:
        """What a compact layer's rounding takes as its phase, where one is counted at every step."""
        return phase if self._live is None or not self._records else self._live.step

    def _state_of(self, layer: TritModule, scales: bool) -> dict[str, Tensor]:
        state, register = self.state[layer.register], layer.register
        if "row_exponent" not in state and self._settings_of(register)["compact"]:
            state["row_exponent"] = torch.full_like(register[:, :1], nibble.EXPONENT_FLOOR)
            state["group_exponent"] = torch.zeros_like(register[:, :: nibble.GROUP])
        elif "row_exponent" not in state:
            state["momentum"] = torch.zeros_like(register)
            state["row_exponent"] = torch.full_like(register[:, :1], EXPONENT_FLOOR)
        if self._settings_of(register)["row_memory"] and "row_level" not in state:
            state["row_level"] = torch.full_like(register[:, :1], ops.LEVEL_FLOOR, dtype=torch.int16)
        if scales:
            make_scale_state(layer, state)
        return state

    def _settings_of(self, register: Tensor) -> dict[str, Any]:
        return self.param_groups[self._group_of[register]]

    def _learns_scale(self, layer: TritModule) -> bool:
        return layer.learns_scale and self._settings_of(layer.register)["scale_rate"] > 0

    def _moves_now(self, register: Tensor) -> bool:
        """Whether it is this layer's turn to move at this step."""
        group = self._settings_of(register)
        return (group["step"] + self._number[register]) % group["interval"] == 0

    def _in_place(self, layer: TritModule) -> bool:
        """Whether a sparse layer is worked on as a whole. What rows remember is of a direction's own size, which
        depends on how many rows have one: then they are gathered."""
        return in_place(layer.register) and not self._settings_of(layer.register)["row_memory"]

    def _rows(self, layer: TritModule, used_V: Tensor) -> Rows | None:
        """The rows of a sparse layer that `used_V`, bool [V], names; None if it is known that there are none."""
        return used_first(used_V) if self._in_place(layer) else gathered(used_V)

    def _place(self, layer: TritModule, stream: int) -> Place:
        group = self._settings_of(layer.register)
        return Place(group["seed"], group["step"], self._number[layer.register], stream)
