"""The house: README tells the truth, its generated numbers are current, the layers hold, nothing can hide a pickle."""

import ast
import dataclasses
import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import typer

from tritwise import __version__
from tritwise.cli.app import app
from tritwise.errors import UserError
from tritwise.files import write_json
from tritwise.models import ModelConfig, PartsConfig
from tritwise.ops.direction import METHODS
from tritwise.recipes import RECIPES, recipe
from tritwise.train import TrainConfig, override, train
from tritwise.train.config import OPTIMIZERS
from tritwise.train.media_config import KINDS, MediaConfig

pytest.importorskip("matplotlib")

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "src").rglob("*.py"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def script(path: str) -> ModuleType:
    """A script of the repository as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


readme, coverage_rooms = script("scripts/readme.py"), script("scripts/coverage_rooms.py")
collect_demo = script("benchmarks/collect_demo.py")


def fenced(text: str, language: str) -> list[str]:
    """The code blocks of a Markdown text in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    """A folder in which `make demo` could have been run: runs/demo is a finished run of a very small model."""
    folder = tmp_path_factory.mktemp("clone")
    text = (ROOT / "src/tritwise/data/tinyshakespeare.txt").read_bytes()[:60_000]
    (folder / "text.txt").write_bytes(text)
    small = {"data": str(folder / "text.txt"), "depth": 1, "ctx": 64, "steps": 12, "eval_interval": 6}
    train(override(recipe("tiny"), small), folder / "runs" / "demo")
    return folder


# README


def test_the_generated_blocks_are_current():
    assert readme.stale(ROOT) == []


def test_python_blocks_run(demo, monkeypatch, capsys):
    use, build = fenced(README, "python")
    monkeypatch.chdir(demo)
    exec(compile(use, "README.md", "exec"), {})
    *sample, bpb = capsys.readouterr().out.splitlines()
    assert sample and 1 < float(bpb) < 8
    names: dict[str, Any] = {}
    exec(compile(build, "README.md", "exec"), names)
    assert names["losses"][-1] < 0.2 * names["losses"][0]
    assert names["model"][0].register.dtype is torch.int8


def cli_options() -> dict[str, set[str]]:
    """Command, such as "train" or "bench rules" -> its options, less --json, which README names once for all."""

    def options(command: Any, name: str) -> dict[str, set[str]]:
        if hasattr(command, "commands"):
            parts = (options(part, f"{name} {own}".strip()) for own, part in command.commands.items())
            return {full: found for part in parts for full, found in part.items()}
        return {name: {o for p in command.params for o in (*p.opts, *p.secondary_opts) if o.startswith("--")}}

    return {name: found - {"--json"} for name, found in options(typer.main.get_command(app), "").items()}


def test_the_table_of_commands_is_complete():
    rows = re.findall(r"^\| `([a-z][a-z -]*?)(?: [A-Z|\\]+)?` \|.*\| (?:`(.*)`)? ?\|$", README, flags=re.MULTILINE)
    assert {name: set(flags.split()) for name, flags in rows} == cli_options()


def test_every_command_shown_exists():
    shown = "\n".join(fenced(README, "sh") + fenced(CONTRIBUTING, "sh"))
    calls = re.findall(r"^(?:\.venv/bin/)?tritwise (bench [\w-]+|\w+)([^#\n]*)", shown, flags=re.MULTILINE)
    assert len(calls) >= 3
    for name, rest in calls:
        assert set(re.findall(r"--[a-z-]+", rest)) <= cli_options()[name] | {"--json"}


def test_every_make_target_shown_exists():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^(\w+):", makefile, flags=re.MULTILINE))
    assert set(re.findall(r'"make (\w+) ', makefile)) == targets - {"help"}
    shown = set(re.findall(r"\bmake ([a-z]+)\b(?= PIP|[`\n]|  )", README + CONTRIBUTING))
    assert {"setup", "demo", "test", "lint", "readme"} <= shown <= targets


def test_ci_runs_what_is_documented():
    runner = ROOT / ".ci" / "run"
    assert os.access(runner, os.X_OK)
    assert re.findall(r"^for target in (.*); do$", runner.read_text(), flags=re.MULTILINE) == ["setup lint test"]


def test_the_tree_is_the_tree():
    (tree,) = fenced(README, "text")
    packages = set(re.findall(r"^  (\w+)/ +\S", tree, flags=re.MULTILINE))
    assert packages == {path.parent.name for path in (ROOT / "src/tritwise").glob("*/__init__.py")}
    ignored = {line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines() if line.endswith("/")}
    folders = {p.name for p in ROOT.iterdir() if p.is_dir() and not p.name.startswith(".")} - ignored
    assert set(re.findall(r"^(\w+)/", tree, flags=re.MULTILINE)) == folders


def test_links_lead_somewhere():
    for name in (
        "README.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        "docs/LOG.md",
        "docs/RULE.md",
        "docs/SCORING.md",
        "docs/ARB.md",
        "docs/RECURRENCE.md",
        "records/README.md",
    ):
        page = ROOT / name
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert "://" in target or (page.parent / target).exists(), f"{name} links to {target}"


def test_tests_named_in_contributing_exist():
    named = re.findall(r"`tests/(test_\w+\.py)(?:::(\w+))?`", CONTRIBUTING)
    assert len(named) >= 6
    for file, function in named:
        source = (ROOT / "tests" / file).read_text(encoding="utf-8")
        assert f"def {function}" in source, f"{file} has no {function}"


def test_the_changelog_begins_with_this_version():
    versions = re.findall(r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert versions[0] == __version__


# The package


def test_layers():
    command = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([command, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT / "src").as_posix())
def test_docstrings(path):
    """A module, and what it offers, says what it is."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    offered = [n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and not n.name.startswith("_")]
    assert ast.get_docstring(tree), "the module has no docstring"
    assert [node.name for node in offered if not ast.get_docstring(node)] == []


def offered(room: str) -> list[str]:
    return importlib.import_module(f"tritwise.{room}").__all__


@pytest.mark.parametrize("room", ["ops", "nn", "models", "optim"])
def test_everything_a_room_offers_is_tested_by_name(room):
    tests = "\n".join(p.read_text(encoding="utf-8") for p in ROOT.glob("tests/test_*.py") if p != Path(__file__))
    assert [name for name in offered(room) if not re.search(rf"\b{name}\b", tests)] == []


@pytest.mark.parametrize(
    ("part", "choices"),
    [(ModelConfig, ()), (TrainConfig, (*METHODS, *OPTIMIZERS)), (PartsConfig, ()), (MediaConfig, KINDS)],
)
def test_every_setting_is_explained(part, choices):
    assert part.__doc__ is not None
    explained = set(re.findall(r"\w+", part.__doc__))
    assert {*(field.name for field in dataclasses.fields(part)), *choices} - explained == set()


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_called_like_its_function_and_says_what_it_is_for(name):
    function = RECIPES[name]
    assert name == function.__name__ == function().recipe
    assert function.__doc__


RUNS_CODE = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def unsafe(source: str) -> list[str]:
    """Whatever in `source` could load or write a file that runs code when it is read."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in RUNS_CODE]
        elif isinstance(node, ast.ImportFrom):
            package = node.module or ""
            found += [package] if package.split(".")[0] in RUNS_CODE else []
            found += [f"torch.{a.name}" for a in node.names if package == "torch" and a.name in ("load", "save")]
        elif isinstance(node, ast.Attribute) and node.attr in ("load", "save"):
            found += [f"torch.{node.attr}"] if isinstance(node.value, ast.Name) and node.value.id == "torch" else []
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            found.append("allow_pickle")
    return found


def test_nothing_pickles():
    assert {path.name: found for path in SOURCES if (found := unsafe(path.read_text(encoding="utf-8")))} == {}


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import pickle", ["pickle"]),
        ("from pickle import loads", ["pickle"]),
        ("import torch\ntorch.save(x, y)", ["torch.save"]),
        ("def f():\n    return torch.load(x)", ["torch.load"]),
        ("from torch import load", ["torch.load"]),
        ("np.load(x, allow_pickle=True)", ["allow_pickle"]),
        ("import pickletools_of_mine\nstore.load()\njson.load(x)", []),
    ],
)
def test_the_search_for_pickles_finds_them(source, found):
    assert unsafe(source) == found


