"""The artifact: a trained byte model as one file. Leading trits five to a byte, scale exponents as their own stream.

Streams, in the order of the model's layers: `trits`, all leading trits packed base3 in one run; `scales`, all int8
scale exponents; `vectors`, in models that have learned vectors, their int8 fixed-point numbers; `tables`, in ARB
models, the measured constants of their bridges, float32; `tokenizer`, of a model of tokens, since without it nobody
could use the model. The header holds the shape, the layers with their sizes, and
what the trainer wants to say. Evidence and momentum stay behind: they do not change a logit. Models with float weights
ship with a loss, in one of the ways of floats.py.
"""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from tritwise.errors import UserError
from tritwise.models import Arb, ByteLM, ModelConfig, PartsConfig, skeleton
from tritwise.nn import TritModule, TritVector, trit_modules
from tritwise.registers import PLACES, pack_base3, packed_bytes, to_trits, unpack_base3
from tritwise.ship.container import container_bytes, read_container, write_container
from tritwise.ship.floats import METHODS, fill_floats, float_streams, inflated, stream_sizes
from tritwise.ship.quantise import SMALL

KIND, ARB = "byte_lm", "arb"
TOKENIZER = "tokenizer"  # the stream of this name
_PART = 1 << 24  # registers that are taken apart at a time, so that little of a GPU's memory is needed


class ArtifactInfo(NamedTuple):
    """What was written: path, bytes in the file, weights in it, and the bytes of each stream."""

    path: Path
    bytes: int
    weights: int
    streams: dict[str, int]


def write_artifact(
    model: ByteLM | Arb,
    path: Path,
    about: dict[str, Any] | None = None,
    *,
    method: str | None = None,
    small: int = SMALL,
    budget: int = 0,
    tokenizer: bytes = b"",
) -> ArtifactInfo:
    """Write `model` to `path`, atomically. `about`: plain JSON kept in the header. Frozen encoders stay outside: the
    file names them, without the folder they lay in, and knows the checksum of their weights.

    method: for float weights, one of `ship.floats.METHODS`; small: tensors of up to so many numbers stay float16.
    budget: bytes that the file may have; 0: any number. tokenizer: what a model of tokens reads with.
    Raises UserError for a model with float weights and no method (it has no lossless artifact), and if the file cannot
    be written; OverBudgetError for one over the budget. Then a file that was there before is as it was.
    """
    header, streams, weights = _described(model, about or {}, method, small)
    streams |= _reading(tokenizer)
    info = write_container(path, header, streams, budget=budget)
    size = Path(path).stat().st_size  # of the file, not of what was meant to be in it
    return ArtifactInfo(Path(path), size, weights, {s.name: s.stored for s in info.streams})


def shipped_bytes(
    model: ByteLM | Arb, method: str | None = None, small: int = SMALL, level: int = 3, tokenizer: bytes = b""
) -> int:
    """How many bytes `model` would take now, but for what the trainer says of it, without writing a file.

    level: of zstd; 22 is what ships, and takes as long as it takes."""
    header, streams, _ = _described(model, {}, method, small)
    return container_bytes(header, streams | _reading(tokenizer), level)


def read_tokenizer(path: Path) -> bytes:
    """The tokenizer in the artifact `path`; b"" if its model reads bytes. UserError as `read_artifact`."""
    return read_container(path)[1].get(TOKENIZER, b"")


def _reading(tokenizer: bytes) -> dict[str, bytes]:
    return {TOKENIZER: tokenizer} if tokenizer else {}


