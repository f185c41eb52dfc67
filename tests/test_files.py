"""Durable files: whole or not there, and every refusal one line with a remedy."""

import errno
import json
import os
import resource
import signal
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tritwise import files
from tritwise.errors import UserError
from tritwise.files import JsonLines, atomic_write, read_bytes, read_json, read_json_lines, sha256_of, write_json


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """A real refusal in the middle of a write, by the kernel."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


@contextmanager
def unprivileged() -> Iterator[None]:
    """Permissions do not bind root, so root becomes nobody for a moment."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def refuse(code: int):
    def refused(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    return refused


def test_atomic_write_replaces_and_leaves_nothing_beside(tmp_path: Path):
    path = tmp_path / "a.bin"
    atomic_write(path, b"old")
    atomic_write(path, (piece for piece in [b"ne", bytearray(b"w"), b""]))
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["a.bin"]


def test_the_data_is_on_the_disk_before_the_rename_and_the_rename_after(tmp_path: Path, monkeypatch):
    calls = []

    def noted(name: str, real):
        def act(*arguments):
            is_folder = name == "fsync" and stat.S_ISDIR(os.fstat(arguments[0]).st_mode)
            calls.append("fsync of the folder" if is_folder else name)
            return real(*arguments)

        return act

    monkeypatch.setattr(files, "_write_all", noted("write", files._write_all))
    monkeypatch.setattr(os, "fsync", noted("fsync", os.fsync))
    monkeypatch.setattr(os, "replace", noted("replace", os.replace))
    atomic_write(tmp_path / "a", [b"x", b"y"])
    assert calls == ["write", "write", "fsync", "replace", "fsync of the folder"]


def test_atomic_write_takes_a_name_of_the_longest_legal_length(tmp_path: Path):
    atomic_write(tmp_path / ("n" * 255), b"x")
    assert names(tmp_path) == ["n" * 255]


def test_new_file_has_ordinary_permissions(tmp_path: Path):
    atomic_write(tmp_path / "a", b"")
    (tmp_path / "b").write_bytes(b"")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


@pytest.mark.parametrize(
    ("code", "what", "remedy"),
    [
        (errno.ENOSPC, "no space left", "free space or choose another --out"),
        (errno.EDQUOT, "no space left", "free space or choose another --out"),
        (errno.EROFS, "read-only", "choose another --out"),
        (errno.EACCES, "permissions", "choose another --out"),
        (errno.EPERM, "permissions", "choose another --out"),
        (errno.EIO, "Input/output error", "check the disk"),
    ],
)
@pytest.mark.parametrize("call", ["os.fsync", "os.replace", "tritwise.files._write_all", "pathlib.Path.open"])
def test_refused_write_keeps_the_old_file(tmp_path: Path, monkeypatch, call: str, code: int, what: str, remedy: str):
    path = tmp_path / "a.bin"
    atomic_write(path, b"old")
    with monkeypatch.context() as patch, pytest.raises(UserError) as caught:
        patch.setattr(call, refuse(code))
        atomic_write(path, b"new")
    message = str(caught.value)
    assert what in message and remedy in message and str(path) in message and "\n" not in message
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a.bin"]


@pytest.mark.parametrize(
    "code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EIO]
)
def test_a_remedy_of_the_caller_takes_the_place_of_the_usual_one(tmp_path: Path, monkeypatch, code: int):
    error = OSError(code, os.strerror(code))
    usual, what = str(files.explain(error, "a", "write")).split("; ")[::-1]
    assert str(files.explain(error, "a", "write", "buy a disk")) == f"{what}; buy a disk" and usual != "buy a disk"
    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"; buy a disk$"):
        patch.setattr(os, "fsync", refuse(code))
        atomic_write(tmp_path / "a.bin", b"new", "buy a disk")
    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"; buy a disk$"):
        patch.setattr(os, "mkdir", refuse(code))
        files.make_folder(tmp_path / "folder", "buy a disk")
    for action in ("read", "write"):
        gone = files.explain(FileNotFoundError(errno.ENOENT, "gone"), "a", action, "buy a disk")
        assert str(gone).endswith("does not exist; buy a disk")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a device that is always full")
def test_really_full_device(tmp_path: Path, monkeypatch):
    path = tmp_path / "a.bin"
    atomic_write(path, b"old")
    real_open = Path.open
    with monkeypatch.context() as patch, pytest.raises(UserError, match="no space left"):
        patch.setattr(Path, "open", lambda self, mode, **more: real_open(Path("/dev/full"), "wb", **more))
        atomic_write(path, b"new")
    assert path.read_bytes() == b"old"