# The scripts


def test_a_run_becomes_a_result_file(demo, tmp_path):
    out = tmp_path / "demo_cpu2_2026-01-31.json"
    assert collect_demo.main([str(demo / "runs" / "demo"), str(out)]) == 0
    record = json.loads(out.read_text())
    result = json.loads((demo / "runs/demo/result.json").read_text())
    assert record["result"]["val"] == result["val"]
    assert record["result"]["artifact"]["path"] == "model.tritwise"
    assert record["audit"]["float_trainable"] == 0 and "tensors" not in record["audit"]
    assert [len(record["curves"][kind]["nats"]) for kind in ("train", "eval")] == [2, 2]
    assert record["curves"]["eval"]["bytes"] == [6 * 16 * 64, 12 * 16 * 64]


def test_an_unfinished_run_is_no_result(tmp_path, capsys):
    with pytest.raises(UserError, match="no finished run"):
        collect_demo.collect(tmp_path)
    assert collect_demo.main([str(tmp_path), str(tmp_path / "out.json")]) == 2
    assert not (tmp_path / "out.json").exists() and capsys.readouterr().err.startswith("error: ")
    assert collect_demo.main([]) == 2


def write_readme(root: Path) -> None:
    text = readme.fill((root / "README.md").read_text(encoding="utf-8"), readme.blocks(root))
    (root / "README.md").write_text(text, encoding="utf-8")


