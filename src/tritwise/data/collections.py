"""Collections of images or sounds with texts, for captions, transcripts and classes.

`open_collection(path)` knows these layouts and tells them apart by what lies there:

    folder with captions.jsonl, index.npy and images_jpg128.bin   JPEGs end to end, a caption for each
    folder with *-images-idx3-ubyte[.gz] and their labels         IDX, as MNIST and Fashion-MNIST come
    file .npz with audio, offsets, label, take, rate              spoken words, one class each
    folder with manifest.jsonl                                    lines {"file", "text" or "caption", "split"}
    folder with x.png and x.txt, or x.wav and x.txt, …            your own pairs; every tenth, by name, is val

Every example is of the split "train" or "val".
"""

import gzip
import hashlib
import struct
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tritwise.data.media import IMAGES, SOUNDS, decode_image, read_image, read_sound, resampled
from tritwise.errors import UserError
from tritwise.files import canonical_json, read_bytes, read_json_lines, sha256_of

FASHION = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WRONG = "give images or sounds with texts (the layouts are in the docstring of tritwise.data.collections)"


@dataclass(frozen=True)
class Example:
    """One image or sound: its name, its text, its split, and its class (-1: none)."""

    name: str
    text: str
    split: str
    label: int = -1


class Collection:
    """Examples of one kind, "images" or "sounds", and how to read the media of the i-th.

    read(i, rate): uint8 [H, W, 3], or float32 [samples] at `rate`. classes: names of the labels, () if there are none.
    """

    def __init__(
        self,
        path: Path,
        kind: str,
        examples: Sequence[Example],
        read: Callable[[int, int], np.ndarray],
        classes: Sequence[str] = (),
        content: str = "",
    ) -> None:
        self.path, self.kind, self.examples, self.classes = path, kind, list(examples), tuple(classes)
        self._read, self._content = read, content

    def __len__(self) -> int:
        return len(self.examples)

    def read(self, index: int, rate: int = 16000) -> np.ndarray:
        """The image or sound of example `index`. Raises UserError if its file is damaged."""
        return self._read(index, rate)

    def part(self, split: str) -> list[int]:
        """Indices of the examples of "train" or "val". Raises UserError if there are none."""
        found = [index for index, example in enumerate(self.examples) if example.split == split]
        if not found:
            raise UserError(f"{self.path} has no {split} examples; mark some with a split, or give at least ten pairs")
        return found

    def digest(self) -> str:
        """sha256 of what is read: names and texts, and the content of the files."""
        facts = [self.kind, self._content, [[e.name, e.text, e.split, e.label] for e in self.examples]]
        return hashlib.sha256(canonical_json(facts)).hexdigest()

    def first(self, count: int) -> "Collection":
        """At most `count` train examples and a tenth as many of val, evenly spread; 0: all."""
        if not count:
            return self
        kept = [*_spread(self.part("train"), count), *_spread(self.part("val"), max(1, count // 10))]
        read = self._read
        examples = [self.examples[index] for index in kept]
        content = f"{self._content} first {count}"
        return Collection(
            self.path, self.kind, examples, lambda index, rate: read(kept[index], rate), self.classes, content
        )


def open_collection(path: Path | str, kind: str | None = None) -> Collection:
    """The collection at `path`; `kind` "images" or "sounds" says what is wanted.

    Raises UserError: nothing there, no layout that is known, damaged, or of the other kind.
    """
    place = Path(path).expanduser()
    if not place.exists():
        raise UserError(f"there is no collection at {place}; {WRONG}")
    if place.is_file():
        found = _spoken(place)
    elif (place / "index.npy").exists():
        found = _packed_images(place)
    elif any(place.glob("*-images-idx3-ubyte*")):
        found = _idx(place)
    elif (place / "manifest.jsonl").exists():
        found = _manifest(place)
    else:
        found = _pairs(place)
    if kind is not None and found.kind != kind:
        raise UserError(f"{place} holds {found.kind}, not {kind}; name a collection of {kind}")
    return found


def _packed_images(folder: Path) -> Collection:
    rows = read_json_lines(folder / "captions.jsonl")
    index_N2 = _array(folder / "index.npy")
    data = read_bytes(folder / "images_jpg128.bin")
    if index_N2.shape != (len(rows), 2) or (len(rows) and int(index_N2.sum(axis=1).max()) > len(data)):
        raise UserError(f"{folder} is damaged: its index does not fit its captions and images; copy it again")
    try:
        examples = [Example(row["file"], row["caption"], _split_of(row["split"], folder) or "train") for row in rows]
    except KeyError as error:
        raise UserError(f"{folder / 'captions.jsonl'} has a line without {error}; copy it again") from None

    def read(index: int, rate: int) -> np.ndarray:
        start, length = map(int, index_N2[index])
        return decode_image(data[start : start + length], f"{examples[index].name} in {folder}")

    return Collection(folder, "images", examples, read, content=sha256_of(data))


def _idx(folder: Path) -> Collection:
    images, labels, splits, content = [], [], [], []
    for prefix, split in (("train", "train"), ("t10k", "val")):
        for kind, into in (("images-idx3", images), ("labels-idx1", labels)):
            files = sorted(folder.glob(f"{prefix}-{kind}-ubyte*"))
            if not files:
                raise UserError(f"{folder} has no {prefix}-{kind}-ubyte; copy the four files of the set there")
            raw = read_bytes(files[0])
            content.append(sha256_of(raw))
            into.append(_idx_array(raw, files[0]))
        if len(images[-1]) != len(labels[-1]):
            raise UserError(f"{folder} is damaged: images and labels of {prefix} differ in number; copy it again")
        splits += [split] * len(labels[-1])
    pictures, classes_of = np.concatenate(images), np.concatenate(labels).astype(int).tolist()
    count = max(classes_of) + 1
    names = FASHION if "fashion" in folder.resolve().name.lower() and count == len(FASHION) else DIGITS[:count]
    if len(names) < count:
        names = tuple(map(str, range(count)))
    examples = [
        Example(f"{split}-{index}", names[label], split, label)
        for index, (label, split) in enumerate(zip(classes_of, splits, strict=True))
    ]
    return Collection(
        folder,
        "images",
        examples,
        lambda index, rate: np.repeat(pictures[index][:, :, None], 3, axis=2),
        names,
        "".join(content),
    )


def _idx_array(raw: bytes, path: Path) -> np.ndarray:
    """The array in an IDX file (Y. LeCun's MNIST format: two zeros, type 8, dimensions, big-endian sizes, bytes)."""
    try:
        raw = gzip.decompress(raw) if path.suffix == ".gz" else raw
        zeros, kind, dimensions = struct.unpack(">HBB", raw[:4])
        shape = struct.unpack(f">{dimensions}I", raw[4 : 4 + 4 * dimensions])
        if zeros or kind != 8:
            raise ValueError("it is no IDX file of bytes")
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
    except (OSError, EOFError, ValueError, struct.error) as error:
        raise UserError(f"{path} is damaged ({error}); download it again") from error


def _spoken(path: Path) -> Collection:
    try:
        with np.load(path) as archive:
            arrays = {name: archive[name] for name in ("audio", "offsets", "label", "take", "rate")}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is no collection of spoken words ({error}); {WRONG}") from error
    audio, offsets_N2, found = arrays["audio"], arrays["offsets"], int(arrays["rate"])
    names = DIGITS if int(arrays["label"].max()) < len(DIGITS) else tuple(map(str, range(arrays["label"].max() + 1)))
    # The set's own rule: the first five takes of every speaker and digit are for testing.
    examples = [
        Example(f"clip-{index}", names[int(label)], "val" if take < 5 else "train", int(label))
        for index, (label, take) in enumerate(zip(arrays["label"], arrays["take"], strict=True))
    ]

    def read(index: int, rate: int) -> np.ndarray:
        start, length = map(int, offsets_N2[index])
        return resampled(audio[start : start + length].astype(np.float32) / 32768, found, rate)

    return Collection(path, "sounds", examples, read, names, sha256_of(audio.tobytes()))


def _manifest(folder: Path) -> Collection:
    place = folder / "manifest.jsonl"
    pairs: list[tuple[Path, str, Any]] = []
    for row in read_json_lines(place):
        file, text = row.get("file"), row.get("text")
        text = row.get("caption") if text is None else text
        if not isinstance(file, str) or not isinstance(text, str):
            lacks = "file" if not isinstance(file, str) else "text"
            raise UserError(f"{place} has a line without {lacks}; every line needs file and text, in quotes")
        pairs.append((folder / file, text, _split_of(row.get("split") or None, place)))
    return _files(folder, pairs)


def _pairs(folder: Path) -> Collection:
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGES + SOUNDS)
    if not files:
        raise UserError(f"{folder} holds neither images nor sounds; {WRONG}")
    pairs: list[tuple[Path, str, Any]] = []
    for file in files:
        told = file.with_suffix(".txt")
        if not told.exists():
            raise UserError(f"{file} has no text beside it; write it into {told.name}")
        pairs.append((file, read_bytes(told).decode("utf-8", errors="replace").strip(), None))
    return _files(folder, pairs)


def _split_of(named: Any, place: Path) -> str | None:
    """A split that somebody chose; None: nobody did. What is held out as test is neither trained on nor evaluated."""
    if named is not None and named not in ("train", "val", "test"):
        raise UserError(f"{place} has the split {named!r}; choose train, val or test, or leave split out")
    return named


def _files(folder: Path, pairs: Sequence[tuple[Path, str, Any]]) -> Collection:
    """A collection of files of one kind; those without a split get theirs by the order of their names' hashes."""
    kinds = {"images" if path.suffix.lower() in IMAGES else "sounds" for path, _, _ in pairs}
    if len(kinds) != 1:
        raise UserError(f"{folder} mixes images and sounds, or is empty; put each kind into a folder of its own")
    kind = kinds.pop()
    names = [path.relative_to(folder).as_posix() for path, _, _ in pairs]
    order = sorted(range(len(pairs)), key=lambda index: sha256_of(names[index].encode()))
    drawn = {index for rank, index in enumerate(order) if rank % 10 == 0}
    examples = [
        Example(name, text, split or ("val" if index in drawn else "train"))
        for index, (name, (_, text, split)) in enumerate(zip(names, pairs, strict=True))
    ]
    reader = read_image if kind == "images" else None

    def read(index: int, rate: int) -> np.ndarray:
        path = pairs[index][0]
        return reader(path) if reader else read_sound(path, rate)

    sizes = canonical_json([[p.stat().st_size, p.stat().st_mtime_ns] if p.exists() else None for p, _, _ in pairs])
    return Collection(folder, kind, examples, read, content=sha256_of(sizes))


def _array(path: Path) -> np.ndarray:
    try:
        return np.load(path)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} is damaged ({error}); copy it again") from error


def _spread(indices: list[int], count: int) -> list[int]:
    """`count` of `indices`, evenly spread; all if there are fewer."""
    if count >= len(indices):
        return indices
    return [indices[i * len(indices) // count] for i in range(count)]
