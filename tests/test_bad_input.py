"""Bad input: whatever a person gets wrong is one line with a remedy and exit code 2, and what was saved is intact."""

import errno
import json
import os
import re
import resource
import signal
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch

from tritwise import files
from tritwise.files import canonical_json, json_bytes, read_json
from tritwise.loading import load
from tritwise.train import train


class World:
    """What a case may name: a text, a finished run (a copy, free to damage), and new paths."""

    def __init__(self, text: Path, run: Path, folder: Path) -> None:
        self.text, self.run, self.folder = text, run, folder
        self.artifact = run / "model.tritwise"

    def new(self, name: str, content: bytes | None = None) -> Path:
        """A path in an empty folder; with `content`, a file."""
        path = self.folder / name
        if content is not None:
            path.write_bytes(content)
        return path

    def train(self, *flags: object, data: Path | None = None) -> list[object]:
        small = ["--width", 32, "--depth", 1, "--ctx", 16, "--batch", 4, "--steps", 2]
        where = ["--data", data or self.text, "--out", self.new("out")]
        return ["train", "--recipe", "tiny", *small, *where, *flags]

    def resume(self, *flags: object) -> list[object]:
        return ["train", "--resume", "--out", self.run, *flags]

    def checkpoint(self, kind: str) -> Path:
        return self.run / f"checkpoints/step_00000060.{kind}"


