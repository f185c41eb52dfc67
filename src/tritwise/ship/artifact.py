"""The artifact: a trained byte model as one file. Leading trits five to a byte, scale exponents as their own stream.

Streams, in the order of the model's layers: `trits`, all leading trits packed base3 in one run; `scales`, all int8
scale exponents; `vectors`, in models that have learned vectors, their int8 fixed-point numbers. The header holds the
shape, the layers with their sizes, and what the trainer wants to say. Evidence and momentum stay behind: they do not
change a logit.
"""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from tritwise.errors import UserError
from tritwise.models import ByteLM, ModelConfig
from tritwise.nn import TritModule, TritVector, trit_modules
from tritwise.registers import LEAD, leading_trit, pack_base3, packed_bytes, unpack_base3
from tritwise.ship.container import read_container, write_container

KIND = "byte_lm"


class ArtifactInfo(NamedTuple):
    """What was written: path, bytes in the file, weights in it, and the bytes of each stream."""

    path: Path
    bytes: int
    weights: int
    streams: dict[str, int]


def write_artifact(model: ByteLM, path: Path, about: dict[str, Any] | None = None) -> ArtifactInfo:
    """Write `model` to `path`, atomically. `about`: plain JSON kept in the header.

    Raises UserError for a model with float weights (it has no lossless artifact) and if the file cannot be written.
    """
    if model.config.weights != "trit":
        raise UserError("only ternary models can be shipped; train with --set weights=trit")
    layers, (matrices, vectors) = list(trit_modules(model)), _sorted(model)
    trits = torch.cat([leading_trit(layer.register).reshape(-1).cpu() for layer in matrices])
    scales = torch.cat([e.detach().reshape(-1).cpu() for layer in matrices for e in layer.exponents()])
    weights = sum(layer.register.numel() for _, layer in layers)
    header = {
        "kind": KIND,
        "config": dataclasses.asdict(model.config),
        "layers": [
            {"name": name, "role": layer.role, "shape": list(layer.register.shape), "groups": layer.exponent.shape[1]}
            for name, layer in layers
        ],
        "weights": weights,
        "packing": "base3",
        "about": about or {},
    }
    streams = {"trits": pack_base3(trits).numpy(), "scales": scales.view(torch.uint8).numpy()}
    if vectors:
        numbers = torch.cat([layer.register.detach().reshape(-1).cpu() for layer in vectors])
        streams["vectors"] = numbers.view(torch.uint8).numpy()
    info = write_container(path, header, streams)
    return ArtifactInfo(Path(path), info.bytes, weights, {s.name: s.stored for s in info.streams})


def _sorted(model: ByteLM) -> tuple[list[TritModule], list[TritVector]]:
    """The ternary layers that ship as trits and scales, and those that ship as whole registers."""
    layers = [layer for _, layer in trit_modules(model)]
    vectors = [layer for layer in layers if isinstance(layer, TritVector)]
    return [layer for layer in layers if not isinstance(layer, TritVector)], vectors


def read_artifact(path: Path) -> tuple[ByteLM, dict[str, Any]]:
    """The model in `path`, frozen and in eval mode, and the header. Its logits equal the trained model's bit for bit.

    Raises UserError if the file is missing, damaged, cut off, newer than this version, or holds something else.
    """
    header, streams = read_container(path)
    try:
        if header["kind"] != KIND or header["packing"] != "base3":
            raise UserError(f"{path} holds a {header['kind']!r} in {header['packing']!r}; upgrade tritwise to read it")
        config = ModelConfig(**header["config"])
        model = ByteLM(config)
        layers = list(trit_modules(model))
        expected = [[name, list(layer.register.shape)] for name, layer in layers]
        if [[entry["name"], entry["shape"]] for entry in header["layers"]] != expected:
            raise UserError(f"{path} does not fit the shape it names; ship it again from its run")
        matrices, vectors = _sorted(model)
        trits, scales = streams["trits"], streams["scales"]
        numbers = streams["vectors"] if vectors else b""
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is no byte model this version understands ({error}); upgrade tritwise") from None
    count = sum(layer.register.numel() for layer in matrices)
    shared = sum(e.numel() for layer in matrices for e in layer.exponents())
    if (len(trits), len(scales), len(numbers)) != (
        packed_bytes(count),
        shared,
        sum(v.register.numel() for v in vectors),
    ):
        raise UserError(f"{path} holds another number of weights than it names; ship it again from its run")
    try:
        flat = unpack_base3(torch.from_numpy(np.frombuffer(trits, np.uint8).copy()), count)
    except ValueError as error:  # checksums do not vouch for a file that somebody made by hand
        raise UserError(f"{path} holds bytes that are no trits; ship it again from its run") from error
    exponents = torch.from_numpy(np.frombuffer(scales, np.int8).copy())
    with torch.no_grad():
        vector_N = torch.from_numpy(np.frombuffer(numbers, np.int8).copy())
        for layer in vectors:
            layer.register.copy_(vector_N[: layer.register.numel()].view_as(layer.register))
            vector_N = vector_N[layer.register.numel() :]
        for layer in matrices:
            size = layer.register.numel()
            layer.register.copy_(flat[:size].view_as(layer.register) * LEAD)
            flat = flat[size:]
            for kept in layer.exponents():
                kept.copy_(exponents[: kept.numel()].view_as(kept))
                exponents = exponents[kept.numel() :]
        for _, layer in layers:
            layer.trainable(False)
    return model.eval(), header
