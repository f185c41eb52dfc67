"""The harness of the benchmarks: every rule learns, rows are whole, sweeps go on, the command line says what it did."""

import json
import math
import multiprocessing
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import typer.main

from tritwise.bench import harness, sweep
from tritwise.bench.flips import FlipWatch, flip_back, flip_rate, zero_share
from tritwise.bench.grid import GRID, UNTUNED, WEIGHTS, add_ladder, grid_cells, untuned_rows
from tritwise.bench.harness import Cell, load_parts, run_cell
from tritwise.bench.rules import RULES, parse_rates, parse_rules, rule_called
from tritwise.bench.sweep import devices_called, run_cells
from tritwise.bench.tuning import further_seeds, tune
from tritwise.cli import bench
from tritwise.data.sampler import Sampler
from tritwise.errors import UserError
from tritwise.files import read_json_lines
from tritwise.models import ByteLM, ModelConfig
from tritwise.nn import TritLinear, trit_modules
from tritwise.optim import Muon
from tritwise.optim.groups import ROLE_RATES
from tritwise.registers import LEAD

TINY = {"width": 32, "depth": 1, "ctx": 16, "batch": 8, "steps": 12, "warmup": 2}
# At which every rule is well below its first loss after a dozen steps.
RATES = {
    "ours": 0.05,
    "dqt": 0.01,
    "bop": 0.01,
    "random-trits": 0.05,
    "bitnet-adamw": 0.02,
    "bitnet-muon": 0.1,
    "signsgd": 0.01,
    "signsgd-c": 0.01,
    "signsgd-e": 0.01,
    "lion": 0.01,
    "lion-bf16": 0.01,
    "adamw": 0.01,
    "adamw-bf16": 0.01,
    "muon": 0.05,
}
# state bytes a weight of rules without scales of their own; latents and Adam's two moments are 12
BYTES = {"adamw": 12, "adamw-bf16": 6, "lion": 8, "lion-bf16": 4, "signsgd": 4, "signsgd-c": 4, "bitnet-adamw": 12}
TERNARY = ("ours", "sign-counter-3", "sign-counter-8", "sign-counter-32", "dqt", "bop")
FIELDS = {
    *("bench", "rule", "settings", "rate", "seed", "steps", "batch", "ctx", "width", "depth", "weights", "data"),
    *("split", "bytes_seen", "val_bpb", "val_nats", "scored", "state_bytes", "bytes_per_weight"),
    *("float_state_bytes", "float_trainable", "flip_rate", "flip_back", "zero_fraction", "saturation", "seconds"),
    *("step_ms", "device", "torch", "dtype", "commit", "tritwise", "curve", "evals", "diverged", "key"),
}


def tiny(text: Path, rule: str = "ours", **changes) -> Cell:
    return Cell(**{"rule": rule, "rate": RATES.get(rule, 1.0), "data": str(text), **TINY, **changes})


def run(cell: Cell) -> dict:
    return run_cell(cell, load_parts(cell.data, cell.split, cell.batch, cell.ctx))