@pytest.fixture
def world(small_text: Path, copied: Path, tmp_path: Path, monkeypatch) -> World:
    monkeypatch.setenv("TRITWISE_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "new"
    folder.mkdir()
    return World(small_text, copied, folder)


def flip(path: Path, place: float = 0.5) -> Path:
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 1
    path.write_bytes(data)
    return path


def cut(path: Path, share: float = 0.5) -> Path:
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    return path


def with_file(path: Path, act: Callable[[Path], object], command: list[object]) -> list[object]:
    act(path)
    return command


def newer_checkpoint(path: Path) -> None:
    """As a later version would write it: another format, and checksums that hold."""
    body = read_json(path)
    body = {key: value for key, value in body.items() if key != "sha256"} | {"format": 9}
    path.write_bytes(json_bytes(body | {"sha256": sha256(canonical_json(body)).hexdigest()}))


def newer_artifact(path: Path) -> None:
    """The same for an artifact: version 9, and the header's checksum made anew."""
    data = bytearray(path.read_bytes())
    data[8:12] = struct.pack("<I", 9)
    end = 16 + struct.unpack_from("<I", data, 12)[0]
    data[end : end + 32] = sha256(data[:end]).digest()
    path.write_bytes(data)


def broken_zip(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "text " * 1000)
    return cut(path, 0.9)


NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")

# name -> (world -> command line, words of the message)
CASES: dict[str, tuple[Callable[[World], list[object]], str]] = {
    # data
    "data missing": (lambda w: w.train(data=w.new("none.txt")), "no such file or folder"),
    "data empty": (lambda w: w.train(data=w.new("empty.txt", b"")), "empty file"),
    "data too short for ctx": (lambda w: w.train(data=w.new("short.txt", b"a text too short")), "data too short"),
    "data too short to split": (lambda w: w.train(data=w.new("short.txt", b"sh")), "leaves"),
    "data empty name": (lambda w: w.train("--data", ""), "no data given"),
    "data folder without files": (lambda w: w.train(data=w.folder), "folder without files"),
    "data corrupt gz": (lambda w: w.train(data=w.new("a.gz", b"no gzip at all")), "corrupted file"),
    "data corrupt xz": (lambda w: w.train(data=w.new("a.xz", b"\xfd7zXZ\x00 and then junk")), "corrupted file"),
    "data corrupt zst": (lambda w: w.train(data=w.new("a.zst", b"\x28\xb5\x2f\xfd junk")), "corrupted file"),
    "data corrupt zip": (lambda w: w.train(data=broken_zip(w.new("a.zip"))), "corrupted file"),
    "data of a packed type": (lambda w: w.train(data=w.new("a.parquet", b"PAR1")), "unsupported type .parquet"),
    "data is a device": (lambda w: w.train(data=Path("/dev/null")), "not a file or folder"),
    "scored text missing": (lambda w: ["score", w.run, "--data", w.new("none")], "no such file or folder"),
    "scored text empty": (lambda w: ["score", w.run, "--data", w.new("empty", b"")], "empty file"),
    # numbers and names
    "steps 0": (lambda w: w.train("--steps", 0), "steps is 0; it must be at least 1"),
    "steps negative": (lambda w: w.train("--steps", -5), "steps is -5; it must be at least 1"),
    "batch 0": (lambda w: w.train("--batch", 0), "batch is 0"),
    "batch negative": (lambda w: w.train("--batch", -1), "batch is -1"),
    "accum 0": (lambda w: w.train("--accum", 0), "accum is 0"),
    "ctx 0": (lambda w: w.train("--ctx", 0), "ctx is 0"),
    "ctx negative": (lambda w: w.train("--ctx", -64), "ctx is -64"),
    "width 0": (lambda w: w.train("--width", 0), "width is 0"),
    "width negative": (lambda w: w.train("--width", -32), "width is -32"),
    "width odd": (lambda w: w.train("--width", 33), "does not divide into 1 heads of an even size"),
    "depth 0": (lambda w: w.train("--depth", 0), "depth is 0"),
    "depth negative": (lambda w: w.train("--depth", -2), "depth is -2"),
    "heads that do not divide": (lambda w: w.train("--set", "heads=3"), "does not divide into 3 heads"),
    "kv heads that do not divide": (lambda w: w.train("--set=heads=4", "--set=kv_heads=3"), "choose a divisor"),
    "rate nan": (lambda w: w.train("--rate", "nan"), "rate is nan; it must be a finite number"),
    "rate inf": (lambda w: w.train("--rate", "inf"), "rate is inf; it must be a finite number"),
    "rate negative": (lambda w: w.train("--rate", "-0.1"), "rate is -0.1"),
    "seed negative": (lambda w: w.train("--seed", -1), "seed is -1"),
    "seed too large": (lambda w: w.train("--seed", 2**64), "seed out of range"),
    "log interval 0": (lambda w: w.train("--log-interval", 0), "log_interval is 0"),
    "save interval negative": (lambda w: w.train("--save-interval", -1), "save_interval is -1"),
    "steps no number": (lambda w: w.train("--steps", "abc"), "--steps"),
    "rate no number": (lambda w: w.train("--rate", "fast"), "--rate"),
    "more memory than there is": (lambda w: w.train("--batch", 10**16), "not enough memory"),
    "more weights than memory": (
        lambda w: w.train("--set=ngrams=2", f"--set=ngram_rows={10**15}"),
        "not enough memory",
    ),
    "softcap no number": (lambda w: w.train("--set", "softcap=inf"), "softcap is inf"),
    "vocab of another size": (lambda w: w.train("--set", "vocab=100"), "vocab is 100; a model of bytes needs 256"),
    "stride beyond the context": (lambda w: w.train("--set", "stride=17"), "stride is 17"),
    "momentum 1": (lambda w: w.train("--set", "momentum=1"), "momentum is 1.0"),
    "unknown option": (lambda w: w.train("--widht", 3), "No such option: --widht"),
    "unknown command": (lambda w: ["trian"], "No such command 'trian'"),
    "no model": (lambda w: ["score"], "Missing argument"),
    "no out": (lambda w: ["ship", w.run], "Missing option '--out'"),
    "an argument too many": (lambda w: ["audit", w.run, w.run], "unexpected extra argument"),
    "unknown setting": (lambda w: w.train("--set", "sofcap=3"), "no setting 'sofcap'; did you mean softcap?"),
    "setting without value": (lambda w: w.train("--set", "softcap"), "--set softcap is not KEY=VALUE"),
    "setting without key": (lambda w: w.train("--set", "=3"), "--set =3 is not KEY=VALUE"),
    "setting of another type": (
        lambda w: w.train("--set", "interval=often"),
        "interval is 'often'; it must be a whole",
    ),
    "setting neither true nor false": (lambda w: w.train("--set", "save=perhaps"), "must be true or false"),
    "unknown recipe": (lambda w: ["train", "--recipe", "shakespear"], "did you mean shakespeare?"),
    "unknown optimizer": (lambda w: w.train("--set", "optimizer=sgd"), "choose one of trit, adamw, muon"),
    "optimizer without float weights": (lambda w: w.train("--set", "optimizer=muon"), "use trit with weights=trit"),
    "fp8 of float weights": (
        lambda w: w.train("--set=weights=float", "--set=optimizer=adamw", "--set=fp8=true"),
        "fp8 is for ternary layers, whose trits are exact in it; use optimizer=trit",
    ),
    "fp8 of small layers": (
        lambda w: w.train("--set", "fp8=true"),
        "no ternary matrix is wide enough for it to pay, from 512 rows on; leave fp8 off",
    ),
    "fp8 with several scales a row": (
        lambda w: w.train("--set", "mlp_ratio=32", "--set", "fp8=true"),
        "each row needs a single scale; set group=65536",
    ),
    "fp8 of an odd width": (
        lambda w: w.train("--width", 40, "--set=mlp_ratio=32", "--set=group=65536", "--set=fp8=true"),
        "must be multiples of 16, not (1280, 40); choose another width",
    ),
    "unknown direction": (lambda w: w.train("--set", "direction=up"), "direction is 'up'; choose one of"),
    "unknown device": (lambda w: w.train("--set", "device=tpu"), "device is 'tpu'; choose one of auto, cpu, cuda"),
    "unknown split rule": (lambda w: w.train("--set", "split=most"), "unknown split rule: 'most'; use"),
    "split without train": (lambda w: w.train("--set", "split=all"), "leaves nothing to train on"),
    # runs
    "out holds a run": (lambda w: ["train", "--recipe", "tiny", "--out", w.run], "already holds a run; add --resume"),
    "resume without a run": (lambda w: ["train", "--resume", "--out", w.new("none")], "there is no run at"),
    "resume of an empty folder": (lambda w: ["train", "--resume", "--out", w.folder], "is no run folder"),
    "resume with another seed": (lambda w: w.resume("--seed", 9), "seed cannot change"),
    "resume with fewer steps": (lambda w: w.resume("--steps", 9), "is at step 60 already"),
    "resume with another recipe": (lambda w: w.resume("--recipe", "shakespeare"), "is a run of tiny"),
    "both out and run": (lambda w: w.train("--run", "x"), "both --out and --run name the run folder"),
    "out is a file": (lambda w: w.train("--out", w.text), "a file is in the way"),
    "out below a file": (lambda w: w.train("--out", w.text / "run"), "a file is in the way"),
    "out where nobody may write": (lambda w: w.train("--out", "/proc/run"), "cannot write /proc/run"),
    "out with too long a name": (lambda w: w.train("--out", w.new("x" * 300)), "the name is too long"),
    "audit of nothing": (lambda w: ["audit", w.new("none")], "there is no run at"),
    "audit of a file": (lambda w: ["audit", w.text], "is no run folder"),
    "report of nothing": (lambda w: ["report", w.new("none")], "does not exist"),
    "report of an empty folder": (lambda w: ["report", w.folder], "is not a run folder"),
    "score of a run without checkpoint": (
        lambda w: with_file(w.checkpoint("json"), lambda p: [x.unlink() for x in p.parent.iterdir()], ["score", w.run]),
        "no checkpoint in",
    ),
    "damaged config": (lambda w: with_file(w.run / "config.json", cut, w.resume()), "is not valid JSON"),
    "config of another kind": (
        lambda w: with_file(w.run / "config.json", lambda p: p.write_text("[]"), ["ship", w.run, "--out", w.new("m")]),
        "this run's config is damaged",
    ),
    "newer config": (
        lambda w: with_file(w.run / "config.json", lambda p: p.write_text('{"format": 2}'), ["audit", w.run]),
        "this run's config has format 2; upgrade",
    ),
    # checkpoints
    "flipped byte in the tensors": (lambda w: with_file(w.checkpoint("safetensors"), flip, w.resume()), "is damaged"),
    "flipped byte in the JSON": (lambda w: with_file(w.checkpoint("json"), flip, w.resume()), "is damaged"),
    "truncated tensors": (lambda w: with_file(w.checkpoint("safetensors"), cut, w.resume()), "is cut short"),
    "truncated JSON": (lambda w: with_file(w.checkpoint("json"), cut, w.resume()), "is damaged"),
    "missing tensors": (lambda w: with_file(w.checkpoint("safetensors"), Path.unlink, w.resume()), "is missing"),
    "newer checkpoint": (
        lambda w: with_file(w.checkpoint("json"), newer_checkpoint, w.resume()),
        "was made by a newer Tritwise (checkpoint format 9; this one reads 1); upgrade Tritwise",
    ),
    "damaged checkpoint scored": (
        lambda w: with_file(w.checkpoint("safetensors"), flip, ["score", w.run]),
        "to resume from step 40",
    ),
    # artifacts
    "no such model": (lambda w: ["sample", w.new("none.tritwise")], "does not exist; check the path"),
    "artifact is a text": (lambda w: ["score", w.text], "is not a Tritwise artifact; name a file"),
    "artifact is empty": (lambda w: ["sample", w.new("empty", b"")], "is empty; copy it again"),
    "flipped byte in the header": (
        lambda w: ["sample", flip(w.artifact, 0.05)],
        "is damaged: its header's checksum does not match; copy it again",
    ),
    "flipped byte in the weights": (lambda w: ["sample", flip(w.artifact, 0.9)], "is damaged in its stream"),
    "truncated artifact": (lambda w: ["score", cut(w.artifact)], "is cut short"),
    "newer artifact": (
        lambda w: with_file(w.artifact, newer_artifact, ["sample", w.artifact]),
        "was made by a newer Tritwise (artifact format 9; this one reads 1); upgrade Tritwise",
    ),
    "artifact where a folder is": (lambda w: ["ship", w.run, "--out", w.folder], "it is a folder; name a file"),
    "artifact into no folder": (lambda w: ["ship", w.run, "--out", w.new("no") / "m"], "does not exist; make it"),
    "artifact to a device": (lambda w: ["ship", w.run, "--out", "/dev/full"], "it is a device or a pipe"),
    # scoring and sampling
    "score of an unknown part": (lambda w: ["score", w.run, "--split", "dev"], "no part 'dev'; choose one of"),
    "score with an unknown rule": (lambda w: ["score", w.run, "--rule", "9"], "unknown split rule"),
    "window beyond the model": (lambda w: ["score", w.run, "--window", 33], "window 33 does not fit the model"),
    "stride beyond the window": (lambda w: ["score", w.run, "--window", 8, "--stride", 9], "stride 9 would skip"),
    "a negative number of bytes": (lambda w: ["sample", w.run, "--bytes", -1], "cannot sample -1 bytes; ask for"),
    "temperature nan": (lambda w: ["sample", w.run, "--temperature", "nan"], "temperature is nan; it must be"),
    "temperature negative": (lambda w: ["sample", w.run, "--temperature", "-1"], "temperature is -1.0"),
    "top k beyond the bytes": (lambda w: ["sample", w.run, "--top-k", 257], "top_k is 257"),
    "seed of a sample too large": (lambda w: ["sample", w.run, "--seed", 10**30], "--seed"),
}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_one_line(outcome, words: str) -> None:
    """Exit code 2, and on stderr one line: what is wrong; a remedy of two words or more."""
    assert outcome.code == 2
    assert re.fullmatch(r"error: [^\n]+; [^\n ]+ [^\n]+\n", outcome.err), outcome.err
    assert words in outcome.err and "Traceback" not in outcome.err
    assert outcome.json == {"error": outcome.err.removeprefix("error: ").removesuffix("\n")}


@pytest.mark.parametrize("name", CASES)
def test_one_line_and_a_remedy(name: str, world: World, cli):
    build, words = CASES[name]
    command = build(world)
    before = contents(world.run)
    assert_one_line(cli(*command, "--json"), words)
    assert contents(world.run) == before, "what was there must stay as it was"


@NO_GPU
def test_a_gpu_that_is_not_there(world: World, cli):
    assert_one_line(cli(*world.train("--set", "device=cuda"), "--json"), "torch sees no GPU; use --set device=cpu")


def test_a_backend_that_is_not_there(world: World, cli, monkeypatch):
    monkeypatch.setenv("TRITWISE_BACKEND", "abacus")
    assert_one_line(cli("sample", world.run, "--json"), "there is no backend 'abacus'; choose one of")
    monkeypatch.setenv("TRITWISE_BACKEND", "reference")
    assert cli("sample", world.run, "--json").code == 0


def test_without_json_stdout_stays_empty(world: World, cli):
    outcome = cli("score", world.new("none"))
    assert outcome.code == 2 and not outcome.out and outcome.err.startswith("error: ")


def test_a_file_that_may_not_be_read(world: World, cli, monkeypatch):
    # Root may read everything, so the refusal is the system's in name only.
    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(world.text))

    monkeypatch.setattr(np, "memmap", refuse)
    assert_one_line(cli(*world.train(), "--json"), "Permission denied; check its permissions")


