"""Shared by the tests of the upper rooms: a small text, a small config, a trained run, the command line."""

import contextlib
import gzip
import importlib
import io
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
if "-m" not in sys.argv or "not gpu" in " ".join(sys.argv):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # these compare runs with what is loaded on a CPU, bit for bit

import numpy as np
import pytest
import torch

from tritwise import ops
from tritwise.cli.app import main
from tritwise.data import open_bytes
from tritwise.ops import backends, gpu
from tritwise.recipes import recipe
from tritwise.train import Config, override, train
from tritwise.train.checkpoint import CheckpointStore
from tritwise.train.progress import Quiet

# Tiny tensors: a second thread costs more than it brings, and test runs side by side would fight for the cores.
torch.set_num_threads(1)

SMALL = {
    "width": 32,
    "depth": 1,
    "ctx": 16,
    "batch": 4,
    "steps": 12,
    "log_interval": 2,
    "eval_interval": 6,
    "save_interval": 4,
    "eval_bytes": 320,
    "sample_bytes": 8,
}

# The tests of the rooms whose lines are counted (scripts/coverage_rooms.py).
COUNTED = tuple(
    f"test_{name}"
    for name in (
        *("registers", "packing", "random", "rounding", "scales"),
        *("ops_", "triton", "backends", "native", "decoded", "tilelang", "compile", "memory"),
        *("optim", "muon"),
    )
)


def refusals(operation: str, device: str = "cpu") -> dict[str, str | None]:
    """Backend -> why it cannot run on this machine's CPU, or its GPU, or None."""
    if device == "cuda" and not torch.cuda.is_available():
        return dict.fromkeys(ops.backends_of(operation), "torch sees no GPU")
    where = torch.device(device)
    return {name: backends._backends[operation][name].refuses(where) for name in ops.backends_of(operation)}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that uses `each_backend` runs on every backend of its module's OPERATION that this machine can run, on its
    GPU if the test is marked `gpu`, else on its CPU; one that uses `left_out` is told which it cannot."""
    if "each_backend" in metafunc.fixturenames:
        device = "cuda" if metafunc.definition.get_closest_marker("gpu") else "cpu"
        names = [name for name, reason in refusals(metafunc.module.OPERATION, device).items() if not reason]
        metafunc.parametrize("each_backend", names, indirect=True, scope="module")
    if "left_out" in metafunc.fixturenames:
        found = [(operation, refusals(operation)) for operation in backends._backends]
        metafunc.parametrize("left_out", found, ids=[operation for operation, _ in found])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that run many others in Triton's interpreter come first: the last to start would keep one core waiting."""
    items.sort(key=lambda item: "in_the_interpreter" not in item.name)


def counting() -> Any:
    """The Coverage that counts the lines of this process, or None."""
    coverage = sys.modules.get("coverage")
    return coverage.Coverage.current() if coverage is not None else None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """Lines are counted in the tests of COUNTED alone, as that takes time. pytest-cov's own mark for it, no_cover, does
    nothing in processes of pytest-xdist."""
    if counting() is None or item.path.name.startswith(COUNTED):
        return (yield)
    trace = sys.gettrace()
    sys.settrace(None)
    try:
        return (yield)
    finally:
        sys.settrace(trace)


@pytest.fixture
def in_interpreter() -> Callable[..., str]:
    """Runs the tests `some`, an expression of -k, of these files in Triton's interpreter, which needs a process of its
    own, and gives what pytest printed. None may fail. The process's lines are counted if those of this one are."""

    def run(files: Sequence[Path], some: str) -> str:
        command = [sys.executable]
        if (coverage := counting()) is not None:
            place, source = Path(coverage.get_option("run:data_file")).resolve(), coverage.get_option("run:source")
            command += ["-m", "coverage", "run", "-p", f"--data-file={place}", f"--source={','.join(source)}"]
        command += ["-m", "pytest", "-m", "not gpu", "-k", some, "-p", "no:cacheprovider", "-rs", *map(str, files)]
        environment = os.environ | {gpu.INTERPRET: "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
        return done.stdout

    return run


@pytest.fixture(scope="session")
def benchmark_script() -> Callable[[str], ModuleType]:
    """Gives benchmarks/NAME.py, which imports its neighbours as a script does."""

    def load(name: str) -> ModuleType:
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(str(Path(__file__).resolve().parent.parent / "benchmarks"))
            return importlib.import_module(name)

    return load


@pytest.fixture(scope="module")
def each_backend(request: pytest.FixtureRequest) -> Iterator[None]:
    """Ask for one backend of the module's OPERATION."""
    with ops.backend(request.param):
        yield


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fresh memory is filled with NaN (floats) or the largest number (integers)."""
    monkeypatch.setattr("torch.utils.deterministic.fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60,000 bytes of the bundled text as a file of their own, so that a final score takes a moment."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(bytes(open_bytes("shakespeare")[:60_000]))
    return path


@pytest.fixture(scope="session")
def small_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3,000 bytes of the bundled text, for runs of which only the course matters."""
    path = tmp_path_factory.mktemp("small") / "small.txt"
    path.write_bytes(bytes(open_bytes("shakespeare")[:3_000]))
    return path


@pytest.fixture(scope="session")
def small_config(small_text: Path) -> Callable[..., Config]:
    """small_config(steps=8, …): a config whose run takes a fraction of a second."""

    def make(**changes: Any) -> Config:
        return override(recipe("tiny"), SMALL | {"data": str(small_text)} | changes)

    return make


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """The folder of a finished run of the recipe `tiny`, without its report. Read only: `copied` may be changed."""
    out = tmp_path_factory.mktemp("runs") / "trained"
    train(override(recipe("tiny"), {"data": str(text)}), out)
    return out


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    """A copy of `trained` to change or to damage."""
    return Path(shutil.copytree(trained, tmp_path / "copied"))


class StopAt(Quiet):
    """A display that sends this process a signal when the line of a step is logged, as a person would."""

    def __init__(self, step: int, number: int = signal.SIGINT, times: int = 1) -> None:
        self.step, self.number, self.times = step, number, times

    def record(self, record: dict[str, Any]) -> None:
        if record["kind"] == "train" and record["step"] == self.step:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)


