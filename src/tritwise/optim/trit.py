"""The register rule as a torch optimizer: int8 momentum, a direction of unit RMS, stochastic rounding into registers.

For every ternary layer, as soon as backward has made its gradient G:

    momentum  M <- round(decay * M + G)                     int8, one power-of-two exponent a row
    scales    the same for the gradient of the scale exponents

and at `step()`:

    direction U <- orthogonalised (or row/column-normalised, …) M, unit RMS
    registers R <- clamp(R - round(rate * 81 * U), +-121)   the leading trit of R is the weight
    exponents E <- E - scale_rate * 8 * u                   an integer; what is less than one step of it is kept as
                                                            evidence, an int8 of 1/256 steps, as a register keeps it

A compact layer keeps momentum and register in one byte, as nibbles (`tritwise.registers.nibble`): half the state.

`round` is stochastic and counter-based. The gradient is let go of at once: memory never holds two. Source: DESIGN.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tritwise import ops
from tritwise.nn import TritModule, trit_modules
from tritwise.ops import gpu, nibble
from tritwise.ops.direction import METHODS
from tritwise.ops.update.reference import EXPONENT_FLOOR
from tritwise.optim.live import Live
from tritwise.optim.moves import RecordedMoves
from tritwise.optim.scales import ScaleMoves, make_scale_state, scale_grads, scale_sets
from tritwise.registers import LEAD, Key, Place, make_key, to_nibbles

# Streams of randomness of one tensor at one step; micro-batches count up from the last. Those of columns count down.
_MOVE, _MOVE_SCALE, _ACCUMULATE, _MOVE_COLUMN, _ACCUMULATE_COLUMN = 0, 1, 2, -1, -2
_NO_STEP = -1  # in the key of a compact layer: its rounding counts steps by phase

# Weights that move in one call on a GPU: their directions are held at once, about 10 bytes each.
_TOGETHER = 1 << 25

# Row/column beats Newton-Schulz where rows are symbols: a rare row gets its step whatever the others do.
ROLE_DEFAULTS: dict[str, dict[str, Any]] = {
    "embedding": {"direction": "row_column", "row_memory": 0.0},
    "head": {"direction": "row_column", "row_memory": 0.0},
    # A vector's register is its number: it moves a little at every step, and has neither a scale nor spare bits.
    "vector": {"direction": "rms", "interval": 1, "scale_rate": 0.0, "compact": False, "row_memory": 0.0},
}
ROLE_RATES = {"embedding": 2.0, "head": 2.0}
"""Rates of roles over that of matrices, unless given: docs/RULE.md."""


class TritOptimizer(torch.optim.Optimizer):
    """Trains every ternary layer of a model. State: 1 byte a weight for momentum, beside the register's own byte.

    layers: a model, an iterable of TritModule, or a list of groups {"params": [TritModule, …], "lr": …, …}. A model or
        an iterable is split into one group per declared role (matrix, embedding, head).
    rate: step of a register in leading-trit units for a direction of 1; stored as "lr", so torch's schedulers work.
    momentum: decay of the int8 momentum. scale_rate: step of a scale in octaves (0: scales stay).
    direction: of the groups that have no other by default (ROLE_DEFAULTS), one of `tritwise.ops.direction.METHODS`;
        steps: Newton-Schulz steps. row_memory: rows of the direction are divided by the root of a running mean of their
        squares, and this is its decay; it takes two bytes a row. 0: they are not.
    roles: settings for single roles, such as {"embedding": {"direction": "row_column", "rate": 0.01}}.
    interval: a layer moves at every interval-th step, by interval times as much; layers take turns.
    compact: register and momentum share one byte a weight, in 15 steps each, beside an exponent for 32 weights: half
        the state for a little loss. Only for dense layers; their registers become nibbles, with the same trits.
    seed: of the stochastic rounding.

    Gradient accumulation: call backward several times before `step()`, each with loss / count. Every micro-batch is
    added into the integer momentum. `zero_grad` is not needed. On a GPU neither consuming a gradient nor a step waits
    for the device, unless a layer is sparse.
    Raises ValueError for a rate, momentum or direction that cannot work.
    """

    def __init__(
        self,
        layers: nn.Module | Iterable[TritModule] | list[dict[str, Any]],
        rate: float = 0.03,
        *,
        momentum: float = 0.9,
        scale_rate: float = 0.005,
        direction: str = "balanced",
        steps: int = 3,
        row_memory: float = 0.0,
        interval: int = 1,
        compact: bool = False,
        roles: dict[str, dict[str, Any]] | None = None,
        seed: int = 0,
    ) -> None:
        defaults = {
            "lr": rate,
            "momentum": momentum,
            "scale_rate": scale_rate,
            "direction": direction,
            "steps": steps,
            "row_memory": row_memory,
            "interval": interval,
            "compact": compact,
            "seed": seed,
            "step": 0,
            "skipped": 0,
        }
        _check(defaults)
        self._layers: dict[Tensor, TritModule] = {}
        self._group_of: dict[Tensor, int] = {}  # by index: load_state_dict puts new dicts in the place of the groups
        self._number: dict[Tensor, int] = {}
        self._received: dict[Tensor, int] = {}
        self._taken: list[Tensor] = []
        self._touched: dict[Tensor, Tensor] = {}
        self._uncounted: Tensor | None = None  # skipped steps that the host has not read yet
        self._live: Live | None = None
        self._records = False
        self._moves: RecordedMoves | None = None
        self.records_moves = False
        """Whether the moves of a step are recorded as a CUDA graph where they can be; it keeps memory for them."""
        self.version = 0
        """Counts what makes a recorded step stale: changed groups or settings, tensors in the place of others."""
        self.flips_by_layer: dict[TritModule, Tensor] = {}
        super().__init__(_groups(layers, roles or {}, rate), defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add {"params": [TritModule, …], …settings}. The layers' gradients come here from now on."""
        layers = list(param_group["params"])
        for layer in layers:
            if not isinstance(layer, TritModule):
                raise ValueError(f"TritOptimizer trains ternary layers, not {type(layer).__name__}; give it to AdamW")
        settings = {k: v for k, v in param_group.items() if k not in ("params", "rate")}
        if "rate" in param_group:
            settings["lr"] = param_group["rate"]
        merged = self.defaults | settings
        _check(merged)
        if merged["compact"]:
            if any(layer.sparse for layer in layers):
                raise ValueError(
                    "a sparse layer cannot be compact; make it with sparse=False, or take it out of the group"
                )
            _drop_momentum(layers)
        self.version += 1
        super().add_param_group({"params": [layer.register for layer in layers], **settings})
        for layer in layers:
            self._layers[layer.register] = layer
            self._group_of[layer.register] = len(self.param_groups) - 1
            self._number[layer.register] = len(self._number)
            layer.consumer = lambda layer, grad: self.consume([layer], [grad])

    @property
    def layers(self) -> list[TritModule]:
        """The layers that this trains, group by group."""
        return [self._layers[register] for group in self.param_groups for register in group["params"]]

    @property
    def step_count(self) -> int:
        """Steps taken, the skipped ones included."""
        return self.param_groups[0]["step"]

    @property
    def skipped(self) -> int:
        """Steps at which nothing moved because a gradient held a NaN or an infinity."""
        if self._uncounted is not None:
            count = int(self._uncounted)
            self._uncounted.zero_()
            for group in self.param_groups:
                group["skipped"] += count
        return self.param_groups[0]["skipped"]

    @property
    def flips(self) -> int:
        """Leading trits that changed at the last step."""
        return sum(int(flips) for flips in self.flips_by_layer.values())

    def configure(self, role: str | None = None, **settings: Any) -> None:
        """Change settings between steps: those of `__init__` but for roles, of all groups or of those of one role.

        A new rate is that of matrices, or of the role that is named, and schedules start from it. ValueError for an
        unknown role or setting, or a value that cannot work; then nothing has changed.
        """
        groups = [group for group in self.param_groups if role is None or group.get("role") == role]
        if not groups:
            raise ValueError(f"no group has the role {role!r}; choose one of {_roles_of(self.param_groups)}")
        unknown = set(settings) - set(_SETTINGS)
        if unknown:
            raise ValueError(f"there is no setting {sorted(unknown)[0]!r}; choose one of {', '.join(_SETTINGS)}")
        changed = []
        _check(
            self.defaults
            | {name: settings[name] for name in settings if name != "rate"}
            | {"lr": settings.get("rate", 0.0)}
        )
        for group in groups:
            own = {name: value for name, value in settings.items() if name != "rate"}
            if "rate" in settings:
                factor = ROLE_RATES.get(group.get("role", ""), 1.0) if role is None else 1.0
                own["lr"] = own["initial_lr"] = settings["rate"] * factor
            changed.append(own)
        self.version += 1
        for group, own in zip(groups, changed, strict=True):
            group.update(own)

    def reset_runtime_state(self) -> None:
        """Forget what is not a weight: momentum, the evidence of scales, gradients taken since the last step, and the
        counts of steps and skipped steps. Registers, scale exponents and settings stay."""
        self.state.clear()
        for pending in (self._received, self._taken, self._touched, self.flips_by_layer):
            pending.clear()
        self._uncounted = None
        self.version += 1
        for group in self.param_groups:
            group["step"] = group["skipped"] = 0
            if group["compact"]:
                _drop_momentum([self._layers[register] for register in group["params"]])

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with every skipped step counted."""
        _ = self.skipped
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's."""
        self.version += 1
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            group.setdefault("row_memory", 0.0)  # of before there was one

    @property
    def recordable(self) -> bool:
        """Whether a step can be recorded in a CUDA graph: every layer moves at every step, by the same calls."""
        plain = all(group["interval"] == 1 for group in self.param_groups)
        return plain and not any(layer.sparse for layer in self.layers)

    @contextmanager
    def recording(self) -> Iterator[list[Tensor]]:
        """Inside, `consume` and `step` take what changes from step to step from the device, and count no steps: so they
        can be recorded in a CUDA graph. Before each replay call `before_replay`. Yields every tensor that they change,
        for whoever tries a step first and wants to take it back. Only for optimizers that are `recordable`."""
        self._tell()
        if self._uncounted is None:
            self._uncounted = torch.zeros(1, dtype=torch.int64, device=self._numbers().device)
        changed = [self._uncounted]
        for group in self.param_groups:
            for layer in (self._layers[register] for register in group["params"]):
                state = self._state_of(layer, self._learns_scale(layer))
                changed += [layer.register, *layer.exponents(), *state.values()]
        with self._reading_the_device():
            yield changed

    @contextmanager
    def _reading_the_device(self) -> Iterator[None]:
        self._numbers()
        self._records = True
        try:
            yield
        finally:
            self._records = False

    def _numbers(self) -> Live:
        if self._live is None or len(self._live.rates) != len(
            self.param_groups
        ):  # all recordings read the same numbers
            self._live = Live(next(iter(self._layers)).device, len(self.param_groups))
        return self._live

    def _tell(self) -> None:
        """Tell the device the step's number and rates."""
        self._numbers().write(self.step_count, [_reach(group) for group in self.param_groups])

    def before_replay(self) -> None:
        """Tell the device the step's number and rates, and count the step that a replay now takes."""
        self._tell()
        for group in self.param_groups:
            group["step"] += 1

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

    @torch.no_grad()
    def consume(self, layers: Sequence[TritModule], grads: Sequence[Tensor]) -> None:
        """Take gradients, dL/dW float32 [rows, columns] of each layer, into the momenta. Called from backward with one
        layer at a time, once for every micro-batch; or for many at once by whoever kept the gradients."""
        calls: dict[float, list[tuple[Tensor, Tensor, Tensor, Place]]] = {}  # decay -> what is accumulated with it
        compact: dict[
            tuple[float, int], list[tuple[Tensor, Tensor, Tensor, Tensor, Key]]
        ] = {}  # decay, phase -> the same
        for layer, grad, scale_parts in zip(layers, grads, self._scale_grads(layers, grads), strict=True):
            register = layer.register
            group, micro = self._settings_of(register), self._received.get(register, 0)
            self._received[register] = micro + 1
            decay = group["momentum"] if micro == 0 else 1.0
            state, stream = self._state_of(layer, self._learns_scale(layer)), _ACCUMULATE + 3 * micro
            where = (group["seed"], group["step"], self._number[register])
            if layer.sparse:
                self._accumulate_rows(register, state, grad, group["momentum"], where, stream)
            elif group["compact"]:
                key = make_key(group["seed"], _NO_STEP, self._number[register], stream)
                nibbles = (register, state["row_exponent"], state["group_exponent"], grad, key)
                compact.setdefault((decay, group["step"]), []).append(nibbles)
            else:
                entry = (state["momentum"], state["row_exponent"], grad, Place(*where, stream))
                calls.setdefault(decay, []).append(entry)
            if scale_parts:
                streams = (stream + 2, _ACCUMULATE_COLUMN - micro)
                for one, part, own in zip(scale_sets(layer, state), scale_parts, streams, strict=False):
                    calls.setdefault(decay, []).append((one.momentum, one.row_exponent, part, Place(*where, own)))
        for decay, entries in calls.items():
            momenta, exponents, gradients, places = zip(*entries, strict=True)
            keys = self._keys(places)
            self._taken.append(ops.accumulate_momentum_many(momenta, exponents, gradients, decay, keys))
        for (decay, phase), entries in compact.items():
            registers, rows, groups, gradients, keys = zip(*entries, strict=True)
            when = self._phase(phase)
            self._taken.append(ops.accumulate_nibble_many(registers, rows, groups, gradients, decay, keys, when))

    def _learns_scale(self, layer: TritModule) -> bool:
        return layer.learns_scale and self._settings_of(layer.register)["scale_rate"] > 0

    def _scale_grads(self, layers: Sequence[TritModule], grads: Sequence[Tensor]) -> list[list[Tensor]]:
        """Gradients of the scales of each layer (see `scale_grads`), nothing where they do not learn."""
        learn = [number for number, layer in enumerate(layers) if self._learns_scale(layer)]
        found: list[list[Tensor]] = [[] for _ in layers]
        for number, own in zip(learn, scale_grads([layers[n] for n in learn], [grads[n] for n in learn]), strict=True):
            found[number] = own
        return found

    def _accumulate_rows(
        self,
        register: Tensor,
        state: dict[str, Tensor],
        grad: Tensor,
        decay: float,
        where: tuple[int, int, int],
        stream: int,
    ) -> None:
        """The same for the rows that have a gradient, and only those. A row decays when a step first touches it."""
        used_V = grad.abs().amax(dim=1) != 0  # true for NaN as well: such a row is refused below
        known_V = self._touched.get(register)
        parts = [(used_V, decay)] if known_V is None else [(used_V & ~known_V, decay), (used_V & known_V, 1.0)]
        for part, (mask_V, factor) in enumerate(parts):
            rows = mask_V.nonzero()[:, 0]
            if rows.numel():
                momentum, exponent = state["momentum"][rows], state["row_exponent"][rows]
                key = make_key(*where, stream + part)
                self._taken.append(ops.accumulate_momentum(momentum, exponent, grad[rows], factor, key).view(1))
                state["momentum"][rows], state["row_exponent"][rows] = momentum, exponent
        self._touched[register] = used_V if known_V is None else used_V | known_V

    def refuse(self) -> None:
        """Let the next `step()` move nothing and count as skipped: for a loss that is no number, before backward."""
        self._taken.append(torch.zeros(1, dtype=torch.bool, device=next(iter(self._layers)).device))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move the registers of every layer that received a gradient since the last step; returns closure's loss.

        If any gradient held a NaN or an infinity nothing moves, `skipped` counts it, and the step still counts.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        go = torch.cat(self._taken).all() if self._taken else None
        known = True  # whether something may move, as far as the host knows without asking a GPU
        if go is not None and go.is_cuda:
            if self._uncounted is None:
                self._uncounted = torch.zeros(1, dtype=torch.int64, device=go.device)
            self._uncounted += ~go
        elif go is not None and not bool(go):
            known = False
            for group in self.param_groups:
                group["skipped"] += 1
        self.flips_by_layer = {}
        if known and go is not None and self._moves_are_recorded(go):
            if self._moves is None:
                self._moves = RecordedMoves(go.device)
            key = tuple(group["step"] % group["interval"] for group in self.param_groups)
            given = self._move_all, self._reading_the_device, self._tell
            self.flips_by_layer = self._moves.make(key, self.version, go, *given)
        elif known:
            self.flips_by_layer = self._move_all(go)
        if not self._records:
            for group in self.param_groups:
                group["step"] += 1
        self._received.clear()
        self._taken.clear()
        self._touched.clear()
        return loss

    def _moves_are_recorded(self, go: Tensor) -> bool:
        """Whether this step's moves can be recorded, or come from a recording: those of every layer, on a GPU."""
        if not self.records_moves or self._records or not go.is_cuda or len(self._received) < len(self._layers):
            return False
        alike = len({group["step"] for group in self.param_groups}) == 1
        return alike and not any(layer.sparse for layer in self._layers.values())

    def _move_all(self, go: Tensor | None) -> dict[TritModule, Tensor]:
        """Move every layer whose turn it is; returns the flips of each."""
        flips: dict[TritModule, Tensor] = {}
        lots = [(index, lot) for index, group in enumerate(self.param_groups) for lot in self._batches(group)]
        places = [self._place(layer, _MOVE) for index, lot in lots if not self._is_compact(index) for layer in lot]
        keys, scales = self._keys(places) if places else [], ScaleMoves()
        for index, lot in lots:
            if self._is_compact(index):
                flips |= self._move(index, lot, scales, [], go)
            else:
                flips |= self._move(index, lot, scales, keys[: len(lot)], go)
                keys = keys[len(lot) :]
        if scales.groups:
            if self._live is not None and self._records:
                groups = gpu.upload([scales.groups], self._live.device)[0]
                octaves = self._live.rates[:, 1].index_select(0, groups)
            else:
                octaves = [_reach(self.param_groups[index])[1] for index in scales.groups]
            scales.make(octaves, self._keys(scales.places), go)
        return flips

    def _is_compact(self, index: int) -> bool:
        return self.param_groups[index]["compact"]

    def _place(self, layer: TritModule, stream: int) -> Place:
        group = self._settings_of(layer.register)
        return Place(group["seed"], group["step"], self._number[layer.register], stream)

    def _batches(self, group: dict[str, Any]) -> Iterator[list[TritModule]]:
        """The layers of a group that move at this step, in lots that move in one call."""
        batch: list[TritModule] = []
        for register in group["params"]:
            if register not in self._received or (group["step"] + self._number[register]) % group["interval"]:
                continue
            layer = self._layers[register]
            if layer.sparse or not register.is_cuda:
                yield [layer]
                continue
            if batch and sum(other.register.numel() for other in batch) + register.numel() > _TOGETHER:
                yield batch
                batch = []
            batch.append(layer)
        if batch:
            yield batch

    def _move(
        self,
        index: int,
        layers: list[TritModule],
        scales: ScaleMoves,
        keys: Sequence[Key] | Tensor,
        go: Tensor | None,
    ) -> dict[TritModule, Tensor]:
        """Move the registers of layers of a group that are all dense, or of one sparse layer; their scales go into
        `scales`. keys: one for each, unless the group is compact. Returns the flips."""
        group, registers = self.param_groups[index], [layer.register for layer in layers]
        states = [self._state_of(layer, scales=False) for layer in layers]
        exponents, rows = [s["row_exponent"] for s in states], None
        levels = [s["row_level"] for s in states] if group["row_memory"] else []
        if group["compact"]:
            # Without the exponents of rows, which the direction takes by themselves, nothing can under- or overflow.
            level = [torch.zeros_like(e) for e in exponents]
            momenta = ops.momentum_of_many(registers, level, [s["group_exponent"] for s in states])
        else:
            momenta = [s["momentum"] for s in states]
        if layers[0].sparse:
            rows = self._touched[registers[0]].nonzero()[:, 0]
            if not rows.numel():
                return {}
            registers, momenta, exponents = [registers[0][rows]], [momenta[0][rows]], [exponents[0][rows]]
            levels = [level[rows] for level in levels]
        blocks, how = [layer.blocks for layer in layers], (group["direction"], group["steps"])
        directions = ops.direction_many(momenta, exponents, *how, blocks, levels, group["row_memory"], go)
        if self._live is not None and self._records:
            rates: Sequence[float] | Tensor = self._live.rates[index, 0].expand(len(layers))
        else:
            rates = [_reach(group)[0]] * len(layers)
        if group["compact"]:
            phase = self._phase(group["step"]) // group["interval"]
            keys = [make_key(group["seed"], _NO_STEP, self._number[layer.register], _MOVE) for layer in layers]
            flips = ops.move_nibbles_many(registers, directions, rates, keys, phase, go)
        else:
            flips = ops.move_registers_many(registers, directions, rates, keys, go=go)
        if rows is not None:
            layers[0].register[rows] = registers[0]
            for state, level in zip(states, levels, strict=False):
                state["row_level"][rows] = level
        for layer in layers:
            if self._learns_scale(layer):
                places = [self._place(layer, stream) for stream in (_MOVE_SCALE, _MOVE_COLUMN)]
                scales.add(layer, self.state[layer.register], index, places, rows)
        return dict(zip(layers, flips, strict=True))


