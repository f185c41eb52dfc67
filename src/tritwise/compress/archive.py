"""`compress` and `decompress`: a file, coded with what a byte model expects, and the same file again.

    header           header.py
    the code         one range code over all frames, read to the last byte of the file

A frame is a part of the text that fits in memory. It is cut into lanes, equal parts that the model reads side by side
(lanes.py); the code holds a byte of every lane in turn. After each frame come the first 6 bytes of the SHA-256 of the
header and all text so far, coded like any byte, so a wrong probability or a changed byte is noticed before the frame
is let out. Lanes of the first frame begin after a newline, those of later frames after the end of the frame before.

What it relies on: that the same model gives the same log-probabilities, bit for bit, in both directions. lanes.py does
what can be done for that: the same shapes, the same order, one thread a batch. What is left is the processor or GPU and
the versions of torch and Tritwise. The header has fingerprints of them; where they differ, `decompress` warns and goes
on, because the outcome is often the same, and the checksum decides. Nothing is written unless every checksum holds.
"""

import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch

from tritwise.compress import header as head
from tritwise.compress.coder import Damaged, RangeDecoder
from tritwise.compress.lanes import one_thread
from tritwise.compress.walk import Progress, Tally, Walk, reading
from tritwise.errors import UserError
from tritwise.files import atomic_write, explain, read_bytes, sha256_of
from tritwise.models import ByteLM, ModelConfig
from tritwise.score.protocol import fit_window
from tritwise.ship import read_artifact, read_tokenizer

LANE_BYTES, LANE_CONTEXTS = 1 << 13, 64  # text a lane gets at least: the first, or the second times the context
LANES = {"cpu": 256, "cuda": 1024}
CACHE_BYTES = {"cpu": 1 << 30, "cuda": 1 << 33}  # for the keys and values of all lanes


class Report(NamedTuple):
    """What was done. Sizes in bytes.

    text, file     the two sizes
    header         of `file`: header without an embedded model
    model          of the artifact, whether embedded or not
    embedded       whether `file` holds the artifact
    bpb            bits of `file` per byte of text; None for an empty text
    claimed_bits   sum of -log2 p over the text, from the model's own float probabilities; None when decompressing
    lane_bits      of these, what lanes cost: estimated from the first 64 bytes of all lanes but one; None if unknown
    lanes, window, stride, frames, seconds
    """

    text: int
    file: int
    header: int
    model: int
    embedded: bool
    bpb: float | None
    claimed_bits: float | None
    lane_bits: float | None
    lanes: int
    window: int
    stride: int
    frames: int
    seconds: float


