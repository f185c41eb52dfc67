"""Image and sound files as arrays, and the layouts in which collections of them come."""

import json
import struct

import numpy as np
import pytest

from tritwise.data.collections import FASHION, open_collection
from tritwise.data.media import decode_image, png_of, read_image, read_sound, resampled, resized
from tritwise.errors import UserError

image = pytest.importorskip("PIL.Image")
library = pytest.importorskip("soundfile")


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "gif", "tiff"])
def test_images_of_every_type_are_read(tmp_path, suffix):
    picture = np.zeros((12, 20, 3), np.uint8)
    picture[:, 10:] = (200, 40, 40)
    image.fromarray(picture).save(tmp_path / f"x.{suffix}")
    found = read_image(tmp_path / f"x.{suffix}")
    assert found.shape == (12, 20, 3) and found.dtype == np.uint8
    assert abs(found[:, 13:].astype(int) - [200, 40, 40]).mean() < 12 and found[:, :7].mean() < 12


def test_what_is_transparent_is_white(tmp_path):
    image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "x.png")
    assert (read_image(tmp_path / "x.png") == 255).all()


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
def test_sounds_of_every_type_are_read_at_the_rate_that_is_wanted(tmp_path, suffix):
    time = np.arange(16000) / 16000
    tone = 0.5 * np.sin(2 * np.pi * 440 * time)
    library.write(tmp_path / f"x.{suffix}", np.stack([tone, tone], axis=1), 16000)
    found = read_sound(tmp_path / f"x.{suffix}", 8000)
    assert found.dtype == np.float32 and abs(len(found) - 8000) < 1200  # mp3 pads
    spectrum = np.abs(np.fft.rfft(found[1000:7000]))
    assert abs(np.argmax(spectrum) * 8000 / 6000 - 440) < 2


def test_resampling_keeps_a_tone_and_drops_what_the_new_rate_cannot_hold():
    time = np.arange(16000) / 16000
    low, high = (np.sin(2 * np.pi * pitch * time).astype(np.float32) for pitch in (1000, 7000))
    assert np.abs(resampled(low, 16000, 8000)).max() > 0.9
    assert np.abs(resampled(high, 16000, 8000)[500:-500]).max() < 0.01


def test_a_picture_survives_png_and_may_be_resized():
    picture = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    assert np.array_equal(decode_image(png_of(picture), "x"), picture)
    assert resized(picture, 8, 2).shape == (8, 2, 3)


@pytest.mark.parametrize(
    ("name", "content", "read", "said"),
    [
        ("x.wav", b"RIFF", read_image, "no image but .wav"),
        ("x.png", b"", lambda path: read_sound(path, 16000), "no sound but .png"),
        ("x.png", png_of(np.zeros((64, 64), np.uint8))[:60], read_image, "no image that can be read"),
        ("x.jpg", b"text", read_image, "no image that can be read"),
        ("x.flac", b"fLaC damaged", lambda path: read_sound(path, 16000), "no sound that can be read"),
        ("x.txt", b"text", read_image, "no image that can be read"),
    ],
)
def test_wrong_and_damaged_files_are_named_in_one_line(tmp_path, name, content, read, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said) as caught:
        read(tmp_path / name)
    assert name in str(caught.value) and ";" in str(caught.value) and "0x" not in str(caught.value)