def _reach(group: dict[str, Any]) -> tuple[float, float]:
    """How far a direction of 1 moves the registers of a group at a step, as its operation takes it, and its scales, in
    octaves: these follow the schedule of the rate, and at a rate of 0 they stay."""
    rate, initial = group["lr"] * group["interval"], group.get("initial_lr", group["lr"])
    octaves = group["scale_rate"] * rate / initial if initial else 0.0
    return rate if group["compact"] else rate * LEAD, octaves


@torch.no_grad()
def _drop_momentum(layers: Iterable[TritModule]) -> None:
    """Five-trit registers become nibbles of the same trits; what are nibbles already lose their momentum alone."""
    for layer in layers:
        layer.register.copy_(to_nibbles(layer.register))


def _groups(
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


def _check(group: dict[str, Any]) -> None:
    for name in ("lr", "scale_rate"):
        if not 0 <= group[name] < float("inf"):
            raise ValueError(f"{'rate' if name == 'lr' else name} is {group[name]}; it must be 0 or more and finite")
    for name in ("momentum", "row_memory"):
        if not 0 <= group[name] < 1:
            raise ValueError(f"{name} is {group[name]}; it must be at least 0 and below 1")
    if group["direction"] not in METHODS:
        raise ValueError(f"there is no direction {group['direction']!r}; choose one of {', '.join(METHODS)}")
    if group["steps"] < 1 or group["interval"] < 1:
        raise ValueError("steps and interval must be at least 1")


_SETTINGS = ("rate", "momentum", "scale_rate", "direction", "steps", "row_memory", "interval", "seed")


def _roles_of(groups: list[dict[str, Any]]) -> str:
    return ", ".join(sorted({group["role"] for group in groups if "role" in group})) or "none: groups made by hand"
