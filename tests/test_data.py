"""Sources and splits: every suffix gives the same bytes, bad input one line and a remedy, parts have exact sizes."""

import contextlib
import errno
import gzip
import hashlib
import itertools
import lzma
import os
import socket
import stat
import zipfile
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tritwise.data import Split, describe, open_bytes, source
from tritwise.data.split import split
from tritwise.errors import UserError

TEXT = b"Now is the winter of our discontent\nMade glorious summer by this sun of York;\n" * 40
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def zip_file(path: Path, **members: bytes) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def put(path: Path, data: bytes) -> Path:
    """Writes data in the form that the path's suffix asks for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    suffix = path.suffix.lower()
    if suffix == ".zip":
        zip_file(path, **{"text.txt": data})
    else:
        pack = {
            ".gz": gzip.compress,
            ".xz": lzma.compress,
            ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
        }.get(suffix, bytes)
        path.write_bytes(pack(data))
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache") / "tritwise"
    monkeypatch.setenv("TRITWISE_CACHE", str(folder))
    return folder


# ---- what is read


@pytest.mark.parametrize("name", ["a.txt", "a", "a.jsonl", "a.gz", "a.txt.gz", "a.zst", "a.xz", "a.zip", "A.GZ"])
def test_every_suffix_gives_the_same_bytes_read_only(tmp_path, name):
    data = open_bytes(put(tmp_path / name, TEXT))
    assert isinstance(data, np.memmap) and data.dtype == np.uint8 and data.tobytes() == TEXT
    with pytest.raises(ValueError):
        data[0] = 1


@given(data=st.binary(min_size=1, max_size=3000), suffix=st.sampled_from([".gz", ".zst", ".xz", ".zip"]))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_survive_any_compression(tmp_path_factory, data, suffix):
    assert open_bytes(put(tmp_path_factory.mktemp("any") / f"x{suffix}", data)).tobytes() == data


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_several_compressed_streams_in_one_file_are_all_read(tmp_path, suffix):
    once = put(tmp_path / f"once{suffix}", TEXT).read_bytes()
    twice = tmp_path / f"twice{suffix}"
    twice.write_bytes(once + once)
    assert open_bytes(twice).tobytes() == TEXT + TEXT


def test_streams_longer_than_a_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr(source, "CHUNK", 7)
    monkeypatch.setattr(source, "BITE", 5)
    for suffix in (".gz", ".xz", ".zst", ".zip"):
        assert open_bytes(put(tmp_path / f"a{suffix}", TEXT)).tobytes() == TEXT


def test_the_bundled_text(cache):
    for name in ("shakespeare", "tinyshakespeare"):
        text = describe(name)
        assert (text.name, len(text.data), text.digest) == ("tinyshakespeare", 1_115_394, SHAKESPEARE_SHA256)
    assert not cache.exists(), "a plain file needs no copy"


def test_describe_a_file(tmp_path):
    told = describe(put(tmp_path / "play.gz", TEXT))
    assert (told.name, told.path, told.data.tobytes()) == ("play.gz", tmp_path / "play.gz", TEXT)
    assert told.digest == hashlib.sha256(TEXT).hexdigest()


def test_folder_in_path_order_joined_by_single_newlines(tmp_path):
    put(tmp_path / "b.txt", b"two\n")
    put(tmp_path / "a.txt.gz", b"one")
    put(tmp_path / "c" / "deep" / "x.xz", b"three")
    put(tmp_path / "c" / "empty.txt", b"")
    zip_file(tmp_path / "d.zip", **{"z": b"five", "y": b"four", ".hidden": b"no", "folder/": b""})
    put(tmp_path / ".hidden", b"no")
    put(tmp_path / ".git" / "config", b"no")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    assert open_bytes(tmp_path).tobytes() == b"one\ntwo\nthree\nfour\nfive"


# ---- the cache


def test_unpacked_once_and_again_when_the_file_changes(tmp_path, cache, monkeypatch):
    file = put(tmp_path / "a.gz", TEXT)
    open_bytes(file)
    (copy,) = cache.iterdir()
    assert copy.read_bytes() == TEXT
    with monkeypatch.context() as patch:
        patch.setattr(source.gzip, "open", lambda *_: pytest.fail("unpacked a second time"))
        assert open_bytes(file).tobytes() == TEXT
    status = file.stat()
    file.write_bytes(gzip.compress(TEXT[::-1])[: status.st_size].ljust(status.st_size, b"\0"))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert open_bytes(file).tobytes() == TEXT[::-1]


def test_a_folder_is_read_again_when_its_listing_changes(tmp_path):
    put(tmp_path / "a", b"one")
    assert open_bytes(tmp_path).tobytes() == b"one"
    put(tmp_path / "b", b"two")
    assert open_bytes(tmp_path).tobytes() == b"one\ntwo"


def test_where_the_cache_lies(tmp_path, monkeypatch):
    file = put(tmp_path / "a.gz", TEXT)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    open_bytes(file, cache=tmp_path / "asked")
    assert len(list((tmp_path / "asked").iterdir())) == 1 and not (tmp_path / "xdg").exists()
    monkeypatch.delenv("TRITWISE_CACHE")
    open_bytes(file)
    assert len(list((tmp_path / "xdg" / "tritwise").iterdir())) == 1
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    open_bytes(file)
    assert len(list((tmp_path / "home" / ".cache" / "tritwise").iterdir())) == 1


def test_a_cache_that_cannot_be_written_names_the_remedy(tmp_path):
    file, blocked = put(tmp_path / "a.gz", TEXT), put(tmp_path / "file", b"x")
    remedy = "; set TRITWISE_CACHE to a writable folder with room$"
    with pytest.raises(UserError, match=f"cannot write {blocked}/inside: a file is in the way .*{remedy}"):
        open_bytes(file, cache=blocked / "inside")
    with pytest.raises(UserError, match=f"cannot write .*: the name is too long{remedy}"):
        open_bytes(file, cache=tmp_path / ("n" * 256))


def test_a_full_disk_leaves_nothing_behind(tmp_path, cache, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(source.os, "fsync", full)
    with pytest.raises(UserError, match=r"no space left on the disk .*; set TRITWISE_CACHE"):
        open_bytes(put(tmp_path / "a.gz", TEXT))
    assert list(cache.iterdir()) == []


# ---- what is refused


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst", ".zip"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "not at all", "junk behind"])
def test_corrupted_streams_are_refused_and_never_cached(tmp_path, cache, suffix, damage):
    noise = np.random.default_rng(0).integers(0, 256, 5000, np.uint8).tobytes()
    file = put(tmp_path / f"a{suffix}", noise)
    good = file.read_bytes()
    middle = len(good) // 2
    bad = {
        "cut": good[:middle],
        "flipped": good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :],
        "not at all": noise,
        "junk behind": good + b"junk" * 3,
    }[damage]
    file.write_bytes(bad)
    if suffix == ".zip" and damage == "junk behind":
        assert open_bytes(file).tobytes() == noise  # the format allows a comment there
        return
    with pytest.raises(UserError, match=r"corrupted file: .*; download or compress it again"):
        open_bytes(file)
    assert list(cache.iterdir()) == []


@given(place=st.integers(0, 10**6), flip=st.integers(1, 255), suffix=st.sampled_from([".gz", ".xz", ".zip", ".zst"]))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_flipped_byte_never_gives_wrong_bytes(tmp_path_factory, place, flip, suffix):
    file = put(tmp_path_factory.mktemp("flip") / f"a{suffix}", TEXT)
    damaged = bytearray(file.read_bytes())
    damaged[place % len(damaged)] ^= flip
    file.write_bytes(damaged)
    with contextlib.suppress(UserError):
        assert open_bytes(file).tobytes() == TEXT  # a byte that carries no content, such as a time stamp


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zip", ".zst"])
def test_a_compressed_file_cut_anywhere_is_refused(tmp_path, suffix):
    whole = put(tmp_path / f"whole{suffix}", TEXT).read_bytes()
    for keep in range(1, len(whole), 5):
        file = tmp_path / f"{keep}{suffix}"
        file.write_bytes(whole[:keep])
        with pytest.raises(UserError, match="corrupted file"):
            open_bytes(file)


def test_a_zip_whose_directory_points_outside_is_refused(tmp_path):
    data = bytearray(put(tmp_path / "a.zip", TEXT).read_bytes())
    end = data.index(b"PK\5\6")
    data[end + 12 : end + 16] = (10**6).to_bytes(4, "little")  # the size of the central directory
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(UserError, match="corrupted file"):
        open_bytes(tmp_path / "a.zip")


def test_a_zip_with_a_damaged_member_name_is_refused(tmp_path):
    data = bytearray(put(tmp_path / "a.zip", TEXT).read_bytes())
    for header, flags, name in ((0, 6, 30), (data.index(b"PK\1\2"), 8, 46)):
        data[header + flags + 1] |= 0x08  # names are UTF-8
        data[header + name] = 0xFF  # and this is not
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(UserError, match="corrupted file"):
        open_bytes(tmp_path / "a.zip")


def test_zeros_between_xz_streams_are_padding(tmp_path):
    once = put(tmp_path / "once.xz", TEXT).read_bytes()
    (tmp_path / "twice.xz").write_bytes(once + bytes(8) + once + bytes(4))
    assert open_bytes(tmp_path / "twice.xz").tobytes() == TEXT + TEXT


def test_a_home_folder_that_cannot_be_found(tmp_path, monkeypatch):
    def nowhere(_):
        raise RuntimeError("Could not determine home directory.")

    file = put(tmp_path / "a.gz", TEXT)
    monkeypatch.setattr(Path, "expanduser", nowhere)
    with pytest.raises(UserError, match="write the path in full"):
        open_bytes("~/text")
    monkeypatch.setattr(source, "locate", Path)
    with pytest.raises(UserError, match=r"no cache folder: .*; set TRITWISE_CACHE"):
        open_bytes(file)


@pytest.mark.parametrize("name", ["a.bz2", "a.tar", "a.tar.gz", "a.TGZ", "a.7z", "a.parquet", "a.parquet.zst", "a.rar"])
@pytest.mark.parametrize("inside", [False, True])
def test_packed_types_are_refused_alone_and_in_a_folder(tmp_path, name, inside):
    file = tmp_path / name
    file.write_bytes(TEXT)
    with pytest.raises(UserError, match=r"unsupported type .*; unpack it first"):
        open_bytes(tmp_path if inside else file)


@pytest.mark.parametrize("name, match", [("a.gz", "compressed file inside a zip"), ("a.tar", "unsupported type .tar")])
def test_packed_members_of_a_zip_are_refused(tmp_path, name, match):
    zip_file(tmp_path / "a.zip", **{name: TEXT})
    with pytest.raises(UserError, match=match):
        open_bytes(tmp_path / "a.zip")


def test_an_encrypted_zip_is_refused(tmp_path):
    zip_file(tmp_path / "a.zip", a=TEXT)
    data = bytearray((tmp_path / "a.zip").read_bytes())
    data[6] |= 1  # the encryption bit of the local header,
    data[data.index(b"PK\1\2") + 8] |= 1  # and of the central directory
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(UserError, match=r"encrypted.*; unpack it first"):
        open_bytes(tmp_path / "a.zip")


@pytest.mark.parametrize("name", ["a.txt", "a.gz", "a.xz", "a.zst", "a.zip"])
def test_empty_files_are_refused(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(UserError, match=r"empty file: .*; give a file with text"):
        open_bytes(tmp_path / name)


@pytest.mark.parametrize("name", ["a.gz", "a.xz", "a.zst", "a.zip"])
def test_files_that_unpack_to_nothing_are_refused(tmp_path, cache, name):
    with pytest.raises(UserError, match=r"empty data: .*; give a file with text"):
        open_bytes(put(tmp_path / name, b""))
    assert list(cache.iterdir()) == []


def test_folders_and_zips_without_files_are_refused(tmp_path):
    put(tmp_path / "folder" / ".hidden", TEXT)
    with pytest.raises(UserError, match=r"folder without files: .*; put text files into it"):
        open_bytes(tmp_path / "folder")
    zip_file(tmp_path / "a.zip")
    with pytest.raises(UserError, match="zip without files"):
        open_bytes(tmp_path / "a.zip")


@pytest.mark.parametrize("name", ["nothing.txt", "file/below", "", "no\0name"])
def test_missing_paths_are_refused(tmp_path, name):
    put(tmp_path / "file", b"x")
    with pytest.raises(UserError, match="--data shakespeare"):
        open_bytes(str(tmp_path / name) if name else "")


def test_devices_and_sockets_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a socket's path may not be long
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket")
        for path in ("socket", "/dev/null"):
            with pytest.raises(UserError, match=r"not a file or folder: .*; copy its content to a file"):
                open_bytes(path)


@pytest.mark.parametrize("name", ["a.txt", "a.gz", "a.zip"])
def test_files_without_permission_are_refused(tmp_path, monkeypatch, name):
    file = put(tmp_path / name, TEXT)

    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(file))

    # The superuser may read everything, so the refusal is played.
    really = Path.open
    monkeypatch.setattr(source.np, "memmap", refuse)
    monkeypatch.setattr(
        Path, "open", lambda path, *more, **named: (refuse if path == file else really)(path, *more, **named)
    )
    monkeypatch.setattr(source.zipfile, "ZipFile", refuse)
    with pytest.raises(UserError, match=r"cannot read .*: Permission denied; check its permissions"):
        open_bytes(file)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may list every folder")
def test_folders_without_permission_are_refused(tmp_path):
    put(tmp_path / "a", TEXT)
    (tmp_path / "closed").mkdir(mode=stat.S_IWUSR)
    with pytest.raises(UserError, match="closed: Permission denied"):
        open_bytes(tmp_path)


# ---- splits


@pytest.mark.parametrize(
    "total, rule, sizes",
    [
        (1_115_394, "90/10", {"train": 1_003_854, "val": 111_540}),
        (100_000_000, "90/5/5", {"train": 90_000_000, "val": 5_000_000, "test": 5_000_000}),
        (1000, "99.5/0.5", {"train": 995, "val": 5}),
        (100_000_000, "first:38000000,last:2000000", {"train": 38_000_000, "val": 2_000_000}),
        (1000, "first:600,last:400", {"train": 600, "val": 400}),
        (7, "all", {"val": 7}),
    ],
)
def test_exact_sizes(total, rule, sizes):
    assert {name: end - start for name, (start, end) in Split(rule).bounds(total).items()} == sizes


def test_parts_are_views_in_order():
    data = np.arange(100, dtype=np.uint8)
    parts = split(data, "90/5/5")
    assert list(parts) == ["train", "val", "test"] and np.concatenate(list(parts.values())).tolist() == data.tolist()
    assert all(part.base is data for part in parts.values())
    ends = split(data, "first:10,last:20")
    assert ends["train"].tolist() == list(range(10)) and ends["val"].tolist() == list(range(80, 100))


@given(total=st.integers(200, 10**12), first=st.integers(1, 98), second=st.integers(1, 98))
def test_percentages_cover_everything_once(total, first, second):
    rule = f"{first}/{100 - first}" if first + second >= 100 else f"{first}/{second}/{100 - first - second}"
    bounds = list(Split(rule).bounds(total).values())
    assert bounds[0] == (0, total * first // 100) and bounds[-1][1] == total
    assert all(left[1] == right[0] for left, right in itertools.pairwise(bounds))


@pytest.mark.parametrize(
    "rule",
    [
        "",
        "90",
        "90/10/0/0",
        "a/b",
        "-10/110",
        "90/ 10",
        "first:10",
        "first:1,last:x",
        "last:5,first:5",
        "nan/10",
        "ALL",
    ],
)
def test_malformed_rules_are_refused(rule):
    with pytest.raises(UserError, match=r"unknown split rule: .*; use 90/10, 90/5/5, first:BYTES,last:BYTES or all"):
        Split(rule)


@pytest.mark.parametrize(
    "total, rule, match",
    [
        (1000, "90/20", "adds up to 110"),
        (1000, "33.3/33.3/33.3", "adds up to 99.9"),
        (10, "90/10", "leaves 1 bytes for val"),
        (1000, "100/0", "leaves 0 bytes for val"),
        (1000, "first:0,last:10", "leaves 0 bytes for train"),
        (1000, "first:900,last:101", "needs 1,001 bytes: the data has 1,000"),
        (1, "all", "leaves 1 bytes for val"),
    ],
)
def test_parts_that_do_not_fit_are_refused(total, rule, match):
    with pytest.raises(UserError, match=match):
        split(np.zeros(total, np.uint8), rule)
