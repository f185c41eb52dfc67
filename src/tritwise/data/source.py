"""Any file or folder as one read-only stream of bytes: plain files are memory-mapped, compressed ones unpacked once.

A model reads bytes, so there is no tokenizer and no format: `open_bytes` gives the bytes of

- a plain file, mapped where it lies;
- a `.gz`, `.zst` or `.xz` file, unpacked;
- a `.zip` file: its members in name order, joined;
- a folder: its regular files at any depth in the order of their relative paths, each plain or compressed, joined;
- the name `shakespeare` (or `tinyshakespeare`): the text in the package. A file of that name is `./shakespeare`.

Joined means one after the other, with a single newline between two parts unless the earlier one already ends with a
newline; empty parts add nothing. Hidden files and folders (a name that starts with a dot) are left out, and so are
dangling links, sockets and devices inside a folder. Compressed or packed members of a zip are refused, never read as
noise.

What is not a single plain file is written once into the cache, `$TRITWISE_CACHE`, else `$XDG_CACHE_HOME/tritwise`, else
`~/.cache/tritwise`, under a name made from absolute path, size and modification time. Its files may be deleted at will.
"""

from __future__ import annotations

import contextlib
import errno
import gzip
import hashlib
import lzma
import os
import re
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import IO, Any, BinaryIO

import numpy as np
import zstandard

from tritwise.errors import UserError
from tritwise.files import CACHE_REMEDY, atomic_write, cache_folder, explain, make_folder

BUNDLED = Path(__file__).parent / "tinyshakespeare.txt"
BUNDLED_NAMES = ("shakespeare", "tinyshakespeare")
COMPRESSED = (".gz", ".zst", ".xz", ".zip")
# Reading these as raw bytes would train on noise, so they are refused by name.
PACKED = re.compile(r"\.(7z|arrow|br|bz2|feather|lz4|lzma|parquet|rar|tar|tbz2|tgz|txz|tzst|z)")
CHUNK = 1 << 20
BITE = 1 << 12  # zstd can unpack 4 bytes to 128 KiB: small bites keep memory bounded for any file
BROKEN = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, zipfile.BadZipFile, zstandard.ZstdError)
BROKEN += (UnicodeDecodeError,)  # a damaged member name in a zip


@dataclass(frozen=True)
class Source:
    """A data source by name. `data` is uint8 of shape [bytes], read-only."""

    name: str
    path: Path
    data: np.ndarray

    @cached_property
    def digest(self) -> str:
        """sha256 of the whole stream, 64 hex digits; read through once, on first use."""
        return sha256_hex(self.data)


def describe(path: Path | str, *, cache: Path | str | None = None) -> Source:
    """Opens `path` as `open_bytes` does and keeps its name beside the bytes. Raises UserError."""
    located, data = locate(path), open_bytes(path, cache=cache)
    name = "tinyshakespeare" if located == BUNDLED else located.resolve().name
    return Source(name, located, data)


def open_bytes(path: Path | str, *, cache: Path | str | None = None) -> np.ndarray:
    """The bytes of a file, a folder or a bundled name, as a read-only np.memmap of uint8, shape [bytes].

    `cache` is the folder for unpacked copies; see the module's first lines for the default.

    Raises UserError: the path is missing, empty, unreadable, not a file or folder, of an unsupported type, or
    corrupted; a folder or zip holds no files; or the cache cannot be written.
    """
    located = locate(path)
    status = _status(located)
    if stat.S_ISDIR(status.st_mode):
        files = _listing(located)
    elif stat.S_ISREG(status.st_mode):
        files = [located]
    else:
        raise UserError(f"not a file or folder: {located} is a device, socket or pipe; copy its content to a file")
    for file in files:
        _refuse_packed(file, file.name)
    if files == [located] and (status.st_size == 0 or located.suffix.lower() not in COMPRESSED):
        return _map(located)
    pieces = _joined(part for file in files for part in _parts(file))
    return _map(once(files, _not_empty(pieces, located), cache=cache))


def once(key: list[Path] | str, pieces: Iterator[bytes], *, cache: Path | str | None = None) -> Path:
    """The file in the cache that holds `pieces`, written if it is not there. key: the files that they are made of, as
    they are now, or words that name the content. Raises UserError, and what `pieces` raises."""
    if isinstance(key, str):
        digest = hashlib.sha256(b"tritwise cache 1\0" + key.encode()).hexdigest()
    else:
        digest = _digest_of(key)
    target = cache_folder(cache) / f"{digest[:32]}.bytes"
    _write_once(target, pieces)
    return target


def sha256_hex(data: np.ndarray) -> str:
    """sha256 of a uint8 array [bytes] as 64 hex digits, in bounded memory."""
    digest = hashlib.sha256()
    for start in range(0, len(data), 16 * CHUNK):
        digest.update(data[start : start + 16 * CHUNK].tobytes())
    return digest.hexdigest()


def locate(path: Path | str) -> Path:
    """Where a path or a bundled name leads. Raises UserError for an empty one."""
    if isinstance(path, str):
        if path in BUNDLED_NAMES:
            return BUNDLED
        if not path:
            raise UserError("no data given: the path is empty; name a file or folder, or use --data shakespeare")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"cannot find the home folder of {path}: {error}; write the path in full") from error


def _status(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"no such file or folder: {path}; check the path or use --data shakespeare") from error
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL byte
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> UserError:
    reason = getattr(error, "strerror", None) or str(error)
    return UserError(f"cannot read {path}: {reason}; check its permissions or use --data shakespeare")


def _corrupted(path: Path, reason: str) -> UserError:
    return UserError(f"corrupted file: {path} does not unpack ({reason}); download or compress it again")


