"""The paired difference: its sign, its interval and how often that is right, and `tritwise score --compare`."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from tritwise.errors import UserError
from tritwise.score import score
from tritwise.score.compare import FEWEST, Comparison, _t_quantile, compare
from tritwise.score.ladder import NGram, count_ngrams
from tritwise.score.ngram import NGramPredictor, ngram_predictor
from tritwise.score.protocol import START, stream_of

BIT = math.log(2)  # nats


def autoregressive(rng: np.random.Generator, texts: int, length: int, memory: float) -> np.ndarray:
    """Gaussian noise of unit variance with a correlation of memory^k at distance k: [texts, length]."""
    out, state = np.empty((length, texts)), rng.standard_normal(texts)
    for i in range(length):
        state = memory * state + math.sqrt(1 - memory**2) * rng.standard_normal(texts)
        out[i] = state
    return out.T


def test_the_difference_is_a_less_b_in_bits():
    rng = np.random.default_rng(0)
    b = rng.exponential(2.0, 40_000)
    a = b - 0.01 * BIT + 0.1 * rng.standard_normal(len(b))
    found = compare(a, b)
    assert found.difference == pytest.approx(float((a - b).mean()) / BIT, rel=1e-12)
    assert found.difference == pytest.approx(found.a_bpb - found.b_bpb, rel=1e-9)
    assert found.low < -0.01 < found.high < 0 and found.better == "A"
    assert (found.bytes, found.level) == (40_000, 0.95)
    turned = compare(b, a)
    assert (turned.low, turned.high) == pytest.approx((-found.high, -found.low)) and turned.better == "B"
    # Pairing is what makes so small a difference visible: each model's own mean is far less certain.
    assert found.high - found.low < 0.1 * (4 * math.sqrt(2) * b.std() / math.sqrt(len(b)) / BIT)


def test_identical_models_differ_by_nothing():
    a = np.random.default_rng(1).exponential(2.0, 10_000)
    found = compare(a, a.copy())
    assert (found.difference, found.low, found.high, found.autocorrelation) == (0, 0, 0, 0)
    assert found.better is None and not found.blocks_too_short


def test_it_says_the_same_every_time():
    rng = np.random.default_rng(2)
    a, b = rng.exponential(1.0, (2, 20_000))
    assert compare(a, b) == compare(a, b)
    wider = compare(a, b, level=0.99)
    assert wider.low < compare(a, b).low < compare(a, b).high < wider.high


@pytest.mark.parametrize(("memory", "length"), [(0.0, 12_000), (0.98, 16_000), (0.999, 64_000)])
def test_the_interval_holds_the_truth_as_often_as_it_says(memory: float, length: int):
    """Over 300 texts whose true difference is 0.1; one standard error of the share is 0.013."""
    noise = autoregressive(np.random.default_rng(3), 300, length, memory)
    nothing = np.zeros(length)
    found = [compare(0.1 + row, nothing) for row in noise]
    covered = np.mean([f.low <= 0.1 / BIT <= f.high for f in found])
    assert (0.89 if memory > 0.99 else 0.92) <= covered <= 0.98
    if memory:  # bytes taken for independent: the error that the blocks are there for
        naive = [compare(0.1 + row, nothing, block=1) for row in noise[:100]]
        assert np.mean([f.low <= 0.1 / BIT <= f.high for f in naive]) < 0.5
        assert np.mean([f.blocks_too_short for f in naive]) == 1


def test_blocks_grow_while_neighbours_are_alike():
    rng = np.random.default_rng(4)
    nothing = np.zeros(64_000)
    assert compare(rng.standard_normal(64_000), nothing).blocks == 32
    slow = np.sin(np.arange(64_000) * 2 * math.pi / 64_000) + 0.1 * rng.standard_normal(64_000)
    found = compare(slow, nothing)
    assert found.blocks == FEWEST and found.block == 8000 and found.autocorrelation > 0.4
    assert compare(slow, nothing, block=2000).blocks == 32 and compare(slow, nothing, block=2000).blocks_too_short


def test_every_byte_counts():
    costs = np.zeros(8_007)
    costs[-1] = 8_007 * BIT
    found = compare(costs, np.zeros(8_007), block=1000)
    assert found.difference == pytest.approx(1) and found.blocks == 8 and found.better is None


@pytest.mark.parametrize(
    ("p", "freedom", "value"),
    [(0.975, 7, 2.3646), (0.975, 31, 2.0395), (0.995, 7, 3.4995), (0.95, 15, 1.7531), (0.975, 1000, 1.9623)],
)
def test_students_t_as_in_tables(p: float, freedom: int, value: float):
    assert _t_quantile(p, freedom) == pytest.approx(value, rel=5e-4)


@pytest.mark.parametrize(
    ("a", "b", "settings", "words"),
    [
        (np.zeros(9000), np.zeros(9001), {}, "A was charged for 9,000 bytes, B for 9,001; score the same text"),
        (np.zeros(7999), np.zeros(7999), {}, "7,999 bytes are too few for an interval; give a text of 8,000"),
        (np.zeros(0), np.zeros(0), {}, "0 bytes are too few"),
        (np.zeros(9000), np.zeros(9000), {"block": 2000}, "too few for an interval; give a text of 16,000"),
        (np.zeros(9000), np.zeros(9000), {"block": -1}, "a block of -1 bytes is none"),
        (np.zeros(9000), np.zeros(9000), {"level": 95}, "confidence level 95 is out of range"),
        (np.full(9000, np.inf), np.zeros(9000), {}, "not finite"),
        (np.zeros(9000), np.full(9000, np.nan), {}, "not finite"),
    ],
)
def test_what_cannot_be_compared(a, b, settings, words):
    with pytest.raises(UserError, match=words):
        compare(a, b, **settings)


# n-grams as Predictors


@pytest.mark.parametrize("order", [1, 2, 5])
@pytest.mark.parametrize("smoothing", ["Witten–Bell", "Kneser–Ney"])
def test_an_ngram_scores_as_the_ladder_says(text: Path, order: int, smoothing):
    data = np.frombuffer(text.read_bytes(), np.uint8)
    model = ngram_predictor(data[:20_000], order, smoothing)
    val = data[20_000:23_000]
    costs = np.empty(len(val))
    found = score(model, val, into=costs)
    # The ladder codes the first byte with no context; the scorer puts a newline before it, which costs nothing.
    all_of_it = model.model.nats(np.concatenate(([START], val)).astype(np.uint8)) * (len(val) + 1)
    first = -math.log(model.model.distribution(b"")[START])
    assert found.nats * len(val) == pytest.approx(all_of_it - first, rel=1e-6)
    assert costs.sum() == pytest.approx(found.nats * len(val), rel=1e-12)
    middle = -math.log(model.model.distribution(val[990:1000].tobytes())[val[1000]])
    assert costs[1000] == pytest.approx(middle, rel=1e-5)


def test_an_ngram_is_the_same_as_a_stream():
    data = np.random.default_rng(5).integers(97, 101, 3000).astype(np.uint8)
    model = NGramPredictor(NGram(count_ngrams(data, 4)), context=64)
    ids = torch.from_numpy(data[:200].astype(np.int64))
    whole = model.log_probs(torch.cat((torch.tensor([START]), ids[:63]))[None])[0]
    assert torch.allclose(whole.exp().sum(-1), torch.ones(64), atol=1e-5)
    stream = stream_of(model)
    rows = torch.cat([stream.read(piece) for piece in ids.split(7)])
    assert torch.allclose(rows[:64], whole, atol=1e-5)
    known = torch.from_numpy(model.model.distribution(data[147:150].tobytes())).log().float()
    assert torch.allclose(rows[150], known, atol=1e-5)  # long after the first window was full
    two = model.log_probs(torch.stack((ids[:50], ids[50:100])))
    assert torch.equal(two[1], model.log_probs(ids[None, 50:100])[0])


# the command


def test_score_compare(trained: Path, text: Path, cli):
    words = ("--data", text, "--split", "test", "--rule", "50/30/20", "--json")
    done = cli("score", "--compare", trained / "model.tritwise", "ngram:3", *words)
    assert done.code == 0 and len(done.out.splitlines()) == 1
    found = done.json
    alone = [cli("score", name, *words, "--no-ladder").json for name in (trained, "ngram:3")]
    assert found["difference"] == pytest.approx(alone[0]["bpb"] - alone[1]["bpb"], rel=1e-6)
    assert found["low"] < found["difference"] < found["high"] and found["better"] in ("A", "B", None)
    assert set(Comparison._fields) <= set(found) and found["bytes"] == 12_000 and found["blocks"] in (8, 12)
    assert found["a"]["model"] == str(trained / "model.tritwise") and found["b"]["declared"]["mode"] == "sliding"
    assert (found["a"]["bpb"], found["b"]["bpb"]) == (alone[0]["bpb"], alone[1]["bpb"])


def test_score_compare_for_people(trained: Path, text: Path, cli):
    told = cli("score", "ngram:1", "ngram:4", "--compare", "--data", text, "--split", "val", "--rule", "80/20")
    assert told.code == 0 and not told.err
    pattern = r"A needs \d\.\d{4} bits per byte more than B; A − B lies in \+\d\.\d{4} … \+\d\.\d{4} \(95% interval\)"
    assert re.search(pattern + ": B is better", told.out) and "blocks of 1,000 bytes" in told.out
    same = cli("score", "ngram:2", "ngram:2", "--compare", "--data", text, "--split", "val", "--rule", "80/20")
    assert "this text does not tell which is better" in same.out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("ngram:2", "--compare"), "models named: 1; name two models to compare"),
        (("ngram:2", "ngram:3"), "models named: 2; name one model, or two with --compare"),
        (("ngram:two",), "ngram:two names no n-gram; write for example ngram:5"),
        (("ngram:2",), "counts the train part of the text, and there is none; choose a part with --split val"),
        (("ngram:9", "--split", "val"), "n-gram order out of range"),
        (("ngram:2", "--split", "val", "--device", "gpu"), "there is no device 'gpu'; choose auto, cpu or cuda"),
        (("ngram:2", "--split", "val", "--mode", "guess"), "there is no mode 'guess'"),
        (("ngram:2", "--split", "val", "--mix", "--mode", "chunked"), "as a stream; leave --mode chunked out"),
        (("ngram:2", "--split", "val", "--mix-train"), "--mix-train counts for the mixture; add --mix"),
        (("ngram:2", "--split", "val", "--no-guard"), "about --adapt; add --adapt all or --adapt scales"),
        (("ngram:2", "--split", "val", "--adapt-rate", "1"), "about --adapt; add --adapt all or --adapt scales"),
        (("ngram:2", "--split", "val", "--adapt", "all"), "has no weights to train"),
        (("ngram:2", "--split", "val", "--separator", "\\x"), r"--separator \\x is not readable"),
    ],
)
def test_words_that_the_command_refuses(words, told, text: Path, cli):
    done = cli("score", *words, "--data", text)
    assert done.code == 2 and re.search(told, done.err) and done.err.count("\n") == 1


def test_a_model_that_names_no_text(cli):
    done = cli("score", "ngram:2")
    assert done.code == 2 and "ngram:2 does not say what it was trained on; name a text with --data" in done.err


def test_how_a_text_is_read_can_be_chosen(trained: Path, text: Path, cli):
    words = ("score", trained, "--data", text, "--split", "val", "--no-ladder", "--window", 32, "--stride", 8)
    sliding, stream = cli(*words, "--json").json, cli(*words, "--mode", "stream", "--json").json
    assert stream["declared"]["mode"] == "stream" and stream["bpb"] == pytest.approx(sliding["bpb"], abs=1e-4)
    chunked = cli(*words[:-2], "--mode", "chunked", "--json").json
    assert chunked["stride"] == 32 and chunked["declared"]["mode"] == "chunked" and chunked["bpb"] != sliding["bpb"]
    told = cli(*words, "--separator", r"\n\n").out
    assert re.search(r"\(window 32, stride 8, sliding, reset: \d+ documents, after .*, 2 extra bytes, ", told)


def test_a_model_may_learn_while_it_is_scored(trained: Path, small_text: Path, cli):
    words = ("score", trained, "--data", small_text, "--split", "val", "--rule", "80/20", "--no-ladder")
    plain = cli(*words, "--json").json
    mixed = cli(*words, "--mix", "--mix-train", "--json").json
    assert mixed["bpb"] < plain["bpb"] - 0.1 and mixed["declared"]["extra_bytes"] == 2400
    adapted = cli(*words, "--adapt", "scales", "--adapt-piece", 32, "--adapt-rate", 0.01, "--no-guard", "--json").json
    about = adapted["declared"]
    assert about["adapt_steps"] == 600 // 32 and about["adapt_worst_bpb"] is None and "0.01" in about["adaptation"]
    assert "adaptation: " in cli(*words, "--mix").out
    refused = cli("score", trained, "--data", small_text, "--mix", "--mix-train")
    assert refused.code == 2 and "the train part of the text, and there is none" in refused.err
