"""Checkpoints: tensors in safetensors beside a JSON that vouches for them, both checksummed, never pickle.

    step_00001000.safetensors   the tensors
    step_00001000.json          {"format", "step", "tensors": {"file", "bytes", "sha256"}, "meta", "sha256"}

The JSON is written last, and a checkpoint exists only once its JSON does: a kill or a full disk at any moment leaves
the checkpoints that were there. The JSON's own "sha256" is of the canonical JSON of everything else in it; that rule
and the place of "format" stay the same in every format version.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch

from tritwise.errors import UserError
from tritwise.files import (
    atomic_write,
    canonical_json,
    explain,
    json_bytes,
    make_folder,
    parse_json,
    read_bytes,
    remove_leftovers,
    sha256_of,
)

FORMAT = 1
_JSON = re.compile(r"step_(\d{8}|[1-9]\d{8,})\.json")
_TENSORS = re.compile(r"step_(\d{8}|[1-9]\d{8,})(\.again)?\.safetensors")


# How safetensors spells types, in the order in which it writes them.
_SPELLING = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class Checkpoint(NamedTuple):
    """What `CheckpointStore.load` returns. The tensors are on the CPU and may be changed, which changes no file; until
    then they are the file's own pages, which take no memory that the system could not take back."""

    step: int
    tensors: dict[str, torch.Tensor]
    meta: dict[str, Any]


class _Unusable(Exception):
    """A checkpoint that cannot be used, and why. `remedy` is None where the remedy is an earlier checkpoint."""

    def __init__(self, message: str, remedy: str | None = None) -> None:
        super().__init__(message)
        self.remedy = remedy


