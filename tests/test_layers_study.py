"""The study of the further layers in its short form: whole rows, kept and not made twice."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from tritwise.files import read_json

PATH = Path(__file__).resolve().parent.parent / "benchmarks" / "layers_study.py"
SPEC = importlib.util.spec_from_file_location("layers_study", PATH)
assert SPEC is not None and SPEC.loader is not None
study = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(study)


@pytest.mark.parametrize(("name", "items"), [("graph", 3), ("moe", 3), ("stream", 1)])
def test_a_row_of_text_is_whole_and_made_once(name, items, tmp_path, capsys):
    arguments = [name, "--quick", "--seeds", "0", "--out", str(tmp_path / "rows.json")]
    assert study.main(arguments) == 0
    rows = read_json(tmp_path / "rows.json")["rows"]
    assert len(rows) == items and len({row["item"] for row in rows}) == items
    for row in rows:
        assert row["study"] == name and row["float_trainable"] == 0 and 3 < row["val_nats"] < 6
        if "load_most" in row:
            assert row["load_most"] >= 1 >= row["load_least"] and 1 <= row["passes"] <= 3
    if name == "stream":
        assert rows[0]["largest_difference"] < 1e-4 and rows[0]["compared"] == 2048
    capsys.readouterr()
    assert study.main(arguments) == 0
    assert capsys.readouterr().out == "" and read_json(tmp_path / "rows.json")["rows"] == rows


def test_with_and_without_a_graph_there_are_as_many_weights():
    options = study.argparse.Namespace(size="cpu", quick=False, seeds=[0])
    shapes = {item.split(",")[0]: run.args[0] for item, run in study.graph(options)}
    size = study.SIZES["cpu"]["graph"]
    counts = []
    for name in ("with a graph", "without"):
        shape = {"width": size["width"], "depth": size["depth"], "ctx": size["ctx"]} | shapes[name] | {}
        if name == "without":
            shape.pop("kv_heads", None)
        model = study.ByteLM(study.ModelConfig(**shape))
        counts.append(sum(layer.register.numel() for _, layer in study.trit_modules(model)))
    assert counts[0] == counts[1]


def test_a_row_of_pictures(tmp_path):
    """Two images of stripes in the place of Fashion-MNIST."""
    import gzip

    for part in ("train", "t10k"):
        pixels = (np.arange(2 * 784) * 7 % 256).astype(np.uint8)
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(16) + pixels.tobytes()))
    out = tmp_path / "rows.json"
    assert study.main(["vq", "--quick", "--seeds", "0", "--fashion", str(tmp_path), "--out", str(out)]) == 0
    ternary, twin = read_json(out)["rows"]
    assert ternary["float_trainable"] == 0 < twin["float_trainable"] and ternary["patches"] == 98
    assert 0 < ternary["used"] <= 1 and ternary["squared_error"] > 0