# rules


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_learns_and_its_row_is_whole(rule: str, small_text: Path):
    row = run(tiny(small_text, rule))
    assert row.keys() >= FIELDS and not row["diverged"]
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    assert str(small_text) not in json.dumps(row) and row["data"] == small_text.name
    losses = [loss for _, loss in row["curve"]]
    # Counters move nothing before their threshold, and everything at once then: there it is enough that all ran.
    if not rule.startswith("sign-counter"):
        assert losses[-1] < losses[0] - 0.05
    assert row["curve"][-1][0] == row["bytes_seen"] == 12 * 8 * 16 and row["scored"] == 300
    assert row["val_nats"] == pytest.approx(row["val_bpb"] * math.log(2))
    assert row["evals"] == [[row["bytes_seen"], row["val_bpb"]]]
    assert row["weights"] == 2 * 256 * 32 + 12 * 32**2
    assert row["state_bytes"] == pytest.approx(row["weights"] * row["bytes_per_weight"], rel=1e-3)
    if rule in BYTES:
        assert row["bytes_per_weight"] == pytest.approx(BYTES[rule], rel=1e-3)
    shows = rule in TERNARY or rule.startswith("bitnet") or rule in ("signsgd-c", "random-trits")
    assert (row["zero_fraction"] is not None) == (row["flip_rate"] is not None) == shows
    assert (row["saturation"] is not None) == (rule == "ours")
    if rule == "ours":
        assert row["float_trainable"] == row["float_state_bytes"] == 0
        assert row["bytes_per_weight"] < 2.15  # with the scales of rows as short as these
        assert row["flip_rate"] > 0
    if rule == "random-trits":
        assert row["flip_rate"] == 0 and 0 < row["float_trainable"] < row["weights"] / 10


def test_rules_start_alike_and_read_the_same_batches(small_text: Path, monkeypatch):
    seen: dict[str, list[torch.Tensor]] = {}
    plain = harness.Stepper
    for rule in ("ours", "adamw", "sign-counter-3"):

        class Recorded(plain):
            def step(self, ids, targets, name=rule):
                seen.setdefault(name, []).append(torch.stack((ids, targets)))
                return super().step(ids, targets)

        monkeypatch.setattr(harness, "Stepper", Recorded)
        run(tiny(small_text, rule, seed=3, steps=4))
    ours = torch.stack(seen["ours"])
    expected = Sampler(np.fromfile(small_text, np.uint8)[:2700], 8, 16, 3)
    assert torch.equal(ours, torch.stack([torch.stack(expected.batch_at(step)) for step in range(4)]))
    assert all(torch.equal(ours, torch.stack(batches)) for batches in seen.values())


def test_a_run_is_a_function_of_its_cell(small_text: Path):
    one, two, other = (run(tiny(small_text, steps=4, seed=seed)) for seed in (0, 0, 1))
    assert one["curve"] == two["curve"] and one["val_bpb"] == two["val_bpb"] and one["key"] == two["key"]
    assert one["curve"] != other["curve"] and one["key"] != other["key"]


def test_settings_reach_the_optimizer():
    shape = ModelConfig(width=32, depth=1, ctx=16)
    settings = {"rate": 0.02, "momentum": 0.8, "head_rate": 0.5, "embedding_direction": "sign"}
    _, (ours,) = RULES["ours"].build(shape, settings, 0, torch.float32, 10)
    by_role = {group["role"]: group for group in ours.param_groups}
    assert {role: group["initial_lr"] for role, group in by_role.items()} == pytest.approx(
        {"matrix": 0.02, "embedding": 0.02 * ROLE_RATES["embedding"], "head": 0.01}
    )
    assert {group["momentum"] for group in by_role.values()} == {0.8}
    assert by_role["embedding"]["direction"] == "sign"
    for trits in (1, 3):
        model, _ = RULES["ours"].build(shape, {"rate": 0.02, "weight_trits": trits}, 0, torch.float32, 10)
        assert {layer.weight_trits for _, layer in trit_modules(model) if layer.role != "embedding"} == {trits}
    _, (muon, adam) = RULES["muon"].build(shape, {"rate": 0.02}, 0, torch.float32, 10)
    assert isinstance(muon, Muon) and isinstance(adam, torch.optim.AdamW)
    assert {(group["role"], group["blocks"]) for group in muon.param_groups} == {("matrix", 1), ("matrix", 3)}
    assert {group["role"] for group in adam.param_groups} == {"embedding", "head"}
    assert adam.defaults["betas"] == (0.9, 0.95)
    model, _ = RULES["adamw-bf16"].build(shape, {"rate": 0.02}, 0, torch.float32, 10)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and model.rotary.cos.dtype == torch.float32


