"""Batches of captions, transcripts and pictures. A batch is a function of (data, seed, step, micro), as of text.

A row of the stream, with P tokens of an image (or AUDIO_… of a sound), targets only where a byte or EOS is to be told:

    IMAGE_BEGIN  IMAGE_SLOT × P  IMAGE_END  text …  EOS  PAD …

Shape suffixes: B batch, T time, F frames or tokens of features, D size of a feature, L letters.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tritwise.data.collections import Collection
from tritwise.data.vocabulary import BYTES, Special, encode
from tritwise.encoders import Features
from tritwise.errors import UserError
from tritwise.models.arb import IGNORED
from tritwise.models.denoiser import centred

MARKS = {
    "vision": (Special.IMAGE_BEGIN, Special.IMAGE_SLOT, Special.IMAGE_END),
    "audio": (Special.AUDIO_BEGIN, Special.AUDIO_SLOT, Special.AUDIO_END),
}
MEASURED = 500  # examples from which the channels' means and deviations are taken, or up to twice as many
EVEN = 32  # rows that are recorded have a multiple of so many positions
SPAN = 5  # features that are hidden together in a sound
UNLABELLED = 0.1  # share of pictures whose class is hidden, so that "any" is learned
Batch = tuple[Any, ...]


def generator_of(*place: int | str) -> torch.Generator:
    """A generator for one place of a run: the same words give the same numbers."""
    digest = hashlib.blake2b("/".join(map(str, place)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def opening(kind: str, tokens: int) -> np.ndarray:
    """Ids before the text: begin, a slot for each token, end. int64 [tokens + 2]."""
    begin, slot, end = MARKS[kind]
    return encode(begin, *[slot] * tokens, end)


class MediaStream:
    """Batches of a kind, "vision" or "audio", from features. The rows of a batch have as many features each.

    stride: features that make one token. ctx: positions that a row may take; texts that are longer are cut, and
    examples whose media alone are longer are left out (`left_out` tells how many).
    Raises UserError if nothing is left to train on.
    """

    def __init__(
        self, kind: str, features: Features, *, batch: int, ctx: int, stride: int, seed: int, noise: float, hide: float
    ) -> None:
        self.kind, self.features, self.batch, self.ctx, self.stride = kind, features, batch, ctx, stride
        self.seed, self.noise, self.hide = seed, noise, hide
        train = features.part("train")
        fits = [index for index in train if features.length(index) // stride + 4 <= ctx]
        self.left_out = len(train) - len(fits)
        if not fits:
            raise UserError(f"no {kind} example fits ctx {ctx}; raise --ctx, or give shorter media")
        lengths = torch.tensor([features.length(index) for index in fits])
        self.groups = [torch.tensor(fits)[lengths == length].tolist() for length in lengths.unique().tolist()]
        self._shares = torch.tensor([float(len(group)) for group in self.groups])
        some = fits[:: max(1, len(fits) // MEASURED)]
        x_TD = torch.cat([features.of(index).float() for index in some])
        self.mean_D, self.spread_D = x_TD.mean(dim=0), x_TD.std(dim=0).clamp(min=1e-3)

    def state(self) -> dict[str, Any]:
        """What must be equal for a resumed run to read the same batches."""
        told = hashlib.sha256(repr([(e.name, e.text, e.split) for e in self.features.examples]).encode()).hexdigest()
        return {"examples": told, "batch": self.batch, "ctx": self.ctx, "stride": self.stride, "seed": self.seed}

    def batch_at(self, step: int, micro: int = 0) -> Batch:
        """(kind, ids, targets, features [, letters, their number]): see `Arb.loss`."""
        g = generator_of(self.seed, step, micro, self.kind)
        group = self.groups[int(torch.multinomial(self._shares, 1, generator=g))]
        chosen = [group[int(i)] for i in torch.randint(len(group), (self.batch,), generator=g)]
        batch = self.rows(chosen)
        x_BFD = batch[3]
        if self.noise:
            x_BFD = x_BFD + self.noise * self.spread_D * torch.randn(x_BFD.shape, generator=g)
        if self.hide:
            span = SPAN if self.kind == "audio" else 1
            spans = -(-x_BFD.shape[1] // span)
            seen = (torch.rand(len(chosen), spans, generator=g) >= self.hide).repeat_interleave(span, dim=1)
            x_BFD = torch.where(seen[:, : x_BFD.shape[1], None], x_BFD, self.mean_D)
        return (*batch[:3], x_BFD, *batch[4:])

    def rows(self, indices: Sequence[int]) -> Batch:
        """The batch of these examples, which have as many features each, unspoiled."""
        x_BFD = torch.stack([self.features.of(index).float() for index in indices])
        tokens = x_BFD.shape[1] // self.stride
        start, room = opening(self.kind, tokens), self.ctx - tokens - 2
        texts = [np.append(encode(self.features.examples[i].text), Special.EOS)[:room] for i in indices]
        longest = max(map(len, texts))
        ids_BT = torch.full((len(texts), len(start) + longest), int(Special.PAD))
        targets_BT = torch.full_like(ids_BT, IGNORED)
        for row, text in enumerate(texts):
            whole = torch.from_numpy(np.concatenate((start, text)))
            ids_BT[row, : len(whole)] = whole
            targets_BT[row, len(start) - 1 : len(whole) - 1] = whole[len(start) :]
        batch: Batch = (self.kind, ids_BT, targets_BT, x_BFD)
        if self.kind == "vision":
            return batch
        spelled = [torch.from_numpy(encode(self.features.examples[i].text)) for i in indices]
        counts_B = torch.tensor([len(letters) for letters in spelled])
        letters_BL = torch.nn.utils.rnn.pad_sequence(spelled, batch_first=True, padding_value=BYTES - 1)
        return (*batch, letters_BL, counts_B)

    def parts_of(self, indices: Sequence[int], most: int = 64) -> list[list[int]]:
        """`indices` in batches of at most `most` whose examples have as many features each."""
        by_length: dict[int, list[int]] = {}
        for index in indices:
            by_length.setdefault(self.features.length(index), []).append(index)
        return [own[at : at + most] for own in by_length.values() for at in range(0, len(own), most)]


def evened(tensors: Sequence[Tensor], ctx: int) -> list[Tensor]:
    """ids, targets, features [, letters, their number] of a media batch with rows as long as the next multiple of EVEN,
    at most ctx: what is added is padding, which costs and changes nothing. Letters are no positions: they have no most.
    """
    ids_BT, targets_BT, x_BFD, *spelled = tensors
    longer = [_longer(ids_BT, int(Special.PAD), ctx), _longer(targets_BT, IGNORED, ctx), x_BFD]
    return [*longer, _longer(spelled[0], BYTES - 1), *spelled[1:]] if spelled else longer


def _longer(rows: Tensor, filler: int, most: int = 1 << 30) -> Tensor:
    length = min(most, -(-rows.shape[1] // EVEN) * EVEN)
    return torch.nn.functional.pad(rows, (0, max(0, length - rows.shape[1])), value=filler)


class PictureStream:
    """Batches of pictures with their class for the diffusion part: see `Arb.loss`.

    pictures: uint8 [N, channels, H, W]; labels: int64 [N]; classes: how many there are, the number of "any".
    """

    def __init__(self, pictures: Tensor, labels: Tensor, classes: int, *, batch: int, seed: int) -> None:
        self.pictures, self.labels, self.classes, self.batch, self.seed = pictures, labels, classes, batch, seed

    def state(self) -> dict[str, Any]:
        """What must be equal for a resumed run to read the same batches."""
        digest = hashlib.sha256(self.pictures.numpy().tobytes()).hexdigest()
        return {"pictures": digest, "batch": self.batch, "seed": self.seed}

    def batch_at(self, step: int, micro: int = 0) -> Batch:
        """("diffusion", pictures, noise, times, labels). Times are a normal number's logistic: most in the middle."""
        g = generator_of(self.seed, step, micro, "diffusion")
        chosen = torch.randint(len(self.pictures), (self.batch,), generator=g)
        x = centred(self.pictures[chosen])
        noise = torch.randn(x.shape, generator=g)
        times = torch.sigmoid(torch.randn(self.batch, generator=g) - 0.4)
        hidden = torch.rand(self.batch, generator=g) < UNLABELLED
        return ("diffusion", x, noise, times, torch.where(hidden, self.classes, self.labels[chosen]))


def pictures_in(
    collection: Collection, split: str, channels: int, progress: Callable[[int, int], None] | None = None
) -> tuple[Tensor, Tensor]:
    """Pictures uint8 [N, channels, H, W] and labels int64 [N] of a split. Grey ones are the mean of their colours.

    Raises UserError if the pictures are not of one size and square.
    """
    found: list[np.ndarray] = []
    indices = collection.part(split)
    for done, index in enumerate(indices, start=1):
        picture = collection.read(index)
        if picture.shape[0] != picture.shape[1] or (found and picture.shape[0] != found[0].shape[-1]):
            raise UserError(
                f"{collection.examples[index].name} is {picture.shape[1]} × {picture.shape[0]} pixels; "
                "pictures to draw must all be squares of one size"
            )
        grey = picture.mean(axis=2).round().astype(np.uint8)[None]
        found.append(grey if channels == 1 else picture.transpose(2, 0, 1))
        if progress is not None and done % 1000 == 0:
            progress(done, len(indices))
    labels = [max(0, collection.examples[index].label) for index in indices]
    return torch.from_numpy(np.stack(found)), torch.tensor(labels)
