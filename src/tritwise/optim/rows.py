"""Rows of a sparse layer that a step used: gathered when the host knows them, or brought to the front where they lie.

On a CPU the rows in use are gathered, worked on and put back. To know how many there are a host would have to wait for
its GPU; there the whole table is worked on instead, its rows in another order: those in use first, which then get the
random bits that they would get if they were gathered.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

IN_PLACE = 1 << 26
"""Numbers of a table at most that is worked on as a whole; of a larger one few rows are in use."""


class Order(NamedTuple):
    """Rows [V] with those in use first, both kinds in order. front_V: int64, the row at each place. place_V: int64, the
    place of each row. used_V: bool. share: float32 0-d, of the rows in use among all."""

    front_V: Tensor
    place_V: Tensor
    used_V: Tensor
    share: Tensor

    def front(self, table: Tensor) -> Tensor:
        """A copy of `table` [V, …] in this order."""
        return table.index_select(0, self.front_V)

    def blank(self, changed: Tensor, value: int) -> None:
        """Set the rows of `changed`, a table [V, 1 or more] in this order, that are not in use to `value`."""
        changed.masked_fill_(~self.front(self.used_V)[:, None], value)

    def put_back(self, changed: Tensor, table: Tensor) -> None:
        """Write the rows in use of `changed`, a table in this order, into `table`; others stay."""
        used = self.used_V.view(-1, *[1] * (table.dim() - 1))
        table.copy_(torch.where(used, changed.index_select(0, self.place_V), table))


def used_first(used_V: Tensor) -> Order:
    """The order for the rows that `used_V`, bool [V], names. The host does not wait for the device."""
    before_V = used_V.cumsum(0)
    number_V = torch.arange(len(used_V), device=used_V.device)
    place_V = torch.where(used_V, before_V - 1, before_V[-1] + number_V - before_V)
    front_V = torch.empty_like(number_V).scatter_(0, place_V, number_V)
    return Order(front_V, place_V, used_V, before_V[-1].float() / len(used_V))


def in_front(orders: Mapping[int, Order], *lists: Sequence[Tensor]) -> list[list[Tensor]]:
    """The same lists of tables, in which those that have an order, by their numbers, are copies in that order."""
    return [[orders[n].front(table) if n in orders else table for n, table in enumerate(own)] for own in lists]


def in_place(register: Tensor) -> bool:
    """Whether a sparse layer is worked on as a whole, with nothing that a host would wait for."""
    return register.is_cuda and register.numel() <= IN_PLACE
