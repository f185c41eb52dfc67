"""From the config of an ARB run to its features: the collection, the frozen encoder, the cache."""

import dataclasses
from pathlib import Path
from typing import Any

from tritwise.data.collections import open_collection
from tritwise.encoders import AudioEncoder, Features, VisionEncoder, features_of, load_encoder
from tritwise.errors import UserError
from tritwise.models import PartsConfig
from tritwise.train.config import Config
from tritwise.train.tasks import Say


def encoder_for(parts: PartsConfig, kind: str, place: str = "") -> Any:
    """The frozen encoder of "vision" or "audio", from `place` or from where the run had it.

    Raises UserError: no encoder was named, it cannot be loaded, is of the other kind, or has other weights than the one
    that the model learned to read.
    """
    where = place or getattr(parts, f"{kind}_encoder")
    if not where:
        raise UserError(f"no {kind} encoder was named; give --encoder, a folder or a name on the hub")
    layer = parts.vision_layer if kind == "vision" else parts.audio_layer
    encoder = load_encoder(where, layer=layer, grid=parts.vision_grid, pixels=parts.vision_pixels)
    if not isinstance(encoder, VisionEncoder if kind == "vision" else AudioEncoder):
        raise UserError(f"{where} is an encoder of {encoder.kind}, not of {kind}; name another")
    wanted = getattr(parts, f"{kind}_digest")
    if wanted and encoder.digest != wanted:
        raise UserError(f"{where} is not the encoder that the model learned with; name that one with --encoder")
    return encoder


def open_features(config: Config, kind: str, say: Say) -> Features:
    """Features of the collection of "vision" or "audio": read from the .json of a cache, or found by the encoder.

    Raises UserError for collections, encoders and caches that cannot be used.
    """
    place = Path(config.media.place_of(kind))
    if place.suffix == ".json":
        found = Features.load(place)
        if found.kind != kind:
            raise UserError(f"{place} holds features of {found.kind}, not of {kind}; name another")
        return found
    collection = open_collection(place, "images" if kind == "vision" else "sounds").first(config.media.limit)
    encoder = encoder_for(config.parts, kind)
    last = -1

    def progress(done: int, total: int) -> None:
        nonlocal last
        if done * 10 // total > last:
            last = done * 10 // total
            say(f"{kind} features: {done} of {total}")

    return features_of(encoder, collection, progress=progress)


def known_images(encoder: VisionEncoder, place: Path) -> Features:
    """Features by `encoder` of a collection of images, or of the .json of a cache. Raises UserError if they are of
    another encoder, or have no train part."""
    if place.suffix == ".json":
        found = Features.load(place)
    else:
        found = features_of(encoder, open_collection(place, "images"))
    if found.about != encoder.settings():
        raise UserError(f"{place} holds features of another encoder or layer than the model's; name its images instead")
    if not found.part("train"):
        raise UserError(f"{place} has no train part, so nothing with a known caption; name another collection")
    return found


def told_by_features(config: Config, kind: str, features: Features) -> Config:
    """`config` with the part switched on that reads `features`, and with what is to be known of their encoder."""
    about = features.about
    values: dict[str, Any] = {
        kind: True,
        f"{kind}_size": features.size,
        f"{kind}_digest": about["encoder"],
        f"{kind}_layer": about["layer"],
    }
    if kind == "vision":
        values |= {"vision_grid": about["grid"], "vision_pixels": about["pixels"]}
    return dataclasses.replace(config, parts=dataclasses.replace(config.parts, **values))