def _described(
    model: ByteLM | Arb, about: dict[str, Any], method: str | None, small: int
) -> tuple[dict[str, Any], dict[str, Any], int]:
    """Header, streams and number of weights."""
    header: dict[str, Any] = {"kind": KIND, "config": dataclasses.asdict(model.config), "about": about}
    if isinstance(model, Arb):
        header |= {"kind": ARB, "parts": _public(model.parts)}
    if model.config.weights != "trit":
        if method is None:
            raise UserError(
                "only ternary models can be shipped; train with --set weights=trit, or choose how float weights lose "
                "precision with --ship-as or --set ship_as=auto"
            )
        weights = sum(parameter.numel() for parameter in model.parameters())
        header |= {"weights": weights, "packing": method, "small": small}
        return header, float_streams(model, method, small) | _measured(model), weights
    layers, (matrices, vectors) = list(trit_modules(model)), _sorted(model)
    trits = torch.cat([_trits(layer) for layer in matrices])
    scales = torch.cat([e.detach().reshape(-1).cpu() for layer in matrices for e in layer.exponents()])
    weights = sum(layer.register.numel() for _, layer in layers)
    header |= {
        "layers": [
            {"name": name, "role": layer.role, "shape": list(layer.register.shape), "groups": layer.exponent.shape[1]}
            for name, layer in layers
        ],
        "weights": weights,
        "packing": "base3",
    }
    streams = {"trits": pack_base3(trits).numpy(), "scales": scales.view(torch.uint8).numpy()}
    if vectors:
        numbers = torch.cat([layer.register.detach().reshape(-1).cpu() for layer in vectors])
        streams["vectors"] = numbers.view(torch.uint8).numpy()
    return header, streams | _measured(model), weights


def _trits(layer: TritModule) -> torch.Tensor:
    """The trits that a layer ships, int8 [weight_trits * rows * columns]: all first ones, then all second ones."""
    parts = layer.register.detach().reshape(-1).split(_PART)  # where they lie: a GPU is quick at it
    kept = [to_trits(part, layer.weight_trits).T.contiguous().cpu() for part in parts]
    return torch.cat(kept, dim=1).reshape(-1)


def _fill_trits(layer: TritModule, trits: torch.Tensor) -> None:
    """The inverse: registers without evidence that have these trits."""
    planes = trits.view(layer.weight_trits, *layer.register.shape)
    layer.register.zero_()
    for plane, place in zip(planes, PLACES, strict=False):
        layer.register.add_(plane * place)


def tables_of(model: ByteLM | Arb) -> list[torch.Tensor]:
    """The constants that were measured on the training data, float32 [D] each, in the order of the parts."""
    parts = (model.vision, model.audio) if isinstance(model, Arb) else ()
    return [table for part in parts if part is not None for table in (part.mean, part.spread)]


def _measured(model: ByteLM | Arb) -> dict[str, np.ndarray]:
    """These as a stream, of an ARB model."""
    if not isinstance(model, Arb):
        return {}
    tables = [table.detach().float().cpu() for table in tables_of(model)]
    return {"tables": torch.cat([torch.empty(0), *tables]).view(torch.uint8).numpy()}


def _public(parts: PartsConfig) -> dict[str, Any]:
    """The parts as plain JSON; of the path of an encoder only its last name, for where it lay is nobody's business."""
    told = dataclasses.asdict(parts)
    return told | {key: Path(told[key]).name for key in ("vision_encoder", "audio_encoder")}


def _sorted(model: ByteLM | Arb) -> tuple[list[TritModule], list[TritVector]]:
    """The ternary layers that ship as trits and scales, and those that ship as whole registers."""
    layers = [layer for _, layer in trit_modules(model)]
    vectors = [layer for layer in layers if isinstance(layer, TritVector)]
    return [layer for layer in layers if not isinstance(layer, TritVector)], vectors


def read_artifact(path: Path) -> tuple[ByteLM | Arb, dict[str, Any]]:
    """The model in `path`, frozen and in eval mode, and the header. The logits of a ternary model equal the trained
    one's bit for bit.

    Raises UserError if the file is missing, damaged, cut off, newer than this version, or holds something else.
    """
    header, streams = read_container(path)
    try:
        config, parts = _shape_named(path, header)
        # What the streams must hold is told by the model's shape alone: no memory is taken on the word of a header.
        streams = _checked(skeleton(config, parts), header, streams)
    except UserError:
        raise
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is no byte model this version understands ({error}); upgrade tritwise") from None
    except (ValueError, RuntimeError) as error:  # torch's, for a shape of more numbers than can be counted
        raise UserError(f"{path} does not fit the shape it names ({error}); ship it again from its run") from error
    model = ByteLM(config) if parts is None else Arb(config, parts)
    if header["packing"] != "base3":
        fill_floats(model, streams, header["small"])
    else:
        _fill(model, streams, path)
    flat = torch.from_numpy(np.frombuffer(streams.get("tables", b""), np.float32).copy())
    for table in tables_of(model):
        table.copy_(flat[: table.numel()])
        flat = flat[table.numel() :]
    return model.eval().requires_grad_(False), header


