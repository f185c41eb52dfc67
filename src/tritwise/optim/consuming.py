"""The first half of a TritOptimizer's step: gradients go into momenta, and are let go of."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tritwise import ops
from tritwise.nn import TritModule
from tritwise.optim.book import NO_STEP, Book
from tritwise.optim.rows import Rows
from tritwise.optim.scales import scale_grads, scale_sets
from tritwise.registers import Key, Place, make_key

# Streams of randomness of one tensor at one step, of which moves have others (moving.py); micro-batches count up, those
# of columns down.
_ACCUMULATE, _ACCUMULATE_COLUMN = 2, -2

WAITING = 1 << 26
"""Bytes of gradients on a GPU that wait for others, to be taken in one call."""


class Consuming(Book):
    """Takes gradients, whole or only the rows that have one."""

    _waiting: dict[TritModule, Tensor]

    def take(self, layer: TritModule, grad: Tensor) -> None:
        """`consume` for the gradient that backward has just made. On a GPU small ones wait for each other, as one call
        for many costs as many launches as one for one; no two of one layer wait, nor any beyond `step()`."""
        if (layer.sparse and not self._in_place(layer)) or not self._gathers(grad):
            self.consume([layer], [grad])
            return
        if layer in self._waiting or self.waiting_bytes + grad.nbytes > WAITING:
            self.take_waiting()
        self._waiting[layer] = grad

    @staticmethod
    def _gathers(grad: Tensor) -> bool:
        return grad.is_cuda and grad.nbytes < WAITING

    @property
    def waiting_bytes(self) -> int:
        """Bytes of the gradients that wait."""
        return sum(grad.nbytes for grad in self._waiting.values())

    def take_waiting(self) -> None:
        """Consume the gradients that wait."""
        if self._waiting:
            layers, grads = zip(*self._waiting.items(), strict=True)
            self._waiting.clear()
            self.consume(layers, grads)

    @torch.no_grad()
    def consume(self, layers: Sequence[TritModule], grads: Sequence[Tensor]) -> None:
        """Take gradients, dL/dW float32 [rows, columns] of each layer, into the momenta. Called from backward with one
        layer at a time, once for every micro-batch; or for many at once by whoever kept the gradients."""
        calls: dict[float, list[tuple[Tensor, Tensor, Tensor, Place]]] = {}  # decay -> what is accumulated with it
        compact: dict[
            tuple[float, int], list[tuple[Tensor, Tensor, Tensor, Tensor, Key]]
        ] = {}  # decay, phase -> the same
        put_back: list[tuple[Rows, Tensor, Tensor]] = []  # of sparse layers
        for layer, grad, scale_parts in zip(layers, grads, self._scale_grads(layers, grads), strict=True):
            register = layer.register
            group, micro = self._settings_of(register), self._received.get(register, 0)
            self._received[register] = micro + 1
            decay = group["momentum"] if micro == 0 else 1.0
            state, stream = self._state_of(layer, self._learns_scale(layer)), _ACCUMULATE + 3 * micro
            where = (group["seed"], group["step"], self._number[register])
            if layer.sparse:
                parts = self._used(register, grad, group["momentum"])
                for part, (mask_V, factor) in enumerate(parts):
                    if (rows := self._rows(layer, mask_V)) is not None:
                        momentum, exponent = (rows.front(state[name]) for name in ("momentum", "row_exponent"))
                        put_back += [(rows, momentum, state["momentum"]), (rows, exponent, state["row_exponent"])]
                        own = rows.front(grad if len(parts) == 1 else grad.where(mask_V[:, None], 0.0))
                        calls.setdefault(factor, []).append((momentum, exponent, own, Place(*where, stream + part)))
            elif group["compact"]:
                key = make_key(group["seed"], NO_STEP, self._number[register], stream)
                nibbles = (register, state["row_exponent"], state["group_exponent"], grad, key)
                compact.setdefault((decay, group["step"]), []).append(nibbles)
            else:
                entry = (state["momentum"], state["row_exponent"], grad, Place(*where, stream))
                calls.setdefault(decay, []).append(entry)
                if group["nesterov"] and self._moves_now(register):
                    if micro == 0:
                        self._lookahead[register] = state["momentum"].clone(), state["row_exponent"].clone()
                    # Directions have no size, so a newest gradient that counts more is a momentum that counts less.
                    less = decay * decay / (1 + decay) if micro == 0 else 1.0
                    ahead = (*self._lookahead[register], grad, Place(*where, stream + 1))
                    calls.setdefault(less, []).append(ahead)
            if scale_parts:
                streams = (stream + 2, _ACCUMULATE_COLUMN - micro)
                for one, part, own in zip(scale_sets(layer, state), scale_parts, streams, strict=False):
                    calls.setdefault(decay, []).append((one.momentum, one.row_exponent, part, Place(*where, own)))
        for decay, entries in calls.items():
            momenta, exponents, gradients, places = zip(*entries, strict=True)
            keys = self._keys(places)
            self._taken.append(ops.accumulate_momentum_many(momenta, exponents, gradients, decay, keys))
        for rows, changed, table in put_back:
            rows.put_back(changed, table)
        for (decay, phase), entries in compact.items():
            registers, exponents, groups, gradients, keys = zip(*entries, strict=True)
            when = self._phase(phase)
            self._taken.append(ops.accumulate_nibble_many(registers, exponents, groups, gradients, decay, keys, when))

    def _scale_grads(self, layers: Sequence[TritModule], grads: Sequence[Tensor]) -> list[list[Tensor]]:
        """Gradients of the scales of each layer (see `scale_grads`), nothing where they do not learn."""
        learn = [number for number, layer in enumerate(layers) if self._learns_scale(layer)]
        found: list[list[Tensor]] = [[] for _ in layers]
        for number, own in zip(learn, scale_grads([layers[n] for n in learn], [grads[n] for n in learn]), strict=True):
            found[number] = own
        return found

    def _used(self, register: Tensor, grad: Tensor, decay: float) -> list[tuple[Tensor, float]]:
        """The rows that have a gradient, bool [V], in parts with what their momentum decays by: a row decays when a
        step first touches it."""
        # A row with a NaN is used as well, and refused. On a CPU a norm takes ten times as long.
        if grad.is_cuda:
            used_V = torch.linalg.vector_norm(grad, float("inf"), dim=1) != 0
        else:
            used_V = (grad.amax(dim=1) != 0) | (grad.amin(dim=1) != 0)
        known_V = self._touched.get(register)
        parts = [(used_V, decay)] if known_V is None else [(used_V & ~known_V, decay), (used_V & known_V, 1.0)]
        if register not in self._masks:
            self._masks[register] = torch.empty_like(used_V)
        self._touched[register] = self._masks[register].copy_(used_V if known_V is None else used_V | known_V)
        return parts

    def refuse(self) -> None:
        """Let the next `step()` move nothing and count as skipped: for a loss that is no number, before backward."""
        self._taken.append(torch.zeros(1, dtype=torch.bool, device=next(iter(self._layers)).device))