def choose_lanes(length: int, config: ModelConfig, device: torch.device) -> int:
    """One lane for every 64 contexts of text or 8 KiB, whichever is less, up to 256 on a CPU and 1024 on a GPU, and as
    many as caches of 1 or 8 GiB hold.

    A lane begins without context. That costs a few bytes of code each (`Report.lane_bits`; two with a context of 64),
    one or two thousandths of what a lane's text is coded in. What it buys is time, which goes with the bytes of a lane:
    64 lanes read twenty times as fast as one.
    """
    layers = len(config.layers())  # each repeat of a block has its own
    cache = 8 * layers * config.ctx * config.kv_heads * config.head_size  # keys and values in float32
    least = min(LANE_BYTES, LANE_CONTEXTS * config.ctx)
    return max(1, min(length // least, LANES[device.type], CACHE_BYTES[device.type] // cache))


def compress(
    source: Path,
    out: Path,
    model: Path,
    *,
    embed: bool = False,
    lanes: int = 0,
    window: int = 0,
    stride: int = 0,
    device: torch.device | str = "cpu",
    jobs: int = 0,
    progress: Progress | None = None,
) -> Report:
    """Code the file `source` with the artifact `model` into the new file `out`.

    embed: put the artifact into the file; else its checksum, and `decompress` must be given it.
    lanes: parts of the text read side by side; 0: `choose_lanes`. window, stride: as in `score`; 0: the model's context
    and half of it. jobs: threads on a CPU, without influence on the result; 0: as many as there are processors.
    Raises UserError: `source`, `model` or `out` cannot be read or written, `out` is there already, or a number is out
    of range. Then `out` is not written.
    """
    began, device = time.perf_counter(), torch.device(device)
    _require_new(out)
    length = _size_of(source)
    byte_lm, artifact = read_artifact(model)[0].to(device), read_bytes(model)
    if read_tokenizer(model):
        raise UserError(f"{model} is a model of tokens, and files are coded byte by byte; give one that reads bytes")
    window, stride = fit_window(byte_lm, window, stride)
    lanes = lanes or choose_lanes(length, byte_lm.config, device)
    if not 1 <= lanes <= head.MOST_LANES:
        raise UserError(f"lanes is {lanes}; choose 1 to {head.MOST_LANES}, or 0 for as many as fit the text")
    lanes = max(1, min(lanes, length))
    model_mark = bytes.fromhex(sha256_of(artifact))[: head.MODEL_BYTES]
    about = head.Header(
        length, lanes, window, stride, model_mark, embed, device.type == "cuda",
        head.software_mark(), head.machine_mark(device),
    )  # fmt: skip
    spelled, tally = head.spell(about), Tally()
    before = head.varint(len(artifact)) + artifact if embed else b""
    with one_thread(), _opened(source) as file, Walk(byte_lm, about, spelled, jobs, progress) as walk:
        atomic_write(out, _chain([spelled, before], walk.encode(file, source, tally)))
    size = out.stat().st_size
    return Report(
        length, size, len(spelled), len(artifact), embed, 8 * size / length if length else None,
        tally.bits, tally.lane_bits, lanes, window, stride, len(walk.frames), time.perf_counter() - began,
    )  # fmt: skip


def decompress(
    source: Path,
    out: Path,
    model: Path | None = None,
    *,
    jobs: int = 0,
    progress: Progress | None = None,
) -> Report:
    """Write the text that `source` holds to the new file `out`. `model`: the artifact, unless `source` has it embedded.

    Warns, with the module `warnings`, if the file was made with other software or on another kind of machine.
    Raises UserError: `source` is no such file, damaged, cut short or longer than it should be; `model` is another; the
    file was made on a GPU and there is none; or this machine computes other probabilities. Then `out` is not written.
    """
    began = time.perf_counter()
    _require_new(out)
    _size_of(source)
    with _opened(source) as file:
        read = reading(file, source)
        about = head.parse(read, source)
        if about.cuda and not torch.cuda.is_available():
            raise UserError(f"{source} was made on a GPU and torch sees none here; decompress it on such a machine")
        device = torch.device("cuda" if about.cuda else "cpu")
        byte_lm, artifact_bytes = _model_for(about, read, source, model)
        if (about.window, about.stride) != _fitting(byte_lm, about):
            raise UserError(f"{source} has a window that its model cannot hold: it is damaged; copy it again")
        differs = _differences(about, device)
        if differs:
            warnings.warn(f"{source} was made with {differs}; if probabilities differ, it cannot be read", stacklevel=2)
        spelled = head.spell(about)
        try:
            with one_thread(), Walk(byte_lm.to(device), about, spelled, jobs, progress) as walk:
                atomic_write(out, walk.decode(RangeDecoder(read)))
        except Damaged:
            cause = f"it was made with {differs}" if differs else "it is damaged or cut short"
            remedy = "decompress it where it was made" if differs else "copy it again, or compress the original again"
            raise UserError(f"{source} does not give back the text it was made from: {cause}; {remedy}") from None
    size = source.stat().st_size
    return Report(
        about.length, size, len(spelled), artifact_bytes, about.embedded,
        8 * size / about.length if about.length else None, None, None,
        about.lanes, about.window, about.stride, len(walk.frames), time.perf_counter() - began,
    )  # fmt: skip


def _chain(first: list[bytes], rest: Iterator[bytes]) -> Iterator[bytes]:
    yield from first
    yield from rest


def _require_new(out: Path) -> None:
    if os.path.lexists(out):
        raise UserError(f"{out} is already there; name another file with --out, or remove it")


def _size_of(source: Path) -> int:
    """Bytes of a file. Raises UserError for what is none, or cannot be read."""
    read_bytes(source, first=0)
    return source.stat().st_size


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise explain(error, path, "read") from error


def _model_for(
    about: head.Header, read: Callable[[int], bytes], source: Path, model: Path | None
) -> tuple[ByteLM, int]:
    """The model that made the file, and the bytes of its artifact."""
    if about.embedded:
        size, _ = head.read_varint(read, source)
        artifact = read(min(size, source.stat().st_size))
        if len(artifact) < size or not _is_named(about, artifact):
            raise UserError(f"{source} is damaged or cut short in the model that it holds; copy it again")
        with tempfile.TemporaryDirectory(prefix="tritwise-") as folder:
            kept = Path(folder) / "model.tritwise"
            atomic_write(kept, artifact)
            return _byte_lm(kept), size
    if model is None:
        raise UserError(f"{source} was made with the model {about.model.hex()}…, not embedded; name it with --model")
    artifact = read_bytes(model)
    if not _is_named(about, artifact):
        raise UserError(
            f"{source} was made with another model than {model} (SHA-256 {about.model.hex()}…, not "
            f"{sha256_of(artifact)[:8]}…); name the right one with --model"
        )
    return _byte_lm(model), len(artifact)


def _byte_lm(path: Path) -> ByteLM:
    model = read_artifact(path)[0]
    if not isinstance(model, ByteLM):
        raise UserError(f"{path} is no byte model but reads images or sounds too; name one from tritwise train")
    return model


def _is_named(about: head.Header, artifact: bytes) -> bool:
    return bytes.fromhex(sha256_of(artifact))[: head.MODEL_BYTES] == about.model


def _fitting(model: ByteLM, about: head.Header) -> tuple[int, int] | None:
    try:
        return fit_window(model, about.window, about.stride)
    except UserError:
        return None


def _differences(about: head.Header, device: torch.device) -> str:
    """What is not as it was when the file was made, in words."""
    other = {
        "another version of torch or Tritwise": about.software != head.software_mark(),
        "another processor" if device.type == "cpu" else "another GPU": about.machine != head.machine_mark(device),
    }
    return " and ".join(words for words, differs in other.items() if differs)
