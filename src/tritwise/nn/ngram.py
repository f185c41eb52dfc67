"""Embeddings of the last few bytes: hashed tables for pairs, triples, …, for words, beside the embedding of the byte.

A lookup costs no arithmetic, so on a small budget of time this is the cheapest context there is. Hash collisions are
left to the layers above, as in hashed n-gram embeddings generally (Huang et al. 2025, "Over-tokenized transformer").
"""

import functools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from tritwise.nn.dropout import dropout
from tritwise.nn.linear import TritLinear

_FACTOR = 1000003
_SPREAD = 0x9E3779B1
WORD_REACH = (0, 15, 23)
"""Ids before the last one that tables by no word, one, or two words look at."""


class NGramEmbedding(nn.Module):
    """Sum over n = 2 … longest of table_n[hash of the last n ids], or a matrix times what all tables have, one after
    the other.

    words: 1: one more table, by the word so far (`word_codes`); 2: and one by that and the word before. Ids are bytes.
    rows: entries of each table. inner: numbers of an entry, of which `up`, a layer of the class `linear`, makes
    `width`; 0: each has `width`, and they are added. Narrow entries are more for the same bytes, and collide less.
    embedding: TritEmbedding or FloatEmbedding. share: of lookups in each table that find nothing in training, so that
    the layers above learn to do without: tables learn by heart what they meet often.
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
        words: int = 0,
        inner: int = 0,
        group: int = 256,
        share: float = 0.0,
    ) -> None:
        super().__init__()
        assert longest > 1 or words, "an n-gram embedding needs longest >= 2 or words"
        self.rows, self.longest, self.words, self.share = rows, longest, words, share
        own, count = inner or width, longest - 1 + words
        self.tables = nn.ModuleList(embedding(rows, own, group=group, sparse=True) for _ in range(count))
        self.up = linear(own * count, width, group=group) if inner else None

    def forward(
        self, ids: Tensor, time: int, dtype: torch.dtype = torch.float32, noise: Tensor | None = None
    ) -> Tensor:
        found = []
        for number, (table, code) in enumerate(zip(self.tables, self._codes(ids), strict=True)):
            # Of a product modulo 2**64 the lowest bits mix worst; they are dropped.
            slot = ((code * _SPREAD) >> 20) % self.rows
            rows = table(slot[:, -time:], dtype)
            if noise is not None and self.share:
                rows = dropout(rows, self.share, noise, -1 - number, rows=True)  # layers have the places from 0 on
            found.append(rows)
        if self.up is not None:
            return self.up(torch.cat(found, dim=-1))
        return functools.reduce(torch.add, found)

    def _codes(self, ids: Tensor) -> Iterator[Tensor]:
        """What each table hashes, int64 like ids."""
        shifted = code = ids + 1
        for _ in range(self.longest - 1):
            shifted = _later(shifted)
            code = code * _FACTOR + shifted
            yield code
        for words in range(1, self.words + 1):
            yield word_codes(ids, words)


def word_codes(ids: Tensor, words: int) -> Tensor:
    """A number for each position of bytes [B, T], int64, that tells its word so far: the byte itself, and the letters
    before it up to the first byte that is none, WORD_REACH of them at most. Large and small letters are one, and bytes
    from 128 on, of which other alphabets are made, are letters. At a byte that is no letter this is the word that it
    ends. words: 2: the word before that, and the one byte between them, count too."""
    capital = (ids >= ord("A")) & (ids <= ord("Z"))
    small, reach = torch.where(capital, ids + 32, ids), WORD_REACH[words]
    letter = ((small >= ord("a")) & (small <= ord("z"))) | ((small >= 128) & (small < 256))
    # Padded once, and looked at from further and further back: compiled, that is one kernel.
    symbols, ends = nn.functional.pad(small + 1, (reach, 0)), nn.functional.pad(~letter, (reach, 0), value=True)
    code, left = small + 1, torch.full_like(ids, words)
    for start in range(reach - 1, -1, -1):
        left = left - ends[:, start : start + ids.shape[1]].to(ids.dtype)
        code = torch.where(left > 0, code * _FACTOR + symbols[:, start : start + ids.shape[1]], code)  # modulo 2**64
    return code


def _later(ids: Tensor) -> Tensor:
    """What lies one position back, [B, T]; 0 before the start."""
    return nn.functional.pad(ids[:, :-1], (1, 0))