def test_a_list_of_rules_is_read():
    assert parse_rules("ours, ours:momentum=0.9,steps=5,adamw") == [
        ("ours", {}),
        ("ours", {"momentum": 0.9, "steps": 5}),
        ("adamw", {}),
    ]
    assert parse_rules("") == [(name, {}) for name in RULES]
    assert parse_rules("ours:rates=0.02/0.01,momentum=0.9,decay=1,adamw:warmup=7,rates=1e-3") == [
        ("ours", {"momentum": 0.9, "rates": [0.01, 0.02], "decay": 1.0}),
        ("adamw", {"rates": [1e-3], "warmup": 7}),
    ]
    assert parse_rates("3,1e-2,.5") == [0.01, 0.5, 3.0]
    assert not any({"rates", "decay", "warmup"} & rule.settings.keys() for rule in RULES.values())


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("our", "did you mean ours?"),
        ("adamv", "did you mean adamw?"),
        ("ours:momentun=0.9", "did you mean momentum?"),
        ("steps=5,ours", "has no rule before it"),
        ("ours:momentum", "is not KEY=VALUE"),
        ("ours:steps=many", "whole number"),
        ("sign-counter-3:rate=1", "it has threshold"),
        ("ours:rates=0.1/high", "rates 0.1/high are no numbers; write for example 0.01/0.02"),
        ("ours:decay=late", "decay is 'late'"),
        ("ours:warmup=0.5", "warmup is '0.5'"),
    ],
)
def test_a_bad_list_of_rules_is_refused(text: str, told: str):
    with pytest.raises(UserError, match=re.escape(told)):
        parse_rules(text)


# flips


def history(*courses: list[int]) -> torch.Tensor:
    return torch.tensor(courses, dtype=torch.int8).T


def test_flips_of_a_history_made_by_hand():
    # Looks 0 … 6; with a horizon of 2 the flips at steps 1 … 4 count.
    made = history(
        [0, 1, 0, 0, 0, 0, 0],  # step 1: back one step later. step 2: 1 never comes again
        [0, 1, 1, 0, 0, 0, 0],  # step 1: back two steps later. step 3: never
        [0, 1, 1, 1, 0, 0, 0],  # step 1: back three steps later, too late. step 4: never
        [0, 1, -1, 0, 0, 0, 0],  # step 1: back two steps later, by a detour. step 2: 1 never. step 3: -1 never
        [0, 0, 0, 0, 0, 1, 0],  # steps 5 and 6: not watched for the whole horizon
        [-1, -1, -1, -1, -1, -1, -1],
    )
    assert flip_back(made, horizon=2) == 3 / 9
    assert flip_back(made, horizon=3) == 4 / 8  # steps 1 … 3: the third comes back in time, its flip at 4 is out
    assert flip_rate(made) == pytest.approx(11 / 36)
    assert flip_rate(made[-2:]) == pytest.approx(1 / 6)
    assert flip_back(made, horizon=6) is None and flip_rate(made[:1]) is None
    assert flip_back(history([0] * 7), horizon=2) is None


def test_the_watch_sees_what_layers_show():
    torch.manual_seed(0)
    model = torch.nn.Sequential(TritLinear(40, 50), TritLinear(50, 30))
    watch = FlipWatch(model, steps=3, seed=1, count=1000)
    watch.look()
    with torch.no_grad():
        for layer in model:
            layer.register.copy_(layer.trits() * LEAD)
            layer.register[:, ::2] = -LEAD  # type: ignore[union-attr]
    before = watch.history_SN[0].clone()
    watch.look()
    changed = (watch.history_SN[1] != before).float().mean()
    assert watch.rate(5) == pytest.approx(float(changed)) and 0.3 < changed < 0.45  # half of five sixths at span 0.9
    assert watch.back() is None
    assert zero_share(model) == pytest.approx(float((watch.history_SN[1] == 0).float().mean()), abs=0.05)
    everything = FlipWatch(model, steps=1, seed=1)
    everything.look()
    assert torch.equal(everything.history_SN[0], torch.cat([layer.trits().flatten() for layer in model]))
    none = FlipWatch(torch.nn.Linear(2, 2), steps=1, seed=1)
    none.look()
    assert none.rate(1) is none.back() is zero_share(torch.nn.Linear(2, 2)) is None


