"""The artifact's format: golden bytes, and no damaged file is ever read as if it were whole."""

import hashlib
import json
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from tritwise.errors import UserError
from tritwise.files import canonical_json
from tritwise.ship.container import MAGIC, ContainerInfo, StreamInfo, read_container, write_container

# Format 1, byte for byte. These must never change: there are files in this format out there.
GOLDEN = bytes.fromhex(
    "545249545749534501000000d60000007b22686561646572223a7b226c697374223a5b312c302e352c6e756c6c5d2c2274657874223a22"
    "e2889231227d2c22736861323536223a223836616266373038313834373265313331316662306138613563326638646363623361653334"
    "3766306537623930313363393263346330336536306462626339222c2273747265616d73223a5b7b22636f646563223a22726177222c22"
    "6372633332223a313337363734393732352c226e616d65223a227472697473222c226f6666736574223a302c22726177223a332c227374"
    "6f726564223a337d5d7d7f9a06c8bbc9f7518fc9ba3e6e7e584a6a294788e0f534131fa73e502d0f1f2e0079f2"
)
# Only read, never compared with what is written: a later zstd may pack the same stream in other bytes.
GOLDEN_ZSTD = bytes.fromhex(
    "545249545749534501000000070100007b22686561646572223a7b7d2c22736861323536223a2231353761663335343264373435346436"
    "616561613232656562326339346466386238666339343966383239613463393063303736303864393662616434373832222c2273747265"
    "616d73223a5b7b22636f646563223a227a737464222c226372633332223a343032303039303134382c226e616d65223a227a65726f7322"
    "2c226f6666736574223a302c22726177223a3330302c2273746f726564223a31397d2c7b22636f646563223a22726177222c2263726333"
    "32223a3839313536383537382c226e616d65223a22666577222c226f6666736574223a31392c22726177223a332c2273746f726564223a"
    "337d5d7d7bdcd10b4f3b9b47c984ecb4261faeae5bc7beb37fa7004de0c7079397e562ca28b52ffd602c004d00001000000100272ac002"
    "616263"
)


def build(listing: object, body: bytes, version: int = 1) -> bytes:
    """A file whose checksum vouches for its header, whatever that says."""
    encoded = listing if isinstance(listing, bytes) else canonical_json(listing)
    start = struct.pack("<8sII", MAGIC, version, len(encoded)) + encoded
    return start + hashlib.sha256(start).digest() + body


def refusal(folder: Path, data: bytes) -> str:
    path = folder / "bad.tritwise"
    path.write_bytes(data)
    with pytest.raises(UserError) as caught:
        read_container(path)
    message = str(caught.value)
    assert "\n" not in message and "; " in message
    return message


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "a"
    info = write_container(path, {"width": 8}, {"trits": b"\x01" * 100, "scales": bytes(range(40)), "none": b""})
    assert [stream.codec for stream in info.streams] == ["zstd", "raw", "raw"]
    return path.read_bytes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("container")


def test_golden_bytes(tmp_path: Path):
    info = write_container(tmp_path / "a", {"text": "−1", "list": [1, 0.5, None]}, {"trits": bytes([0, 121, 242])})
    assert (tmp_path / "a").read_bytes().hex() == GOLDEN.hex()
    assert info.bytes == len(GOLDEN)
    (tmp_path / "b").write_bytes(GOLDEN)
    assert read_container(tmp_path / "b") == ({"text": "−1", "list": [1, 0.5, None]}, {"trits": bytes([0, 121, 242])})
    (tmp_path / "c").write_bytes(GOLDEN_ZSTD)
    assert read_container(tmp_path / "c") == ({}, {"zeros": bytes(300), "few": b"abc"})


def test_the_layout_can_be_read_with_the_standard_library(whole: bytes):
    magic, version, length = struct.unpack_from("<8sII", whole)
    assert (magic, version) == (b"TRITWISE", 1)
    listing, body = json.loads(whole[16 : 16 + length]), whole[16 + length + 32 :]
    assert hashlib.sha256(whole[: 16 + length]).digest() == whole[16 + length : 16 + length + 32]
    assert hashlib.sha256(body).hexdigest() == listing["sha256"]
    first = listing["streams"][0]
    assert zstandard.decompress(body[first["offset"] :][: first["stored"]]) == b"\x01" * 100


