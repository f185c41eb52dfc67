"""Shipping under a budget of bytes: float rows in few bits, estimates, the best way that fits, refusals."""

import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tritwise.errors import UserError
from tritwise.files import read_json, read_json_lines
from tritwise.models import ByteLM, ModelConfig
from tritwise.nn import trit_modules
from tritwise.ship import WAYS, estimate, read_artifact, require_room, ship_within, shipped_bytes, write_artifact
from tritwise.ship.container import read_container, write_container
from tritwise.ship.quantise import QUANTILES, quantise_rows, restore_rows
from tritwise.train import override, train
from tritwise.train.finish import ship_run

PARTS = {"loops": 2, "loop_embedding": True, "value_tables": 2, "repeat_skip": True, "input_mix": True, "gains": True}
SMALL = 1000  # so that the matrices of a tiny model count as large


def model_of(weights: str = "float", **shape: object) -> ByteLM:
    torch.manual_seed(0)
    return ByteLM(ModelConfig(**({"width": 32, "depth": 2, "ctx": 16, "weights": weights} | PARTS | shape)))  # type: ignore[arg-type]


# --- rows in few bits -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 7, 6])
@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 70),
    scale=st.sampled_from([1e-6, 1e-3, 1.0, 50.0]),
    seed=st.integers(0, 9),
)
@settings(max_examples=25, deadline=None)
def test_rows_are_within_half_a_step_and_no_quantile_alone_is_better(bits, rows, columns, scale, seed):
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * scale
    codes, scales = quantise_rows(w, bits)
    most = 2 ** (bits - 1) - 1
    assert codes.dtype == torch.int8 and scales.dtype == torch.float16 and int(codes.abs().max()) <= most
    error = (restore_rows(codes, scales) - w).square().sum(1)
    alone = [(restore_rows(*quantise_rows(w, bits, (q,))) - w).square().sum(1) for q in QUANTILES]
    assert (error <= torch.stack(alone).amin(0) * 1.0001 + 1e-30).all()
    inside = w.abs() <= scales.float() * most
    if scale >= 1e-3:  # below, float16 has too few bits for a scale
        assert ((restore_rows(codes, scales) - w).abs() <= scales.float() * 0.5001)[inside].all()


def test_a_row_of_zeros_and_an_outlier():
    w = torch.zeros(2, 20_000)
    w[1] = torch.randn(20_000, generator=torch.Generator().manual_seed(0)) * 0.01
    w[1, 7] = 0.3
    codes, scales = quantise_rows(w, 6)
    assert not codes[0].any() and torch.isfinite(restore_rows(codes, scales)).all()
    plain = restore_rows(*quantise_rows(w, 6, (1.0,)))
    assert (restore_rows(codes, scales) - w).square().sum() < (plain - w).square().sum()


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [way for way in WAYS if way != "auto"])
def test_a_float_model_comes_back_as_it_was_rounded(method, tmp_path):
    model, path = model_of(), tmp_path / "model.tritwise"
    info = write_artifact(model, path, method=method, small=SMALL)
    assert info.bytes == path.stat().st_size and set(info.streams) == {"codes", "row_scales", "small"}
    reread, header = read_artifact(path)
    assert header["packing"] == method and not any(p.requires_grad for p in reread.parameters())
    for (name, before), after in zip(model.named_parameters(), reread.parameters(), strict=True):
        if before.numel() <= SMALL:
            assert torch.equal(before.half().float(), after), name
        else:
            error = (before - after).norm() / before.norm()
            assert 1e-4 < error < (0.04 if method == "int6" else 0.02), (name, error)
    ids = torch.randint(256, (2, 16), generator=torch.Generator().manual_seed(1))
    assert (model(ids) - reread(ids)).abs().max() < 1.0


