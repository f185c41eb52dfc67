"""The guards: a model that cheats gets no number, and is told which of the four conditions it breaks."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from tritwise.data import open_bytes
from tritwise.errors import UserError
from tritwise.models import ByteLM, ModelConfig
from tritwise.score import score, score_stream, scorer, stream_of
from tritwise.score.cheats import EntropyExpert, Peeking, Remembering, counted_twice
from tritwise.score.guards import CONDITIONS, Tally, check_sums
from tritwise.score.windows import windows_of

TEXT = np.array(open_bytes("shakespeare")[:3000])
CONTEXT = 32


class Bigram:
    """An honest Predictor: what followed a byte in another part of the text."""

    context = CONTEXT

    def __init__(self) -> None:
        train = np.array(open_bytes("shakespeare")[10_000:400_000], dtype=np.int64)
        counts = torch.ones(256, 256).index_put_(
            (torch.from_numpy(train[:-1]), torch.from_numpy(train[1:])), torch.tensor(1.0), accumulate=True
        )
        self.table = torch.log(counts / counts.sum(dim=1, keepdim=True))

    def log_probs(self, ids: Tensor) -> Tensor:
        return self.table[ids]


class OtherRows(Bigram):
    """Cheat 2 again: looks the byte up in the window below, which overlaps by all but `stride` bytes."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def log_probs(self, ids: Tensor) -> Tensor:
        found = super().log_probs(ids).exp()
        for p in range(self.stride - 1, ids.shape[1]):
            sure = torch.nn.functional.one_hot(ids[1:, p + 1 - self.stride], 256).float()
            found[:-1, p] = 0.1 * found[:-1, p] + 0.9 * sure
        return torch.log(found)


class CountingStream:
    """An honest Stream that learns: order-0 counts of the bytes read. `learn_first` makes it the third cheat."""

    def __init__(self, *, learn_first: bool = False, forgets: bool = True, ahead: int = 0, total: float = 1.0) -> None:
        self.learn_first, self.forgets, self.ahead, self.total = learn_first, forgets, ahead, total
        self.counts = torch.ones(256)

    def log_probs(self) -> Tensor:
        return torch.log(self.total * self.counts / self.counts.sum())

    def read(self, ids: Tensor) -> Tensor:
        rows = []
        for place, byte in enumerate(ids.tolist()):
            later = ids[place + self.ahead : place + self.ahead + 1] if self.ahead else ids[:0]
            self.counts[later] += 20
            if self.learn_first:
                self.counts[byte] += 20
            rows.append(self.log_probs())
            self.counts[byte] += 20 * (not self.learn_first)
            self.counts[later] -= 20
        return torch.stack(rows)

    def reset(self) -> None:
        if self.forgets:
            self.counts = torch.ones(256)


