"""The scorer: every byte once, from what came before it and no more, and equal to a slow scorer written on its own."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tritwise.errors import UserError
from tritwise.models import ByteLM, ModelConfig
from tritwise.score import Predictor, Score, score, scorer

START = ord("\n")


class Table:
    """A Predictor made from a function: (ids before and at a position) -> 256 logits. Counts nothing, knows nothing."""

    def __init__(self, context: int, logits) -> None:
        self.context, self.logits = context, logits

    def log_probs(self, ids: torch.Tensor) -> torch.Tensor:
        assert ids.dtype == torch.int64 and 1 <= ids.shape[1] <= self.context
        rows = [[self.logits(row[: t + 1]) for t in range(len(row))] for row in ids.tolist()]
        return torch.log_softmax(torch.tensor(rows, dtype=torch.float64), dim=-1)


class Fixed:
    """A Predictor whose answer is the same at every position: log_probs float64 [256], whatever they sum to."""

    def __init__(self, log_probs: torch.Tensor, context: int = 8) -> None:
        self.context, self.answer = context, log_probs

    def log_probs(self, ids: torch.Tensor) -> torch.Tensor:
        return self.answer.expand(*ids.shape, 256)


def hashed(prefix: list[int]) -> list[float]:
    """Logits that depend on every byte of the prefix, on its place and on the prefix's length."""
    code = 0
    for byte in prefix:
        code = (code * 1000003 + byte + 1) % 2**31
    return np.sin(np.arange(256) * (1 + code % 9973)).tolist()


def slow_score(data: list[int], window: int, stride: int, logits) -> float:
    """Mean nats, byte by byte: byte i is read by the first window that reaches it, and windows end every stride."""
    text, total = [START, *data], 0.0
    for i in range(len(data)):
        end = window
        while end <= i:
            end += stride
        end = min(end, len(data))
        values = np.array(logits(text[max(0, end - window) : i + 1]))
        total += math.log(np.exp(values).sum()) - values[data[i]]
    return total / len(data)


@st.composite
def cases(draw):
    context = draw(st.integers(1, 12))
    window = draw(st.integers(1, context))
    data = draw(st.lists(st.integers(0, 255), min_size=1, max_size=40))
    return data, context, window, draw(st.integers(1, window)), draw(st.integers(1, 60))


@settings(deadline=None, max_examples=60)
@given(cases())
def test_it_equals_a_slow_scorer(case):
    data, context, window, stride, batch_bytes = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scorer, "BATCH_BYTES", batch_bytes)  # so that windows come in many batches, some cut short
        result = score(Table(context, hashed), np.array(data, np.uint8), window=window, stride=stride)
    assert result.nats == pytest.approx(slow_score(data, window, stride, hashed), rel=1e-12)
    assert result.bpb == pytest.approx(result.nats / math.log(2), rel=1e-12)
    assert (result.bytes, result.window, result.stride) == (len(data), window, stride)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 200), st.integers(1, 20), st.integers(1, 20))
def test_every_byte_is_scored_exactly_once(length: int, window: int, stride: int):
    # Every byte value has a price of its own, no byte value occurs twice, and sums of different prices differ.
    prices = torch.log_softmax(torch.linspace(0, 7, 256, dtype=torch.float64) ** 1.7, dim=0)
    data = np.random.default_rng(length).permutation(256)[:length].astype(np.uint8)
    result = score(Fixed(prices, 20), data, window=window, stride=min(stride, window))
    assert result.nats * length == pytest.approx(-float(prices[torch.from_numpy(data).long()].sum()), rel=1e-12)


def test_knowing_nothing_costs_eight_bits():
    data = np.random.default_rng(0).integers(0, 256, 1000, dtype=np.uint8)
    result = score(Fixed(torch.full((256,), -math.log(256), dtype=torch.float64)), data)
    assert result.bpb == pytest.approx(8, abs=1e-12) and result.nats == pytest.approx(math.log(256), abs=1e-12)
    assert isinstance(result, Score) and result.seconds > 0


def test_knowing_everything_costs_nothing():
    def follower(byte: int) -> int:
        return (5 * byte + 1) % 256

    data = [follower(START)]
    while len(data) < 500:
        data.append(follower(data[-1]))
    oracle = Table(8, lambda prefix: [40.0 * (byte == follower(prefix[-1])) for byte in range(256)])
    assert score(oracle, np.array(data, np.uint8)).bpb < 1e-12
    assert score(oracle, np.array(data[::-1], np.uint8)).bpb > 30


def test_the_first_byte_is_scored_too():
    sure = Table(4, lambda prefix: [50.0 * (byte == 65) for byte in range(256)])
    assert score(sure, np.array([65], np.uint8)).nats < 1e-12
    wrong = score(sure, np.array([66], np.uint8))
    assert wrong.nats == pytest.approx(50) and wrong.bytes == 1
    # It is predicted from a newline, like the first byte of a line.
    seen: list[list[int]] = []
    score(Table(4, lambda prefix: seen.append(prefix) or [0.0] * 256), np.array([1, 2, 3], np.uint8))
    assert seen == [[START], [START, 1], [START, 1, 2]]


