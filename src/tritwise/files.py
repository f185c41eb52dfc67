"""Durable files: a file is either whole or not there, and a refusal by the disk is one line with a remedy.

Every file that a run leaves behind goes through here. A new file is written beside its place, flushed to the disk and
renamed over the old one, so a kill or a full disk at any moment leaves the previous file intact.
"""

import errno
import hashlib
import json
import math
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any

from tritwise.errors import UserError

Buffer = bytes | bytearray | memoryview

CACHE_REMEDY = "set TRITWISE_CACHE to a writable folder with room"  # for what is written below `cache_folder`

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EACCES, errno.EPERM}


def explain(error: OSError, path: str | Path, action: str, remedy: str | None = None) -> UserError:
    """What the operating system refused, as one line with a remedy.

    Args:
        action: "read" or "write".
        remedy: replaces the usual one, which speaks of --out or of another path.
    """
    path, code = Path(path), error.errno
    cannot = f"cannot {action} {path}"
    if code in _NO_SPACE:
        what, usual = "no space left on the disk (or over its quota)", "free space or choose another --out"
    elif code == errno.EROFS:
        what, usual = "the disk is read-only", "choose another --out"
    elif code in _FORBIDDEN:
        what = "its permissions do not allow it"
        usual = f"change them or choose another {'--out' if action == 'write' else 'file'}"
    elif code == errno.ENAMETOOLONG:
        cannot = f"cannot {action} {path.name[:40]}…"
        what, usual = "the name is too long", "choose a shorter one"
    elif code in (errno.ENOTDIR, errno.EEXIST):
        what, usual = "a file is in the way where a folder is needed", "move it or choose another path"
    elif code == errno.EISDIR:
        what, usual = "it is a folder", "name a file"
    elif code == errno.ENOENT and action == "write":
        what, usual = f"the folder {path.parent} does not exist", "make it or choose another --out"
    elif code == errno.ENOENT:
        return UserError(f"{path} does not exist; {remedy or 'check the path'}")
    else:
        what, usual = error.strerror or str(error), "check the disk or choose another path"
    return UserError(f"{cannot}: {what}; {remedy or usual}")


def atomic_write(path: str | Path, data: Buffer | Iterable[Buffer], remedy: str | None = None) -> None:
    """Put `data` (bytes, or pieces of bytes) at `path`, whole or not at all, and on the disk when this returns.

    Args:
        remedy: what a refusal advises, if not another --out; see `explain`.

    Raises:
        UserError: the disk is full or read-only, the folder is missing, the name is too long, or `path` is not a file.
            The previous file, if there was one, is intact and nothing is left beside it.
    """
    path = Path(path)
    pieces = (data,) if isinstance(data, Buffer) else data
    # A short name that does not grow with the target's: a legal long name stays legal.
    temporary = path.parent / f".tritwise-{secrets.token_hex(8)}.tmp"
    try:
        _require_file_or_nothing(path, "write")
        try:
            with temporary.open("xb", buffering=0) as file:
                for piece in pieces:
                    _write_all(file, piece)  # type: ignore[arg-type]  # pyright takes a memoryview for an Iterable
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)
    except OSError as error:
        raise explain(error, path, "write", remedy) from error


def remove_leftovers(folder: str | Path) -> None:
    """Remove what killed writers left in `folder`, which must have no other writer now.

    Raises:
        UserError: the disk refuses.
    """
    try:
        for temporary in Path(folder).glob(".tritwise-*.tmp"):
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise explain(error, folder, "write") from error