@pytest.fixture(scope="module")
def filled(demo, tmp_path_factory) -> Path:
    """A folder with a README and results, drawn and filled."""
    root = tmp_path_factory.mktemp("house")
    results = root / readme.RESULTS
    results.mkdir(parents=True)
    (root / "docs").mkdir()
    (root / "README.md").write_text(README, encoding="utf-8")
    write_json(results / "demo_cpu2_2026-01-31.json", collect_demo.collect(demo / "runs" / "demo"))
    rows = [
        {"width": w, "batch": b, "tritwise_ms": 2.0 * w, "adamw_ms": 1.5 * w, "ratio": 1 + w / 512}
        for w in (64, 128, 256)
        for b in (8, 32)
    ]
    write_json(results / "step_cost_cpu2_2026-01-31.json", {"rows": rows})
    assert readme.draw(root) == [readme.LOSS, readme.COST]
    write_readme(root)
    return root


@pytest.fixture
def house(filled, tmp_path) -> Path:
    """A copy of it to spoil."""
    return shutil.copytree(filled, tmp_path / "house")


def test_blocks_are_filled_from_results(house, demo):
    text, result = (house / "README.md").read_text(), json.loads((demo / "runs/demo/result.json").read_text())
    assert readme.stale(house) == []
    assert f"re-read from its file** | {result['val']['nats']:.4f} | {result['artifact']['bpb_reread']:.4f} |" in text
    rungs = [float(nats) for nats in re.findall(r"^\| .* \| (\d\.\d{4}) \| \d\.\d{4} \|$", text, flags=re.MULTILINE)]
    ladder = json.loads((demo / "runs/demo/ladder.json").read_text())["rows"]
    assert len(rungs) == len(ladder) + 1 and rungs == sorted(rungs, reverse=True)
    assert "1.12× to 1.50× the time" in text
    for picture in (readme.LOSS, readme.COST):
        assert f"]({picture})" in text and (house / picture).read_bytes().startswith(b"\x89PNG")


