"""`tritwise.load`: the same model from a run and from its artifact, and what it generates and scores."""

from pathlib import Path

import numpy as np
import pytest
import torch

import tritwise
from tritwise.data import open_bytes
from tritwise.data.split import split
from tritwise.errors import UserError
from tritwise.files import read_json
from tritwise.loading import LoadedModel, load
from tritwise.nn import trit_modules


@pytest.fixture(scope="module", params=["run", "artifact"])
def loaded(request, trained: Path) -> LoadedModel:
    return load(trained if request.param == "run" else trained / "model.tritwise")


def test_run_and_artifact_hold_the_same_model(trained: Path):
    run, artifact = tritwise.load(trained), tritwise.load(str(trained / "model.tritwise"))
    assert isinstance(run, LoadedModel) and isinstance(run.model, tritwise.ByteLM)
    ids = torch.randint(0, 256, (4, 32))
    assert torch.equal(run.model(ids), artifact.model(ids))
    assert run.path == trained and artifact.path == trained / "model.tritwise"


def test_it_knows_where_it_came_from(loaded: LoadedModel, text: Path):
    assert loaded.about["recipe"] == "tiny" and loaded.about["steps"] == 60
    assert loaded.about["train"]["split"] == "90/10"
    # A run knows where its text lies; an artifact goes out into the world and says so of the bundled text alone.
    assert loaded.about["train"].get("data") == (str(text) if loaded.path.is_dir() else None)


def test_it_is_frozen(loaded: LoadedModel):
    assert not loaded.model.training
    assert all(layer.port is None for _, layer in trit_modules(loaded.model))
    assert loaded.to("cpu") is loaded


@pytest.mark.parametrize("prompt", ["", b"", "R", "ROMÉO:", b"\xff\x00", "x" * 100], ids=repr)
def test_generate_gives_that_many_bytes_and_the_same_again(loaded: LoadedModel, prompt):
    one = loaded.generate(prompt, bytes=50, seed=3)
    assert isinstance(one, bytes) and len(one) == 50
    assert loaded.generate(prompt, bytes=50, seed=3) == one
    assert loaded.generate(prompt, bytes=50, seed=4) != one
    assert loaded.generate(prompt, 50, seed=3)[:20] == loaded.generate(prompt, 20, seed=3)


def test_prompts(loaded: LoadedModel):
    greedy = {"bytes": 20, "temperature": 0}
    assert loaded.generate("ROMÉO", **greedy) == loaded.generate("ROMÉO".encode(), **greedy)
    assert loaded.generate("", **greedy) == loaded.generate("\n", **greedy) == loaded.generate(**greedy)
    # Of a prompt longer than the context, the last 32 bytes are read.
    assert loaded.generate("z" * 50 + "a" * 32, **greedy) == loaded.generate("a" * 32, **greedy)
    # Bytes of a command line that are not UTF-8 arrive as surrogates.
    assert loaded.generate("\udcff\udc80", **greedy) == loaded.generate(b"\xff\x80", **greedy)
    assert loaded.generate("a", 0) == b""


@torch.inference_mode()
def greedy_without_cache(model, text: list[int], count: int) -> bytes:
    """The likeliest byte after a full forward pass each time; a full context goes on from its last half."""
    ctx, window = model.config.ctx, text[-model.config.ctx :]
    made: list[int] = []
    for _ in range(count):
        if len(window) > ctx:
            window = (text + made)[-ctx // 2 :]
        made.append(int(model(torch.tensor([window]))[0, -1].argmax()))
        window = [*window, made[-1]]
    return bytes(made)


@pytest.mark.parametrize("prompt", [b"a", b"the king", b"q" * 31, b"q" * 32, b"q" * 33], ids=len)
def test_the_cache_changes_nothing(loaded: LoadedModel, prompt: bytes):
    assert loaded.generate(prompt, 60, temperature=0) == greedy_without_cache(loaded.model, list(prompt), 60)
    # A trained model soon repeats itself; an untrained one hangs on every byte that it reads again.
    torch.manual_seed(0)
    wild = LoadedModel(tritwise.ByteLM(tritwise.ModelConfig(width=32, depth=1, ctx=12)).eval(), Path(), {})
    assert wild.generate(prompt, 60, temperature=0) == greedy_without_cache(wild.model, list(prompt), 60)


def test_score_takes_arrays_bytes_paths_and_names(loaded: LoadedModel, text: Path):
    data = open_bytes(text)
    part = split(data, "90/10")["val"]
    wanted = loaded.score(part)
    assert wanted.bytes == 6000
    assert loaded.score(bytes(part)).nats == wanted.nats
    assert loaded.score(text, split="val").nats == loaded.score(str(text), split="val").nats == wanted.nats
    other = loaded.score(text, split="test", rule="80/10/10", window=16, stride=16)
    assert (other.bytes, other.window, other.stride) == (6000, 16, 16)
    assert other.nats == loaded.score(part, window=16, stride=16).nats != wanted.nats
    assert loaded.score(data[:100]).bytes == 100
    assert loaded.score(b"a").bytes == 1


def test_the_score_is_the_result_of_the_run(loaded: LoadedModel, trained: Path, text: Path):
    result = read_json(trained / "result.json")
    found = loaded.score(text, split="val")
    assert found.bpb == result["val"]["bpb"] == result["artifact"]["bpb_reread"]
    assert found.nats == result["val"]["nats"] and found.bytes == result["val"]["bytes"]
    assert loaded.score(text, split="val", stride=32).nats == result["val_chunked"]["nats"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model, text: model.score(text, split="dev"), "no part 'dev'; choose one of train, val"),
        (lambda model, text: model.score(text, split="test"), "no part 'test'; choose one of train, val"),
        (lambda model, text: model.score(text, split="val", rule="9/1"), "percentages must add up to 100"),
        (lambda model, text: model.score(b""), "nothing to score"),
        (lambda model, text: model.score(np.empty(0, np.uint8)), "nothing to score"),
        (lambda model, text: model.score(text.parent / "none.txt"), "no such file or folder"),
        (lambda model, text: model.score(text, window=33), "window 33 does not fit"),
        (lambda model, text: model.generate("a", -1), "cannot sample -1 bytes"),
        (lambda model, text: model.generate("a", temperature=float("nan")), "temperature is nan"),
        (lambda model, text: model.generate("a", temperature=-1), "temperature is -1"),
        (lambda model, text: model.generate("a", top_k=257), "top_k is 257"),
    ],
)
def test_what_cannot_be_done_is_one_line(loaded: LoadedModel, text: Path, call, message: str):
    with pytest.raises(UserError) as caught:
        call(loaded, text)
    assert message in str(caught.value) and ";" in str(caught.value)


def test_what_cannot_be_loaded_is_one_line(tmp_path: Path, text: Path):
    (tmp_path / "empty").mkdir()
    for path, message in [
        (tmp_path / "none", "does not exist; check the path"),
        (tmp_path / "empty", "is no run folder: it has no config.json; name"),
        (text, "is not a Tritwise artifact; name a file that tritwise ship made"),
    ]:
        with pytest.raises(UserError) as caught:
            load(path)
        assert message in str(caught.value)