def test_float_files_that_lie_are_refused(tmp_path):
    path, bad = tmp_path / "model.tritwise", tmp_path / "bad.tritwise"
    write_artifact(model_of(), path, method="int8", small=SMALL)
    header, streams = read_container(path)
    for change, message in (
        ({"streams": streams | {"codes": streams["codes"][:-1]}}, "another number of codes"),
        ({"streams": streams | {"small": streams["small"] + b"\0\0"}}, "another number of small"),
        ({"header": header | {"packing": "base3"}}, "does not fit"),
        ({"header": header | {"packing": "int8+zlib"}}, "does not fit"),
        ({"header": header | {"packing": "int5"}}, "upgrade tritwise"),
    ):
        write_container(bad, change.get("header", header), change.get("streams", streams))
        with pytest.raises(UserError, match=message):
            read_artifact(bad)
    write_artifact(model_of(), path, method="int8+zlib", small=SMALL)
    header, streams = read_container(path)
    for stream in (zlib.compress(bytes(10**8)), streams["codes"][:-9], b"no zlib"):  # the first is 97 kB
        write_container(bad, header, streams | {"codes": stream})
        tracemalloc.start()
        with pytest.raises(UserError, match="does not fit the shape it names"):
            read_artifact(bad)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
        tracemalloc.stop()
    with pytest.raises(UserError, match="only ternary models can be shipped"):
        write_artifact(model_of(), bad)


# --- budgets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape",
    [
        *({}, {"width": 64, "depth": 3, "ngrams": 3, "ngram_rows": 500}, {"group": 8, "column_scales": True}),
        {"width": 64, "depth": 3, "ngrams": 3, "ngram_rows": 500, "ngram_width": 16, "word_tables": 1},
        {"width": 64, "depth": 3, "ngrams": 3, "ngram_rows": 500, "weight_trits": 3},
    ],
)
def test_the_ternary_estimate_is_never_too_small_and_close(shape, tmp_path):
    model = model_of("trit", **shape)
    for _, layer in trit_modules(model):
        for exponent in layer.exponents():
            exponent.data.copy_(torch.randint(-127, 128, exponent.shape, dtype=torch.int8))  # as dear as can be
        layer.register.copy_(torch.randint(-121, 122, layer.register.shape))
    sizes = estimate(model)
    info = write_artifact(model, tmp_path / "model.tritwise")
    assert info.bytes <= sizes["total"] <= 1.02 * info.bytes + 3500
    assert info.streams == {name: sizes[name] for name in info.streams}
    assert info.bytes - 100 <= shipped_bytes(model) <= info.bytes + 100


@pytest.mark.parametrize("method", ["int8", "int7", "int6"])
def test_the_float_estimate_is_near(method, tmp_path):
    model = model_of(width=64)
    info = write_artifact(model, tmp_path / "model.tritwise", method=method, small=SMALL)
    assert estimate(model, method, SMALL)["total"] == pytest.approx(info.bytes, rel=0.12)
    assert shipped_bytes(model, method, SMALL) == pytest.approx(info.bytes, rel=0.02)


def test_the_best_way_that_fits_is_taken(tmp_path):
    model, path = model_of(width=64), tmp_path / "model.tritwise"
    sizes = {way: write_artifact(model, path, method=way, small=SMALL).bytes for way in ("int8", "int7", "int6")}
    assert sizes["int8"] > sizes["int7"] > sizes["int6"]
    for way, size in sizes.items():
        info, taken = ship_within(model, path, {}, size, small=SMALL)
        assert (info.bytes, taken) == (size, way)
    kept = path.read_bytes()
    for other in (path, tmp_path / "new"):
        with pytest.raises(UserError, match=f"1 over the budget of {sizes['int6'] - 1:,}"):
            ship_within(model, other, {}, sizes["int6"] - 1, small=SMALL)
    assert path.read_bytes() == kept and not (tmp_path / "new").exists()
    with pytest.raises(UserError, match="no way 'int5'"):
        ship_within(model, path, {}, method="int5")