def _shape_named(path: Path, header: dict[str, Any]) -> tuple[ModelConfig, PartsConfig | None]:
    """The shape of the model that a header names, and of an ARB model its parts. UserError if this version has no such
    thing, KeyError or TypeError if the header does not say."""
    kind, packing = header["kind"], header["packing"]
    if kind not in (KIND, ARB) or packing not in ("base3", *METHODS):
        raise UserError(f"{path} holds a {kind!r} in {packing!r}; upgrade tritwise to read it")
    if not isinstance(header["about"], dict):
        raise TypeError("about")
    try:
        config = ModelConfig(**header["config"])
        parts = PartsConfig(**header["parts"]) if kind == ARB else None
    except UserError as error:
        what = str(error).split(";")[0]
        raise UserError(f"{path} names a shape that no model has ({what}); ship it again from its run") from None
    if (config.weights == "trit") != (packing == "base3"):
        raise UserError(f"{path} does not fit the shape it names; ship it again from its run")
    return config, parts


def _checked(bare: ByteLM | Arb, header: dict[str, Any], streams: dict[str, bytes]) -> dict[str, bytes]:
    """The streams, ready to be read, of a model whose shape is `bare`'s. KeyError if one is missing, ValueError if one
    has another size than the model needs."""
    sizes = {"tables": 4 * sum(table.numel() for table in tables_of(bare))} if isinstance(bare, Arb) else {}
    if header["packing"] == "base3":
        layers, (matrices, vectors) = list(trit_modules(bare)), _sorted(bare)
        named = [[entry["name"], entry["shape"]] for entry in header["layers"]]
        if named != [[name, list(layer.register.shape)] for name, layer in layers]:
            raise ValueError("other layers")
        sizes["trits"] = packed_bytes(sum(layer.weight_trits * layer.register.numel() for layer in matrices))
        sizes["scales"] = sum(e.numel() for layer in matrices for e in layer.exponents())
        if vectors:
            sizes["vectors"] = sum(layer.register.numel() for layer in vectors)
    else:
        packed = stream_sizes(bare, header["small"])
        if METHODS[header["packing"]].zlib:
            streams = streams | {name: inflated(streams[name], size) for name, size in packed.items()}
        sizes |= packed
    for name, size in sizes.items():
        if len(streams[name] if size else streams.get(name, b"")) != size:
            raise ValueError(f"another number of {name} than it needs")
    return streams


def _fill(model: ByteLM | Arb, streams: dict[str, bytes], path: Path) -> None:
    """Put trits, scales and vectors into a ternary model, which is frozen then."""
    matrices, vectors = _sorted(model)
    count = sum(layer.weight_trits * layer.register.numel() for layer in matrices)
    try:
        flat = unpack_base3(torch.from_numpy(np.frombuffer(streams["trits"], np.uint8).copy()), count)
    except ValueError as error:  # checksums do not vouch for a file that somebody made by hand
        raise UserError(f"{path} holds bytes that are no trits; ship it again from its run") from error
    exponents = torch.from_numpy(np.frombuffer(streams["scales"], np.int8).copy())
    with torch.no_grad():
        vector_N = torch.from_numpy(np.frombuffer(streams["vectors"] if vectors else b"", np.int8).copy())
        for layer in vectors:
            layer.register.copy_(vector_N[: layer.register.numel()].view_as(layer.register))
            vector_N = vector_N[layer.register.numel() :]
        for layer in matrices:
            size = layer.weight_trits * layer.register.numel()
            _fill_trits(layer, flat[:size])
            flat = flat[size:]
            for kept in layer.exponents():
                kept.copy_(exponents[: kept.numel()].view_as(kept))
                exponents = exponents[kept.numel() :]
        for layer in (*matrices, *vectors):
            layer.trainable(False)
