"""The study of the ARB model in small, and the tables that are made of its rows."""

import gzip
import json
import struct
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tritwise.data.collections import Example, open_collection
from tritwise.encoders import Features
from tritwise.report.arb_tables import TABLES, arb_table, quarter_loss


@pytest.fixture(scope="module")
def study(benchmark_script) -> ModuleType:
    return benchmark_script("arb_study")


def test_every_item_is_a_config_of_both_sizes(study):
    for name in study.ITEMS:
        for size in ("gpu", "cpu"):
            config = study.config_of(study.settings_of(name, size, False), Path("data"))
            assert (config.model.weights == "float") == ("float" in name)
            assert config.train.seed == int(name[-1]) and config.train.steps >= 200
    wanted = [*study.FIRST[:5], *study.LAYERS]
    shares = [study.LAYERS[name] if name in study.LAYERS else study.ITEMS[name][0] for name in wanted]
    assert sum(shares) <= 500 * study.WORKERS  # the most wanted, on one GPU


def idx(path: Path, head: tuple[int, ...], body: bytes) -> None:
    path.write_bytes(gzip.compress(struct.pack(f">{len(head)}I", *head) + body))


def test_what_is_packed_is_unpacked(study, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "CARRY", tmp_path / "carry")
    monkeypatch.setattr(study, "PICTURES", 3)
    g = torch.Generator().manual_seed(0)
    x_TD = (torch.randn(48, 6, generator=g) * torch.tensor([1, 1, 50, 0.01, 3, 1]) + 7).to(torch.float16)
    splits = ["train"] * 9 + ["val"] * 3
    examples = [Example(f"{n}.wav", str(n % 3), split, n % 3) for n, split in enumerate(splits)]
    preview = torch.zeros(2, 2, dtype=torch.uint8)
    whole = Features("audio", x_TD, [*range(0, 49, 4)], examples, ("0", "1", "2"), {"layer": 4}, {10: preview})
    whole.save(tmp_path / "features.json")
    raw = tmp_path / "fashion"
    raw.mkdir()
    for part, count in (("train", 5), ("t10k", 4)):
        idx(raw / f"{part}-images-idx3-ubyte.gz", (2051, count, 28, 28), bytes(range(count)) * 784)
        idx(raw / f"{part}-labels-idx1-ubyte.gz", (2049, count), bytes(range(count)))
    study.pack([tmp_path / "features.json"], raw, None)
    study.unpack("digits", tmp_path)
    back = Features.load(tmp_path / "digits.json")
    kept = [*range(0, 9, study.DIGITS), 9, 10, 11]
    assert [e.name for e in back.examples] == [f"{n}.wav" for n in kept] and back.about == {"layer": 4}
    assert list(back.previews) == [kept.index(10)]
    spread_D = x_TD.float().std(dim=0)
    for place, index in enumerate(kept):
        assert ((back.of(place).float() - whole.of(index).float()).abs() < 0.06 * spread_D + 0.01).all()
    assert len(open_collection(str(tmp_path / "carry" / "fashion-mnist"), "images").part("train")) == 3


def row(name: str, val: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """A row as the study writes it."""
    given = {"weights": "trit", "rate": 0.015, "optimizer": "trit", "task": next(iter(val), "text")} | settings
    made = {"device": "cpu", "cpu": "abacus", "threads": 1}
    facts = {"steps": 40, "weights": 1000, "float_trainable": 0, "surroundings": made}
    return {"name": name, "settings": given, "val": val, **facts, "losses": [[10, 3.0, None], [40, 1.0, None]]}


def test_tables_gather_seeds_and_hold_a_mixture_against_its_parts():
    near = {"exact": 0.0, "cer": 0.37}
    helped = {"exact": 0.1, "cer": 0.2, "neighbours": 4}
    vals = [
        {"vision": {"exact": exact, "cer": cer, "nearest": near, "with_neighbours": helped}}
        for exact, cer in ((0.2, 0.3), (0.3, 0.4))
    ]
    rows = [row(f"emoji_trit_seed{seed}", val) for seed, val in enumerate(vals)]
    line, voted = arb_table("told", rows).splitlines()[2:]
    assert "4 neighbours vote too | 2 | 10.0 % (10.0 % … 10.0 %) | 0.200 (0.200 … 0.200)" in voted
    assert "| 2 | 25.0 % (20.0 % … 30.0 %) | 0.350 (0.300 … 0.400) | 0.0 %, 0.370 | 40 |" in line
    drawn = {
        "recognised": 0.9,
        "pictures": 10,
        "classifier_accuracy": 0.95,
        "loss": 0.2,
        "draw_steps": 2,
        "guidance": 3,
    }
    assert "| 1 | 90.0 % | 10 |" in arb_table("drawn", [row("drawn_trit_seed0", {"diffusion": drawn})])
    mixture = row("mixture_seed0", {"text": {}}, task="mixture")
    mixture["losses"] = [[40, 2.0, {"text": 2.5, "audio": 3.5}]]
    alone = [row(f"alone_{kind}_seed0", {}, task=kind) for kind in ("text", "audio")]
    assert quarter_loss(alone[0]) == 3.0
    text, audio = arb_table("mixture", [mixture, *alone]).splitlines()[2:]
    assert "| text | 3.000 | 2.500 | yes |" in text and "| audio | 3.000 | 3.500 | **no** |" in audio
    layer = {"study": "vq", "steps": 9, "device": "gpu", "weights": 7, "float_trainable": 0, "used": 1.0}
    layers = [layer | {"item": f"ternary, seed {seed}", "squared_error": 0.06 + seed / 100} for seed in (0, 1)]
    assert "| codebook | ternary | 2 | squared error 0.065 (0.060 … 0.070); 100.0 % (100" in arb_table("layers", layers)
    took = {"seconds": 99.6, "before_seconds": 20.4, "training_seconds": 70.0} | row("finetune-text", {})
    assert (
        arb_table("recipes", [took]).splitlines()[2].startswith("| `finetune text` | 100 | 20 | 70 | 40 | 1,000 | 0 |")
    )
    for name in TABLES:
        assert "Nothing has been recorded" in arb_table(name, []) and json.dumps(rows)


def test_recipes_are_timed_as_whole_commands_once(benchmark_script, tmp_path):
    times = benchmark_script("recipe_times")
    nowhere = [f"--{name}={tmp_path}" for name in ("images", "sounds", "pictures", "vision-encoder", "audio-encoder")]
    out = tmp_path / "times.json"
    given = [str(out), *nowhere, "--work", str(tmp_path), "--steps", "2", "--only", "train-text"]
    times.main(given)
    (made,) = json.loads(out.read_text())["rows"]
    assert made["name"] == "train-text" and made["steps"] == 2 and made["float_trainable"] == 0
    assert made["seconds"] > made["training_seconds"] > 0 and made["before_seconds"] > 0
    times.main(given)
    assert json.loads(out.read_text())["rows"] == [made]
    with pytest.raises(RuntimeError, match="train-audio ended with code 2"):
        times.main([*given[:-1], "train-audio"])