def test_a_missing_file_and_an_empty_sound(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_image(tmp_path / "none.png")
    library.write(tmp_path / "x.wav", np.zeros(0), 16000)
    with pytest.raises(UserError, match="holds no sound"):
        read_sound(tmp_path / "x.wav", 16000)


def test_pairs_in_a_folder(image_pairs):
    found = open_collection(image_pairs, "images")
    assert found.kind == "images" and len(found) == 40
    assert len(found.part("val")) == 4 and len(found.part("train")) == 36
    assert found.examples[5].text == "green" and found.read(5)[0, 0].argmax() == 1
    again = open_collection(image_pairs)
    assert again.digest() == found.digest() and [e.split for e in again.examples] == [e.split for e in found.examples]


def test_a_manifest_keeps_its_splits(sound_pairs):
    found = open_collection(sound_pairs, "sounds")
    assert found.part("val") == [16, 17, 18, 19] and found.examples[17].text == "high"
    assert len(found.read(0, 16000)) == 8000
    few = found.first(4)
    assert [e.name for e in few.examples] == ["00.flac", "04.flac", "08.flac", "12.flac", "16.flac"]
    assert np.array_equal(few.read(1), found.read(4)) and few.digest() != found.digest()


def test_idx_files(drawn_idx):
    found = open_collection(drawn_idx, "images")
    assert found.classes == ("zero", "one") and len(found.part("train")) == 64 and len(found.part("val")) == 16
    picture = found.read(0)
    assert picture.shape == (8, 8, 3) and picture[:, :4].mean() > 190 and picture[:, 4:].mean() < 30
    assert len(FASHION) == 10


def test_spoken_words_in_an_archive(tmp_path):
    audio = (1000 * np.sin(np.arange(3000) / 3)).astype(np.int16)
    offsets = np.array([[0, 1000], [1000, 1000], [2000, 1000]])
    arrays = {"audio": audio, "offsets": offsets, "label": np.array([0, 1, 1], np.uint8)}
    np.savez(tmp_path / "words.npz", **arrays, take=np.array([0, 7, 9], np.uint8), rate=np.array(8000))
    found = open_collection(tmp_path / "words.npz", "sounds")
    told = [(e.text, e.split, e.label) for e in found.examples]
    assert told == [("zero", "val", 0), ("one", "train", 1), ("one", "train", 1)]
    assert len(found.read(1, 16000)) == 2000
    np.savez(tmp_path / "other.npz", x=audio)
    with pytest.raises(UserError, match="no collection of spoken words"):
        open_collection(tmp_path / "other.npz")


def test_packed_images(tmp_path):
    pictures = [png_of(np.full((4, 4, 3), shade, np.uint8)) for shade in (10, 200)]
    (tmp_path / "images_jpg128.bin").write_bytes(b"".join(pictures))
    index = np.array([[0, len(pictures[0])], [len(pictures[0]), len(pictures[1])]])
    np.save(tmp_path / "index.npy", index)
    rows = [{"file": f"{i}.png", "caption": f"shade {i}", "split": split} for i, split in enumerate(("train", "val"))]
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = open_collection(tmp_path)
    assert found.read(1).mean() == 200 and found.examples[1].text == "shade 1"
    np.save(tmp_path / "index.npy", index + 10)
    with pytest.raises(UserError, match="damaged"):
        open_collection(tmp_path)


def test_what_is_no_collection_is_refused(tmp_path, image_pairs):
    with pytest.raises(UserError, match="holds images, not sounds"):
        open_collection(image_pairs, "sounds")
    with pytest.raises(UserError, match="there is no collection"):
        open_collection(tmp_path / "none")
    with pytest.raises(UserError, match="neither images nor sounds"):
        open_collection(tmp_path)
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"no text beside it; write it into a\.txt"):
        open_collection(tmp_path)
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.wav").write_bytes(b"")
    (tmp_path / "b.txt").write_text("b")
    with pytest.raises(UserError, match="mixes images and sounds"):
        open_collection(tmp_path)
    with pytest.raises(UserError, match="has no val examples"):
        _only_train(tmp_path).part("val")


def _only_train(folder):
    alone = folder / "alone"
    alone.mkdir()
    (alone / "manifest.jsonl").write_text(json.dumps({"file": "x.png", "text": "x", "split": "train"}) + "\n")
    return open_collection(alone)


def test_a_damaged_idx_file_is_named(tmp_path, drawn_idx):
    for file in drawn_idx.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01" + struct.pack(">I", 99) + b"\0" * 16)
    with pytest.raises(UserError, match="t10k-labels-idx1-ubyte is damaged"):
        open_collection(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(UserError, match="has no t10k-labels"):
        open_collection(tmp_path)


def test_a_manifest_without_files_or_with_a_broken_line(tmp_path):
    (tmp_path / "manifest.jsonl").write_text(json.dumps({"text": "x"}) + "\n")
    with pytest.raises(UserError, match="line without file"):
        open_collection(tmp_path)
    (tmp_path / "manifest.jsonl").write_text(json.dumps({"file": "x.png"}) + "\n")
    with pytest.raises(UserError, match="line without text; every line needs file and text"):
        open_collection(tmp_path)


def test_splits_are_those_that_were_chosen_or_refused(tmp_path):
    """What is held out as test is in neither part; a word that names no split is no wish to have one drawn."""
    rows = [{"file": f"{i}.png", "text": "x", "split": split} for i, split in enumerate(("train", "test", "val"))]
    place = tmp_path / "manifest.jsonl"
    place.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = open_collection(tmp_path)
    assert found.part("train") == [0] and found.part("val") == [2]
    place.write_text("".join(json.dumps(row | {"split": "valid"}) + "\n" for row in rows))
    with pytest.raises(UserError, match="has the split 'valid'; choose train, val or test"):
        open_collection(tmp_path)