def unguarded(run: Callable[[], float]) -> float:
    """What `run` would report if nobody looked."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scorer, "check_predictor", lambda *_: {})
        for name in ("check_sums", "check_stream", "check_told"):
            patch.setattr(scorer, name, lambda *_: None)
        return run()


def rejected(condition: int, run: Callable[[], float], honest: float) -> str:
    """The message with which a cheat is rejected. It must be one: unwatched it beats the honest model by far."""
    assert unguarded(run) < honest - 0.1
    with pytest.raises(UserError) as raised:
        run()
    assert CONDITIONS[condition] in str(raised.value)
    return str(raised.value)


HONEST = score(Bigram(), TEXT).bpb


# The honest


def test_honest_models_pass():
    assert 3 < HONEST < 4
    assert score(Bigram(), TEXT, mode="stream").bpb == pytest.approx(HONEST, abs=1e-6)
    assert 4 < score_stream(CountingStream(), TEXT).bpb < 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [{"window": 5}, {"ngrams": 3, "ngram_rows": 64}, {"weights": "float"}], ids=str)
def test_byte_models_pass(shape: dict, dtype: torch.dtype):
    torch.manual_seed(0)
    model = ByteLM(ModelConfig(width=32, depth=2, ctx=CONTEXT, **shape), dtype).eval()
    assert score(model, TEXT[:500]).bpb == unguarded(lambda: score(model, TEXT[:500]).bpb)
    assert score(model, TEXT[:200], mode="stream").bytes == 200


@pytest.mark.parametrize("length", [1, 2, 3, 31, 32, 33])
def test_short_texts_pass(length: int):
    data = TEXT[:length]
    for mode in ("sliding", "chunked", "stream"):
        assert score(Bigram(), data, mode=mode).bytes == length
    assert score(Bigram(), data, documents=range(1, length)).bytes == length


def test_a_model_of_fewer_symbols_is_asked_for_no_others():
    torch.manual_seed(0)
    model = ByteLM(ModelConfig(width=32, depth=1, ctx=CONTEXT, vocab=128)).eval()  # the text is ASCII
    for mode in ("sliding", "stream"):
        assert score(model, TEXT[:200], mode=mode).bytes == 200


# The four cheats


def test_an_entropy_expert_is_no_probability():
    message = rejected(2, lambda: score(EntropyExpert(Bigram()), TEXT).bpb, HONEST)
    total = float(message.split("sum to ")[1].split(",")[0])
    assert total > 1.5 and message.startswith("the model's probabilities sum to ")


@pytest.mark.parametrize("mode", ["sliding", "chunked"])
@pytest.mark.parametrize(
    "cheat",
    [Peeking(Bigram()), Peeking(Bigram(), strength=0.4), Peeking(Bigram(), share=3)],
    ids=["the next byte", "a little", "every third time"],
)
def test_a_model_that_peeks(cheat: Peeking, mode: scorer.Mode):
    message = rejected(1, lambda: score(cheat, TEXT, mode=mode).bpb, HONEST)
    assert "when the bytes from" in message


@pytest.mark.parametrize("ahead", [2, 5])
def test_a_model_that_peeks_further_ahead_need_not_gain_to_be_rejected(ahead: int):
    with pytest.raises(UserError, match=CONDITIONS[1]):
        score(Peeking(Bigram(), ahead, strength=0.01), TEXT)


def test_a_model_that_reads_the_other_windows():
    rejected(1, lambda: score(OtherRows(4), TEXT, stride=4).bpb, score(Bigram(), TEXT, stride=4).bpb)


def test_a_cache_keyed_by_the_target():
    # A cache that is filled by scoring the text twice is as good as the text.
    def twice() -> float:
        cheat = Remembering(Bigram())
        score(cheat, TEXT)
        return score(cheat, TEXT).bpb

    assert "asked twice for the same windows" in rejected(3, twice, HONEST)


def test_a_memory_that_starts_after_the_probes_is_seen_when_their_windows_are_scored(monkeypatch):
    monkeypatch.setattr(scorer, "BATCH_BYTES", 256)  # many calls, from each of which the next could learn
    with pytest.raises(UserError, match=r"asked twice for the same window, .*condition 3"):
        score(Remembering(Bigram(), from_call=4), TEXT)  # two probes of two calls each come first


def test_a_model_that_answers_at_random():
    model = torch.nn.Dropout(0.5)
    model.context = CONTEXT  # type: ignore[assignment]
    model.log_probs = lambda ids: torch.log_softmax(model(torch.ones(*ids.shape, 256)), dim=-1)  # type: ignore[assignment]
    with pytest.raises(UserError, match=r"turn dropout off.*condition 3"):
        score(model, TEXT)  # type: ignore[arg-type]
    model.eval()
    assert score(model, TEXT).bpb == pytest.approx(8)  # type: ignore[arg-type]


@pytest.mark.parametrize("where", [0, 40, -1])
def test_a_window_that_counts_bytes_twice(where: int, monkeypatch: pytest.MonkeyPatch):
    # Bytes deep in a window are cheap. Who scores them again, and divides by all he scored, has a better mean.
    def overlapping(*arguments) -> np.ndarray:
        return counted_twice(windows_of(*arguments), where)

    monkeypatch.setattr(scorer, "windows_of", overlapping)
    with pytest.raises(UserError, match=r"byte [0-9]+ was (scored twice|left out).*condition 4, every byte once"):
        score(Bigram(), TEXT)


# Streams


def test_a_stream_that_learns_a_byte_before_it_scores_it():
    honest = score_stream(CountingStream(), TEXT).bpb
    message = rejected(3, lambda: score_stream(CountingStream(learn_first=True), TEXT).bpb, honest)
    assert "when that byte itself was changed" in message


def test_a_stream_that_reads_ahead():
    with pytest.raises(UserError, match=r"when a later byte, [0-9]+, was changed.*condition 1"):
        score_stream(CountingStream(ahead=1), TEXT)


def test_a_stream_that_does_not_forget():
    with pytest.raises(UserError, match=r"after a reset the stream still remembers.*condition 3"):
        score_stream(CountingStream(forgets=False), TEXT)


@pytest.mark.parametrize("total", [0.99, 1.01, math.nan])
def test_a_stream_whose_probabilities_are_none(total: float):
    with pytest.raises(UserError, match=r"probabilities sum to .*, not 1.*condition 2"):
        score_stream(CountingStream(total=total), TEXT)


def test_a_stream_must_score_with_what_it_told():
    class TwoFaced(CountingStream):
        def read(self, ids: Tensor) -> Tensor:
            rows = super().read(ids)
            if len(ids) > 600:  # no probe is as long
                rows[0] = torch.log_softmax(10 * torch.nn.functional.one_hot(ids[0], 256).float(), dim=0)
            return rows

    with pytest.raises(UserError, match=r"told other probabilities of byte 0 before it saw it.*condition 3"):
        score_stream(TwoFaced(), TEXT)


def test_a_peeking_model_is_no_better_as_a_stream():
    with pytest.raises(UserError, match=r"condition [13]"):
        score_stream(stream_of(Peeking(Bigram())), TEXT)


# The parts


def test_the_tally_counts_for_itself():
    tally = Tally(5)
    tally.add(0, np.array([1.0, 2.0]))
    for first, fault in ((1, "byte 1 was scored twice"), (3, "byte 2 was left out")):
        with pytest.raises(UserError, match=fault):
            tally.add(first, np.ones(1))
    with pytest.raises(UserError, match=r"2 bytes were scored of a text of 5.*condition 4"):
        tally.close()
    with pytest.raises(UserError, match=r"6 bytes were scored of a text of 5.*condition 4"):
        tally.add(2, np.ones(4))
    tally = Tally(5)
    tally.add(0, np.array([1.0, 2.0]))
    tally.add(2, np.array([4.0, 8.0, 16.0]))
    assert tally.close() == 31


def test_sums_are_checked_where_they_count():
    log_probs = torch.full((3, 2, 256), -math.log(256))
    log_probs[1, 1] += 2e-4
    counts = np.ones((3, 2), bool)
    with pytest.raises(UserError, match="condition 2"):
        check_sums(log_probs, 0, counts)
    counts[1, 1] = False
    check_sums(log_probs, 0, counts)


class Counting(Bigram):
    """How many positions were asked for, and how many calls it took."""

    def __init__(self, context: int) -> None:
        super().__init__()
        self.context, self.asked = context, 0

    def log_probs(self, ids: Tensor) -> Tensor:
        self.asked += ids.numel()
        return super().log_probs(ids)


@pytest.mark.parametrize("mode", ["sliding", "chunked"])
@pytest.mark.parametrize("context", [64, 256, 512, 1024])
def test_guards_read_little(context: int, mode: scorer.Mode):
    data = np.array(open_bytes("shakespeare")[:100_000])
    watched, alone = Counting(context), Counting(context)
    assert score(watched, data, mode=mode).nats == unguarded(lambda: score(alone, data, mode=mode).nats)
    assert alone.asked < watched.asked < 1.05 * alone.asked


def test_of_a_larger_batch_more_sums_are_taken():
    """One position whose probabilities do not sum to 1, which 64 of 65,536 would have passed over, and 256 do not."""
    count = 4 * 16_384
    few, many = (set(np.random.default_rng(5).choice(count, n, replace=False).tolist()) for n in (64, 256))
    log_probs = torch.full((count, 4), -math.log(4))
    check_sums(log_probs, 5)
    log_probs[min(many - few)] += 0.1
    with pytest.raises(UserError, match=r"sum to 1\.10"):
        check_sums(log_probs, 5)
