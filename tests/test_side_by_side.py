"""Commands on several GPUs within a span of time: order, what is told to them, the end of the time, the archive."""

import importlib.util
import sys
import tarfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def lanes(monkeypatch):
    spec = importlib.util.spec_from_file_location("side_by_side", ROOT / "benchmarks/side_by_side.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "side_by_side", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "GRACE", 1.0)
    return module


def names(archive):
    with tarfile.open(archive) as tar:
        return {member.name for member in tar.getmembers()}


def test_commands_of_a_gpu_follow_each_other_and_everything_is_packed(lanes, tmp_path):
    folder = tmp_path / "out"
    first = f"echo $CUDA_VISIBLE_DEVICES >> {folder}/order; sleep 0.3; echo a >> {folder}/order"
    second = f"echo b {{seconds}} {{minutes}} >> {folder}/order; mkdir {folder}/checkpoints; touch {folder}/m.tritwise"
    words = [str(folder), "--seconds", "31", "--pack", str(folder / "all.tgz")]
    words += [
        "--run",
        "0,1",
        first,
        "--run",
        "0,1",
        second,
        "--run",
        "2",
        f"echo $CUDA_VISIBLE_DEVICES > {folder}/other",
    ]
    assert lanes.main(words) == 0
    assert (folder / "order").read_text().split() == ["0,1", "a", "b", "30", "0.49"]
    assert (folder / "other").read_text() == "2\n"
    assert names(folder / "all.tgz") == {"logs/gpu0_1.log", "logs/gpu2.log", "order", "other"}


def test_the_end_of_the_time_stops_what_runs_and_keeps_what_is_there(lanes, tmp_path, capsys):
    """A command that does not heed being told to stop, with a child that would write on; one that waits behind it."""
    child = (
        f"(sleep 4; touch {tmp_path}/late) & trap '' TERM; echo begun > {tmp_path}/file; while true; do sleep 0.1; done"
    )
    told = f"trap 'echo told > {tmp_path}/told; exit 0' TERM; while true; do sleep 0.1; done"
    began = time.monotonic()
    words = [str(tmp_path), "--seconds", "2.5", "--pack", str(tmp_path / "all.tgz")]
    assert lanes.main([*words, "--run", "0", child, "--run", "0", "true", "--run", "1", told]) == 1
    assert time.monotonic() - began < 10
    assert {"file", "told"} <= names(tmp_path / "all.tgz")
    assert "never began: true" in capsys.readouterr().out
    time.sleep(max(0.0, began + 5 - time.monotonic()))
    assert not (tmp_path / "late").exists()


def test_what_a_command_started_may_save_after_the_command_is_gone(lanes, tmp_path):
    saves = f"trap 'sleep 0.6; echo saved > {tmp_path}/saved; exit 0' TERM; while true; do sleep 0.05; done"
    began = time.monotonic()
    words = [str(tmp_path), "--seconds", "3", "--run", "0", f'bash -c "{saves}" & echo begun > {tmp_path}/begun; wait']
    assert lanes.main(words) == 1
    assert (tmp_path / "begun").exists() and (tmp_path / "saved").exists()
    assert time.monotonic() - began < 2.95  # it was not waited for longer than it lived


def test_an_archive_is_there_before_the_end(lanes, tmp_path, monkeypatch):
    monkeypatch.setattr(lanes, "AGAIN", 0.2)
    archive, folder = tmp_path / "all.tgz", tmp_path / "out"
    watch = f"echo 1 > {folder}/row; for i in $(seq 100); do [ -f {archive} ] && exit 0; sleep 0.1; done; exit 1"
    assert lanes.main([str(folder), "--seconds", "30", "--pack", str(archive), "--run", "0", watch]) == 0
    assert lanes.main([str(folder), "--seconds", "30", "--run", "0", "exit 3"]) == 1