@pytest.fixture
def stop_at() -> type[StopAt]:
    """stop_at(step): the display that interrupts a run in this step."""
    return StopAt


@dataclass
class Outcome:
    """What a command left: its exit code and what it printed."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The object on the last line of stdout."""
        return json.loads(self.out.splitlines()[-1])


@pytest.fixture
def cli(cli_once: Callable[..., Outcome]) -> Callable[..., Outcome]:
    """cli("score", run, "--json"): the command line in this process."""
    return cli_once


@pytest.fixture(scope="session")
def cli_once() -> Callable[..., Outcome]:
    """What `cli` is, for fixtures that live longer than a test."""

    def call(*arguments: object) -> Outcome:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main([str(argument) for argument in arguments])
        return Outcome(code, out.getvalue(), err.getvalue())

    return call


@pytest.fixture
def state_of() -> Callable[[Path], dict[str, torch.Tensor]]:
    """state_of(run): every tensor of the newest checkpoint, registers and optimizer state alike."""

    def read(run: Path) -> dict[str, torch.Tensor]:
        return CheckpointStore(run / "checkpoints").load().tensors

    return read


@pytest.fixture
def assert_same_state(state_of: Callable[[Path], dict[str, torch.Tensor]]) -> Callable[[Path, Path], None]:
    """assert_same_state(run, other): the newest checkpoints are equal to the last bit."""

    def check(run: Path, other: Path) -> None:
        one, two = state_of(run), state_of(other)
        assert one.keys() == two.keys()
        different = [name for name in one if not torch.equal(one[name], two[name])]
        assert not different
        assert any(name.startswith("optimizer.") for name in one)

    return check


# ARB runs: tiny encoders with random weights, and tiny collections, made here so that nothing has to lie beside the
# project.


@pytest.fixture(scope="session")
def tiny_vision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random DINOv2 of two layers: features of 16 numbers, patches of 14 pixels, images of 42."""
    hub = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("encoders") / "vision"
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 42, "patch_size": 14}
    hub.Dinov2Model(hub.Dinov2Config(**shape, mlp_ratio=2)).save_pretrained(folder)
    size = {"height": 42, "width": 42}
    processor = {"image_processor_type": "BitImageProcessor", "do_resize": True, "do_center_crop": True}
    told = {"size": {"shortest_edge": 42}, "crop_size": size, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor | told))
    return folder


@pytest.fixture(scope="session")
def tiny_audio(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random Whisper encoder of two layers: features of 16 numbers, windows of 96 frames."""
    hub = pytest.importorskip("transformers")
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    folder = tmp_path_factory.mktemp("encoders") / "audio"
    torch.manual_seed(0)
    shape = {"d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 32}
    config = hub.WhisperConfig(**shape, num_mel_bins=80, max_source_positions=96, architectures=["WhisperEncoder"])
    WhisperEncoder(config).save_pretrained(folder)
    hub.WhisperFeatureExtractor(chunk_length=2).save_pretrained(folder)
    return folder


COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "white": (240, 240, 240)}


@pytest.fixture(scope="session")
def image_pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 40 squares of four colours, each a PNG with its colour in a .txt beside it."""
    image = pytest.importorskip("PIL.Image")
    folder = tmp_path_factory.mktemp("images")
    for place in range(40):
        name, colour = list(COLOURS.items())[place % 4]
        shade = tuple(max(0, value - place // 4) for value in colour)
        image.new("RGB", (28, 28), shade).save(folder / f"{place:02d}.png")
        (folder / f"{place:02d}.txt").write_text(name)
    return folder


TONES = {"low": 220.0, "high": 1760.0}


@pytest.fixture(scope="session")
def sound_pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 20 tones, low or high, each a FLAC file, with a manifest."""
    library = pytest.importorskip("soundfile")
    folder = tmp_path_factory.mktemp("sounds")
    lines = []
    for place in range(20):
        name, pitch = list(TONES.items())[place % 2]
        time = np.arange(4000 + 400 * (place // 10)) / 8000
        library.write(folder / f"{place:02d}.flac", 0.3 * np.sin(2 * np.pi * (pitch + place) * time), 8000)
        split = "val" if place >= 16 else "train"
        lines.append(json.dumps({"file": f"{place:02d}.flac", "text": name, "split": split}) + "\n")
    (folder / "manifest.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(scope="session")
def drawn_idx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in MNIST's form with two classes of 8 × 8 pictures: bright left halves, bright upper halves."""
    folder = tmp_path_factory.mktemp("idx")
    noise = np.random.default_rng(0)
    for prefix, total in (("train", 64), ("t10k", 16)):
        pictures = noise.integers(0, 20, (total, 8, 8), dtype=np.uint8)
        pictures[0::2, :, :4] += 200
        pictures[1::2, :4, :] += 200
        labels = np.arange(total, dtype=np.uint8) % 2
        head = bytes((0, 0, 8))
        images = head + struct.pack(">BIII", 3, total, 8, 8) + pictures.tobytes()
        (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(head + struct.pack(">BI", 1, total) + labels.tobytes())
    return folder