class CheckpointStore:
    """The checkpoints of one run, in one folder with one writer.

    Arguments:
        folder: made at the first save.
        keep: how many checkpoints to keep, newest first; 0 keeps all.
    """

    def __init__(self, folder: str | Path, keep: int = 2) -> None:
        assert keep >= 0
        self.folder = Path(folder)
        self.keep = keep

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, whole or damaged, in rising order."""
        matches = (_JSON.fullmatch(path.name) for path in self.folder.glob("step_*.json"))
        return sorted(int(match[1]) for match in matches if match)

    def latest(self) -> int | None:
        """The newest step whose files are whole (checksums are verified), passing over damaged ones; None if none."""
        return self._newest_whole(self.steps())

    def save(self, step: int, tensors: dict[str, torch.Tensor], meta: dict[str, Any]) -> Path:
        """Save a checkpoint, then remove the ones beyond `keep`. Returns the path of its JSON.

        Arguments:
            tensors: of the types in `_SPELLING`, any shape, on any device; no two share memory. They are written one
                after the other from where they are: there is no second copy, and off the CPU one tensor's at a time.
            meta: plain JSON values, so that what is read back is equal: lists and not tuples, keys that are strings.

        Raises:
            UserError: the disk is full or read-only, or the folder cannot be made. Earlier checkpoints are intact.
            ValueError: `meta` holds NaN or infinity, which JSON has not.
        """
        assert step >= 0
        assert parse_json(canonical_json(meta), "meta") == meta, "meta must be plain JSON: lists and string keys"
        make_folder(self.folder)
        remove_leftovers(self.folder)
        summary, size = hashlib.sha256(), 0
        for piece in _safetensors(tensors):
            summary.update(piece)
            size += len(piece)
        digest = summary.hexdigest()
        tensor_file = self._place_for_tensors(step, digest)
        atomic_write(tensor_file, _safetensors(tensors))
        body = {
            "format": FORMAT,
            "step": step,
            "tensors": {"file": tensor_file.name, "bytes": size, "sha256": digest},
            "meta": meta,
        }
        json_file = self._json_file(step)
        atomic_write(json_file, json_bytes({**body, "sha256": sha256_of(canonical_json(body))}))
        self._prune(step, tensor_file)
        return json_file

    def load(self, step: int | None = None) -> Checkpoint:
        """Read the checkpoint of `step`, or the newest. A damaged one is reported, never passed over in silence.

        Raises:
            UserError: there is none, a file is missing, cut short or changed, or a newer Tritwise made it. The message
                names the file and, where an earlier checkpoint is whole, how to resume from that.
        """
        steps = self.steps()
        if not steps:
            raise UserError(f"no checkpoint in {self.folder}; start without --resume, or name the run that has one")
        if step is None:
            step = steps[-1]
        elif step not in steps:
            there = ", ".join(map(str, steps))
            raise UserError(f"no checkpoint for step {step} in {self.folder}; the steps there are {there}")
        try:
            body, tensor_file = self._verify(step)
        except _Unusable as problem:
            raise UserError(f"{problem}; {problem.remedy or self._remedy(step)}") from problem
        return Checkpoint(step, safetensors.torch.load_file(tensor_file), body["meta"])

    def _verify(self, step: int) -> tuple[dict[str, Any], Path]:
        """The JSON of one step and the file of its tensors, both verified, or _Unusable."""
        body = self._read_json(step)
        expected = body["tensors"]
        path = self.folder / expected["file"]
        if not path.is_file():
            raise _Unusable(f"{path} is missing, and {self._json_file(step).name} needs it")
        size = path.stat().st_size
        if size < expected["bytes"]:
            raise _Unusable(f"{path} is cut short: {size} bytes of {expected['bytes']}")
        if size > expected["bytes"]:
            raise _Unusable(f"{path} is damaged: it has {size} bytes and should have {expected['bytes']}")
        if sha256_of(path) != expected["sha256"]:
            raise _Unusable(f"{path} is damaged: its checksum does not match")
        return body, path

    def _read_json(self, step: int) -> dict[str, Any]:
        path = self._json_file(step)
        raw = read_bytes(path)
        try:
            whole = parse_json(raw, path)
        except UserError as error:
            raise _Unusable(f"{path} is damaged: it is not valid JSON") from error
        if not isinstance(whole, dict):
            raise _Unusable(f"{path} is damaged: it is not a JSON object")
        body = {key: value for key, value in whole.items() if key != "sha256"}
        vouched = _checksum_holds(body, whole.get("sha256"))
        version = body.get("format")
        if isinstance(version, int) and version > FORMAT:
            doubt = "" if vouched else ", or is damaged (its checksum does not match)"
            raise _Unusable(
                f"{path} was made by a newer Tritwise (checkpoint format {version}; this one reads {FORMAT}){doubt}",
                remedy="upgrade Tritwise" + ("" if vouched else f", or delete {path.name}"),
            )
        # The spelling is checked too: a changed space would leave the values, and so their checksum, as they were.
        if not vouched or json_bytes(whole) != raw:
            raise _Unusable(f"{path} is damaged: its checksum does not match")
        if body["step"] != step:
            raise _Unusable(f"{path} was renamed: it holds step {body['step']}")
        return body

    def _newest_whole(self, steps: list[int]) -> int | None:
        for step in reversed(steps):
            try:
                self._verify(step)
            except _Unusable:
                continue
            return step
        return None

    def _remedy(self, step: int) -> str:
        earlier = self._newest_whole([other for other in self.steps() if other < step])
        if earlier is None:
            return "no earlier checkpoint is whole: restore the file, or start again without --resume"
        return f"delete {self._json_file(step)} to resume from step {earlier}"

    def _json_file(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}.json"

    def _place_for_tensors(self, step: int, digest: str) -> Path:
        """Where the tensors of `step` go: never over different ones that a JSON still vouches for.

        A step that is saved again goes to its other name, so that the old pair is whole until the new JSON is there.
        """
        first, second = (self.folder / f"step_{step:08d}{again}.safetensors" for again in ("", ".again"))
        if not self._json_file(step).exists():
            return first
        try:
            there = self._read_json(step)["tensors"]
        except _Unusable:
            return first
        return second if there["file"] == first.name and there["sha256"] != digest else first

    def _prune(self, step: int, saved: Path) -> None:
        """After `step` was saved: remove what is beyond `keep`, and tensors that no JSON names.

        Checkpoints later than `step` stay: after a resume from an earlier step they must not push the new one out.
        """
        past = [other for other in self.steps() if other <= step]
        try:
            for old in past[: -self.keep] if self.keep else []:
                self._json_file(old).unlink()  # before its tensors: a kill in between leaves no JSON without them
            kept = set(self.steps())
            for path in self.folder.glob("step_*.safetensors"):
                match = _TENSORS.fullmatch(path.name)
                if match and (int(match[1]) not in kept or (int(match[1]) == step and path != saved)):
                    path.unlink()
        except OSError as error:
            raise explain(error, self.folder, "write") from error


def _safetensors(tensors: dict[str, torch.Tensor]) -> Iterator[bytes | memoryview]:
    """The safetensors file of `tensors` in pieces: the bytes of the library, which wants them all at once.

    https://github.com/huggingface/safetensors, "Format": the length of the header (8 bytes, little-endian), the header
    (JSON: type, shape and place of every tensor), and the tensors.
    """
    order = list(_SPELLING)
    names = sorted(tensors, key=lambda name: (order.index(tensors[name].dtype), name))
    header, end = {}, 0
    for name in names:
        x, begin = tensors[name], end
        end += x.numel() * x.element_size()
        header[name] = {"dtype": _SPELLING[x.dtype], "shape": list(x.shape), "data_offsets": [begin, end]}
    told = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    told += b" " * (-len(told) % 8)
    yield len(told).to_bytes(8, "little") + told
    for name in names:
        yield tensors[name].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def _checksum_holds(body: dict[str, Any], checksum: object) -> bool:
    try:
        return sha256_of(canonical_json(body)) == checksum
    except ValueError:  # NaN and infinity, which Python reads from JSON but a checkpoint never holds
        return False
