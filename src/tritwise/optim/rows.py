"""Rows of a sparse layer that a step used, brought together to be worked on, and put back.

On a CPU the rows in use are gathered. To know how many there are a host would have to wait for its GPU; there the whole
table is worked on, its rows in another order: those in use first, which then get the random bits that they would get if
they were gathered.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

IN_PLACE = 1 << 26
"""Numbers of a table at most that is worked on as a whole; of a larger one few rows are in use."""


class Rows(Protocol):
    """Some rows of tables [V, …] of one layer."""

    def front(self, table: Tensor) -> Tensor:
        """A copy of the rows, in their order; others may follow."""
        ...

    def put_back(self, changed: Tensor, table: Tensor) -> None:
        """Write the rows of `changed`, which `front` gave, into `table`; others stay."""
        ...

    def blank(self, changed: Tensor, value: int) -> None:
        """Set what follows the rows in `changed`, which `front` gave, to `value`."""
        ...

    def scale(self, direction: Tensor) -> None:
        """Bring a direction of unit RMS over all that `front` gave to unit RMS over the rows."""
        ...


class Gathered(NamedTuple):
    """Rows by their numbers, int64 [R], and nothing else."""

    rows_R: Tensor

    def front(self, table: Tensor) -> Tensor:
        return table[self.rows_R]

    def put_back(self, changed: Tensor, table: Tensor) -> None:
        table[self.rows_R] = changed

    def blank(self, changed: Tensor, value: int) -> None:
        """Nothing follows."""

    def scale(self, direction: Tensor) -> None:
        """It is of unit RMS over the rows."""


class UsedFirst(NamedTuple):
    """All rows [V], those in use first, both kinds in order. front_V: int64, the row at each place. place_V: int64, the
    place of each row. used_V: bool. share: float32 0-d, of the rows in use among all."""

    front_V: Tensor
    place_V: Tensor
    used_V: Tensor
    share: Tensor

    def front(self, table: Tensor) -> Tensor:
        return table.index_select(0, self.front_V)

    def put_back(self, changed: Tensor, table: Tensor) -> None:
        table.copy_(torch.where(self.used_V[:, None], changed.index_select(0, self.place_V), table))

    def blank(self, changed: Tensor, value: int) -> None:
        changed.masked_fill_(~self.front(self.used_V)[:, None], value)

    def scale(self, direction: Tensor) -> None:
        direction.mul_(self.share.sqrt())


def gathered(used_V: Tensor) -> Gathered | None:
    """The rows that `used_V`, bool [V], names; None if there are none. The host waits for the device."""
    rows_R = used_V.nonzero()[:, 0]
    return Gathered(rows_R) if rows_R.numel() else None


def used_first(used_V: Tensor) -> UsedFirst:
    """The order for the rows that `used_V`, bool [V], names. The host does not wait for the device."""
    before_V = used_V.cumsum(0)
    number_V = torch.arange(len(used_V), device=used_V.device)
    place_V = torch.where(used_V, before_V - 1, before_V[-1] + number_V - before_V)
    front_V = torch.empty_like(number_V).scatter_(0, place_V, number_V)
    return UsedFirst(front_V, place_V, used_V, before_V[-1].float() / len(used_V))


def in_front(rows: Mapping[int, Rows], *lists: Sequence[Tensor]) -> list[list[Tensor]]:
    """The same lists of tables, in which those that have rows here, by their numbers, are copies with these in
    front."""
    return [[rows[n].front(table) if n in rows else table for n, table in enumerate(own)] for own in lists]


def in_place(register: Tensor) -> bool:
    """Whether a sparse layer is worked on as a whole, with nothing that a host would wait for."""
    return register.is_cuda and register.numel() <= IN_PLACE
