"""The artifact of a model: the same logits to the last bit, five weights to a byte, and nothing else believed."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tritwise.errors import UserError
from tritwise.models import ByteLM, ModelConfig
from tritwise.nn import trit_modules
from tritwise.registers import EXPONENT_LIMIT, LEAD, REGISTER_LIMIT, leading_trit
from tritwise.ship import ArtifactInfo, read_artifact, write_artifact
from tritwise.ship.container import read_container, write_container

SHAPES = [
    {"width": 32, "depth": 1},
    {"width": 64, "depth": 2, "heads": 4, "kv_heads": 2},
    {"width": 96, "depth": 1, "window": 5, "group": 32},
    {"width": 32, "depth": 1, "ngrams": 3, "ngram_rows": 37},
    {"width": 32, "depth": 1, "ngrams": 3, "ngram_rows": 37, "ngram_width": 6, "word_tables": 1, "column_scales": True},
    {"width": 32, "depth": 2, "column_scales": True, "group": 8},
    {"width": 34, "depth": 1, "heads": 1, "mlp_ratio": 3, "group": 7},
    {"width": 32, "depth": 1, "weight_trits": 2, "ngrams": 2, "ngram_rows": 37, "ngram_width": 6},
    {"width": 32, "depth": 1, "weight_trits": 3, "mixer": "lstm"},
    {"width": 32, "depth": 1, "weight_trits": 5},
]


def scrambled(seed: int = 0, **shape: object) -> ByteLM:
    """A model with any registers, limits included, and scales that are not where they started."""
    torch.manual_seed(seed)
    model = ByteLM(ModelConfig(**({"width": 32, "depth": 1, "ctx": 16} | shape)))  # type: ignore[arg-type]
    for _, layer in trit_modules(model):
        layer.register.copy_(torch.randint(-REGISTER_LIMIT, REGISTER_LIMIT + 1, layer.register.shape))
        for exponent in layer.exponents():
            exponent.add_(torch.randint(-6, 7, exponent.shape, dtype=torch.int8))
    return model


@pytest.fixture(scope="module")
def shipped(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("shipped") / "model.tritwise"
    write_artifact(scrambled(), path, {"recipe": "none", "train": {}})
    return path


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_logits_are_identical(shape: dict, tmp_path: Path):
    model = scrambled(**shape)
    info = write_artifact(model, tmp_path / "model.tritwise", {"note": "−1 é"})
    reread, header = read_artifact(tmp_path / "model.tritwise")
    ids = torch.randint(0, 256, (3, 16))
    assert torch.equal(model(ids), reread(ids))
    assert reread.config == model.config and header["config"] == dataclasses.asdict(model.config)
    assert header["about"] == {"note": "−1 é"} and header["weights"] == info.weights
    for (name, layer), (other_name, other) in zip(trit_modules(model), trit_modules(reread), strict=True):
        assert name == other_name
        assert torch.equal(layer.trits() * layer.lead, other.register)
        trits = 1 if layer.sparse else model.config.weight_trits  # hashed tables have one
        assert layer.lead == other.lead == 3 ** (5 - trits)
        assert all(map(torch.equal, layer.exponents(), other.exponents()))


def test_what_is_read_is_frozen_and_holds_no_float(shipped: Path):
    model, _ = read_artifact(shipped)
    assert not model.training
    assert all(layer.port is None for _, layer in trit_modules(model))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.int8}
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_five_weights_to_a_byte(shape: dict, tmp_path: Path):
    model = scrambled(**shape)
    layers = [layer for _, layer in trit_modules(model)]
    weights, scales = (
        sum(x.numel() for x in xs) for xs in zip(*[(r.register, r.exponent) for r in layers], strict=True)
    )
    trits = sum(layer.weight_trits * layer.register.numel() for layer in layers)
    info = write_artifact(model, tmp_path / "model.tritwise")
    assert isinstance(info, ArtifactInfo) and info.path == tmp_path / "model.tritwise"
    assert info.bytes == info.path.stat().st_size
    assert info.weights == weights
    header = info.bytes - sum(info.streams.values())
    assert 0 < header < 600 + 150 * len(layers)
    # Trits that are as likely as each other hold log2(3) bits: no packing could go far below 5 to a byte.
    assert 0.97 * trits * math.log2(3) / 8 < info.streams["trits"] <= math.ceil(trits / 5)
    assert info.streams["scales"] <= scales


def test_the_same_model_makes_the_same_bytes(tmp_path: Path):
    for name in ("one", "two"):
        write_artifact(scrambled(3), tmp_path / name, {"a": 1})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    write_artifact(scrambled(4), tmp_path / "two", {"a": 1})
    assert (tmp_path / "one").read_bytes() != (tmp_path / "two").read_bytes()


def test_evidence_stays_behind(tmp_path: Path):
    model = scrambled()
    write_artifact(model, tmp_path / "with")
    for _, layer in trit_modules(model):
        layer.register.copy_(leading_trit(layer.register) * LEAD)
    write_artifact(model, tmp_path / "without")
    assert (tmp_path / "with").read_bytes() == (tmp_path / "without").read_bytes()


def test_what_is_read_can_be_shipped_again(shipped: Path, tmp_path: Path):
    model, header = read_artifact(shipped)
    write_artifact(model, tmp_path / "again", header["about"])
    assert (tmp_path / "again").read_bytes() == shipped.read_bytes()


def test_a_few_zeros_more_make_it_smaller(tmp_path: Path):
    model = scrambled()
    full = write_artifact(model, tmp_path / "full").streams["trits"]
    for _, layer in trit_modules(model):
        layer.register[torch.rand(layer.register.shape) < 0.7] = 0
    assert write_artifact(model, tmp_path / "sparse").streams["trits"] < 0.9 * full


def test_a_float_model_is_refused(tmp_path: Path):
    model = ByteLM(ModelConfig(width=32, depth=1, ctx=16, weights="float"))
    with pytest.raises(UserError, match="only ternary models can be shipped; train with --set weights=trit"):
        write_artifact(model, tmp_path / "model.tritwise")
    assert not list(tmp_path.iterdir())


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_changed_file_is_read(shipped: Path, tmp_path: Path, data: st.DataObject):
    whole = bytearray(shipped.read_bytes())
    kind = data.draw(st.sampled_from(["flip", "cut", "add"]))
    place = data.draw(st.integers(0, len(whole) - 1))
    if kind == "flip":
        whole[place] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "cut":
        del whole[place:]
    else:
        whole += bytes([place % 256])
    path = tmp_path / "changed"
    path.write_bytes(whole)
    with pytest.raises(UserError) as caught:
        read_artifact(path)
    assert ";" in str(caught.value)


def change_header(**changes: object):
    return lambda header, streams: header.update(changes)


FOREIGN = {
    "another kind": (change_header(kind="vocoder"), "holds a 'vocoder' in 'base3'; upgrade"),
    "another packing": (change_header(packing="base9"), "holds a 'byte_lm' in 'base9'; upgrade"),
    "no kind": (lambda header, streams: header.pop("kind"), "no byte model this version understands"),
    "no config": (lambda header, streams: header.pop("config"), "no byte model this version understands"),
    "no layers": (lambda header, streams: header.pop("layers"), "no byte model this version understands"),
    "no trits": (lambda header, streams: streams.pop("trits"), "no byte model this version understands"),
    "no scales": (lambda header, streams: streams.pop("scales"), "no byte model this version understands"),
    "an unknown setting": (
        lambda header, streams: header["config"].update(wings=2),
        "no byte model this version understands",
    ),
    "another shape": (lambda header, streams: header["config"].update(width=64), "does not fit the shape it names"),
    "float weights": (lambda header, streams: header["config"].update(weights="float"), "does not fit the shape"),
    "an impossible shape": (
        lambda header, streams: header["config"].update(width=0),
        "(width is 0); ship it again",
    ),
    "nothing about itself": (lambda header, streams: header.pop("about"), "no byte model this version understands"),
    "a number about itself": (change_header(about=5), "no byte model this version understands"),
    "a layer less": (lambda header, streams: header["layers"].pop(), "does not fit the shape it names"),
    "too few trits": (
        lambda header, streams: streams.update(trits=streams["trits"][:-1]),
        "another number of trits",
    ),
    "too many scales": (
        lambda header, streams: streams.update(scales=streams["scales"] + b"\0"),
        "another number of scales",
    ),
    "no trits but bytes": (
        lambda header, streams: streams.update(trits=b"\xff" * len(streams["trits"])),
        "bytes that are no trits; ship it again",
    ),
}


HUGE = [{"width": 64_000}, {"depth": 2_000}, {"ctx": 10**8}, {"experts": 1000}, {"loops": 10**9}, {"vocab": 10**9}]
HUGE += [{"width": 2**33}, {"depth": 900, "experts": 900}]


@pytest.mark.parametrize("change", HUGE, ids=str)
def test_no_header_makes_us_take_memory_for_what_the_file_does_not_hold(change, shipped: Path, tmp_path, monkeypatch):
    header, streams = read_container(shipped)
    header["config"].update(change)
    write_container(tmp_path / "huge", header, streams)

    def built(config):
        raise AssertionError("a model of this shape was built")

    monkeypatch.setattr("tritwise.ship.artifact.ByteLM", built)
    with pytest.raises(UserError, match=r"a shape that no model has|does not fit the shape it names"):
        read_artifact(tmp_path / "huge")
    with pytest.raises(AssertionError, match="was built"):
        read_artifact(shipped)


@pytest.mark.parametrize("name", FOREIGN)
def test_a_whole_container_of_something_else_is_refused(name: str, shipped: Path, tmp_path: Path):
    change, message = FOREIGN[name]
    header, streams = read_container(shipped)
    change(header, streams)
    write_container(tmp_path / "foreign", header, streams)
    with pytest.raises(UserError) as caught:
        read_artifact(tmp_path / "foreign")
    assert message in str(caught.value) and ";" in str(caught.value)


def test_every_scale_survives(tmp_path: Path):
    model = scrambled(width=256, depth=1)
    limit = torch.arange(-EXPONENT_LIMIT, EXPONENT_LIMIT + 1, dtype=torch.int8)
    layer = model.embed
    layer.exponent.copy_(limit.repeat(2)[:256, None])
    write_artifact(model, tmp_path / "model.tritwise")
    reread, _ = read_artifact(tmp_path / "model.tritwise")
    assert torch.equal(reread.embed.exponent, layer.exponent)
