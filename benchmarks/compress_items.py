"""What `score_study.py` measures of compression: bytes on disk, other compressors, the same bytes again, bad input."""

import hashlib
import io
import math
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compress_peers import PEERS, measure_ours, measure_peer
from score_items import Task

from tritwise.compress import compress, decompress
from tritwise.compress.coder import RangeDecoder, RangeEncoder
from tritwise.compress.quantise import SYMBOLS, cumulative
from tritwise.errors import UserError
from tritwise.models import ByteLM, ModelConfig
from tritwise.score import score
from tritwise.score.learning import Learning, learning_stream
from tritwise.ship import read_artifact, write_artifact

BAD_BYTES, REPEAT_BYTES, DECODE_BYTES = 512, 1 << 15, 1 << 11
EMBED_BYTES = 120_000  # a longer text is compressed once, without the model in the file


def compress_item(task: Task) -> dict[str, Any]:
    """`tritwise compress` and `decompress` as a user calls them, with the model beside the file; then embedded."""
    with tempfile.TemporaryDirectory(prefix="tritwise-") as name:
        folder = Path(name)
        text = _written(folder / "text", task.text)
        options = [f"--device={task.device.type}", f"--lanes={task.lanes}"]
        rows = [measure_ours(str(task.artifact), text, folder, options)]
        held = {
            "bytes": len(task.text),
            "sha256": _sha256(text),
            "sha256_back": _sha256(folder / "ours.back"),
            "rows": rows,
        }
        if len(task.text) <= EMBED_BYTES:
            (folder / "ours.twz").unlink()
            (folder / "ours.back").unlink()
            embedded = measure_ours(str(task.artifact), text, folder, [*options, "--embed"])
            held["embedded"] = {key: embedded[key] for key in ("bytes", "bpb", "identical")}
    return held


def peers_item(task: Task) -> dict[str, Any]:
    """General compressors on the same bytes, those that are installed."""
    with tempfile.TemporaryDirectory(prefix="tritwise-") as name:
        folder = Path(name)
        text = _written(folder / "text", task.text)
        here = [peer for peer, (command, _) in PEERS.items() if shutil.which(command[0])]
        rows = [measure_peer(peer, text, folder) for peer in here]
        return {
            "bytes": len(task.text),
            "sha256": _sha256(text),
            "rows": rows,
            "missing": sorted(set(PEERS) - set(here)),
        }


def repeat_item(task: Task) -> dict[str, Any]:
    """The same file from the same text: again, with one job, with two, with other numbers of torch's threads."""
    sums, before = {}, torch.get_num_threads()
    with tempfile.TemporaryDirectory(prefix="tritwise-") as name:
        folder = Path(name)
        text = _written(folder / "text", task.text[:REPEAT_BYTES])
        for number, (jobs, threads) in enumerate([(0, before), (0, before), (1, 1), (2, 2), (1, 2)]):
            torch.set_num_threads(threads)
            packed, back = folder / f"packed{number}", folder / f"back{number}"
            compress(text, packed, task.artifact, lanes=256, device=task.device, jobs=jobs)
            decompress(packed, back, task.artifact, jobs=3 - jobs)
            sums[f"run {number + 1}: {jobs or 'all'} jobs, {threads} threads"] = [_sha256(packed), _sha256(back)]
        torch.set_num_threads(before)
        wanted = _sha256(text)
    packed_sums = {one for one, _ in sums.values()}
    return {
        "bytes": min(REPEAT_BYTES, len(task.text)),
        "lanes": 256,
        "files": sums,
        "same": len(packed_sums) == 1 and {back for _, back in sums.values()} == {wanted},
    }


def decode_item(task: Task, hows: dict[str, Learning]) -> dict[str, Any]:
    """Predictors that learn while they read, through the range coder a byte at a time: coded, and decoded by another
    stream that sees nothing but the code."""
    data, model, rows = task.text[:DECODE_BYTES].tobytes(), task.model(), {}
    for name, how in hows.items():
        stream, coder, bits = learning_stream(model, how), RangeEncoder(), 0.0
        for byte in data:
            logs = stream.log_probs()[None].cpu()
            table = cumulative(logs)[0].tolist()
            coder.encode([table[byte]], [table[byte + 1]])
            bits -= float(logs[0, byte]) / math.log(2)
            stream.read(torch.tensor([byte]))
        code = coder.take() + coder.finish()
        stream, decoder, found = learning_stream(model, how), RangeDecoder(io.BytesIO(code).read), bytearray()
        for _ in data:
            table = cumulative(stream.log_probs()[None].cpu())[0].to(torch.int32).numpy()
            found += bytes(decoder.decode(table.data, 1, SYMBOLS + 1))
            stream.read(torch.tensor([found[-1]]))
        decoder.finish()
        rows[name] = {"claimed_bits": bits, "bytes": len(code), "identical": bytes(found) == data}
    return {"bytes": len(data), "rows": rows}