def _listing(folder: Path) -> list[Path]:
    """The regular, visible files below a folder, sorted by relative path."""

    def fail(error: OSError) -> None:
        raise error  # os.walk would pass over a folder that it cannot list

    files: list[Path] = []
    with _reading(folder):
        for root, folders, names in os.walk(folder, onerror=fail):
            folders[:] = [name for name in folders if not _hidden(name)]
            paths = (Path(root, name) for name in names if not _hidden(name))
            files += [path for path in paths if path.is_file()]
    files.sort(key=lambda file: file.relative_to(folder).as_posix())
    if not files:
        raise UserError(f"folder without files: {folder}; put text files into it or use --data shakespeare")
    return files


def _refuse_packed(path: Path, name: str) -> None:
    """Raises for a type that has to be unpacked first; `name` also catches x.tar.gz and packed members of a zip."""
    suffixes = [suffix.lower() for suffix in PurePosixPath(name).suffixes]
    while suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    if suffixes and PACKED.fullmatch(suffixes[-1]):
        raise UserError(
            f"unsupported type {suffixes[-1]}: {path}; unpack it first (read are plain, .gz, .zst, .xz, .zip, folders)"
        )


def _parts(path: Path) -> Iterator[Iterator[bytes]]:
    """The streams of one file: several for a zip, else one. All reading errors come out as UserError."""
    suffix = path.suffix.lower()
    if suffix != ".zip":
        yield _guarded(path, _stream(path, suffix))
        return
    with _reading(path), zipfile.ZipFile(path) as archive:
        entries = sorted(archive.infolist(), key=lambda entry: entry.filename)
        entries = [entry for entry in entries if not (entry.is_dir() or _hidden(entry.filename))]
        if not entries:
            raise UserError(f"zip without files: {path}; give an archive with at least one file in it")
        for entry in entries:
            if PurePosixPath(entry.filename).suffix.lower() in COMPRESSED:
                raise UserError(
                    f"compressed file inside a zip: {entry.filename} in {path}; unpack the zip and give the folder"
                )
            _refuse_packed(path / entry.filename, entry.filename)
        for entry in entries:
            yield _guarded(path, _member(archive, entry))


def _hidden(name: str) -> bool:
    return any(part.startswith(".") for part in PurePosixPath(name).parts)


def _stream(path: Path, suffix: str) -> Iterator[bytes]:
    with path.open("rb") as raw:
        if suffix == ".zst":
            yield from _frames(raw, lambda: zstandard.ZstdDecompressor().decompressobj())
        elif suffix == ".xz":
            yield from _frames(raw, lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ))
        elif suffix == ".gz":
            with gzip.open(raw) as unpacked:
                yield from _pieces(unpacked)
        else:
            yield from _pieces(raw)


def _member(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Iterator[bytes]:
    with archive.open(entry) as member:
        yield from _pieces(member)


def _pieces(stream: IO[bytes] | gzip.GzipFile) -> Iterator[bytes]:
    while piece := stream.read(CHUNK):
        yield piece


def _frames(raw: BinaryIO, new_frame: Callable[[], Any]) -> Iterator[bytes]:
    # The libraries' own readers are too kind: zstandard's takes a cut frame for the end, lzma's drops junk behind one.
    frame = None
    while piece := raw.read(BITE):
        while frame or (piece := piece.lstrip(b"\0")):  # xz allows zeros between its streams
            frame = frame or new_frame()
            yield frame.decompress(piece)
            if not frame.eof:
                break
            piece, frame = frame.unused_data, None
    if frame:
        raise EOFError("it ends in the middle of the stream")


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except BROKEN as error:
        raise _corrupted(path, str(error) or "it ends too early") from error
    except (RuntimeError, NotImplementedError) as error:  # zipfile: encrypted, or a method it does not know
        raise UserError(f"cannot unpack {path}: {error}; unpack it first") from error
    except OSError as error:
        if error.errno == errno.EINVAL:  # zipfile followed a damaged offset to before the file
            raise _corrupted(path, "an offset points outside the file") from error
        raise _unreadable(Path(error.filename or path), error) from error


def _guarded(path: Path, stream: Iterator[bytes]) -> Iterator[bytes]:
    with _reading(path):
        yield from stream


def _joined(parts: Iterable[Iterator[bytes]]) -> Iterator[bytes]:
    last = b""
    for part in parts:
        opening = True
        for piece in part:
            if not piece:
                continue
            if opening and last and last != b"\n":
                yield b"\n"
            opening = False
            last = piece[-1:]
            yield piece


def _digest_of(files: list[Path]) -> str:
    key = hashlib.sha256(b"tritwise cache 1")
    for file in files:
        status = _status(file)
        key.update(b"\0" + os.fsencode(file.absolute()) + f"\0{status.st_size}\0{status.st_mtime_ns}".encode())
    return key.hexdigest()


def _write_once(target: Path, pieces: Iterator[bytes]) -> None:
    try:
        if target.exists():
            return
    except OSError as error:
        raise explain(error, target, "write", CACHE_REMEDY) from error
    make_folder(target.parent, CACHE_REMEDY)
    atomic_write(target, pieces, CACHE_REMEDY)


def _not_empty(pieces: Iterator[bytes], source: Path | str) -> Iterator[bytes]:
    written = 0
    for piece in pieces:
        written += len(piece)
        yield piece
    if not written:
        raise UserError(f"empty data: {source} holds no bytes; give a file with text or use --data shakespeare")


def _map(path: Path) -> np.ndarray:
    if _status(path).st_size == 0:
        raise UserError(f"empty file: {path} holds no bytes; give a file with text or use --data shakespeare")
    try:
        return np.memmap(path, dtype=np.uint8, mode="r")
    except OSError as error:
        raise _unreadable(path, error) from error