def test_flips_are_watched_in_a_run(small_text: Path):
    row = run(tiny(small_text, steps=160, batch=1, ctx=8))
    assert 0 < row["flip_rate"] < 0.1 and 0 < row["flip_back"] < 1


# cells and runs


def test_a_run_that_diverges_is_a_row(small_text: Path):
    row = run(tiny(small_text, "adamw", rate=1e30))
    assert row["diverged"] and row["val_bpb"] is None and row["val_nats"] is None and row["evals"] == []
    assert row["bytes_seen"] < 12 * 8 * 16 and json.dumps(row, allow_nan=False)
    worse = run(tiny(small_text, "signsgd", rate=1000.0, decay=0.0))
    assert worse["diverged"] and worse["val_bpb"] is None and worse["curve"][-1][1] > worse["curve"][0][1] + 1


def test_scores_on_the_way(small_text: Path):
    row = run(tiny(small_text, eval_interval=5))
    assert [seen for seen, _ in row["evals"]] == [5 * 128, 10 * 128, 12 * 128]
    assert row["evals"][-1][1] == row["val_bpb"] != row["evals"][0][1]
    sliding = run(tiny(small_text, stride=4))
    assert sliding["val_bpb"] != row["val_bpb"] and sliding["scored"] == row["scored"]


def test_cells_are_known_by_what_shapes_them(small_text: Path, tmp_path: Path):
    cell = tiny(small_text)
    assert cell.key == replace(cell, data=str(tmp_path / small_text.name)).key == replace(cell).key
    others = [
        {"rate": 0.1},
        {"settings": {"momentum": 0.5}},
        {"seed": 1},
        {"shape": {"group": 8}},
        {"dtype": "bfloat16"},
    ]
    assert len({replace(cell, **change).key for change in others} | {cell.key}) == len(others) + 1


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"rule": "adam"}, "there is no rule 'adam'"),
        ({"rate": 0.0}, "rate is 0.0"),
        ({"rate": math.nan}, "rate is nan"),
        ({"settings": {"beta": 1}}, "has no setting 'beta'"),
        ({"settings": {"momentum": "much"}}, "momentum of ours is 'much'"),
        ({"settings": {"weight_trits": 6}}, "weight_trits of ours is 6; choose 1 to 5"),
        ({"steps": 0}, "steps is 0"),
        ({"decay": 2.0}, "share of the steps"),
        ({"dtype": "float16"}, "choose one of float32, bfloat16"),
        ({"stride": 17}, "at most ctx, 16"),
        ({"shape": {"layers": 3}}, "there is no setting 'layers' of a model"),
        ({"width": 33, "shape": {"heads": 2}}, "does not divide into 2 heads"),
        ({"split": "1/2"}, "adds up to 3"),
    ],
)
def test_a_cell_that_cannot_work_is_refused(changes: dict, told: str, small_text: Path):
    with pytest.raises(UserError, match=told):
        tiny(small_text, **changes)


# sweeps


def test_rows_are_appended_and_not_made_twice(small_text: Path, tmp_path: Path, monkeypatch):
    ran: list[Cell] = []

    def count(cell, *arguments, **options):
        ran.append(cell)
        return run_cell(cell, *arguments, **options)

    monkeypatch.setattr(sweep, "run_cell", count)
    one, two = tiny(small_text, steps=2), tiny(small_text, steps=2, seed=1)
    out = tmp_path / "new" / "rows.jsonl"
    assert [row["key"] for row in run_cells([one, one], out).rows] == [one.key]
    found = run_cells([two, one], out)
    assert ran == [one, two] and [row["seed"] for row in found.rows] == [1, 0]
    assert [row["seed"] for row in read_json_lines(out)] == [0, 1] and not found.failures
    with pytest.raises(UserError, match="already holds rows; add --resume"):
        run_cells([one], out, resume=False)


