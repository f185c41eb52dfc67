"""Embeddings of the last few bytes: hashed tables for pairs, triples, … beside the embedding of the byte itself.

A lookup costs no arithmetic, so on a small budget of time this is the cheapest context there is. Hash collisions are
left to the layers above, as in hashed n-gram embeddings generally (Huang et al. 2025, "Over-tokenized transformer").
"""

import functools

import torch
from torch import Tensor, nn

from tritwise.nn.dropout import dropout
from tritwise.nn.linear import TritLinear

_FACTOR = 1000003
_SPREAD = 0x9E3779B1


class NGramEmbedding(nn.Module):
    """Sum over n = 2 … longest of table_n[hash of the last n ids], or a matrix times what all tables have, one after
    the other.

    rows: entries of each table. inner: numbers of an entry, of which `up`, a layer of the class `linear`, makes
    `width`; 0: each has `width`, and they are added. Narrow entries are more for the same bytes, and collide less.
    embedding: TritEmbedding or FloatEmbedding. share: of lookups in each table that find
    nothing in training, so that the layers above learn to do without: tables learn by heart what they meet often.
    ids: int64 [B, P + T], the last T of which are embedded; earlier ones are context -> `dtype` [B, T, width].
    Ids before the start count as a symbol of their own. noise: what the lookups that find nothing are drawn from, of
    `noise_of`; None: all find their rows.
    """

    def __init__(
        self,
        rows: int,
        width: int,
        longest: int,
        *,
        embedding: type[nn.Module],
        linear: type[nn.Module] = TritLinear,
        inner: int = 0,
        group: int = 256,
        share: float = 0.0,
    ) -> None:
        super().__init__()
        self.rows, self.share, own = rows, share, inner or width
        self.tables = nn.ModuleList(embedding(rows, own, group=group, sparse=True) for _ in range(longest - 1))
        self.up = linear(own * (longest - 1), width, group=group) if inner else None

    def forward(
        self, ids: Tensor, time: int, dtype: torch.dtype = torch.float32, noise: Tensor | None = None
    ) -> Tensor:
        # int64 products wrap modulo 2**64 on every device; the lowest bits mix worst and are dropped.
        shifted, code, found = ids + 1, ids + 1, []
        for number, table in enumerate(self.tables):
            shifted = nn.functional.pad(shifted[:, :-1], (1, 0))
            code = code * _FACTOR + shifted
            slot = ((code * _SPREAD) >> 20) % self.rows
            rows = table(slot[:, -time:], dtype)
            if noise is not None and self.share:
                rows = dropout(rows, self.share, noise, -1 - number, rows=True)  # layers have the places from 0 on
            found.append(rows)
        assert found, "an n-gram embedding needs longest >= 2"
        if self.up is not None:
            return self.up(torch.cat(found, dim=-1))
        return functools.reduce(torch.add, found)
