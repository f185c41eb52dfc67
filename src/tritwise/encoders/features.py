"""Features of a whole collection, computed once and kept on the disk.

    features_KEY.safetensors   "features" float16 [all tokens, D], "offsets" int64 [N + 1], and "preview_I": what the
                               first val examples look like, for reports: uint8, an image or the spectrogram of a sound
    features_KEY.json          what they are of: encoder, layer, texts, splits, classes, and the checksum of the tensors

KEY is a checksum of the encoder's weights, the layer and the other settings, and the content of the collection: what
changes any of them makes another file. The JSON is written last and vouches for the tensors.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from tritwise.data.collections import Collection, Example
from tritwise.encoders.frozen import RATE, AudioEncoder, VisionEncoder
from tritwise.errors import UserError
from tritwise.files import (
    CACHE_REMEDY,
    atomic_write,
    cache_folder,
    canonical_json,
    json_bytes,
    make_folder,
    read_bytes,
    read_json,
    sha256_of,
)

FORMAT = 1
BATCH = 8
PREVIEWS = 12
Progress = Callable[[int, int], None]


class Features:
    """Features of N examples, with their texts: all that training needs, without the encoder or the media.

    of(i): float16 [F, D], the tokens of example i. about: the encoder's settings, as plain JSON. previews: uint8
    [H, W, 3] or [bands, frames] by index of the example.
    """

    def __init__(
        self,
        kind: str,
        features_TD: Tensor,
        offsets: list[int],
        examples: list[Example],
        classes: tuple[str, ...],
        about: dict[str, Any],
        previews: dict[int, Tensor] | None = None,
    ) -> None:
        self.kind, self.examples, self.classes, self.about = kind, examples, classes, about
        self.previews = previews or {}
        self._features_TD, self._offsets = features_TD, offsets

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def size(self) -> int:
        """D."""
        return self._features_TD.shape[1]

    def length(self, index: int) -> int:
        """F of example `index`."""
        return self._offsets[index + 1] - self._offsets[index]

    def of(self, index: int) -> Tensor:
        """The tokens of example `index`, float16 [F, D]."""
        return self._features_TD[self._offsets[index] : self._offsets[index + 1]]

    def part(self, split: str) -> list[int]:
        """Indices of the examples of "train" or "val"."""
        return [index for index, example in enumerate(self.examples) if example.split == split]

    def save(self, path: Path) -> None:
        """Write PATH.safetensors and PATH.json, each whole or not at all. Raises UserError if the disk refuses."""
        tensors = {"features": self._features_TD.contiguous(), "offsets": torch.tensor(self._offsets)}
        tensors |= {f"preview_{index}": preview.contiguous() for index, preview in self.previews.items()}
        data = safetensors.torch.save(tensors)
        atomic_write(path.with_suffix(".safetensors"), data, CACHE_REMEDY)
        told = {
            "format": FORMAT,
            "kind": self.kind,
            "sha256": sha256_of(data),
            "about": self.about,
            "classes": list(self.classes),
            "examples": [[e.name, e.text, e.split, e.label] for e in self.examples],
        }
        atomic_write(path.with_suffix(".json"), json_bytes(told), CACHE_REMEDY)

    @staticmethod
    def load(path: Path) -> "Features":
        """Read what `save` wrote. Raises UserError if it is missing, damaged or from a newer version."""
        tensor_file, told = path.with_suffix(".safetensors"), read_json(path.with_suffix(".json"))
        remedy = "delete it and its .json, and they are made again"
        if not isinstance(told, dict) or told.get("format") != FORMAT:
            raise UserError(f"{path.with_suffix('.json')} holds no features this version knows; {remedy}")
        if sha256_of(read_bytes(tensor_file)) != told["sha256"]:
            raise UserError(f"{tensor_file} is damaged: its checksum does not match; {remedy}")
        tensors = safetensors.torch.load_file(tensor_file)
        examples = [Example(*row) for row in told["examples"]]
        offsets = tensors["offsets"].tolist()
        previews = {int(name[8:]): tensor for name, tensor in tensors.items() if name.startswith("preview_")}
        classes, about = tuple(told["classes"]), told["about"]
        return Features(told["kind"], tensors["features"], offsets, examples, classes, about, previews)


def features_of(
    encoder: VisionEncoder | AudioEncoder,
    collection: Collection,
    *,
    cache: Path | str | None = None,
    progress: Progress | None = None,
) -> Features:
    """Features of every example, from the cache folder if they are there, else computed and put there.

    progress: called with (examples done, all) as it goes. Raises UserError: the encoder is for another kind of media,
    a file is damaged, or the cache cannot be written.
    """
    wanted = "images" if encoder.kind == "vision" else "sounds"
    if collection.kind != wanted:
        raise UserError(
            f"{encoder.where} encodes {wanted}, and {collection.path} holds {collection.kind}; name another"
        )
    about = encoder.settings()
    key = hashlib.sha256(canonical_json([FORMAT, about, collection.digest()])).hexdigest()[:24]
    path = cache_folder(cache) / f"features_{key}.json"
    if path.exists():
        return Features.load(path)
    make_folder(path.parent, CACHE_REMEDY)
    pieces: list[Tensor] = []
    for start in range(0, len(collection), BATCH):
        batch = range(start, min(len(collection), start + BATCH))
        media = [collection.read(index, RATE) for index in batch]
        pieces += [x_FD.to(torch.float16).cpu() for x_FD in encoder(media)]
        if progress is not None:
            progress(batch.stop, len(collection))
    offsets = [0]
    for piece in pieces:
        offsets.append(offsets[-1] + len(piece))
    shown = [index for index, example in enumerate(collection.examples) if example.split == "val"]
    shown = shown[:: max(1, len(shown) // PREVIEWS)][:PREVIEWS]
    previews = {index: encoder.preview(collection.read(index, RATE)) for index in shown}
    examples, classes = collection.examples, collection.classes
    found = Features(encoder.kind, torch.cat(pieces), offsets, examples, classes, about, previews)
    found.save(path)
    return found


@contextmanager
def progress_bar(console: Any, what: str) -> Iterator[Progress]:
    """A bar on a terminal, a line every tenth elsewhere: what `features_of` takes as `progress`."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    if not console.is_terminal:
        told = -1

        def line(done: int, total: int) -> None:
            nonlocal told
            if done * 10 // total > told:
                told = done * 10 // total
                console.print(f"{what}: {done}/{total}", markup=False, highlight=False)

        yield line
        return
    with Progress(
        TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console, transient=True
    ) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
