"""The scorer: every byte once, from what came before it and no more, and equal to a slow scorer written on its own."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tritwise.errors import UserError
from tritwise.models import ByteLM, ModelConfig
from tritwise.score import Predictor, Score, score, score_stream, scorer, stream_of
from tritwise.score.windows import documents_of, windows_of

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
    assert seen[-3:] == [[START], [START, 1], [START, 1, 2]]  # the guards asked before


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
    first = told.said[-3:]  # the guards asked before
    for changed in (0, 5, 11, 12, 17, 29):
        other = data.copy()
        other[changed] ^= 0x55
        again = Recorder(model)
        score(again, other, stride=12)
        second = again.said[-3:]
        # chunks of 12: targets 0 … 11, 12 … 23, 18 … 29 (the last window reaches back and scores its new six)
        for number, start in enumerate((0, 12, 18)):
            same = (first[number] == second[number]).all(dim=-1)
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


# Sliding, streaming and the whole text in one window


SHAPES = [
    *({}, {"window": 3}, {"ngrams": 3, "ngram_rows": 32}, {"heads": 2, "kv_heads": 1}),
    {"word_tables": 1, "ngram_rows": 32, "ngram_width": 8},
]


def byte_model(ctx: int, **shape) -> ByteLM:
    torch.manual_seed(0)
    return ByteLM(ModelConfig(width=32, depth=2, ctx=ctx, **shape)).eval()


def noise(count: int) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, count, dtype=np.uint8)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_with_a_window_for_all_of_it_every_way_is_the_full_context(shape: dict):
    model, data = byte_model(24, **shape), noise(24)
    with torch.inference_mode():
        full = float(-_picked(model, torch.tensor([[START, *data.tolist()]])).mean()) / math.log(2)
    for mode in ("sliding", "chunked", "stream"):
        assert score(model, data, mode=mode).bpb == pytest.approx(full, abs=1e-5), mode
    assert score(model, data, mode="stream", window=4).bpb != pytest.approx(full, abs=1e-3)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("stride", "length"), [(1, 21), (5, 12 + 5 * 5), (12, 12 * 4)])
def test_sliding_equals_streaming(shape: dict, stride: int, length: int):
    # With stride 1 for any text; else if the last window ends with the text, so that it is not drawn back over it.
    model, data = byte_model(16, **shape), noise(length)
    sliding = score(model, data, window=12, stride=stride)
    stream = score(model, data, mode="stream", window=12, stride=stride)
    assert stream.bpb == pytest.approx(sliding.bpb, abs=1e-5)
    assert (stream.bytes, stream.window, stream.stride) == (length, 12, stride)


def test_a_longer_stride_knows_less():
    # Trained on nothing, a model gains nothing from context: this one is told the price of a byte by its context.
    def logits(prefix: list[int]) -> list[float]:
        return [0.5 * len(prefix)] + [0.0] * 255

    data = np.zeros(8 + 4 * 6, np.uint8)
    found = [score(Table(8, logits), data, mode="stream", stride=stride).nats for stride in (1, 2, 4, 8)]
    assert found == sorted(found) and found[0] < found[-1]
    assert found[3] == pytest.approx(score(Table(8, logits), data, mode="chunked").nats, rel=1e-12)


@settings(deadline=None, max_examples=40)
@given(cases())
def test_a_stream_without_a_cache_equals_a_slow_one(case):
    data, context, window, stride, piece = case
    text, total, held = [START, *data], 0.0, 1
    for i, byte in enumerate(data):
        if i and held == window:
            held -= stride
        held += 1 if i else 0
        values = np.array(hashed(text[i + 1 - held : i + 1]))
        total += math.log(np.exp(values).sum()) - values[byte]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scorer, "PIECE", piece)
        result = score(Table(context, hashed), np.array(data, np.uint8), mode="stream", window=window, stride=stride)
    assert result.nats * len(data) == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pieces_change_nothing_but_rounding(shape: dict):
    stream, data = stream_of(byte_model(16, **shape), window=12, stride=5), torch.from_numpy(noise(50)).long()
    whole = stream.read(data)
    after = stream.log_probs()
    assert whole.shape == (50, 256) and whole.dtype == torch.float32
    stream.reset()
    assert torch.equal(stream.read(data), whole) and torch.equal(stream.log_probs(), after)
    stream.reset()
    single = []
    for byte in data:
        single.append(stream.log_probs())
        assert torch.equal(stream.read(byte[None])[0], single[-1])
    torch.testing.assert_close(torch.stack(single), whole, rtol=0, atol=2e-5)
    stream.reset()
    cut = torch.cat([stream.read(part) for part in data.split([0, 7, 5, 1, 37])])
    torch.testing.assert_close(cut, whole, rtol=0, atol=2e-5)
    torch.testing.assert_close(stream.log_probs(), after, rtol=0, atol=2e-5)


def test_a_stream_reads_a_byte_once_while_the_cache_has_room():
    model, read = byte_model(16), []
    model.register_forward_pre_hook(lambda module, arguments: read.append(arguments[0].shape[1]))
    stream = stream_of(model, window=8, stride=6)
    for byte in range(20):
        stream.read(torch.tensor([byte]))
    # The newline and 7 bytes; then, twice, the last 2 again with the next byte, and 5 more; at last one byte more.
    assert read == [1] * 8 + [3] + [1] * 5 + [3] + [1] * 5 + [3]


# Documents


def test_a_document_is_scored_like_a_text_of_its_own():
    data, model = noise(90), byte_model(16)
    parts = [data[:7], data[7:8], data[8:60], data[60:]]
    for settings_ in ({"stride": 5}, {"mode": "stream", "stride": 12}):
        whole = score(model, data, documents=[7, 8, 60], **settings_)
        alone = sum(score(model, part, **settings_).nats * len(part) for part in parts)
        assert whole.nats * 90 == pytest.approx(alone, rel=1e-6)
        assert score(model, data, **settings_).nats != pytest.approx(whole.nats, rel=1e-6)
        assert whole.declared["reset"] == "4 documents, by offsets" and whole.declared["extra_bytes"] == 4


def test_a_separator_ends_a_document():
    data = np.frombuffer(b"one||two|||three||", np.uint8)
    assert documents_of(data, separator=b"||").tolist() == [0, 5, 10]
    assert documents_of(data, separator=b"?").tolist() == [0]
    model = byte_model(16)
    found = score(model, data, separator=b"||")
    assert found.nats == score(model, data, documents=[0, 5, 10]).nats
    assert found.declared["reset"] == "3 documents, after b'||'" and found.declared["extra_bytes"] == 2


@pytest.mark.parametrize("offsets", [[0, 0], [3, 2], [10], [2, 11], [-1]])
def test_documents_out_of_place(offsets: list[int]):
    with pytest.raises(UserError, match=r"document offset -?[0-9]+ is out of place; give rising offsets below 10"):
        score(byte_model(16), noise(10), documents=offsets)


def test_documents_given_twice():
    with pytest.raises(UserError, match="given twice, by offsets and by a separator; choose one"):
        score(byte_model(16), noise(10), documents=[3], separator=b"x")


@settings(deadline=None, max_examples=80)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(1, 12), st.integers(1, 12))
def test_windows_tile_the_documents(lengths: list[int], window: int, stride: int):
    begins = np.cumsum([0, *lengths])
    windows = windows_of(begins[:-1], int(begins[-1]), window, min(stride, window))
    assert windows[0, 2] == 0 and (windows[1:, 2] == windows[:-1, 1]).all() and windows[-1, 1] == begins[-1]
    document = np.searchsorted(begins, windows[:, 2], side="right") - 1
    assert (windows[:, 0] >= begins[document]).all() and (windows[:, 1] <= begins[document + 1]).all()
    assert (windows[:, 1] - windows[:, 0] == np.minimum(window, np.array(lengths)[document])).all()
    assert (windows[:, 3] == (windows[:, 0] == begins[document])).all()


# What is declared


def test_a_score_declares_what_it_used():
    model, data, costs = byte_model(16), noise(100), np.zeros(100)
    sliding = score(model, data, stride=4, into=costs)
    assert costs.mean() == pytest.approx(sliding.nats, rel=1e-12) and costs.std() > 0
    told = {key: sliding.declared[key] for key in ("mode", "window", "stride", "reset", "adaptation", "extra_bytes")}
    assert told == {
        "mode": "sliding",
        "window": 16,
        "stride": 4,
        "reset": "never",
        "adaptation": "none",
        "extra_bytes": 0,
    }
    assert sliding.declared["seconds"] == sliding.seconds > sliding.declared["guard_seconds"] > 0
    assert score(model, data, mode="chunked").declared["mode"] == "chunked"
    assert score(model, data, stride=16).declared["mode"] == "chunked"
    streamed = np.zeros(100)
    assert score(model, data, mode="stream", stride=4, into=streamed).declared["mode"] == "stream"
    np.testing.assert_allclose(streamed, costs, atol=1e-4)


def test_a_stream_declares_for_itself():
    stream = stream_of(byte_model(16), window=12, stride=4)
    stream.declared = {"adaptation": "scales, every 4 bytes", "steps": 25}  # type: ignore[attr-defined]
    declared = score_stream(stream, noise(100), declared={"mode": "test-time training", "steps": 24}).declared
    assert declared["adaptation"] == "scales, every 4 bytes" and declared["mode"] == "test-time training"
    assert (declared["window"], declared["stride"], declared["steps"]) == (12, 4, 24)


def test_settings_that_contradict_each_other():
    with pytest.raises(UserError, match="no mode 'fast'; choose sliding, chunked, stream or endless"):
        score(byte_model(16), noise(10), mode="fast")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="moves by the whole window, 16, not 4; leave the stride out"):
        score(byte_model(16), noise(10), mode="chunked", stride=4)
    with pytest.raises(UserError, match=r"costs of 10 bytes do not fit an array of shape \(9,\)"):
        score(byte_model(16), noise(10), into=np.zeros(9))
    for mode in ("sliding", "stream"):
        with pytest.raises(UserError, match="window 17 does not fit the model; choose 1 to 16"):
            score(byte_model(16), noise(10), mode=mode, window=17)
        with pytest.raises(UserError, match="nothing to score"):
            score(byte_model(16), np.empty(0, np.uint8), mode=mode)


@pytest.mark.parametrize(("gigabytes", "expected"), [(8, 16_384), (24, 32_768), (80, 131_072)])
def test_a_large_gpu_reads_more_at_a_time(gigabytes, expected, monkeypatch):
    told = SimpleNamespace(total_memory=gigabytes << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: told)
    assert scorer.batch_bytes("cuda") == scorer.batch_bytes(torch.device("cuda:0")) == expected
    assert scorer.batch_bytes("cpu") == 16_384
