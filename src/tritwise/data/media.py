"""Image and sound files as arrays. Pillow, soundfile and soxr (the extra `media`) do the work; errors become one line.

Images are uint8 [H, W, 3]; sounds are float32 [samples], mono, between -1 and 1, at a rate that the caller names.
"""

import io
from pathlib import Path
from types import ModuleType

import numpy as np

from tritwise.errors import UserError
from tritwise.files import read_bytes

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
SOUNDS = (".wav", ".flac", ".ogg", ".mp3", ".aiff", ".aif")


def read_image(path: Path | str) -> np.ndarray:
    """The picture in a file as uint8 [H, W, 3]; transparent parts lie on white.

    Raises UserError: missing, not an image, damaged, or Pillow is not installed.
    """
    path = Path(path)
    _refuse(path, IMAGES, "image", SOUNDS, "transcribe")
    return decode_image(read_bytes(path), path)


def read_sound(path: Path | str, rate: int) -> np.ndarray:
    """The sound in a file as float32 [samples] at `rate` samples a second, its channels averaged.

    Raises UserError: missing, not a sound, damaged, empty, or soundfile is not installed.
    """
    path = Path(path)
    _refuse(path, SOUNDS, "sound", IMAGES, "caption")
    return decode_sound(read_bytes(path), path, rate)


def decode_image(data: bytes, name: Path | str) -> np.ndarray:
    """As `read_image`, from the bytes of a file; `name` says in an error where they came from."""
    image_of = _library("PIL.Image")
    try:
        with image_of.open(io.BytesIO(data)) as opened:
            picture = opened.convert("RGBA")
        white = image_of.new("RGBA", picture.size, (255, 255, 255, 255))
        return np.asarray(image_of.alpha_composite(white, picture).convert("RGB"))
    except (OSError, SyntaxError, ValueError, image_of.DecompressionBombError) as error:
        raise UserError(
            f"{name} is no image that can be read ({_short(error)}); give a whole file of {_list(IMAGES)}"
        ) from error


def decode_sound(data: bytes, name: Path | str, rate: int) -> np.ndarray:
    """As `read_sound`, from the bytes of a file; `name` says in an error where they came from."""
    library = _library("soundfile")
    try:
        samples_SC, found = library.read(io.BytesIO(data), dtype="float32", always_2d=True)
    except (library.SoundFileError, RuntimeError, TypeError) as error:
        raise UserError(
            f"{name} is no sound that can be read ({_short(error)}); give a whole file of {_list(SOUNDS)}"
        ) from error
    if not len(samples_SC):
        raise UserError(f"{name} holds no sound; give a file with at least one sample")
    return resampled(samples_SC.mean(axis=1), found, rate)


def resampled(samples: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    """Sound float32 [samples] at another rate, band-limited."""
    return samples if rate == wanted else _library("soxr").resample(samples, rate, wanted)


def save_image(path: Path | str, picture: np.ndarray) -> None:
    """Write uint8 [H, W] or [H, W, 3] as a PNG, whole or not at all. Raises UserError if it cannot be written."""
    from tritwise.files import atomic_write

    atomic_write(path, png_of(picture))


def png_of(picture: np.ndarray) -> bytes:
    """uint8 [H, W] or [H, W, 3] as the bytes of a PNG file."""
    buffer = io.BytesIO()
    _library("PIL.Image").fromarray(picture).save(buffer, format="PNG")
    return buffer.getvalue()


def resized(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [H, W, 3] at another size, bicubic."""
    image_of = _library("PIL.Image")
    image = image_of.fromarray(picture)
    return np.asarray(image.resize((width, height), image_of.Resampling.BICUBIC))


def _refuse(path: Path, known: tuple[str, ...], kind: str, other: tuple[str, ...], command: str) -> None:
    """Say at once when a file is of the other kind; unknown suffixes are left to the libraries."""
    if path.suffix.lower() in other:
        raise UserError(f"{path} is no {kind} but {path.suffix}; give {_list(known)}, or use tritwise {command}")


def _list(suffixes: tuple[str, ...]) -> str:
    return ", ".join(suffix.removeprefix(".") for suffix in suffixes[:4])


def _short(error: Exception) -> str:
    """What a library says, without the address of a buffer that is nobody's business."""
    return str(error).split("<_io")[0].split(" 0x")[0].strip().rstrip(":.") or type(error).__name__


def _library(name: str) -> ModuleType:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"{name.split('.')[0]} is missing; pip install 'tritwise[media]'") from None