def test_binary_data_is_data(world: World, cli):
    noise = np.random.default_rng(0).integers(0, 256, 3000, dtype=np.uint8).tobytes()
    done = cli(*world.train(data=world.new("noise.bin", noise)), "--json")
    assert done.code == 0 and 5 < done.json["val"]["nats"] < 7


def test_an_empty_prompt_is_a_prompt(world: World, cli):
    done = cli("sample", world.run, "--prompt", "", "--bytes", 5, "--json")
    assert done.code == 0 and done.json["prompt"] == "" and done.json["bytes"] == 5


def test_every_flipped_bit_of_the_json_is_noticed(world: World, cli):
    path = world.checkpoint("json")
    whole = path.read_bytes()
    for place in np.linspace(0, len(whole) - 1, 40).astype(int):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        assert_one_line(cli("audit", world.run, "--json"), str(path))


# The disk


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """The system itself refuses to let a file grow beyond `size` bytes, as a full disk or a quota would."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_while_a_checkpoint_is_saved(small_config, stop_at, tmp_path: Path, cli, assert_same_state):
    train(small_config(), tmp_path / "whole")
    run = tmp_path / "run"
    train(small_config(), run, display=stop_at(6))
    before = contents(run / "checkpoints")
    size = (run / "checkpoints/step_00000006.safetensors").stat().st_size
    with files_no_larger_than(size - 1000):
        refused = cli("train", "--resume", "--out", run, "--json")
    assert refused.code == 2
    assert re.search(r"error: cannot write .*step_00000008\.safetensors: no space left .*; free space", refused.err)
    assert "Traceback" not in refused.err and "error" in refused.json
    assert contents(run / "checkpoints") == before
    assert load(run).about["steps"] == 6
    done = cli("train", "--resume", "--out", run, "--json")
    assert done.code == 0 and done.json["steps"] == 12
    assert_same_state(tmp_path / "whole", run)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EIO], ids=errno.errorcode.get)
@pytest.mark.parametrize(
    "victim", ["step_00000008.safetensors", "step_00000008.json", "metrics.jsonl", "result.json", "model.tritwise"]
)
def test_a_disk_that_refuses(code: int, victim: str, small_config, stop_at, tmp_path: Path, cli, monkeypatch):
    run = tmp_path / "run"
    train(small_config(), run, display=stop_at(6))
    before = contents(run / "checkpoints")
    sound, target = files._write_all, [""]

    def write(file, data) -> None:
        if target[0] == victim or str(file.name).endswith(victim):
            raise OSError(code, os.strerror(code))
        sound(file, data)

    def atomic_write(path, data) -> None:
        target[0] = Path(path).name
        try:
            written(path, data)
        finally:
            target[0] = ""

    written = files.atomic_write
    with monkeypatch.context() as patch:
        patch.setattr(files, "_write_all", write)
        for module in ("tritwise.files", "tritwise.train.checkpoint", "tritwise.ship.container"):
            patch.setattr(f"{module}.atomic_write", atomic_write)
        refused = cli("train", "--resume", "--out", run, "--json")
    assert refused.code == 2
    (line,) = [line for line in refused.err.splitlines() if line.startswith("error: ")]
    assert victim in line and "; " in line and "Traceback" not in refused.err
    assert json.loads(refused.out)["error"] == line.removeprefix("error: ")
    kept = contents(run / "checkpoints")
    if victim.startswith(("step", "metrics")):
        assert {name: kept[name] for name in before} == before and not any(name.endswith(".tmp") for name in kept)
    assert cli("train", "--resume", "--out", run, "--json").json["steps"] == 12


def test_a_report_that_cannot_be_written(world: World, cli):
    pytest.importorskip("matplotlib")
    assert_one_line(cli("report", world.run, "--out", world.text, "--json"), "a file is in the way")
