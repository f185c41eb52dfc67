"""What a recording runs side by side, with streams that only take notes; GPU tests of recordings show the bits."""

import contextlib

import pytest
import torch

from tritwise.ops import gpu

CUDA = torch.device("cuda", 0)


class Stream:
    """A stream as torch has it: equal to another one of the same number."""

    device = CUDA

    def __init__(self, number: int, notes: list[tuple[object, ...]]) -> None:
        self.number, self.notes = number, notes

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and other.number == self.number

    def __hash__(self) -> int:
        return self.number

    def record_event(self) -> str:
        self.notes.append(("fork", self.number))
        return f"fork of {self.number}"

    def wait_event(self, event: str) -> None:
        self.notes.append((self.number, "waits for", event))

    def wait_stream(self, other: "Stream") -> None:
        self.notes.append((self.number, "waits for", other.number))


@pytest.fixture
def notes(monkeypatch):
    """Of a device that records on stream 2 of four, which it hands out in turn."""
    taken: list[tuple[object, ...]] = []
    numbers = iter(range(100))

    @contextlib.contextmanager
    def on(stream: Stream):
        taken.append(("on", stream.number))
        yield

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(2, taken))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(next(numbers) % 4, taken))
    monkeypatch.setattr(torch.cuda, "stream", on)
    gpu._side_streams.cache_clear()
    yield taken
    gpu._side_streams.cache_clear()


def run(parts: int, device: torch.device = CUDA) -> list[int]:
    done = []
    with gpu.Branches(device) as branches:
        for part in range(parts):
            with branches.branch():
                done.append(part)
    return done


def test_parts_fork_from_the_recording_and_join_it(notes):
    assert run(3) == [0, 1, 2]
    assert notes == [
        ("fork", 2),
        (0, "waits for", "fork of 2"),
        ("on", 0),
        (1, "waits for", "fork of 2"),
        ("on", 1),
        (2, "waits for", 0),
        (2, "waits for", 1),
    ]


def test_there_are_three_sides_none_of_which_is_the_recording_itself(notes):
    assert run(6) == list(range(6))
    assert [note[1] for note in notes if note[0] == "on"] == [0, 1, 3, 0]  # the first and the fifth stay where they are
    assert [note[2] for note in notes if note[0] == 2] == [0, 1, 3]


@pytest.mark.parametrize("parts", [0, 1])
def test_less_than_two_parts_take_no_side(notes, parts):
    assert len(run(parts)) == parts and notes == [("fork", 2)]


def test_elsewhere_parts_run_one_after_another(notes, monkeypatch):
    assert run(2, torch.device("cpu")) == [0, 1]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert run(2) == [0, 1] and not notes