class Trials:
    """Bad input, case by case: each comes back identical or is refused, or it counts as wrong output."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, model
        self.rows: list[dict[str, Any]] = []

    def comes_back(self, what: str, data: bytes) -> None:
        """There and back."""
        source, there, back = (self.folder / part for part in ("source", "source.twz", "source.back"))
        source.write_bytes(data)
        for file in (there, back):
            file.unlink(missing_ok=True)
        compress(source, there, self.model, lanes=min(8, max(1, len(data))))
        decompress(there, back, self.model)
        self._add(what, 1, int(back.read_bytes() == data), 0, None)

    def refused(self, what: str, files: list[bytes], wanted: bytes, model: Path | None) -> None:
        """Files to decompress, each of which must be refused unless it gives `wanted`."""
        identical, refused, said = 0, 0, None
        there, back = self.folder / "bad.twz", self.folder / "bad.back"
        for data in files:
            there.write_bytes(data)
            back.unlink(missing_ok=True)
            try:
                decompress(there, back, model)
                identical += back.read_bytes() == wanted
            except UserError as error:
                said = said or str(error).replace(f"{self.folder}/", "")
                refused += not back.exists()
        self._add(what, len(files), identical, refused, said)

    def raises(self, what: str, call: Callable[[], object]) -> None:
        """A call that must be refused."""
        try:
            call()
            self._add(what, 1, 0, 0, None)
        except UserError as error:
            self._add(what, 1, 0, 1, str(error).replace(f"{self.folder}/", ""))

    def _add(self, what: str, cases: int, identical: int, refused: int, said: str | None) -> None:
        counts = {"cases": cases, "identical": identical, "refused": refused, "wrong": cases - identical - refused}
        self.rows.append({"what": what, **counts, "said": said})


def bad_item(task: Task) -> dict[str, Any]:
    """What decompress, and score, do with bad input."""
    rng, data = np.random.default_rng(0), task.text[:BAD_BYTES].tobytes()
    with tempfile.TemporaryDirectory(prefix="tritwise-") as name:
        folder = Path(name)
        model, other, text = task.artifact, folder / "other.tritwise", folder / "text"
        packed, embedded = folder / "text.twz", folder / "text.embedded"
        text.write_bytes(data)
        write_artifact(ByteLM(ModelConfig(width=32, depth=1, ctx=16)), other)
        compress(text, packed, model, lanes=8)
        compress(text, embedded, model, lanes=8, embed=True)
        good, whole = packed.read_bytes(), embedded.read_bytes()
        trials = Trials(folder, model)
        trials.comes_back("empty file", b"")
        trials.comes_back("one byte", b"\0")
        trials.comes_back("binary file", rng.bytes(BAD_BYTES))
        trials.refused("wrong artifact", [good], data, other)
        trials.refused("no artifact", [good], data, None)
        trials.refused("file that compress did not make", [data, rng.bytes(400), b""], data, model)
        cuts = sorted({int(cut) for cut in np.linspace(0, len(good) - 1, 16)})
        trials.refused("truncated stream", [good[:cut] for cut in cuts], data, model)
        places = sorted({int(at) for at in np.linspace(0, len(good) - 1, 32)})
        trials.refused("flipped byte", [_flipped(good, at, rng) for at in places], data, model)
        trials.refused("bytes added at the end", [good + b"\0", good + good], data, model)
        places = [int(at) for at in np.linspace(20, len(whole) - len(good), 8)]
        trials.refused("flipped byte in an embedded model", [_flipped(whole, at, rng) for at in places], data, None)
        trials.raises("artifact cut short", lambda: read_artifact(_cut(model, folder / "cut.tritwise")))
        trials.raises("score of an empty text", lambda: score(task.model(), np.empty(0, np.uint8)))
    return {"bytes": BAD_BYTES, "rows": trials.rows, "wrong": sum(row["wrong"] for row in trials.rows)}


def _cut(path: Path, copy: Path) -> Path:
    copy.write_bytes(path.read_bytes()[:-7])
    return copy


def _flipped(data: bytes, at: int, rng: np.random.Generator) -> bytes:
    changed = bytearray(data)
    changed[at] ^= int(rng.integers(1, 256))
    return bytes(changed)


def _written(path: Path, data: np.ndarray) -> Path:
    path.write_bytes(data.tobytes())
    return path


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