def make_folder(path: str | Path, remedy: str | None = None) -> Path:
    """Make `path` and the folders above it, unless they are there. `remedy`: see `explain`.

    Raises:
        UserError: a file is in the way, or the disk refuses.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise explain(error, path, "write", remedy) from error
    return path


def cache_folder(asked: str | Path | None = None) -> Path:
    """The folder of files that can be made again: `asked`, else $TRITWISE_CACHE, else the user's cache folder.

    The last is $XDG_CACHE_HOME/tritwise, else ~/.cache/tritwise. The folder need not exist.

    Raises:
        UserError: there is no home folder.
    """
    try:
        chosen = asked or os.environ.get("TRITWISE_CACHE")
        if chosen:
            return Path(chosen).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "tritwise"
    except RuntimeError as error:
        raise UserError(f"no cache folder: {error}; {CACHE_REMEDY}") from error


def read_bytes(path: str | Path, first: int = -1) -> bytes:
    """The whole of a file, or its `first` bytes.

    Raises:
        UserError: missing, a folder or a device, or not readable.
    """
    path = Path(path)
    try:
        _require_file_or_nothing(path, "read")  # a device such as /dev/zero never ends
        with path.open("rb") as file:
            return file.read(first)
    except OSError as error:
        raise explain(error, path, "read") from error


def sha256_of(source: str | Path | Buffer) -> str:
    """SHA-256 in hex of bytes, or of the file at a path (read in pieces).

    Raises:
        UserError: the file cannot be read.
    """
    if isinstance(source, Buffer):
        return hashlib.sha256(source).hexdigest()
    try:
        with Path(source).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise explain(error, source, "read") from error


def json_bytes(value: Any) -> bytes:
    """JSON for people: indented, keys in the order given, UTF-8. JSON has no NaN or infinity: they become null."""
    return _encode(finite(value), indent=2) + b"\n"


def canonical_json(value: Any) -> bytes:
    """JSON for checksums: one spelling per value (sorted keys, no spaces, UTF-8).

    Raises:
        ValueError: a number is NaN or infinite.
    """
    return _encode(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def parse_json(data: bytes, name: str | Path) -> Any:
    """The value that `data` spells; `name` says in the error where it came from.

    Raises:
        UserError: not UTF-8 or not JSON.
    """
    try:
        return json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name} is not valid JSON: {error}; restore it or make it again") from error


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as readable JSON, atomically. Raises UserError as `atomic_write` does."""
    atomic_write(path, json_bytes(value))


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: missing, unreadable or malformed.
    """
    return parse_json(read_bytes(path), path)


def read_json_lines(path: str | Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, without a last line that has no newline (torn by a kill, or being written).

    Raises:
        UserError: missing, unreadable, or a whole line that is not a JSON object.
    """
    return [record for _, record in _whole_lines(read_bytes(path), path)]


def append_line(path: str | Path, record: dict[str, Any]) -> None:
    """Append one object to a JSON-lines file. Raises UserError as `JsonLines` does."""
    with JsonLines(path) as lines:
        lines.write(record)


class JsonLines:
    """A growing file with one JSON object a line; every line is handed to the system as it is written.

    Opening an existing file appends to it, after dropping a last line that a kill has torn.

    Raises:
        UserError: the file cannot be opened for writing.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            _require_file_or_nothing(self.path, "write")
            # Unbuffered: nothing is lost at a kill, and after a failed write no hidden buffer is flushed later.
            self._file = self.path.open("ab", buffering=0)
            data = self.path.read_bytes()
            self._file.truncate(data.rfind(b"\n") + 1)
        except OSError as error:
            raise explain(error, self.path, "write") from error

    def write(self, record: dict[str, Any]) -> None:
        """Append one object: the whole line, or nothing of it. NaN and infinity become null.

        Raises:
            UserError: the disk is full or refuses.
        """
        line = _encode(finite(record)) + b"\n"
        end = os.fstat(self._file.fileno()).st_size
        try:
            _write_all(self._file, line)
        except OSError as error:
            with suppress(OSError):
                self._file.truncate(end)
            raise explain(error, self.path, "write") from error

    def truncate_after(self, step: int) -> None:
        """Drop, atomically, every line whose "step" is above `step`; lines without a step stay. For resuming at `step`.

        Raises:
            UserError: a line is not a JSON object, or the disk refuses; the file is then unchanged.
        """
        lines = _whole_lines(read_bytes(self.path), self.path)
        atomic_write(self.path, [line for line, record in lines if record.get("step", 0) <= step])
        self._file.close()
        self._file = self.path.open("ab", buffering=0)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "JsonLines":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _write_all(file: FileIO, data: Buffer) -> None:
    """An unbuffered write may take only part (Linux stops at 2 GiB): go on until all is taken."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable. Some network file systems say that they cannot sync a folder: nothing to do."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def _require_file_or_nothing(path: Path, action: str) -> None:
    """Renaming over /dev/null would destroy it for the whole machine, and a pipe or /dev/zero has no end to read to."""
    if path.exists() and not path.is_file():
        what = "a folder" if path.is_dir() else "a device or a pipe"
        raise UserError(f"cannot {action} {path}: it is {what}; name a file")


def _encode(value: Any, **style: Any) -> bytes:
    # A path that is not UTF-8 reaches us as lone surrogates; backslashreplace spells them as JSON escapes (\udc80).
    return json.dumps(value, ensure_ascii=False, **style).encode("utf-8", errors="backslashreplace")


def finite(value: Any) -> Any:
    """`value` with every NaN and infinity, however deep, as None: JSON has no spelling for them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def _whole_lines(data: bytes, name: str | Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    for number, line in enumerate(data[: data.rfind(b"\n") + 1].splitlines(keepends=True), start=1):
        record = parse_json(line, f"{name}, line {number},")
        if not isinstance(record, dict):
            raise UserError(f"{name}, line {number}, is not a JSON object; remove the line")
        yield line, record
