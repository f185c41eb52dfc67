"""Vector quantisation with a ternary codebook: a vector becomes the number of the nearest code, and the code itself.

Shape suffixes: N vectors, D channels, K codes.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from tritwise.nn.embedding import TritEmbedding
from tritwise.registers import EXPONENT_LIMIT, EXPONENTS_PER_OCTAVE, LEAD, REGISTER_LIMIT, scale_values

_WIDE = 1.224
"""Scale over RMS at which rounding normal numbers to -1, 0, 1 times the scale costs the least squared error."""


class Quantised(NamedTuple):
    """vectors: the codes, float [..., D], whose gradient goes straight through to what was quantised. codes: their
    numbers, int64 [...]. loss: 0-d; add it to the loss of a model, or codes and vectors drift apart."""

    vectors: Tensor
    codes: Tensor
    loss: Tensor


class Usage(NamedTuple):
    """used: share of the codes that occur at all. perplexity: of their distribution; K if all are equally frequent."""

    used: float
    perplexity: float


class TritVQ(nn.Module):
    """z [..., D] -> the nearest of `codes` ternary vectors (van den Oord et al. 2017, "Neural discrete representation
    learning"). Codes are rows of `embedding`: TritEmbedding, or FloatEmbedding for the float twin.

    loss = mean (code - sg z)^2 + commitment * mean (z - sg code)^2: codes come to vectors, and vectors to codes.
    patience: a code that no batch has needed for so many training steps takes the place of a vector of the batch; a new
    codebook does so with its first batch. Which vector is a function of counts of steps, int64, that are saved.
    Works best with z of unit RMS (`rms_norm`), where codes start.
    """

    idle: Tensor
    step: Tensor

    def __init__(
        self,
        codes: int,
        width: int,
        *,
        commitment: float = 0.25,
        patience: int = 50,
        embedding: type[nn.Module] = TritEmbedding,
        group: int = 256,
    ) -> None:
        super().__init__()
        self.count, self.commitment, self.patience = codes, commitment, patience
        self.codebook = embedding(codes, width, group=group, sparse=True)
        self.roles = {"idle": "count", "step": "count"}
        self.register_buffer("idle", torch.full((codes,), patience, dtype=torch.int64))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def forward(self, z: Tensor) -> Quantised:
        """Quantise. While training, codes that have become useless are replaced first."""
        z_ND = z.reshape(-1, z.shape[-1]).float()
        codes_N = self.nearest(z_ND.detach())
        if self.training and torch.is_grad_enabled():
            codes_N = self._revive(z_ND.detach(), codes_N)
        code_ND = self.codebook(codes_N)
        loss = (code_ND - z_ND.detach()).square().mean()
        loss = loss + self.commitment * (z_ND - code_ND.detach()).square().mean()
        straight_ND = z_ND + (code_ND - z_ND).detach()
        return Quantised(straight_ND.view(z.shape).to(z.dtype), codes_N.view(z.shape[:-1]), loss)

    def nearest(self, z: Tensor) -> Tensor:
        """Numbers of the codes nearest to z [..., D] by Euclidean distance: int64 [...]."""
        table_KD = self.decode(torch.arange(self.count, device=z.device))
        # |z|^2 is the same for all codes.
        return (table_KD.square().sum(dim=1) - 2 * z.float() @ table_KD.T).argmin(dim=-1)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """The vectors that codes [...] stand for: float32 [..., D]."""
        return self.codebook(codes)

    def usage(self, codes: Tensor) -> Usage:
        """How a set of codes, int64 of any shape, spreads over the codebook."""
        share_K = torch.bincount(codes.flatten(), minlength=self.count).double() / codes.numel()
        entropy = -(share_K * share_K.clamp(min=1e-300).log()).sum()
        return Usage(float((share_K > 0).double().mean()), float(entropy.exp()))

    @torch.no_grad()
    def _revive(self, z_ND: Tensor, codes_N: Tensor) -> Tensor:
        """Count who was needed, put codes that were not where vectors are, and quantise again."""
        self.idle += 1
        self.idle[codes_N] = 0
        dead_K = self.idle > self.patience
        self.step += 1
        if not bool(dead_K.any()):
            return codes_N
        # Mixed well enough that no two codes and no two steps keep choosing the same vectors.
        number_K = torch.arange(self.count, device=z_ND.device)
        chosen_K = ((number_K * 0x9E3779B1 + self.step * 0x85EBCA6B) >> 8) % len(z_ND)
        self._place(dead_K, z_ND[chosen_K])
        self.idle[dead_K] = 0
        return self.nearest(z_ND)

    def _place(self, where_K: Tensor, z_KD: Tensor) -> None:
        """Codes `where` become the nearest that a codebook has to z."""
        book = self.codebook
        if not isinstance(book, TritEmbedding):
            book.weight[where_K] = z_KD[where_K].to(book.weight.dtype)  # type: ignore[index]
            return
        groups = book.exponent.shape[1]
        for number in range(groups):
            columns = slice(number * book.group, (number + 1) * book.group)
            part_KD = z_KD[:, columns]
            wanted_K = _WIDE * part_KD.square().mean(dim=1).sqrt().clamp(min=1e-6)
            exponent_K = (EXPONENTS_PER_OCTAVE * wanted_K.log2()).round().clamp(-EXPONENT_LIMIT, EXPONENT_LIMIT)
            exponent_K = exponent_K.to(torch.int8)
            lead_KD = (
                (LEAD * part_KD / scale_values(exponent_K)[:, None]).round().clamp(-REGISTER_LIMIT, REGISTER_LIMIT)
            )
            book.exponent[where_K, number] = exponent_K[where_K]
            book.register[where_K, columns] = lead_KD[where_K].to(torch.int8)