def test_a_failing_cell_does_not_stop_the_others(small_text: Path, tmp_path: Path, monkeypatch):
    def fail(cell, *arguments, **options):
        if cell.seed == 0:
            raise RuntimeError("out of\nluck")
        return run_cell(cell, *arguments, **options)

    monkeypatch.setattr(sweep, "run_cell", fail)
    bad, good = tiny(small_text, steps=2), tiny(small_text, steps=2, seed=1)
    found = run_cells([bad, good], tmp_path / "rows.jsonl")
    assert found.failures == [(bad, "RuntimeError: out of luck")] and [row["seed"] for row in found.rows] == [1]
    monkeypatch.undo()
    assert len(run_cells([bad, good], tmp_path / "rows.jsonl").rows) == 2


class KillOnce(sweep.QuietSweep):
    """Kills one of the worker processes as soon as one of them has done some steps."""

    def __init__(self) -> None:
        self.killed = False

    def at(self, place: int, cell: Cell, done: int) -> None:
        if not self.killed:
            multiprocessing.active_children()[0].kill()
            self.killed = True


def test_two_processes_give_the_same_rows_and_one_that_dies_costs_its_cell(small_text: Path, tmp_path: Path):
    cells = [tiny(small_text, steps=40, seed=seed) for seed in range(3)]
    found = run_cells(cells, tmp_path / "rows.jsonl", ["cpu"], workers=2, display=KillOnce())
    ((lost, reason),) = found.failures
    assert "its process ended with code -9" in reason
    assert {row["key"] for row in found.rows} == {cell.key for cell in cells} - {lost.key}
    assert [row["val_bpb"] for row in found.rows] == [run(cell)["val_bpb"] for cell in cells if cell != lost]
    assert not multiprocessing.active_children()


def test_a_text_that_cannot_be_used_is_refused_before_anything_runs(small_text: Path, tmp_path: Path):
    cells = [tiny(small_text), tiny(tmp_path / "none")]
    with pytest.raises(UserError, match="no such file or folder"):
        run_cells(cells, tmp_path / "rows.jsonl")
    assert not (tmp_path / "rows.jsonl").exists()
    for changes, told in (({"ctx": 3000}, "data too short"), ({"split": "all"}, "there is no part 'train'")):
        with pytest.raises(UserError, match=told):
            run_cells([tiny(small_text, **changes)], tmp_path / "rows.jsonl")


