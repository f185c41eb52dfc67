"""Embeddings: `TritEmbedding`, and `FloatEmbedding`, its float twin for baselines."""

from typing import Any

import torch
from torch import Tensor, nn

from tritwise import ops
from tritwise.nn.trit import TritModule


class TritEmbedding(TritModule):
    """Rows of a ternary table W [num_embeddings, embedding_dim], of unit variance at the start.

    ids: int64 [...] in 0 … num_embeddings-1 -> `dtype` [..., embedding_dim], float32 if nothing is said.
    sparse: rows that a step did not use keep their momentum and do not move, which costs nothing in large tables.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        role: str = "embedding",
        group: int = 256,
        sparse: bool = False,
        weight_trits: int = 1,
    ) -> None:
        how: dict[str, Any] = {"group": group, "sparse": sparse, "weight_trits": weight_trits}
        super().__init__(num_embeddings, embedding_dim, role=role, fan_in=1, **how)

    def forward(self, ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        how = self.group, self.port, dtype, self.lead
        return self.scale_columns(ops.embedding(ids, self.register, self.exponent, *how))


class FloatEmbedding(nn.Module):
    """The same table with float weights, normal of unit variance. `group` and `sparse` mean nothing here."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        role: str = "embedding",
        group: int = 256,
        sparse: bool = False,
    ) -> None:
        super().__init__()
        self.roles = {"weight": role}
        self.weight = nn.Parameter(torch.empty(num_embeddings, embedding_dim).normal_())

    def forward(self, ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        return nn.functional.embedding(ids, self.weight).to(dtype)