def test_really_refused_in_mid_write(tmp_path: Path):
    path = tmp_path / "a.bin"
    atomic_write(path, b"old")
    with file_size_limit(1000), pytest.raises(UserError, match="no space left"):
        atomic_write(path, [b"x" * 800, b"y" * 800])
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a.bin"]


def test_really_forbidden_folder(tmp_path: Path):
    folder = tmp_path / "locked"
    folder.mkdir()
    atomic_write(folder / "a", b"old")
    folder.chmod(0o500)
    with unprivileged():
        with pytest.raises(UserError, match=r"permissions do not allow it; .* another --out"):
            atomic_write(folder / "a", b"new")
        with pytest.raises(UserError, match="permissions"):
            files.make_folder(folder / "deeper")
        with pytest.raises(UserError, match="permissions"):
            JsonLines(folder / "metrics.jsonl")
    folder.chmod(0o700)
    assert (folder / "a").read_bytes() == b"old"


def test_exception_in_the_pieces_leaves_the_old_file(tmp_path: Path):
    path = tmp_path / "a.bin"
    atomic_write(path, b"old")

    def pieces() -> Iterator[bytes]:
        yield b"new"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        atomic_write(path, pieces())
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a.bin"]


def test_places_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match=r"the folder .*nowhere does not exist"):
        atomic_write(tmp_path / "nowhere" / "a", b"")
    with pytest.raises(UserError, match="where a folder is needed"):
        atomic_write(tmp_path / "file" / "a", b"")
    with pytest.raises(UserError, match="where a folder is needed"):
        files.make_folder(tmp_path / "file" / "a")
    with pytest.raises(UserError, match="where a folder is needed"):
        files.make_folder(tmp_path / "file")
    with pytest.raises(UserError, match="name is too long"):
        atomic_write(tmp_path / ("n" * 256), b"")
    with pytest.raises(UserError, match="it is a folder"):
        atomic_write(tmp_path, b"")
    assert names(tmp_path) == ["file"]


