"""The report: a page and plots from whole, unfinished, hand-made and hostile run folders."""

import base64
import json
import math
import re
import subprocess
import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from tritwise.errors import UserError
from tritwise.report import write_report
from tritwise.report.figures import spread
from tritwise.report.numbers import duration, human_bytes, number, percent, significant
from tritwise.report.plots import (
    histogram_figure,
    layers_figure,
    loss_figure,
    memory_figure,
    pace_figure,
    png_bytes,
    save_png,
    step_cost_figure,
)
from tritwise.report.reader import read_run, series

pytest.importorskip("matplotlib")

LADDER = (("uniform", 5.545), ("unigram", 3.317), ("xz", 1.838), ("5-gram", 1.669))
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
KINDS = ("attention.query", "attention.key", "attention.value", "attention.out", "mlp.up", "mlp.down")


def fake_run(folder: Path, depth: int = 4, steps: int = 600) -> Path:
    """A finished run as `train` leaves it, less the checkpoints: `depth` blocks of six layers, embedding and head."""
    rng = np.random.default_rng(7)
    names = ["embedding", *(f"blocks.{block}.{kind}" for block in range(depth) for kind in KINDS), "head"]
    batch = 16 * 256
    lines: list[dict] = []
    for step in range(1, steps + 1):
        seen, seconds = step * batch, 0.22 * step
        rate = 0.02 * min(1, step / 30) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        clean = 1.56 + 3.9 * math.exp(-step / 14) + 1.05 * math.exp(-step / 130)
        loss = clean + rng.normal(0, 0.045)
        flip_rate = 0.6 * rate
        lines.append(
            {
                "kind": "train",
                "step": step,
                "bytes": seen,
                "seconds": seconds,
                "loss": loss,
                "bpb": loss / math.log(2),
                "rate": rate,
                "bytes_per_second": 18600 + rng.normal(0, 700),
                "flips": flip_rate * 800_000,
                "flip_rate": flip_rate,
                "zero_fraction": 0.4,
                "skipped": int(step > 210) + int(step > 390),
            }
        )
        if step % 50 == 0:
            lines.append(
                {
                    "kind": "eval",
                    "step": step,
                    "bytes": seen,
                    "seconds": seconds,
                    "split": "val",
                    "loss": clean + 0.035,
                    "bpb": (clean + 0.035) / math.log(2),
                    "scored": 111540,
                }
            )
            lines.append(
                {
                    "kind": "sample",
                    "step": step,
                    "prompt": "ROMEO:",
                    "text": f"ROMEO:\nWhat say'st thou? I have seen {step} steps\nAnd none of them were float.",
                }
            )
        if step % 20 == 0:
            layers = {}
            for index, name in enumerate(names):
                place = index / len(names)
                layers[name] = {
                    "flip_rate": flip_rate * (0.4 + 1.2 * place) * math.exp(rng.normal(0, 0.12)),
                    "zero_fraction": 0.34 + 0.12 * place + 0.05 * step / steps + rng.normal(0, 0.003),
                    "saturation": 0.01,
                }
            lines.append({"kind": "layers", "step": step, "bytes": seen, "layers": layers})
        if step == 400:
            lines.append({"kind": "event", "step": 400, "message": "resumed from step 400"})
    write_lines(folder, lines)
    weights = 802_816
    roles = {"matrix": 786_432, "embedding": 32_768, "head": 32_768, "momentum": 802_816, "scale": 3_600, "vector": 512}
    tensors = [
        {
            "name": name,
            "role": "matrix",
            "dtype": "int8",
            "shape": [128, 256],
            "bytes": 32768,
            "trainable": True,
            "state": False,
        }
        for name in names
    ]
    centres = np.arange(-121, 122)
    histogram = {}
    for index, name in enumerate(names):
        width = 34 + 2 * index
        shape = np.exp(-((centres / width) ** 2) / 2) + 0.35 * np.exp(-(((abs(centres) - 78) / 20) ** 2) / 2)
        shape[[0, -1]] += 0.5
        histogram[name] = rng.poisson(32768 * shape / shape.sum()).tolist()
    files = {
        "config.json": {
            "format": 1,
            "recipe": "shakespeare",
            "model": {"width": 128, "depth": depth, "context": 256},
            "train": {"steps": steps, "batch": 16, "rate": 0.02, "betas": [0.9, 0.99]},
            "data": {"path": "tinyshakespeare.txt"},
        },
        "manifest.json": {
            "tritwise": "0.1.0",
            "git_commit": "0123abc",
            "python": "3.11.9",
            "torch": "2.13.0",
            "platform": "Linux",
            "cpu": "x86-64",
            "threads": 2,
            "device": "cpu",
            "backends": {"linear": "reference"},
            "seed": 0,
            "started": "2025-01-01T12:00:00",
            "command": ["tritwise", "train", "--out", "my runs/first"],
        },
        "ladder.json": {
            "split": "val",
            "bytes": 111540,
            "rows": [{"name": name, "nats": nats, "bpb": nats / math.log(2)} for name, nats in LADDER],
        },
        "audit.json": {
            "tensors": tensors,
            "bytes_by_role": roles,
            "float_trainable": 0,
            "float_state_bytes": 0,
            "state_bytes_per_weight": 2.02,
            "weights": weights,
            "peak_bytes": 91_000_000,
        },
        "histogram.json": {"step": steps, "layers": histogram},
        "result.json": {
            "steps": steps,
            "seconds": 138.4,
            "bytes_seen": steps * batch,
            "val": {"nats": 1.602, "bpb": 1.602 / math.log(2), "bytes": 111540},
            "artifact": {"path": "model.tritwise", "bytes": 171_394, "bpb_reread": 1.602 / math.log(2)},
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return folder


def write_lines(folder: Path, lines: list[dict], tail: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in lines) + tail
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    return folder


class Balance(HTMLParser):
    """Collects the tags that are closed out of turn or never, the attributes, and the text."""

    VOID = frozenset({"meta", "img", "br", "link", "input", "hr", "source"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)
        if tag in ("dt", "dd", "td", "p"):
            self.text += "\n"  # a box of its own on the page

    def handle_endtag(self, tag: str) -> None:
        if self.open and self.open[-1] == tag:
            self.open.pop()
        else:
            self.wrong.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def checked_page(path: Path) -> Balance:
    """The page parsed, after the checks that every page must pass."""
    text = path.read_text(encoding="utf-8")
    page = Balance(text)
    assert page.open == [] and page.wrong == []
    assert not {"script", "link", "iframe", "object", "embed", "form"} & set(page.tags)
    for name, value in page.attributes:
        assert name not in ("href", "srcset", "action") and not name.startswith("on")
        if name == "src":
            assert value.startswith("data:image/png;base64,")
    assert not re.search(r"https?://|url\(|@import", text)
    return page


def image_size(png: bytes) -> tuple[int, int]:
    """Width and height of a PNG whose chunks all carry their right checksums and whose pixels are not all the same."""
    assert png.startswith(PNG_MAGIC)
    place, data = len(PNG_MAGIC), b""
    kinds = []
    while place < len(png):
        length = int.from_bytes(png[place : place + 4], "big")
        kind, body = png[place + 4 : place + 8], png[place + 8 : place + 8 + length]
        assert zlib.crc32(kind + body) == int.from_bytes(png[place + 8 + length : place + 12 + length], "big")
        kinds.append(kind)
        data += body if kind == b"IDAT" else b""
        place += 12 + length
    assert kinds[-1] == b"IEND"
    assert not {b"tIME", b"tEXt"} & set(kinds), "a date or a program version would change the bytes from day to day"
    assert len(set(zlib.decompress(data))) > 20
    return int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big")


@pytest.fixture
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small pictures, for tests that look at the text of the page: drawing is what takes the time."""
    monkeypatch.setattr("tritwise.report.figures.DPI", 30)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_run(tmp_path_factory.mktemp("runs") / "demo")


@pytest.fixture(scope="module")
def full_page(full: Path) -> Balance:
    return checked_page(write_report(full).page)


def test_a_whole_run_gives_a_page_and_six_plots_beside_it(full: Path, full_page: Balance) -> None:
    folder = full / "report"
    names = {"loss", "layers", "registers", "registers_by_layer", "memory", "pace"}
    assert {path.name for path in folder.iterdir()} == {"index.html", *(f"{name}.png" for name in names)}
    embedded = {base64.b64decode(value.split(",")[1]) for name, value in full_page.attributes if name == "src"}
    assert embedded == {(folder / f"{name}.png").read_bytes() for name in names}
    assert all(image_size(png)[0] > 1000 and image_size(png)[1] > 400 for png in embedded)


def test_the_headline_tells_the_artifact_read_back(full_page: Balance) -> None:
    for words in (
        "demo",
        "recipe shakespeare",
        "2.311",
        "1.602",
        "artifact, read back from disk",
        "171,394 B",
        "802,816",
        "2.02 B/weight",
        "2 min 18 s",
        "0 B of float training state",
        "beats the 5-gram by 0.067 nats per byte (4.0 %)",
    ):
        assert words in full_page.text, words
    floats = re.search(r"Trainable floats\s*(\d+)", full_page.text)
    assert floats and floats.group(1) == "0"


def test_the_page_orders_models_from_worst_to_best_and_samples_from_latest(full_page: Balance) -> None:
    text = full_page.text
    table = text[text.index("Beside the ladder") :]
    places = [table.index(name) for name in ("uniform", "unigram", "xz", "5-gram\n1.669", "this model")]
    assert places == sorted(places)
    steps = [int(step) for step in re.findall(r"I have seen (\d+) steps", text)]
    assert steps == list(range(600, 0, -50))
    assert "ROMEO:ROMEO:" not in text.replace("\n", "")  # the prompt is not repeated


def test_config_manifest_events_and_skipped_steps_are_on_the_page(full_page: Balance) -> None:
    for words in (
        "model.width",
        "backends.linear",
        "tritwise train --out 'my runs/first'",
        "resumed from step 400",
        "2 steps were skipped",
    ):
        assert words in full_page.text, words


def test_the_same_run_gives_the_same_bytes(full: Path, full_page: Balance, tmp_path: Path) -> None:
    again = write_report(full, tmp_path / "again")
    assert again.page == tmp_path / "again" / "index.html"
    for path in (again.page, *again.plots):
        assert path.read_bytes() == (full / "report" / path.name).read_bytes(), path.name


def test_a_run_with_one_line_of_metrics_says_what_is_missing(tmp_path: Path, coarse: None) -> None:
    run = write_lines(
        tmp_path / "young", [{"kind": "train", "step": 1, "bytes": 4096, "seconds": 0.2, "loss": 5.6, "rate": 0.01}]
    )
    report = write_report(run)
    page = checked_page(report.page)
    assert [path.name for path in report.plots] == ["loss.png", "pace.png"]
    for words in (
        "No result.json",
        "No ladder.json",
        "No histogram.json",
        "audit.json: the memory plot is left out",
        "No samples",
        "No config.json",
        "“layers”",
        "at step 1, not finished",
    ):
        assert words in page.text or words in str(page.attributes), words


def test_an_unfinished_run_is_scored_by_its_last_evaluation(tmp_path: Path, coarse: None) -> None:
    run = fake_run(tmp_path / "half", depth=1, steps=100)
    (run / "result.json").unlink()
    text = checked_page(write_report(run).page).text
    assert "evaluation at step 100" in text and "at step 100 of 100, not finished" in text
    assert "So far the model does not beat the 5-gram" in text


@pytest.mark.parametrize("name", ["missing", "empty", "file", "stranger", "broken"])
def test_what_is_no_run_folder_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    if name == "file":
        folder.write_text("not a folder")
    elif name != "missing":
        folder.mkdir()
    if name == "stranger":
        (folder / "notes.txt").write_text("hello")
    if name == "broken":
        (folder / "config.json").write_text('{"format": ')
    with pytest.raises(UserError, match="give the folder that `tritwise train --out` wrote") as error:
        write_report(folder)
    assert "\n" not in str(error.value)
    assert not (folder / "report").exists()


def test_generated_text_and_names_cannot_become_markup(tmp_path: Path, coarse: None) -> None:
    evil = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&amp;</pre></div>"
    run = fake_run(tmp_path / "r<b>&", depth=1, steps=60)
    rows = [
        {"kind": "sample", "step": 60, "prompt": f"{evil}P", "text": f"{evil}T\u0000\u001b\ud800\u202e"},
        {"kind": "event", "step": 60, "message": evil},
        {
            "kind": "layers",
            "step": 60,
            "bytes": 1,
            "layers": {evil: {"flip_rate": 0.1, "zero_fraction": 0.2}, "$\\frac{$": {"flip_rate": 1}},
        },
        {"kind": "train", "step": 61, "bytes": 2, "loss": 2.0, "seconds": 1.0},
    ]
    write_lines(run, rows)
    for name in ("config.json", "manifest.json", "audit.json", "ladder.json"):
        content = json.loads((run / name).read_text(encoding="utf-8"))
        content |= {"recipe": evil, evil: evil, "git_commit": evil}
        content["bytes_by_role"] = {evil: 5, "$x^$": 7}
        content["tensors"] = [{"name": evil, "role": evil, "dtype": evil, "shape": [evil], "bytes": 1}]
        content["rows"] = [{"name": evil, "nats": 2.0, "bpb": 3.0}]
        (run / name).write_text(json.dumps(content), encoding="utf-8")
    page = checked_page(write_report(run).page)
    assert page.text.count(evil) >= 8  # shown as text in every place, and checked_page found no script and no handler
    assert "␀␛" in page.text


def test_a_torn_last_line_and_broken_lines_are_left_out_and_told(tmp_path: Path, coarse: None) -> None:
    line = {"kind": "train", "step": 1, "bytes": 10, "loss": 3.0}
    run = write_lines(
        tmp_path / "torn", [line, line | {"step": 2, "bytes": 20}], tail='[1]\nnonsense\n{"kind":"train","step":3,"by'
    )
    content = read_run(run)
    assert series(content.train, "step", "bytes") == ([1.0, 2.0], [10.0, 20.0])
    assert content.notes == [
        "The last line of metrics.jsonl was cut short and is left out",
        "2 lines of metrics.jsonl left out: not a JSON object",
    ]
    assert "was cut short" in checked_page(write_report(run).page).text


def test_figures_that_are_not_finite_are_skipped(tmp_path: Path, coarse: None) -> None:
    bad = [float("nan"), float("inf"), None, "3", True, 10**400, 1e308, 1e-320, -1.0, 0.0]
    keys = ("loss", "rate", "bytes_per_second", "skipped", "bytes", "seconds", "step")
    lines = [
        {
            "kind": "train",
            "step": n,
            "bytes": 10 * n,
            "loss": value,
            "rate": value,
            "bytes_per_second": value,
            "skipped": value,
        }
        for n, value in enumerate(bad)
    ]
    lines += [{"kind": "train", "step": 50, "bytes": 500, "loss": 2.0} | {key: value} for key in keys for value in bad]
    lines += [
        {"kind": "eval", "step": 60 + n, "bytes": 600, "split": "val", "loss": value} for n, value in enumerate(bad)
    ]
    lines += [
        {
            "kind": "layers",
            "step": 70 + n,
            "bytes": 700,
            "layers": {"a": {"flip_rate": value, "zero_fraction": value}, "b": value},
        }
        for n, value in enumerate(bad)
    ]
    lines += [{"kind": "layers", "step": 90, "bytes": 700, "layers": value} for value in bad]
    lines += [{"kind": "sample", "step": value, "prompt": value, "text": value} for value in bad]
    lines += [{"kind": "event", "step": value, "message": value} for value in bad]
    run = write_lines(tmp_path / "odd", lines)
    (run / "ladder.json").write_text(
        '{"bytes": NaN, "rows": [{"name": "5-gram", "nats": NaN, "bpb": 1}, {"name": "xz"}, 3, null]}'
    )
    (run / "audit.json").write_text(
        '{"weights": NaN, "bytes_by_role": {"a": null, "b": -1}, "tensors": [{"bytes": NaN}, 1]}'
    )
    (run / "histogram.json").write_text('{"layers": {"a": [1, 2], "b": 7, "c": [' + "NaN," * 242 + "1]}}")
    (run / "result.json").write_text('{"seconds": "soon", "val": [], "artifact": {"bytes": "many", "bpb_reread": NaN}}')
    (run / "config.json").write_text('{"format": 9, "model": [], "train": 3}')
    (run / "manifest.json").write_text("[]")
    report = write_report(run)
    text = checked_page(report.page).text
    assert "loss.png" in [path.name for path in report.plots] and "memory.png" not in [
        path.name for path in report.plots
    ]
    for words in (
        "manifest.json is left out: it is not a JSON object",
        "config.json has format 9",
        "without 243 counts are left out",
        "rows of ladder.json without a name",
    ):
        assert words in text, words
    assert not re.search(r"\b(nan|inf)\b", text)


def test_scores_on_different_texts_are_not_passed_off_as_comparable(tmp_path: Path, coarse: None) -> None:
    run = write_lines(tmp_path / "run", [{"kind": "train", "step": 1, "bytes": 1, "loss": 3.0}])
    (run / "result.json").write_text('{"val": {"nats": 1.5, "bpb": 2.16404, "bytes": 5000}}')
    (run / "ladder.json").write_text('{"bytes": 7000, "rows": [{"name": "5-gram", "nats": 1.669, "bpb": 2.408}]}')
    text = checked_page(write_report(run).page).text
    assert "Not the same text: the model was scored on 5,000 bytes, the ladder on 7,000." in text
    assert "the artifact was not read back" in text


def test_a_resumed_run_counts_each_step_once(tmp_path: Path) -> None:
    lines = [
        {"kind": "train", "step": step, "bytes": step, "loss": loss}
        for step, loss in ((1, 5.0), (2, 4.0), (3, 9.0), (2, 4.5), (3, 3.0))
    ]
    assert series(read_run(write_lines(tmp_path / "again", lines)).train, "step", "loss") == (
        [1.0, 2.0, 3.0],
        [5.0, 4.5, 3.0],
    )


def test_a_report_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    run = write_lines(tmp_path / "run", [{"kind": "train", "step": 1, "bytes": 1, "loss": 3.0}])
    (run / "report").write_text("in the way")
    with pytest.raises(UserError, match="in the way"):
        write_report(run)


def test_report_imports_neither_torch_nor_matplotlib() -> None:
    code = "import sys, tritwise.report; print([name for name in ('torch', 'matplotlib') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_without_matplotlib_the_remedy_is_named(full: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"pip install 'tritwise\[report\]'"):
        write_report(full, tmp_path)


def test_figures_do_not_depend_on_the_matplotlib_of_the_caller() -> None:
    import matplotlib

    plain = png_bytes(memory_figure({"matrix": 1000.0, "momentum": 1000.0}, 1000))
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "text.usetex": True}):
        assert png_bytes(memory_figure({"matrix": 1000.0, "momentum": 1000.0}, 1000)) == plain
        assert matplotlib.rcParams["font.size"] == 30
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_save_png_replaces_the_file_whole(tmp_path: Path) -> None:
    rows = [
        {"width": width, "batch": batch, "tritwise_ms": 1.2 * width * batch, "adamw_ms": width * batch, "ratio": 1.2}
        for width in (64, 128)
        for batch in (4, 16)
    ]
    path = tmp_path / "cost.png"
    path.write_text("an older picture")
    assert save_png(step_cost_figure(rows), path) == path.read_bytes() == png_bytes(step_cost_figure(rows))
    image_size(path.read_bytes())
    assert [each.name for each in tmp_path.iterdir()] == ["cost.png"]


def test_the_cost_of_a_step_shows_times_ratio_and_limit() -> None:
    rows = [
        {"width": 128, "batch": 8, "tritwise_ms": 30, "adamw_ms": 25, "ratio": 1.2},
        {"width": 64, "batch": 8, "tritwise_ms": 9, "adamw_ms": 5, "ratio": 1.8},
    ]
    left, right = step_cost_figure(rows).axes
    assert [list(line.get_ydata()) for line in left.lines[:2]] == [[9, 30], [5, 25]]
    assert list(right.lines[0].get_xdata()) == [64, 128] and list(right.lines[0].get_ydata()) == [1.8, 1.2]
    assert [list(line.get_ydata()) for line in right.lines[1:]] == [[1.5, 1.5], [1.0, 1.0]]
    assert right.get_ylim()[1] > 1.8


def test_the_loss_axes_agree_and_the_ladder_is_drawn() -> None:
    left, right = loss_figure(([1, 2, 3], [5.0, 3.0, 2.0]), ([3], [2.1]), [("5-gram", 1.669)]).axes
    assert [limit * math.log(2) for limit in right.get_ylim()] == pytest.approx(left.get_ylim())
    assert any(list(line.get_ydata()) == [1.669, 1.669] for line in left.lines)
    assert "5-gram 1.669" in [text.get_text() for text in left.texts]


def test_many_layers_share_a_colour_per_block() -> None:
    lines = {f"blocks.{block}.{kind}": ([1.0, 2.0], [0.1, 0.2]) for block in range(8) for kind in KINDS} | {
        "head": ([1.0], [0.0])
    }
    legend = layers_figure(lines, {}).legends[0]
    assert [text.get_text() for text in legend.get_texts()] == [
        *(f"blocks.{block} · 6 layers" for block in range(8)),
        "head",
    ]
    assert len({line.get_color() for line in legend.get_lines()}) == 9


def test_the_histogram_splits_at_the_flips_of_the_leading_trit() -> None:
    counts = [0.0] * 243
    counts[121 - 41], counts[121 - 40], counts[121 + 40], counts[121 + 41] = 1, 2, 3, 4
    (axes,) = histogram_figure(counts).axes
    texts = [text.get_text().replace("\u00a0", " ") for text in axes.texts]
    assert [" ".join(text.split()) for text in texts[:3]] == ["−1 10.0 %", "0 50.0 %", "+1 40.0 %"]
    assert sorted(line.get_xdata()[0] for line in axes.lines) == [-40.5, 40.5]


def test_a_spike_is_cut_off_and_says_its_height() -> None:
    counts = [1.0] * 243
    counts[0] = 757.0 + 1.0
    (axes,) = histogram_figure(counts).axes
    assert axes.get_ylim()[1] < 0.01
    assert axes.texts[-1].get_text() == "75.8 %" and axes.texts[-1].xy[0] == -121


def test_the_memory_of_adamw_is_computed_from_the_weights() -> None:
    texts = [text.get_text() for text in memory_figure({"matrix": 1e6, "momentum": 1e6}, 1_000_000).axes[1].texts]
    assert [text.split("   ")[0] for text in texts] == ["2.00 MB", "12.0 MB", "16.0 MB"]


def test_a_run_of_one_point_or_none_can_be_drawn() -> None:
    for figure in (
        loss_figure(([], []), ([0.0], [2.0]), []),
        pace_figure(([], []), ([1.0], [0.0]), [1.0]),
        layers_figure({}, {}),
        histogram_figure([0.0] * 243),
        step_cost_figure([]),
    ):
        image_size(png_bytes(figure))


def test_spread_keeps_order_and_gap() -> None:
    placed = spread([0.98, 0.5, 0.97, 0.02], 0.05)
    assert placed == pytest.approx([1.0, 0.5, 0.95, 0.02])


def test_numbers_are_written_for_people() -> None:
    assert [human_bytes(size) for size in (0, 999, 1000, 999_600, 1_115_394)] == [
        "0 B",
        "999 B",
        "1.00 kB",
        "1.00 MB",
        "1.12 MB",
    ]
    assert [significant(value) for value in (0, 0.01234, 1.5, 1234.5)] == ["0", "0.0123", "1.50", "1,234"]
    assert [duration(value) for value in (4.21, 59.97, 138.4, 3900)] == [
        "4.2 s",
        "1 min 0 s",
        "2 min 18 s",
        "1 h 5 min",
    ]
    assert percent(0.0421) == "4.21 %"
    assert [number(value) for value in (3, 2.5, 1e-320, -1e18)] == [3.0, 2.5, 0.0, -1e18]
    assert [number(value) for value in (True, "3", None, float("nan"), float("-inf"), 10**400, 1e19)] == [None] * 7