def test_a_changed_result_makes_blocks_stale(house):
    path = house / readme.RESULTS / "demo_cpu2_2026-01-31.json"
    record = json.loads(path.read_text())
    record["result"]["val"]["nats"] += 0.0001
    write_json(path, record)
    assert readme.stale(house) == ["picture", "result"]


def test_a_changed_picture_makes_its_block_stale(house):
    (house / readme.LOSS).write_bytes(b"another")
    assert readme.stale(house) == ["picture"]
    (house / readme.COST).unlink()
    assert readme.stale(house) == ["picture", "cost"]


def test_a_number_changed_by_hand_is_stale(house):
    text = (house / "README.md").read_text()
    (house / "README.md").write_text(text.replace("1.12× to", "0.12× to"))
    assert readme.stale(house) == ["cost"]


def test_the_newest_result_counts(house):
    results = house / readme.RESULTS
    write_json(results / "step_cost_cpu2_2025-12-31.json", {"rows": []})
    write_json(results / "step_cost_cpu2_draft.json", {"rows": []})
    assert readme.stale(house) == []
    new = results / "step_cost_cpu2_2026-02-01.json"
    write_json(new, json.loads((results / "step_cost_cpu2_2026-01-31.json").read_text()))
    assert readme.newest(house, "step_cost_cpu2") == new
    assert readme.stale(house) == ["cost"]
    write_readme(house)
    assert readme.stale(house) == []


def test_blocks_must_be_there_and_end():
    made = {"one": "new"}
    assert readme.fill("<!-- generated:one -->\nold\n<!-- end:one -->", made) == (
        "<!-- generated:one -->\nnew\n<!-- end:one -->"
    )
    for text in ("", "<!-- generated:one -->\nold", "<!-- generated:one -->\n<!-- generated:two -->\n<!-- end:one -->"):
        with pytest.raises(ValueError, match="README"):
            readme.fill(text, made)


def report_of(**percents: int) -> dict[str, Any]:
    """A coverage report with one file of 100 statements for each room."""
    return {
        "files": {
            f"src/tritwise/{room}/one.py": {
                "summary": {"covered_lines": covered, "num_statements": 100},
                "missing_lines": list(range(covered, 100)),
            }
            for room, covered in percents.items()
        }
    }


@pytest.mark.parametrize(
    ("percents", "code"),
    [
        ({"registers": 95, "ops": 95, "optim": 95}, 0),
        ({"registers": 100, "ops": 94, "optim": 100}, 1),  # a mean would hide it
        ({"registers": 100, "ops": 100}, 1),  # a room that was not measured
        ({"registers": 100, "ops": 100, "train": 100}, 1),
    ],
)
def test_each_room_must_be_covered(percents, code, tmp_path, capsys):
    write_json(tmp_path / "coverage.json", report_of(**percents))
    assert coverage_rooms.main(str(tmp_path / "coverage.json")) == code
    assert ("below 95 %" in capsys.readouterr().out) == bool(code)


@pytest.mark.parametrize("installed", [True, False])
@pytest.mark.parametrize(("library", "file"), [("triton", "triton_kernels.py"), ("tilelang", "tilelang_kernels.py")])
def test_kernels_count_only_where_their_library_is_installed(library, file, installed, tmp_path, capsys, monkeypatch):
    report = report_of(registers=100, ops=96, optim=100)
    kernels = {"summary": {"covered_lines": 0, "num_statements": 100}, "missing_lines": [1], "excluded_lines": [7, 8]}
    report["files"][f"src/tritwise/ops/{file}"] = kernels
    write_json(tmp_path / "coverage.json", report)
    monkeypatch.setattr(
        coverage_rooms.importlib.util, "find_spec", lambda name: object() if installed or name != library else None
    )
    assert coverage_rooms.main(str(tmp_path / "coverage.json")) == int(installed)
    told = capsys.readouterr().out
    assert ("ops: 48.0 %" in told, "ops: 96.0 %" in told) == (installed, not installed)
    assert (f"{library} is not installed" in told) == (not installed)
    assert f"left out: {2 if installed else 0}" in told
