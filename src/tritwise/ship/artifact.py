"""The artifact: a trained byte model as one file. Leading trits five to a byte, scale exponents as their own stream.

Streams, in the order of the model's layers: `trits`, all leading trits packed base3 in one run; `scales`, all int8
scale exponents; of an ARB model also `tables`, the measured constants of its bridges. The header holds the shape, the
layers with their sizes, and what the trainer wants to say. Evidence and momentum stay behind: they do not change a
logit.
"""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from tritwise.errors import UserError
from tritwise.models import Arb, ByteLM, ModelConfig, PartsConfig
from tritwise.nn import trit_modules
from tritwise.registers import LEAD, leading_trit, pack_base3, packed_bytes, unpack_base3
from tritwise.ship.container import read_container, write_container

KIND, ARB = "byte_lm", "arb"


class ArtifactInfo(NamedTuple):
    """What was written: path, bytes in the file, weights in it, and the bytes of each stream."""

    path: Path
    bytes: int
    weights: int
    streams: dict[str, int]


def write_artifact(model: ByteLM | Arb, path: Path, about: dict[str, Any] | None = None) -> ArtifactInfo:
    """Write `model` to `path`, atomically. `about`: plain JSON kept in the header. Frozen encoders stay outside: the
    file names them, without the folder they lay in, and knows the checksum of their weights.

    Raises UserError for a model with float weights (it has no lossless artifact) and if the file cannot be written.
    """
    if model.config.weights != "trit":
        raise UserError("only ternary models can be shipped; train with --set weights=trit")
    layers = list(trit_modules(model))
    trits = torch.cat([leading_trit(layer.register).reshape(-1).cpu() for _, layer in layers])
    scales = torch.cat([e.detach().reshape(-1).cpu() for _, layer in layers for e in layer.exponents()])
    header = {
        "kind": ARB if isinstance(model, Arb) else KIND,
        "config": dataclasses.asdict(model.config),
        "layers": [
            {"name": name, "role": layer.role, "shape": list(layer.register.shape), "groups": layer.exponent.shape[1]}
            for name, layer in layers
        ],
        "weights": trits.numel(),
        "packing": "base3",
        "about": about or {},
    } | ({"parts": _public(model.parts)} if isinstance(model, Arb) else {})
    streams = {"trits": pack_base3(trits).numpy(), "scales": scales.view(torch.uint8).numpy()}
    if isinstance(model, Arb):
        tables = [table.detach().float().cpu() for table in _tables(model)]
        streams["tables"] = torch.cat([torch.empty(0), *tables]).view(torch.uint8).numpy()
    info = write_container(path, header, streams)
    return ArtifactInfo(Path(path), info.bytes, trits.numel(), {s.name: s.stored for s in info.streams})


def _tables(model: Arb) -> list[torch.Tensor]:
    """The constants that were measured on the training data, float32 [D] each, in the order of the parts."""
    return [table for part in (model.vision, model.audio) if part is not None for table in (part.mean, part.spread)]


def _public(parts: PartsConfig) -> dict[str, Any]:
    """The parts as plain JSON; of the path of an encoder only its last name, for where it lay is nobody's business."""
    told = dataclasses.asdict(parts)
    return told | {key: Path(told[key]).name for key in ("vision_encoder", "audio_encoder")}


def read_artifact(path: Path) -> tuple[ByteLM | Arb, dict[str, Any]]:
    """The model in `path`, frozen and in eval mode, and the header. Its logits equal the trained model's bit for bit.

    Raises UserError if the file is missing, damaged, cut off, newer than this version, or holds something else.
    """
    header, streams = read_container(path)
    try:
        if header["kind"] not in (KIND, ARB) or header["packing"] != "base3":
            raise UserError(f"{path} holds a {header['kind']!r} in {header['packing']!r}; upgrade tritwise to read it")
        config = ModelConfig(**header["config"])
        model = Arb(config, PartsConfig(**header["parts"])) if header["kind"] == ARB else ByteLM(config)
        layers = list(trit_modules(model))
        expected = [[name, list(layer.register.shape)] for name, layer in layers]
        if [[entry["name"], entry["shape"]] for entry in header["layers"]] != expected:
            raise UserError(f"{path} does not fit the shape it names; ship it again from its run")
        trits, scales = streams["trits"], streams["scales"]
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is no byte model this version understands ({error}); upgrade tritwise") from None
    count = sum(layer.register.numel() for _, layer in layers)
    if len(trits) != packed_bytes(count) or len(scales) != sum(
        e.numel() for _, layer in layers for e in layer.exponents()
    ):
        raise UserError(f"{path} holds another number of weights than it names; ship it again from its run")
    try:
        flat = unpack_base3(torch.from_numpy(np.frombuffer(trits, np.uint8).copy()), count)
    except ValueError as error:  # checksums do not vouch for a file that somebody made by hand
        raise UserError(f"{path} holds bytes that are no trits; ship it again from its run") from error
    exponents = torch.from_numpy(np.frombuffer(scales, np.int8).copy())
    with torch.no_grad():
        for _, layer in layers:
            size = layer.register.numel()
            layer.register.copy_(flat[:size].view_as(layer.register) * LEAD)
            flat = flat[size:]
            for kept in layer.exponents():
                kept.copy_(exponents[: kept.numel()].view_as(kept))
                exponents = exponents[kept.numel() :]
            layer.trainable(False)
    if isinstance(model, Arb):
        _read_tables(model, streams.get("tables", b""), path)
    return model.eval(), header


def _read_tables(model: Arb, raw: bytes, path: Path) -> None:
    tables = _tables(model)
    if len(raw) != 4 * sum(table.numel() for table in tables):
        raise UserError(f"{path} holds other constants than its bridges need; ship it again from its run")
    flat = torch.from_numpy(np.frombuffer(raw, np.float32).copy())
    for table in tables:
        table.copy_(flat[: table.numel()])
        flat = flat[table.numel() :]
