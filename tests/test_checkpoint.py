"""Checkpoints: bit-exact, all or nothing, and never silently wrong."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tritwise import files
from tritwise.errors import UserError
from tritwise.train.checkpoint import Checkpoint, CheckpointStore

META = {"seconds": 1.5, "text": "−1 é", "nested": {"list": [1, None, True]}, "big": 2**63}


def tensors(fill: int = 1) -> dict[str, torch.Tensor]:
    return {"registers": torch.full((2, 3), fill, dtype=torch.int8), "rng": torch.tensor([fill, 255]).to(torch.uint8)}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def same(found: Checkpoint, step: int, fill: int) -> bool:
    wanted = tensors(fill)
    return found.step == step and all(torch.equal(found.tensors[name], wanted[name]) for name in wanted)


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    """Checkpoints of steps 1 and 2; a test that changes a file puts it back."""
    folder = tmp_path_factory.mktemp("pair")
    store = CheckpointStore(folder)
    store.save(1, tensors(1), META)
    store.save(2, tensors(2), META)
    return folder


def test_round_trip_is_bit_exact(tmp_path: Path):
    torch.manual_seed(0)
    saved = {
        "int8": torch.arange(-128, 128).to(torch.int8).reshape(4, 8, 8),
        "uint8": torch.arange(256).to(torch.uint8),
        "int64": torch.tensor([-(2**63), 2**63 - 1, 0]),
        "float32": torch.tensor([0.1, -0.0, float("inf"), float("nan"), 1e-45]),
        "bfloat16": torch.randn(5, 3).to(torch.bfloat16),
        "bool": torch.tensor([True, False]),
        "zero_d": torch.tensor(-7, dtype=torch.int8),
        "empty": torch.empty(0, 4, dtype=torch.bfloat16),
        "strided": torch.arange(12, dtype=torch.int32).reshape(3, 4).T,
        "parameter": torch.nn.Parameter(torch.randn(3)),
    }
    store = CheckpointStore(tmp_path / "made" / "here")
    assert store.save(1000, saved, META) == tmp_path / "made" / "here" / "step_00001000.json"
    assert names(store.folder) == ["step_00001000.json", "step_00001000.safetensors"]
    step, loaded, meta = store.load()
    assert (step, meta) == (1000, META)
    assert loaded.keys() == saved.keys()
    for name, tensor in saved.items():
        assert loaded[name].dtype == tensor.dtype and loaded[name].shape == tensor.shape, name
        bits = [x.detach().contiguous().flatten().view(torch.uint8) for x in (loaded[name], tensor)]
        assert torch.equal(*bits), name
    loaded["int8"].add_(1)  # memory of its own, not a read-only view of the file


def test_the_same_state_makes_the_same_bytes(tmp_path: Path):
    for folder in "ab":
        CheckpointStore(tmp_path / folder).save(3, tensors(), META)
    for name in names(tmp_path / "a"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_meta_must_survive_json(tmp_path: Path):
    store = CheckpointStore(tmp_path)
    not_json: list[dict] = [{"betas": (0.9, 0.95)}, {1: "one"}]
    for meta in not_json:
        with pytest.raises(AssertionError, match="plain JSON"):
            store.save(1, tensors(), meta)
    with pytest.raises(ValueError, match="JSON"):
        store.save(1, tensors(), {"loss": float("nan")})
    assert names(tmp_path) == []


@pytest.mark.parametrize(("keep", "left"), [(0, [1, 2, 3, 4]), (1, [4]), (2, [3, 4]), (9, [1, 2, 3, 4])])
def test_keeps_the_newest(tmp_path: Path, keep: int, left: list[int]):
    store = CheckpointStore(tmp_path, keep=keep)
    for step in range(1, 5):
        store.save(step, tensors(step), META)
    assert store.steps() == left and len(names(tmp_path)) == 2 * len(left)
    assert store.latest() == 4
    assert all(same(store.load(step), step, step) for step in left)


def test_a_step_of_nine_digits_is_newer(tmp_path: Path):
    store = CheckpointStore(tmp_path)
    for step in (99_999_999, 100_000_000):
        store.save(step, tensors(), META)
    assert store.steps() == [99_999_999, 100_000_000] and store.load().step == 100_000_000


def test_after_an_earlier_resume_the_new_one_is_not_pushed_out(tmp_path: Path):
    store = CheckpointStore(tmp_path, keep=1)
    store.save(9, tensors(9), META)
    store.save(5, tensors(5), META)
    store.save(6, tensors(6), META)
    assert store.steps() == [6, 9] and same(store.load(6), 6, 6)


def test_orphans_leftovers_and_strangers(tmp_path: Path):
    store = CheckpointStore(tmp_path)
    for name in ("step_00000007.safetensors", ".tritwise-0123456789abcdef.tmp", "notes.txt", "step_best.safetensors"):
        (tmp_path / name).write_bytes(b"cut sho")
    assert store.latest() is None and store.steps() == []
    store.save(8, tensors(8), META)
    assert names(tmp_path) == ["notes.txt", "step_00000008.json", "step_00000008.safetensors", "step_best.safetensors"]


def test_no_checkpoint_at_all(tmp_path: Path, pair: Path):
    for folder in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(UserError, match=r"no checkpoint in .*; start without --resume"):
            CheckpointStore(folder).load()
        assert CheckpointStore(folder).latest() is None
    with pytest.raises(UserError, match=r"no checkpoint for step 3 in .*; the steps there are 1, 2"):
        CheckpointStore(pair).load(3)


def damaged(pair: Path, name: str, data: bytes | None) -> str:
    """What load() says while the file `name` holds `data` (None: is missing), after checks that hold for any damage."""
    path, store = pair / name, CheckpointStore(pair)
    whole = path.read_bytes()
    try:
        path.unlink()
        if data is not None:
            path.write_bytes(data)
        with pytest.raises(UserError) as caught:
            store.load()
        assert store.latest() == 1
        assert same(store.load(1), 1, 1)
    finally:
        path.write_bytes(whole)
    message = str(caught.value)
    assert name in message
    return message


def flipped(data: bytes, place: int, mask: int) -> bytes:
    return data[:place] + bytes([data[place] ^ mask]) + data[place + 1 :]


@pytest.mark.parametrize("name", ["step_00000002.json", "step_00000002.safetensors"])
def test_every_single_flipped_byte_is_found(pair: Path, name: str):
    whole = (pair / name).read_bytes()
    rng = random.Random(0)
    for place in range(len(whole)):
        message = damaged(pair, name, flipped(whole, place, rng.randrange(1, 256)))
        assert "damaged" in message and "delete" in message


@settings(max_examples=100, deadline=None)
@given(data=st.data(), tensor_file=st.booleans())
def test_any_flip_cut_or_addition_is_found(pair: Path, data, tensor_file: bool):
    name = "step_00000002.safetensors" if tensor_file else "step_00000002.json"
    whole = (pair / name).read_bytes()
    place = data.draw(st.integers(0, len(whole) - 1))
    change = data.draw(st.sampled_from(["flip", "cut", "add"]))
    if change == "flip":
        changed = flipped(whole, place, data.draw(st.integers(1, 255)))
    elif change == "cut":
        changed = whole[:place]
    else:
        changed = whole + data.draw(st.binary(min_size=1, max_size=9))
    damaged(pair, name, changed)


def test_each_damage_has_its_own_message(pair: Path):
    tensor_name, json_name = "step_00000002.safetensors", "step_00000002.json"
    whole, text = (pair / tensor_name).read_bytes(), (pair / json_name).read_bytes()
    messages = [
        damaged(pair, tensor_name, None),
        damaged(pair, tensor_name, whole[:-1]),
        damaged(pair, tensor_name, whole + b"x"),
        damaged(pair, tensor_name, flipped(whole, len(whole) - 1, 1)),
        damaged(pair, json_name, text[: len(text) // 2]),
        damaged(pair, json_name, b"[]"),
        damaged(pair, json_name, text.replace(b'"seconds": 1.5', b'"seconds": 2.5')),
        damaged(pair, json_name, text.replace(b'"seconds": 1.5', b'"seconds": NaN')),
        damaged(pair, json_name, (pair / "step_00000001.json").read_bytes()),
    ]
    wanted = [
        "is missing",
        f"is cut short: {len(whole) - 1} bytes of {len(whole)}",
        "should have",
        "its checksum does not match",
        "it is not valid JSON",
        "it is not a JSON object",
        "its checksum does not match",
        "its checksum does not match",
        "it holds step 1",
    ]
    for message, part in zip(messages, wanted, strict=True):
        assert part in message
        assert message.endswith(f"; delete {pair / json_name} to resume from step 1")


def test_the_remedy_works_and_names_the_newest_whole_one(tmp_path: Path):
    store = CheckpointStore(tmp_path, keep=0)
    for step in (1, 2, 3):
        store.save(step, tensors(step), META)
    for step in (2, 3):
        (tmp_path / f"step_0000000{step}.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"delete .*step_00000003\.json to resume from step 1"):
        store.load()
    for step in (3, 2):
        (tmp_path / f"step_0000000{step}.json").unlink()
    assert same(store.load(), 1, 1)
    (tmp_path / "step_00000001.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="no earlier checkpoint is whole: restore the file, or start again"):
        store.load()
    assert store.latest() is None


def test_a_newer_format(pair: Path):
    name = "step_00000002.json"
    body = json.loads((pair / name).read_bytes())
    body.pop("sha256")
    body.update(format=2, unheard_of=[])
    checksum = files.sha256_of(files.canonical_json(body))
    message = damaged(pair, name, json.dumps({**body, "sha256": checksum}).encode())
    assert "made by a newer Tritwise (checkpoint format 2; this one reads 1); upgrade Tritwise" in message
    message = damaged(pair, name, json.dumps({**body, "sha256": "0" * 64}).encode())
    assert "newer Tritwise" in message and "or is damaged" in message and "upgrade Tritwise, or delete" in message


class Killed(BaseException):
    """Raised in place of a system call, and by every one after it: the process does nothing more, not even tidy up."""


def kill_at(monkeypatch, call: int) -> None:
    """Let `call` system calls of the durable-file layer pass and none after them. A killed write has written half."""
    made = 0

    def mortal(real, half=None):
        def act(*arguments, **named):
            nonlocal made
            made += 1
            if made > call:
                if half and made == call + 1:
                    half(*arguments)
                raise Killed
            return real(*arguments, **named)

        return act

    for name in ("open", "fsync", "replace", "unlink", "mkdir"):
        monkeypatch.setattr(os, name, mortal(getattr(os, name)))
    write = files._write_all
    monkeypatch.setattr(files, "_write_all", mortal(write, lambda file, data: write(file, data[: len(data) // 2])))


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("again", [False, True])
def test_killed_at_every_system_call(tmp_path: Path, monkeypatch, keep: int, again: bool):
    """Saving step 2, or step 1 again with other tensors: what loads is the old checkpoint or the new one, whole."""
    step, outcomes = (1 if again else 2), []
    for call in range(100):
        store = CheckpointStore(tmp_path / str(call), keep=keep)
        store.save(1, tensors(1), {"fill": 1})
        with monkeypatch.context() as patch:
            kill_at(patch, call)
            try:
                store.save(step, tensors(2), {"fill": 2})
                finished = True
            except Killed:
                finished = False
        found = store.load()
        fill = found.meta["fill"]
        assert same(found, step if fill == 2 else 1, fill) and store.latest() == found.step
        outcomes.append(fill)
        for later in (3, 4):  # which tidy up
            store.save(later, tensors(later), {"fill": later})
        assert store.steps() == [3, 4][-keep:] and len(names(store.folder)) == 2 * keep
        if finished:
            break
    assert finished and len(outcomes) > 9
    assert outcomes == sorted(outcomes) and set(outcomes) == {1, 2}


@pytest.mark.parametrize("call", ["os.fsync", "os.replace", "tritwise.files._write_all"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize("step", [1, 2])
def test_a_full_or_read_only_disk_leaves_the_previous_one(tmp_path: Path, monkeypatch, call: str, code: int, step: int):
    store = CheckpointStore(tmp_path, keep=1)
    store.save(1, tensors(1), META)

    def refused(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"(no space left|read-only).*another --out"):
        patch.setattr(call, refused)
        store.save(step, tensors(2), META)
    assert same(store.load(), 1, 1)
    assert names(tmp_path) == ["step_00000001.json", "step_00000001.safetensors"]


def test_a_refused_removal_is_a_user_error(tmp_path: Path, monkeypatch):
    store = CheckpointStore(tmp_path, keep=1)
    store.save(1, tensors(1), META)

    def refused(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patch, pytest.raises(UserError, match="read-only"):
        patch.setattr(os, "unlink", refused)
        store.save(2, tensors(2), META)
    assert same(store.load(), 2, 2)


def test_a_file_where_the_folder_should_be(tmp_path: Path):
    (tmp_path / "checkpoints").write_bytes(b"")
    with pytest.raises(UserError, match="a file is in the way where a folder is needed"):
        CheckpointStore(tmp_path / "checkpoints").save(1, tensors(), META)


def test_a_step_saved_again(tmp_path: Path):
    store = CheckpointStore(tmp_path)
    for fill in (1, 1, 2, 3, 3):
        store.save(7, tensors(fill), {"fill": fill})
        found = store.load()
        assert same(found, 7, fill) and found.meta == {"fill": fill}
        assert len(names(tmp_path)) == 2
    (tmp_path / "step_00000007.json").write_bytes(b"{")
    store.save(7, tensors(4), META)
    assert same(store.load(), 7, 4) and len(names(tmp_path)) == 2


CHILD = """
import sys, torch
from tritwise.train.checkpoint import CheckpointStore
torch.set_num_threads(1)
store = CheckpointStore(sys.argv[1], keep=2)
for step in range(1, 1_000_000):
    store.save(step, {"fill": torch.full((300_000,), step, dtype=torch.int64)}, {"step": step})
    print(step, flush=True)
"""


@pytest.mark.parametrize("seed", [0, 1])
def test_sigkill_at_any_moment(tmp_path: Path, seed: int):
    command = [sys.executable, "-c", CHILD, str(tmp_path)]
    rng = random.Random(seed)
    with subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"}) as child:
        assert child.stdout
        for _ in range(rng.randrange(3, 9)):
            done = int(child.stdout.readline())
        try:
            child.wait(rng.uniform(0, 0.02))
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGKILL)
        done = int((child.stdout.read().split() or [done])[-1])
    assert child.returncode == -signal.SIGKILL
    store = CheckpointStore(tmp_path)
    step, loaded, meta = store.load()
    assert step in (done, done + 1) and store.latest() == step and meta == {"step": step}
    assert torch.equal(loaded["fill"], torch.full((300_000,), step))
    store.save(step + 1, {}, {})
    assert store.steps() == [step, step + 1] and len(names(tmp_path)) == 4