def test_trits_that_can_never_fit_are_refused_before_training(small_config, tmp_path):
    model = model_of("trit")
    trits = estimate(model)["trits"]
    require_room(model, trits)
    with pytest.raises(UserError, match=f"take {trits:,} bytes, 1 over the budget"):
        require_room(model, trits - 1)
    with pytest.raises(UserError, match="over the budget of 1,000"):
        train(small_config(budget=1000), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_sizes_are_told_before_during_and_after_training(small_config, tmp_path, cli):
    config = small_config(budget=20_000, loops=2, loop_embedding=True)
    result = train(config, tmp_path / "run")
    lines = read_json_lines(tmp_path / "run/metrics.jsonl")
    told = [line["message"] for line in lines if line["kind"] == "event"]
    assert told[0].startswith("about ") and "of 20,000: trits" in told[0]
    tracked = [line["bytes"] for line in lines if line["kind"] == "size"]
    assert all(line["budget"] == 20_000 for line in lines if line["kind"] == "size")
    assert len(tracked) == 2 and tracked[-1] == pytest.approx(result["artifact"]["bytes"], abs=300)
    out = tmp_path / "model.tritwise"
    shipped = cli("ship", tmp_path / "run", "--out", out, "--budget", 20_000, "--score-bytes", 100, "--json")
    assert shipped.code == 0 and shipped.json["bytes"] == out.stat().st_size and shipped.json["scored"] == 100
    assert shipped.json["bpb_before"] == shipped.json["bpb_reread"]  # to the last bit
    assert "left of the budget" in shipped.err and "before" in shipped.err
    refused = cli("ship", tmp_path / "run", "--out", tmp_path / "no", "--budget", out.stat().st_size - 1)
    assert refused.code == 2 and "1 over the budget of" in refused.err and not (tmp_path / "no").exists()


def test_a_run_over_its_budget_is_kept_whatever_was_said(small_config, tmp_path, cli):
    config = override(small_config(weights="float", optimizer="muon", rate=0.02), {"ship_as": "int6", "save": False})
    folder = tmp_path / "run"
    with pytest.raises(UserError, match=rf"over the budget of 20,000; the training is kept: tritwise ship {folder}"):
        train(override(config, {"budget": 20_000, "ship_small": SMALL}), folder)
    told = [line["message"] for line in read_json_lines(folder / "metrics.jsonl") if line["kind"] == "event"]
    assert any(message.startswith("likely more than the budget") for message in told)
    refused = read_json(folder / "refused.json")
    assert 1 < refused["before"]["bpb"] < 9 and "over the budget of 20,000" in refused["error"]
    assert not (folder / "result.json").exists() and not (folder / "model.tritwise").exists()
    shipped = cli("ship", folder, "--out", tmp_path / "all", "--budget", 0, "--json")
    assert shipped.code == 0 and shipped.json["bpb_before"] == refused["before"]["bpb"]
    finer = cli("ship", folder, "--out", tmp_path / "all", "--budget", 0, "--ship-small", 10**6, "--json")
    assert finer.json["streams"]["codes"] == 0 < shipped.json["streams"]["codes"]
    for words in (["--budget", -3], ["--score-bytes", -1], ["--ship-small", -1]):
        assert cli("ship", folder, "--out", tmp_path / "no", *words).code == 2
    result = train(override(config, {"budget": 200_000, "ship_small": SMALL}), folder, resume=True)
    assert result["artifact"]["bytes"] <= 200_000 and not (folder / "refused.json").exists()


def test_a_float_run_ships_with_its_loss_measured(small_config, tmp_path, cli):
    plain = small_config(weights="float", optimizer="muon", rate=0.02)
    config = override(plain, {"ship_as": "auto", "budget": 60_000, "ship_small": SMALL})
    result = train(config, tmp_path / "run")
    assert result["artifact"]["way"] == "int8" and result["artifact"]["bytes"] <= 60_000
    tracked = [line["bytes"] for line in read_json_lines(tmp_path / "run/metrics.jsonl") if line["kind"] == "size"]
    assert tracked[-1] == pytest.approx(result["artifact"]["bytes"], rel=0.02)
    assert 0 < abs(result["before"]["bpb"] - result["val"]["bpb"]) < 0.05
    assert train(plain, tmp_path / "plain")["val"]["bpb"] == result["before"]["bpb"]
    again = ship_run(tmp_path / "run", tmp_path / "again", ship_as="int6", budget=0)
    assert again["way"] == "int6" and again["bytes"] < result["artifact"]["bytes"]
    assert np.isfinite(again["bpb_reread"])
    scored = cli("score", tmp_path / "again", "--data", config.train.data, "--no-ladder", "--json")
    assert scored.code == 0