def test_sliding_gives_every_byte_the_context_it_promises():
    # The price of the only byte falls with every byte of context.
    def logits(prefix: list[int]) -> list[float]:
        return [5.0 * len(prefix)] + [0.0] * 255

    data = np.zeros(61, np.uint8)
    known = torch.tensor([logits([0] * n) for n in range(1, 9)], dtype=torch.float64)
    prices = (-torch.log_softmax(known, dim=1)[:, 0]).tolist()
    chunked = score(Table(8, logits), data, stride=8)
    sliding = score(Table(8, logits), data, stride=3)
    every = score(Table(8, logits), data, stride=1)
    assert chunked.nats > sliding.nats > every.nats
    # stride 1: after the first window each byte sees all that the model can hold
    assert every.nats * 61 == pytest.approx(sum(prices) + 53 * prices[7])
    # stride 3: a later byte sees 6, 7 or 8
    assert sliding.nats * 61 <= sum(prices) + 53 * prices[5]
    # the default stride is half the window
    assert score(Table(8, logits), data).stride == 4 and score(Table(8, logits), data).window == 8


@pytest.mark.parametrize("window", [-1, 9, 1000])
def test_a_window_that_the_model_cannot_hold(window: int):
    with pytest.raises(UserError, match=f"window {window} does not fit the model; choose 1 to 8"):
        score(Fixed(torch.zeros(256)), np.zeros(4, np.uint8), window=window)


@pytest.mark.parametrize("stride", [-1, 5])
def test_a_stride_that_would_skip_or_repeat(stride: int):
    with pytest.raises(UserError, match=f"stride {stride} would skip or repeat bytes; choose 1 to the window, 4"):
        score(Fixed(torch.zeros(256)), np.zeros(4, np.uint8), window=4, stride=stride)


def test_an_empty_text():
    with pytest.raises(UserError, match="nothing to score: the text is empty; name another"):
        score(Fixed(torch.zeros(256)), np.empty(0, np.uint8))


UNIFORM = torch.full((256,), -math.log(256), dtype=torch.float64)


@pytest.mark.parametrize(
    "answer",
    [
        UNIFORM + 1e-3,
        UNIFORM - 1e-3,
        torch.zeros(256, dtype=torch.float64),
        torch.full((256,), math.nan, dtype=torch.float64),
        torch.full((256,), -math.inf, dtype=torch.float64),
        torch.full((256,), math.inf, dtype=torch.float64),
    ],
    ids=["a little too much", "a little too little", "all sure", "nan", "none", "inf"],
)
def test_probabilities_that_are_none_are_rejected(answer: torch.Tensor):
    with pytest.raises(UserError, match=r"the model's probabilities sum to .*, not 1; such a model cannot be scored"):
        score(Fixed(answer), np.zeros(20, np.uint8))


def test_rounding_is_no_fault():
    assert score(Fixed(UNIFORM + 5e-5), np.zeros(20, np.uint8)).bpb == pytest.approx(8, abs=1e-3)


def test_a_byte_without_probability_is_rejected():
    answer = torch.log(torch.cat((torch.zeros(1), torch.full((255,), 1 / 255))))
    with pytest.raises(UserError, match="some byte a probability of zero or no number"):
        score(Fixed(answer), np.array([1, 2, 0, 3], np.uint8))
    assert score(Fixed(answer), np.array([1, 2, 3], np.uint8)).nats == pytest.approx(math.log(255))


class Recorder:
    """A ByteLM, and what it said of every byte of the text: position -> log-probabilities, one window at a time."""

    def __init__(self, model: ByteLM) -> None:
        self.model, self.context = model, model.context
        self.said: list[torch.Tensor] = []

    def log_probs(self, ids: torch.Tensor) -> torch.Tensor:
        found = self.model.log_probs(ids)
        self.said += found.unbind(0)
        return found


@pytest.mark.parametrize(
    "shape", [{}, {"window": 3}, {"ngrams": 3, "ngram_rows": 32}, {"heads": 2, "kv_heads": 1}], ids=str
)
def test_a_future_byte_never_changes_an_earlier_score(shape: dict):
    torch.manual_seed(0)
    model = ByteLM(ModelConfig(width=32, depth=2, ctx=12, **shape)).eval()
    data = np.random.default_rng(1).integers(0, 256, 30, dtype=np.uint8)
    told = Recorder(model)
    score(told, data, stride=12)
    for changed in (0, 5, 11, 12, 17, 29):
        other = data.copy()
        other[changed] ^= 0x55
        again = Recorder(model)
        score(again, other, stride=12)
        # chunks of 12: targets 0 … 11, 12 … 23, 18 … 29 (the last window reaches back and scores its new six)
        for number, start in enumerate((0, 12, 18)):
            same = (told.said[number] == again.said[number]).all(dim=-1)
            known = max(0, min(12, changed + 1 - start))  # the byte itself is predicted without being seen
            assert same[:known].all()
            if start <= changed < start + 11:
                assert not same[known], "the next prediction must have seen it"


def test_a_byte_model_is_a_predictor():
    torch.manual_seed(0)
    model: Predictor = ByteLM(ModelConfig(width=32, depth=1, ctx=16)).eval()
    data = np.random.default_rng(1).integers(0, 256, 100, dtype=np.uint8)
    result = score(model, data, stride=16)
    text = torch.tensor([[START, *data.tolist()]])
    with torch.inference_mode():
        spans = [(start, start + 16) for start in range(0, 96, 16)]
        nats = sum(float(-_picked(model, text[:, a : b + 1]).sum()) for a, b in spans)
        nats += float(-_picked(model, text[:, 84:101])[-4:].sum())
    assert result.nats == pytest.approx(nats / 100, rel=1e-6)
    assert 5 < result.nats < 7


def _picked(model: Predictor, text: torch.Tensor) -> torch.Tensor:
    return model.log_probs(text[:, :-1])[0].gather(1, text[0, 1:, None])[:, 0].double()
