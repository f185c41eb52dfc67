"""Models of transformers: bytes through the Predictor, tokens per byte of the source text, and what is refused.

Everything is tiny, random and made here; nothing is downloaded.
"""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tritwise.errors import UserError
from tritwise.score import score

transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra hf)")

from tritwise.score.hf import HFBytes, HFTokens, load_hf  # noqa: E402

TEXT = "To bé, or not to be:\n  that   is the question. 日本語 🙂\n" * 4
DATA = np.frombuffer(TEXT.encode(), np.uint8)
CTX = 32


def gpt2(vocabulary: int, **changes):
    """A random GPT-2 of one block. Logits are spread, so that tokens have prices of their own."""
    torch.manual_seed(0)
    settings = {"n_positions": CTX, "n_embd": 16, "n_layer": 1, "n_head": 2, "bos_token_id": None, "eos_token_id": None}
    config = transformers.GPT2Config(vocab_size=vocabulary, **settings | changes)
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    return model


def tokenizer(*, lower: bool = False, alphabet: bool = True):
    """A byte-level BPE trained on TEXT: 256 bytes and the commonest pairs, some of which end inside a character."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    made.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    if lower:
        made.normalizer = normalizers.Lowercase()  # type: ignore[assignment]
    letters = pre_tokenizers.ByteLevel.alphabet() if alphabet else []
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=letters, special_tokens=["<s>"], show_progress=False)
    made.train_from_iterator([TEXT], trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>")


@pytest.fixture(scope="module")
def tokens() -> HFTokens:
    return HFTokens(gpt2(300), tokenizer())


@pytest.fixture(scope="module")
def byte_folder(tmp_path_factory) -> Path:
    """A saved model of 256 symbols without a tokenizer."""
    folder = tmp_path_factory.mktemp("hf") / "bytes"
    gpt2(256).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def token_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hf") / "tokens"
    gpt2(300).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


# bytes


def test_a_byte_model_is_a_predictor(byte_folder: Path):
    model = load_hf(str(byte_folder))
    assert isinstance(model, HFBytes) and model.context == CTX
    found = score(model, DATA, window=16, stride=4)
    text, total = [ord("\n"), *DATA.tolist()], 0.0
    with torch.no_grad():
        for i in range(len(DATA)):  # the same windows, written out: they end at 16, 20, 24, …
            end = min(len(DATA), 16 if i < 16 else 16 + -(-(i + 1 - 16) // 4) * 4)
            ids = torch.tensor([text[max(0, end - 16) : i + 1]])
            total -= float(torch.log_softmax(model.model(ids).logits[0, -1].double(), 0)[DATA[i]])
    assert found.nats * len(DATA) == pytest.approx(total, rel=1e-5) and found.bytes == len(DATA)


# tokens


def slow_nats(model: HFTokens, ids: list[int], window: int, stride: int) -> list[float]:
    """What each token costs, one call a token."""
    costs = []
    with torch.no_grad():
        for i, token in enumerate(ids):
            end = window
            while end <= i:
                end += stride
            end = min(end, len(ids))
            row = [model.start, *ids[max(0, end - window) : i]]
            logits = model.model(torch.tensor([row])).logits[0, -1].double()
            costs.append(float(torch.logsumexp(logits, 0) - logits[token]))
    return costs


@pytest.mark.parametrize(("window", "stride"), [(16, 5), (16, 16), (32, 1), (1, 1)])
def test_nats_of_tokens_over_bytes_of_text(tokens: HFTokens, window: int, stride: int):
    ids = tokens.tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert len(ids) < len(DATA)
    found = tokens.score(DATA, window=window, stride=stride)
    expected = sum(slow_nats(tokens, ids, window, stride))
    assert found.bpb == pytest.approx(expected / math.log(2) / len(DATA), rel=1e-5)
    assert (found.bytes, found.window, found.stride) == (len(DATA), window, stride)
    about = found.declared
    assert (about["unit"], about["tokens"], about["start_token"]) == ("tokens", len(ids), "<s>")
    assert about["mode"] == ("chunked" if window == stride else "sliding")


def test_batches_change_nothing(tokens: HFTokens, monkeypatch):
    one = tokens.score(DATA, window=8)
    monkeypatch.setattr("tritwise.score.hf.BATCH_LOGITS", 1)
    assert tokens.score(DATA, window=8).nats == pytest.approx(one.nats, rel=1e-6)


def test_defaults_and_modes(tokens: HFTokens, monkeypatch):
    found = tokens.score(DATA)
    assert (found.window, found.stride, found.declared["mode"]) == (CTX, CTX // 2, "sliding")
    chunked = tokens.score(DATA, mode="chunked")
    assert (chunked.window, chunked.stride, chunked.declared["mode"]) == (CTX, CTX, "chunked")
    monkeypatch.setattr("tritwise.score.hf.LONGEST_WINDOW", 20)
    assert tokens.score(DATA).window == 20 and tokens.score(DATA, window=CTX).window == CTX


def test_every_byte_gets_its_tokens_cost(tokens: HFTokens):
    text = "жаба 🚀 to bé, or not " * 3  # some characters are none of the tokenizer's tokens, but two to four of them
    data = np.frombuffer(text.encode(), np.uint8)
    into = np.full(len(data), np.nan)
    found = tokens.score(data, window=16, stride=5, into=into)
    assert into.sum() == pytest.approx(found.nats * len(data), rel=1e-9)
    ids = tokens.tokenizer(text, add_special_tokens=False)["input_ids"]
    costs, split = slow_nats(tokens, ids, 16, 5), 0
    for count in range(1, len(ids) + 1):
        prefix = tokens.tokenizer.decode(ids[:count])
        if prefix.endswith("\ufffd"):  # the token ends inside a character
            split += 1
        else:
            assert into[: len(prefix.encode())].sum() == pytest.approx(sum(costs[:count]), rel=1e-5)
    assert 0 < split < len(ids) // 2


def test_a_model_that_knows_nothing_pays_for_tokens(tokens: HFTokens):
    flat = gpt2(300)
    with torch.no_grad():
        flat.lm_head.weight.zero_()
    found = HFTokens(flat, tokens.tokenizer).score(DATA)
    assert found.bpb == pytest.approx(found.declared["tokens"] * math.log2(300) / len(DATA), rel=1e-5)


def test_load_a_model_with_its_tokenizer(token_folder: Path, tokens: HFTokens):
    model = load_hf(str(token_folder))
    assert isinstance(model, HFTokens)
    assert model.score(DATA).nats == pytest.approx(tokens.score(DATA).nats, rel=1e-6)


# what is refused


def test_a_tokenizer_that_loses_something():
    model = HFTokens(gpt2(300), tokenizer(lower=True))
    with pytest.raises(UserError, match="the tokenizer does not give the text back: it differs from byte 0 on"):
        model.score(DATA)
    model = HFTokens(gpt2(300), tokenizer(alphabet=False))
    with pytest.raises(UserError, match=r"does not give the text back: it differs from byte 3 on \(4 bytes for 5\)"):
        model.score(np.frombuffer(b"To Zb", np.uint8))


def test_text_that_is_none(tokens: HFTokens):
    with pytest.raises(UserError, match="byte 2 is not UTF-8, and the model's tokenizer reads text only"):
        tokens.score(np.frombuffer(b"ab\xff", np.uint8))
    with pytest.raises(UserError, match="nothing to score"):
        tokens.score(DATA[:0])


def test_a_model_that_looks_ahead(tokens: HFTokens):
    class Peeking(torch.nn.Module):
        config, device = tokens.model.config, torch.device("cpu")

        def forward(self, input_ids, use_cache):
            found = tokens.model(input_ids=input_ids, use_cache=False)
            found.logits[:, :-1].scatter_add_(2, input_ids[:, 1:, None], torch.full_like(found.logits[:, 1:, :1], 5.0))
            return found

    with pytest.raises(UserError, match=r"later tokens were changed; .*\(condition 1, strict causality\)"):
        HFTokens(Peeking(), tokens.tokenizer).score(DATA)


def test_numbers_that_are_none(tokens: HFTokens):
    broken = gpt2(300)
    with torch.no_grad():
        broken.lm_head.weight[5] = math.nan
    with pytest.raises(UserError, match="cannot be scored"):
        HFTokens(broken, tokens.tokenizer).score(DATA)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"window": CTX + 1}, f"window {CTX + 1} does not fit the model; choose 1 to {CTX}"),
        ({"window": 8, "stride": 9}, "stride 9 would skip or repeat"),
        ({"mode": "stream"}, "knows no mode 'stream'; choose sliding or chunked"),
    ],
)
def test_settings_that_do_not_fit(tokens: HFTokens, settings, words):
    with pytest.raises(UserError, match=words):
        tokens.score(DATA, **settings)


def test_tokens_that_the_model_does_not_know():
    with pytest.raises(UserError, match="the tokenizer has tokens that the model does not know"):
        HFTokens(gpt2(270), tokenizer()).score(DATA)


def test_a_tokenizer_that_does_not_say_where(tokens: HFTokens, monkeypatch):
    monkeypatch.setattr(type(tokens.tokenizer), "is_fast", False)
    assert tokens.score(DATA).bytes == len(DATA)
    with pytest.raises(UserError, match="does not say where its tokens stand"):
        tokens.score(DATA, into=np.empty(len(DATA)))


def test_models_that_cannot_be_loaded(tmp_path: Path, monkeypatch):
    with pytest.raises(UserError, match=r"cannot load .*missing with transformers"):
        load_hf(str(tmp_path / "missing"))
    with pytest.raises(UserError, match="Unrecognized model"):
        load_hf(str(tmp_path))
    gpt2(300).save_pretrained(tmp_path / "bare")
    with pytest.raises(UserError, match="has no tokenizer and 300 symbols, not the 256 bytes"):
        load_hf(str(tmp_path / "bare"))
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"transformers is not installed .*; pip install 'tritwise\[hf\]'"):
        load_hf("anything")


# the command


def test_score_of_both_kinds(byte_folder: Path, token_folder: Path, text: Path, cli):
    words = ("--data", text, "--split", "val", "--no-ladder")
    one = cli("score", f"hf:{byte_folder}", *words, "--json").json
    other = cli("score", f"hf:{token_folder}", *words)
    assert one["bytes"] == 6000 and other.code == 0
    assert f"(window {CTX}, stride {CTX // 2}, tokens, sliding, " in other.out
    found = cli("score", f"hf:{byte_folder}", f"hf:{token_folder}", "--compare", "--data", text, "--json").json
    assert found["bytes"] == 60_000 and found["low"] < found["difference"] < found["high"]
    assert found["b"]["declared"]["unit"] == "tokens"
    refused = cli("score", f"hf:{token_folder}", *words, "--separator", "x")
    assert refused.code == 2 and "reads tokens: leave --separator, --adapt and --mix out" in refused.err