def test_devices_are_read(monkeypatch):
    assert devices_called("cpu") == ["cpu"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert devices_called("auto") == ["cpu"]
    with pytest.raises(UserError, match="torch sees no GPU; use --device cpu"):
        devices_called("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert devices_called("auto") == devices_called("cuda") == ["cuda:0", "cuda:1"]
    assert devices_called("cuda:1, cuda:0") == ["cuda:1", "cuda:0"]
    with pytest.raises(UserError, match="cuda:2 was asked for but torch sees 2 GPUs"):
        devices_called("cuda:2")
    with pytest.raises(UserError, match="device is 'tpu'"):
        devices_called("tpu")


# tuning and the grid


def test_tuning_and_more_seeds(small_text: Path):
    base = tiny(small_text)
    cells = tune(base, [("ours", {}), ("ours", {"momentum": 0.5}), ("adamw", {}), ("sign-counter-3", {})], [0.1, 0.2])
    assert [(cell.rule, cell.rate) for cell in cells] == [
        *[("ours", 0.1), ("ours", 0.2)] * 2,
        ("adamw", 0.1),
        ("adamw", 0.2),
        ("sign-counter-3", 1.0),
    ]
    assert [cell.rate for cell in tune(base, [("adamw", {})])] == list(RULES["adamw"].grid)
    given = {"momentum": 0.5, "rates": [0.3, 0.4], "decay": 1.0, "warmup": 7}
    own = tune(base, [("ours", given), ("ours", {}), ("sign-counter-3", {"rates": [0.3], "decay": 0.0})], [0.1])
    assert [(cell.settings, cell.rate, cell.decay, cell.warmup) for cell in own] == [
        ({"momentum": 0.5}, 0.3, 1.0, 7),
        ({"momentum": 0.5}, 0.4, 1.0, 7),
        ({}, 0.1, base.decay, base.warmup),
        ({}, 1.0, 0.0, base.warmup),
    ]
    assert len(given) == 4  # and is left as it was
    scores = [2.0, 1.9, 1.7, 1.8, None, None, 3.0]
    rows = [{"key": cell.key, "val_bpb": bpb} for cell, bpb in zip(cells, scores, strict=True)]
    more = further_seeds(cells, rows, 3)
    assert [(cell.rule, cell.settings, cell.rate, cell.seed) for cell in more] == [
        (rule, settings, rate, seed)
        for rule, settings, rate in (("ours", {}, 0.2), ("ours", {"momentum": 0.5}, 0.1), ("sign-counter-3", {}, 1.0))
        for seed in (1, 2)
    ]
    assert further_seeds(cells, rows, 1) == []


def test_the_grid_has_the_published_size():
    for rule in ("ours", "adamw"):
        model, _ = rule_called(rule).build(GRID.model_config(), {"rate": 1e-3}, 0, torch.float32, 1)
        weight = "register" if rule == "ours" else "weight"
        assert sum(p.numel() for name, p in model.named_parameters() if name.endswith(weight)) == WEIGHTS
        assert isinstance(model, ByteLM)
    assert (GRID.batch, GRID.ctx, GRID.steps, GRID.warmup) == (64, 66, 2500, 250)


def test_the_grid_is_untuned_and_tuned():
    cells = grid_cells(GRID, {"momentum": 0.9})
    assert len({cell.key for cell in cells}) == len(cells)
    for rule, rate in UNTUNED.items():
        assert {rate, *RULES[rule].grid} == {cell.rate for cell in cells if cell.rule == rule}
    assert {json.dumps(cell.settings) for cell in cells if cell.rule == "ours"} == {'{"momentum": 0.9}'}
    assert {cell.bench for cell in cells} == {"optimizer-grid"}
    rows = [cell.settled() for cell in cells]
    assert {(row["rule"], row["rate"]) for row in untuned_rows(rows)} == set(UNTUNED.items())


def test_the_ladder_is_written_once(text: Path, tmp_path: Path):
    cell = replace(GRID, data=str(text), ctx=16, stride=8)
    for _ in range(2):
        add_ladder(tmp_path / "rows.jsonl", cell)
    (row,) = read_json_lines(tmp_path / "rows.jsonl")
    assert (row["bench"], row["data"], row["split"]) == ("ladder", "text.txt", "90/10")
    names = {rung["name"]: rung["nats"] for rung in row["rows"]}
    assert names["uniform-288"] == math.log(288) and names["5-gram"] < names["unigram"] < 4


# the command line

SIZE = ("--steps", 3, "--batch", 2, "--ctx", 8, "--width", 32, "--depth", 1, "--device", "cpu")


def test_bench_rules(small_text: Path, tmp_path: Path, cli):
    pytest.importorskip("matplotlib")
    flags = ("--rules", "ours,ours:steps=1,adamw", "--rates", "0.01,0.02", "--data", small_text, *SIZE)
    done = cli("bench", "rules", *flags, "--set", "momentum=0.5", "--seeds", 2, "--out", tmp_path / "b", "--json")
    assert done.code == 0 and len(done.out.splitlines()) == 1
    rows = read_json_lines(tmp_path / "b" / "rows.jsonl")
    runs = [row for row in rows if row["bench"] == "rules"]
    assert len(runs) == 3 * 2 + 3 and [row["bench"] for row in rows if row not in runs] == ["ladder"]
    assert {json.dumps(row["settings"]) for row in runs if row["rule"] == "ours"} == {
        '{"momentum": 0.5}',
        '{"momentum": 0.5, "steps": 1}',
    }
    assert {(row["steps"], row["width"], row["dtype"]) for row in runs} == {(3, 32, "float32")}
    assert len(done.json["rules"]) == 3 and {entry["n"] for entry in done.json["rules"]} == {2}
    assert all(entry["edge"] in ("lowest", "highest") for entry in done.json["rules"])
    table = Path(done.json["table"]).read_text()
    assert "| rule |" in table and "**ours · steps 1**" in table
    assert done.json["plots"] and all(Path(path).is_file() for path in done.json["plots"])
    again = cli("bench", "rules", *flags, "--set", "momentum=0.5", "--seeds", 2, "--out", tmp_path / "b", "--resume")
    assert again.code == 0 and "ours" in again.out and read_json_lines(tmp_path / "b" / "rows.jsonl") == rows
    refused = cli("bench", "rules", *flags, "--out", tmp_path / "b")
    assert refused.code == 2 and "already holds rows; add --resume" in refused.err


def test_bench_optimizer_grid(small_text: Path, tmp_path: Path, cli):
    flags = ("--rates", "0.001", "--data", small_text, *SIZE, "--out", tmp_path)
    done = cli("bench", "optimizer-grid", *flags)
    assert done.code == 0 and "[10/10]" in done.out and "at untuned rates" in done.out
    rows = read_json_lines(tmp_path / "rows.jsonl")
    runs = [row for row in rows if row["bench"] == "optimizer-grid"]
    # Lion's untuned rate differs from the one to tune over, for the others they are one run.
    assert sorted(row["rule"] for row in runs) == sorted([*UNTUNED, "lion", "lion-bf16", "ours", "muon"])
    assert {row["shape"]["vocab"] for row in runs} == {288} and {row["warmup"] for row in runs} == {0}
    assert rows[-1]["bench"] == "ladder" and rows[-1]["rows"][0]["name"] == "uniform-288"
    assert "untuned" in (tmp_path / "table.md").read_text()


def test_what_failed_is_said_and_the_rest_is_kept(small_text: Path, tmp_path: Path, cli, monkeypatch):
    def fail(cell, *arguments, **options):
        if cell.rule == "lion":
            raise RuntimeError("a bug")
        return run_cell(cell, *arguments, **options)

    monkeypatch.setattr(sweep, "run_cell", fail)
    flags = ("--rules", "lion,adamw", "--rates", "0.01", "--data", small_text, *SIZE, "--out", tmp_path)
    done = cli("bench", "rules", *flags, "--json")
    assert done.code == 2 and len(done.out.splitlines()) == 1
    assert "1 of 2 runs failed, the first of them lion at rate 0.01: RuntimeError: a bug;" in done.json["error"]
    assert read_json_lines(tmp_path / "rows.jsonl")[0]["rule"] == "adamw"


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--rules", "adamm"), "there is no rule 'adamm'; did you mean adamw?"),
        (("--rates", "high"), "rates high are no numbers; write for example 0.01,0.02"),
        (("--rates", "0"), "rate is 0.0"),
        (("--set", "momentun=1"), "the rule ours has no setting 'momentun'; did you mean momentum?"),
        (("--set", "momentum"), "is not KEY=VALUE"),
        (("--data", "/no/such/text"), "no such file or folder"),
        (("--split", "half"), "unknown split rule"),
        (("--steps", 0), "steps is 0"),
        (("--width", 100), "does not divide"),
        (("--full",), "name enwik8 with --data"),
        (("--device", "abacus"), "device is 'abacus'"),
        (("--rules", "ours:momentum=2"), "momentum is 2.0"),
    ],
)
def test_bad_input_is_one_line(flags: tuple, told: str, tmp_path: Path, cli):
    done = cli("bench", "rules", "--rules", "ours", "--rates", "0.1", "--device", "cpu", "--steps", 1, "--width", 32,
               "--depth", 1, "--out", tmp_path / "b", *flags)  # fmt: skip
    assert done.code == 2 and told in done.err and len(done.err.splitlines()) == 1, done.err


