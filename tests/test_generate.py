"""Sampling: equal seeds give equal bytes, temperature and top_k mean what they say, and a full context goes on."""

import dataclasses

import pytest
import torch
from torch import Tensor

from tritwise.errors import UserError
from tritwise.models import ByteLM, ModelConfig, generate

CONFIG = ModelConfig(width=32, depth=1, ctx=16, ngrams=3, ngram_rows=64)


@pytest.fixture(scope="module")
def model() -> ByteLM:
    torch.manual_seed(0)
    return ByteLM(CONFIG).eval()


def sample(model: ByteLM, prompt: bytes = b"ab", count: int = 12, **options: float) -> list[int]:
    return list(generate(model, prompt, count, **options))  # type: ignore[arg-type]


class Fixed:
    """Stands for a model: the same logits whatever it reads, and a record of what it read."""

    def __init__(self, logits: Tensor, ctx: int = 16) -> None:
        self.config = dataclasses.replace(CONFIG, ctx=ctx, vocab=logits.numel())
        self.logits, self.calls = logits, []

    def parameters(self):
        return iter([torch.zeros(1)])

    def new_state(self):
        class State:
            used = 0

        return State()

    def __call__(self, ids: Tensor, state) -> Tensor:
        self.calls.append((state.used, ids[0].tolist()))
        state.used += ids.shape[1]
        assert state.used <= self.config.ctx
        return self.logits.expand(1, ids.shape[1], -1).clone()


def frequencies(logits: Tensor, count: int = 4000, **options) -> Tensor:
    drawn = torch.tensor(list(generate(Fixed(logits), b"a", count, **options)))  # type: ignore[arg-type]
    return torch.bincount(drawn, minlength=logits.numel()) / count


def test_bytes_and_their_number(model):
    for count in (0, 1, 5, 40):
        found = sample(model, count=count)
        assert len(found) == count and all(isinstance(b, int) and 0 <= b < 256 for b in found)


def test_the_same_seed_gives_the_same_bytes(model):
    assert sample(model, seed=3) == sample(model, seed=3)
    assert sample(model, seed=3) != sample(model, seed=4)


def test_torchs_own_generator_is_neither_read_nor_moved(model):
    torch.manual_seed(1)
    before, found = torch.get_rng_state(), sample(model)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert sample(model) == found


def test_longer_is_a_continuation(model):
    assert sample(model, count=30)[:9] == sample(model, count=9)


def test_temperature_zero_takes_the_likeliest_byte(model):
    text = list(b"ab")
    with torch.no_grad():
        for _ in range(8):
            text.append(int(model(torch.tensor([text]))[0, -1].argmax()))
    assert sample(model, b"ab", 8, temperature=0) == text[2:]
    assert sample(model, temperature=0, seed=1) == sample(model, temperature=0, seed=2)


def test_top_one_is_the_likeliest_byte(model):
    assert sample(model, top_k=1, temperature=2.0) == sample(model, temperature=0)


@pytest.mark.parametrize("temperature", [1e-3, 1e-40, 1e-300])
def test_temperatures_near_zero_take_the_likeliest_byte(model, temperature):
    assert sample(model, temperature=temperature) == sample(model, temperature=0)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_frequencies_follow_the_softmax(temperature):
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    expected = torch.softmax(logits / temperature, 0)
    deviation = (expected * (1 - expected) / 4000).sqrt()
    assert ((frequencies(logits, temperature=temperature) - expected).abs() < 4 * deviation).all()


def test_top_k_keeps_the_k_likeliest():
    logits = torch.tensor([0.0, 3.0, 1.0, 2.9, 0.5])
    found = frequencies(logits, temperature=1.0, top_k=2)
    assert (found > 0).tolist() == [False, True, False, True, False]
    assert (frequencies(logits, temperature=1.0) > 0).all()  # 0 keeps all
    assert (frequencies(logits, temperature=1.0, top_k=5) > 0).all()


def test_an_empty_prompt_continues_a_newline(model):
    assert sample(model, b"") == sample(model, b"\n")
    assert sample(model, b"", temperature=0) == sample(model, b"\n", temperature=0)


def test_only_the_end_of_a_long_prompt_is_read(model):
    assert sample(model, bytes(range(100)), count=1) == sample(model, bytes(range(84, 100)), count=1)


def test_a_full_context_goes_on_from_its_last_half():
    fixed = Fixed(torch.tensor([0.0, 9.0]), ctx=4)
    found = list(generate(fixed, bytes([0, 0, 0]), 6, temperature=0))  # type: ignore[arg-type]
    assert found == [1] * 6
    assert fixed.calls == [(0, [0, 0, 0]), (3, [1]), (0, [1, 1]), (2, [1]), (3, [1]), (0, [1, 1])]


def test_a_context_of_one_byte():
    fixed = Fixed(torch.tensor([0.0, 9.0]), ctx=1)
    assert list(generate(fixed, b"\0\0", 3, temperature=0)) == [1, 1, 1]  # type: ignore[arg-type]
    assert fixed.calls == [(0, [0]), (0, [1]), (0, [1])]


def test_beyond_the_context_each_byte_follows_from_what_was_read_again(model):
    text = list(b"0123456789abcde")
    for byte in generate(model, bytes(text), 20, temperature=0):
        # Wherever the cut was, it left at least the last half of the context.
        with torch.no_grad():
            starts = range(max(0, len(text) - 16), max(0, len(text) - 8) + 1)
            choices = {int(model(torch.tensor([text[start:]]))[0, -1].argmax()) for start in starts}
        assert byte in choices
        text.append(byte)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": -1}, "cannot sample -1 bytes; ask for 0 or more"),
        ({"temperature": -0.1}, "temperature is -0.1; it must be 0 or more and finite"),
        ({"temperature": float("inf")}, "temperature is inf; it must be 0 or more and finite"),
        ({"temperature": float("nan")}, "temperature is nan; it must be 0 or more and finite"),
        ({"top_k": -1}, "top_k is -1; it must be between 0 (off) and 256"),
        ({"top_k": 257}, "top_k is 257; it must be between 0 (off) and 256"),
    ],
)
def test_what_cannot_be_sampled_is_refused_in_one_line(model, options, message):
    with pytest.raises(UserError) as caught:
        sample(model, **options)
    assert str(caught.value) == message