def test_a_device_is_never_replaced_or_read(tmp_path: Path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for act in (lambda: atomic_write(pipe, b"x"), lambda: read_bytes(pipe), lambda: JsonLines(pipe)):
        with pytest.raises(UserError, match="a device or a pipe"):
            act()
    assert pipe.is_fifo()


@pytest.mark.parametrize(("code", "raises"), [(errno.EINVAL, False), (errno.ENOTSUP, False), (errno.EIO, True)])
def test_a_file_system_that_cannot_sync_folders_is_accepted(tmp_path: Path, monkeypatch, code: int, raises: bool):
    real, folders = os.fsync, []

    def fsync(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            folders.append(handle)
            raise OSError(code, os.strerror(code))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    if raises:
        with pytest.raises(UserError):
            atomic_write(tmp_path / "a", b"x")
    else:
        atomic_write(tmp_path / "a", b"x")
    assert folders and (tmp_path / "a").read_bytes() == b"x"


def test_leftovers_are_removed_and_nothing_else(tmp_path: Path, monkeypatch):
    class Killed(BaseException):
        pass

    def die(*_: object) -> None:
        monkeypatch.setattr(os, "unlink", die)
        raise Killed

    (tmp_path / "other.tmp").write_bytes(b"")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "replace", die)
        atomic_write(tmp_path / "a", b"x")
    monkeypatch.undo()
    assert len(names(tmp_path)) == 2
    with monkeypatch.context() as patch, pytest.raises(UserError, match="read-only"):
        patch.setattr(os, "unlink", refuse(errno.EROFS))
        files.remove_leftovers(tmp_path)
    files.remove_leftovers(tmp_path)
    assert names(tmp_path) == ["other.tmp"]


def test_json_round_trip_and_layout(tmp_path: Path):
    path = tmp_path / "a.json"
    write_json(path, {"b": [1, 2.5, None], "a": "−1", "bad": float("nan"), "worse": (float("-inf"),)})
    assert read_json(path) == {"b": [1, 2.5, None], "a": "−1", "bad": None, "worse": [None]}
    text = path.read_text(encoding="utf-8")
    assert text.startswith('{\n  "b": [') and '"−1"' in text and text.endswith("}\n")


def test_json_of_a_path_that_is_not_utf8(tmp_path: Path):
    name = os.fsdecode(b"run\xff")
    write_json(tmp_path / "a.json", [name])
    assert read_json(tmp_path / "a.json") == [name]


def test_canonical_json_has_one_spelling():
    assert files.canonical_json({"b": 1, "a": [True, "é"]}) == '{"a":[true,"é"],"b":1}'.encode()
    assert files.canonical_json({"b": 1, "a": 2}) == files.canonical_json({"a": 2, "b": 1})
    with pytest.raises(ValueError, match="JSON"):
        files.canonical_json(float("inf"))


@pytest.mark.parametrize("data", [b"", b"{", b"[1,]", b"\xff", b"[" * 100_000, b"\0\0\0"])
def test_malformed_json(tmp_path: Path, data: bytes):
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(UserError, match=r"a\.json is not valid JSON.*; restore it"):
        read_json(tmp_path / "a.json")


def test_reading_what_is_not_there(tmp_path: Path):
    for read in (read_bytes, read_json, read_json_lines, sha256_of):
        with pytest.raises(UserError, match="does not exist; check the path"):
            read(tmp_path / "nothing")
        with pytest.raises(UserError, match="it is a folder; name a file"):
            read(tmp_path)


def test_sha256_of_bytes_and_of_a_file(tmp_path: Path):
    (tmp_path / "a").write_bytes(b"abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_of(b"abc") == sha256_of(bytearray(b"abc")) == sha256_of(tmp_path / "a") == known
    assert sha256_of(str(tmp_path / "a")) == known


def test_lines_are_on_the_file_as_they_are_written(tmp_path: Path):
    path = tmp_path / "m.jsonl"
    with JsonLines(path) as lines:
        lines.write({"step": 1, "text": "a\nb\u2028c\r"})
        assert read_json_lines(path) == [{"step": 1, "text": "a\nb\u2028c\r"}]
        lines.write({"step": 2, "loss": float("nan")})
    files.append_line(path, {"step": 3})
    assert read_json_lines(path)[1:] == [{"step": 2, "loss": None}, {"step": 3}]
    assert path.read_bytes().count(b"\n") == 3


@settings(max_examples=60)
@given(cut=st.integers(0, 200))
def test_a_torn_last_line_is_dropped_and_the_next_one_is_whole(cut: int, tmp_path_factory):
    path = tmp_path_factory.mktemp("torn") / "m.jsonl"
    records = [{"step": step, "text": "é" * step} for step in range(5)]
    with JsonLines(path) as lines:
        for record in records:
            lines.write(record)
    data = path.read_bytes()[:cut]
    path.write_bytes(data)
    whole = records[: data.count(b"\n")]
    assert read_json_lines(path) == whole
    files.append_line(path, {"step": 9})
    assert read_json_lines(path) == [*whole, {"step": 9}]


def test_truncate_after_a_step(tmp_path: Path):
    path = tmp_path / "m.jsonl"
    with JsonLines(path) as lines:
        for step in range(6):
            lines.write({"kind": "train", "step": step})
        lines.write({"kind": "note"})
        before = path.read_bytes().splitlines()
        lines.truncate_after(2)
        lines.write({"step": 3, "again": True})
    after = path.read_bytes().splitlines()
    assert after[:-1] == [*before[:3], before[6]] and json.loads(after[-1]) == {"step": 3, "again": True}
    assert names(tmp_path) == ["m.jsonl"]


def test_truncate_refused_by_the_disk_changes_nothing(tmp_path: Path, monkeypatch):
    path = tmp_path / "m.jsonl"
    with JsonLines(path) as lines:
        lines.write({"step": 1})
        lines.write({"step": 2})
        with monkeypatch.context() as patch, pytest.raises(UserError, match="no space"):
            patch.setattr(os, "fsync", refuse(errno.ENOSPC))
            lines.truncate_after(1)
        lines.write({"step": 3})
    assert [record["step"] for record in read_json_lines(path)] == [1, 2, 3]


def test_a_refused_line_leaves_no_part_of_itself(tmp_path: Path):
    path = tmp_path / "m.jsonl"
    with JsonLines(path) as lines:
        lines.write({"step": 1})
        with file_size_limit(100), pytest.raises(UserError, match=r"m\.jsonl: no space left"):
            lines.write({"step": 2, "text": "x" * 200})
        lines.write({"step": 3})
    assert [record["step"] for record in read_json_lines(path)] == [1, 3]


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(UserError, match="line 2, is not valid JSON"):
        read_json_lines(path)
    path.write_bytes(b'{"step": 1}\n[2]\n')
    with pytest.raises(UserError, match="line 2, is not a JSON object; remove the line"):
        read_json_lines(path)