@settings(max_examples=60, deadline=None)
@given(
    streams=st.dictionaries(st.text(max_size=8), st.binary(max_size=300) | st.binary(max_size=9).map(lambda x: x * 99)),
    header=st.dictionaries(st.text(max_size=5), st.integers() | st.text() | st.none(), max_size=4),
    compress=st.booleans(),
)
def test_round_trip(folder: Path, streams: dict[str, bytes], header: dict, compress: bool):
    info = write_container(folder / "a", header, streams, compress=compress)
    found_header, found = read_container(folder / "a")
    assert found_header == header and found == streams and list(found) == list(streams)
    assert info.bytes == (folder / "a").stat().st_size == info.header_bytes + sum(s.stored for s in info.streams)
    for stream in info.streams:
        assert stream.raw == len(streams[stream.name])
        assert stream.stored < stream.raw if stream.codec == "zstd" else stream.stored == stream.raw
        assert compress or stream.codec == "raw"


def test_arrays_and_what_write_returns(tmp_path: Path):
    array = np.arange(12, dtype=np.uint8).reshape(3, 4)
    info = write_container(tmp_path / "a", {}, {"array": array.T, "empty": np.empty(0, np.uint8)}, compress=False)
    assert read_container(tmp_path / "a")[1] == {"array": bytes([0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]), "empty": b""}
    assert isinstance(info, ContainerInfo) and info.path == tmp_path / "a"
    assert info.streams[1] == StreamInfo("empty", "raw", 12, 0, 0, 0)
    with pytest.raises(AssertionError, match="stream x must be bytes or uint8"):
        write_container(tmp_path / "a", {}, {"x": np.zeros(3, np.int8)})
    with pytest.raises(AssertionError, match="plain JSON"):
        write_container(tmp_path / "a", {"betas": (1, 2)}, {})


def test_same_input_same_bytes(tmp_path: Path, whole: bytes):
    write_container(tmp_path / "a", {"a": 1, "b": 2}, {"x": b"1" * 500})
    write_container(tmp_path / "b", {"b": 2, "a": 1}, {"x": np.full(500, 49, np.uint8)})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_every_single_flipped_byte_is_found(folder: Path, whole: bytes):
    rng = random.Random(0)
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= rng.randrange(1, 256)
        message = refusal(folder, bytes(changed))
        if place < 8:
            assert "is not a Tritwise artifact" in message
        elif place < 12:
            assert "newer" in message and "or is damaged" in message
        elif place >= 16:
            assert "damaged" in message


def test_every_cut_is_found(folder: Path, whole: bytes):
    for length in range(len(whole)):
        message = refusal(folder, whole[:length])
        assert length < 8 or "cut short" in message


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_change_is_read_as_whole(folder: Path, whole: bytes, data):
    start = data.draw(st.integers(0, len(whole)))
    end = data.draw(st.integers(start, min(len(whole), start + 40)))
    changed = whole[:start] + data.draw(st.binary(max_size=40)) + whole[end:]
    if changed != whole:
        refusal(folder, changed)


def test_each_refusal_has_its_own_message(folder: Path, whole: bytes):
    length = struct.unpack_from("<I", whole, 12)[0]
    body = 16 + length + 32
    listing = whole[16 : 16 + length]

    def flip(place: int) -> bytes:
        return whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]

    again = "; copy it again, or make it again with tritwise ship"
    for data, wanted in [
        (b"", f"is empty{again}"),
        (b"PK\x03\x04 something else", "is not a Tritwise artifact; name a file that tritwise ship made"),
        (whole[:12], f"is cut short inside its header{again}"),
        (whole[: body - 1], f"is cut short inside its header, or its header is damaged{again}"),
        (whole[:-1], f"is cut short: {len(whole) - body - 1} of {len(whole) - body} bytes after its header{again}"),
        (whole + b"xyz", f"is damaged: 3 bytes too many at its end{again}"),
        (flip(20), f"is damaged: its header's checksum does not match{again}"),
        (flip(body - 1), f"is damaged: its header's checksum does not match{again}"),
        (flip(body), f"is damaged in its stream 'trits': the checksum does not match{again}"),
        (flip(len(whole) - 1), f"is damaged in its stream 'scales': the checksum does not match{again}"),
        (build(listing, b"", version=2), "was made by a newer Tritwise (artifact format 2; this one reads 1); upgrade"),
        (build(b"{}garbage", b"", version=7), "was made by a newer Tritwise (artifact format 7; this one"),
        (whole[:8] + b"\2" + whole[9:], "or is damaged (its checksum does not match); upgrade Tritwise, or copy it"),
    ]:
        assert wanted in refusal(folder, data)


