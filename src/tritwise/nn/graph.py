"""A graph over the bytes of a text: messages from neighbours, and from what followed the same few bytes before.

Shape suffixes: B batch, P positions before those that are asked for, T positions asked for, S = P + T, C channels,
R relations, E edges.
"""

import torch
from torch import Tensor, nn

from tritwise import ops
from tritwise.nn.linear import TritLinear
from tritwise.nn.norm import rms_norm

_FACTOR = 1000003  # spreads ids over a code: as large as a vocabulary may be, and odd


def neighbours(batch: int, time: int, distance: int, device: torch.device | str = "cpu") -> Tensor:
    """For every node b * time + t the node `distance` positions before it, or -1: int64 [batch * time]."""
    position_T = torch.arange(time, device=device)
    before_BT = torch.arange(batch, device=device)[:, None] * time + position_T - distance
    return torch.where(position_T >= distance, before_BT, -1).flatten()


def recurrences(ids_BS: Tensor, order: int, most: int) -> tuple[Tensor, Tensor]:
    """Edges (source, target), int64 [most * B * S] each, from what followed earlier occurrences of the same n-gram.

    Position t receives from s + 1 for the `most` latest s < t at which the last `order` ids were the same as at t. A
    missing edge is (-1, -1). No edge comes from the future: s + 1 <= t.
    """
    batch, time = ids_BS.shape
    code_BS = ids_BS
    for back in range(1, order):
        code_BS = (
            code_BS * _FACTOR + torch.nn.functional.pad(ids_BS[:, :-back], (min(back, time), 0), value=-1)[:, :time]
        )
    # Sorted by n-gram, and among equal ones by place, the latest earlier occurrence is the neighbour in this order.
    code_N = _ranks(code_BS.flatten()) * batch + torch.arange(batch, device=ids_BS.device).repeat_interleave(time)
    place_N = torch.argsort(code_N, stable=True)
    sorted_N = code_N[place_N]
    whole_N = place_N % time >= order - 1  # an n-gram that begins before the text is none
    sources, targets = [], []
    for k in range(1, most + 1):
        earlier_N = torch.roll(place_N, k)
        same_N = (torch.roll(sorted_N, k) == sorted_N) & whole_N & torch.roll(whole_N, k)
        same_N[:k] = False
        sources.append(torch.where(same_N, earlier_N + 1, -1))
        targets.append(torch.where(same_N, place_N, -1))
    return torch.cat(sources), torch.cat(targets)


def _ranks(code_N: Tensor) -> Tensor:
    """Small numbers in the place of codes, equal for equal ones: they leave room for the row."""
    order_N = torch.argsort(code_N, stable=True)
    new_N = torch.ones_like(code_N)
    new_N[1:] = (code_N[order_N][1:] != code_N[order_N][:-1]).to(code_N.dtype)
    return torch.empty_like(code_N).scatter_(0, order_N, new_N.cumsum(0))


class TritGraph(nn.Module):
    """x[t] + sum over relations r of W_r (mean of rms_norm(x)[s] over the edges s -> t of r), with ternary W_r.

    Relations: the positions 1 … reach before; and what followed the `most` latest earlier occurrences of the n-gram
    that ends here, for each n of `orders`. No edge leads back in time, so a model stays causal.

    A message is made once for every node that sends it, gathered along the edges and added up where it arrives
    (`ops.gather_add`, `ops.edge_sum`). `linear` makes W [R * C, C]: TritLinear, or FloatLinear for the float twin.
    """

    def __init__(
        self,
        width: int,
        *,
        reach: int = 1,
        orders: tuple[int, ...] = (3,),
        most: int = 2,
        linear: type[nn.Module] = TritLinear,
        group: int = 256,
    ) -> None:
        super().__init__()
        self.reach, self.orders, self.most = reach, orders, most
        self.relations = reach + len(orders)
        if self.relations < 1 or most < 1:
            raise ValueError("a graph needs an edge; give it a reach or orders, and a `most` of at least 1")
        self.message = linear(width, self.relations * width, group=group, blocks=self.relations)

    def forward(self, x_BSC: Tensor, ids_BS: Tensor) -> Tensor:
        """The nodes after one round of messages. x: [B, S, C]; ids: int64 [B, S] -> [B, S, C]."""
        batch, time, width = x_BSC.shape
        nodes = batch * time
        messages_NRC = self.message(rms_norm(x_BSC)).view(nodes, self.relations, width)
        y_NC = x_BSC.reshape(nodes, width)
        for distance in range(1, self.reach + 1):
            index_N = neighbours(batch, time, distance, x_BSC.device)
            y_NC = ops.gather_add(y_NC, messages_NRC[:, distance - 1], index_N)
        for number, order in enumerate(self.orders, start=self.reach):
            source_E, target_E = recurrences(ids_BS, order, self.most)
            count_N = torch.zeros(nodes + 1, device=x_BSC.device).index_add_(
                0, target_E + 1, torch.ones(len(target_E), device=x_BSC.device)
            )[1:]
            total_NC = ops.edge_sum(messages_NRC[:, number], source_E, target_E, nodes)
            y_NC = y_NC + total_NC / count_N.clamp(min=1)[:, None].to(total_NC.dtype)
        return y_NC.view(batch, time, width)