COMMANDS = {
    "rules": "--rules --rates --seeds --steps --batch --ctx --width --depth --data --split --full --set --out --resume "
    "--device --compile --json",
    "optimizer-grid": "--rates --seeds --steps --data --split --set --out --resume --device --json",
    "true-ternary": "--configs --steps --batch --ctx --update-backend --scale-update-interval --accum-threshold "
    "--print-every --reuse-base --rates --measure-3b --seed --device --out --json",
}


def test_bench_without_a_command_shows_help(cli):
    told = cli("bench")
    assert told.code == 0 and all(name in told.out for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_every_option(command: str, cli):
    told = cli("bench", command, "--help")
    assert told.code == 0 and told.out.startswith(f"Usage: tritwise bench {command}") and not told.err
    assert all(option in told.out for option in COMMANDS[command].split())
    for option in typer.main.get_command(bench.app).commands[command].params:  # type: ignore[attr-defined]
        assert getattr(option, "help", None), f"{command} {option.name} has no help"


def test_bench_true_ternary_passes_its_options_on(tmp_path: Path, cli, monkeypatch):
    given: dict = {}
    monkeypatch.setattr("tritwise.bench.true_ternary.run", lambda **options: given.update(options) or {"rows": []})
    flags = ("--configs", "adam-fp32, signsgd", "--steps", 7, "--batch", 2, "--ctx", 9, "--update-backend", "reference")
    more = ("--scale-update-interval", 3, "--accum-threshold", 5, "--print-every", 1, "--out", tmp_path / "a.json")
    more += ("--rates", "adam-fp32:2e-3/0.001, signsgd:1e-4", "--measure-3b", "--seed", 4, "--device", "cpu")
    done = cli("bench", "true-ternary", *flags, *more, "--reuse-base", tmp_path / "b.json", "--json")
    assert done.code == 0 and done.json == {"rows": []}
    given.pop("console")
    assert given == {
        "configs": ["adam-fp32", "signsgd"],
        "steps": 7,
        "batch": 2,
        "ctx": 9,
        "update_backend": "reference",
        "scale_update_interval": 3,
        "accum_threshold": 5,
        "print_every": 1,
        "reuse_base": tmp_path / "b.json",
        "out": tmp_path / "a.json",
        "rates": {"adam-fp32": [0.001, 0.002], "signsgd": [1e-4]},
        "measure_3b": True,
        "seed": 4,
        "device": "cpu",
    }


@pytest.mark.parametrize(
    ("rates", "told"),
    [
        ("0.1", "0.1 in --rates is not NAME:rate/rate; write for example adam-fp32:0.001/0.002"),
        ("signsgd:high", "rates high are no numbers; write for example 0.01/0.02"),
        ("signsdg:0.1", "there is no configuration 'signsdg'; did you mean signsgd?"),
        ("signsgd:0", "the rates of signsgd are [0.0]; give finite numbers above 0"),
    ],
)
def test_bad_rates_of_true_ternary_are_one_line(rates: str, told: str, cli):
    done = cli("bench", "true-ternary", "--rates", rates, "--device", "cpu")
    assert done.code == 2 and told in done.err and len(done.err.splitlines()) == 1, done.err