def test_a_length_from_a_damaged_file_is_never_believed(folder: Path):
    assert "cut short" in refusal(folder, struct.pack("<8sII", MAGIC, 1, 0xFFFFFFFF) + b"{}")


def listed(**changes: object) -> dict:
    entry = {"name": "a", "codec": "raw", "offset": 0, "stored": 4, "raw": 4, "crc32": 0x2144DF1C, **changes}
    return {"header": {}, "sha256": hashlib.sha256(bytes(4)).hexdigest(), "streams": [entry]}


def test_a_header_made_by_hand_is_checked(folder: Path):
    (folder / "good").write_bytes(build(listed(), bytes(4)))
    assert read_container(folder / "good") == ({}, {"a": bytes(4)})
    twice = listed()
    twice["streams"] = [listed(stored=2, raw=2)["streams"][0], listed(stored=2, raw=2, offset=2)["streams"][0]]
    for listing in [
        [],
        {},
        {"header": {}, "sha256": "", "streams": 3},
        {**listed(), "header": 1},
        {**listed(), "sha256": None},
        {**listed(), "streams": [[]]},
        listed(name=1),
        listed(name=[]),
        listed(codec="xz"),
        listed(codec=[]),
        listed(extra=1),
        listed(offset=1),
        listed(offset=0.0),
        listed(stored=-4),
        listed(raw=5),
        listed(raw=True),
        listed(codec="zstd", raw=1 << 62),
        twice,
    ]:
        assert "its header does not describe its streams" in refusal(folder, build(listing, bytes(4))), listing
    assert "is not valid JSON" in refusal(folder, build(b"{", b""))
    assert "is not valid JSON" in refusal(folder, build(b"[" * 100_000, b""))
    assert "the checksum of its streams" in refusal(folder, build({**listed(), "sha256": "0" * 64}, bytes(4)))


@pytest.mark.parametrize(
    "frame",
    [
        b"\0" * 20,  # not zstd
        bytes.fromhex("28b52ffde0") + struct.pack("<Q", 1 << 60) + b"\1\0\0",  # names a size beyond any memory
        zstandard.compress(bytes(99)),
        zstandard.compress(bytes(101)),
        zstandard.compress(bytes(100))[:-1],
        zstandard.compress(bytes(100)) + b"x",
        zstandard.ZstdCompressor(write_content_size=False).compress(bytes(100)),
    ],
)
def test_a_stream_that_does_not_expand_as_it_says(folder: Path, frame: bytes):
    listing = listed(codec="zstd", stored=len(frame), raw=100, crc32=zlib.crc32(frame))
    listing["sha256"] = hashlib.sha256(frame).hexdigest()
    assert "its stream 'a' cannot be decompressed" in refusal(folder, build(listing, frame))


def test_a_stream_that_would_expand_without_bound_is_stored_raw(tmp_path: Path):
    info = write_container(tmp_path / "a", {}, {"zeros": bytes(4 << 20), "fewer": bytes(1 << 20)})
    assert [stream.codec for stream in info.streams] == ["raw", "zstd"]
    assert read_container(tmp_path / "a")[1] == {"zeros": bytes(4 << 20), "fewer": bytes(1 << 20)}


def test_places_that_cannot_be_read_or_written(tmp_path: Path):
    with pytest.raises(UserError, match="does not exist; check the path"):
        read_container(tmp_path / "nothing")
    with pytest.raises(UserError, match="it is a folder; name a file"):
        read_container(tmp_path)
    with pytest.raises(UserError, match="it is a folder; name a file"):
        write_container(tmp_path, {}, {})
    with pytest.raises(UserError, match="does not exist; make it or choose another --out"):
        write_container(tmp_path / "nowhere" / "a", {}, {})
