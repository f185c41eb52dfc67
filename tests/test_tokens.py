"""Shards and tokenizers: what is written comes back, bytes are those of the text, and bits are divided by them."""

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from tritwise import load
from tritwise.bench.entries import base_config, entry
from tritwise.data import open_bytes
from tritwise.data.corpus import open_parts, tokens_of
from tritwise.data.shards import HEADER, MAGIC, open_shards, read_shard, write_shards
from tritwise.data.tokenizer import Tokenizer, train_tokenizer
from tritwise.errors import UserError
from tritwise.recipes import shakespeare
from tritwise.score import score
from tritwise.ship import read_artifact, read_tokenizer
from tritwise.train import override, train
from tritwise.train.restore import load_run

sentencepiece = pytest.importorskip("sentencepiece")

TEXT = bytes(open_bytes("shakespeare")[:40_000])
VOCAB = 400


def sentencepiece_model(**settings) -> bytes:
    """A model trained by the library itself, with its own defaults but for `settings`."""
    written = io.BytesIO()
    defaults = {"vocab_size": VOCAB, "model_type": "bpe", "minloglevel": 2, "num_threads": 1}
    lines = iter(TEXT.decode().split("\n"))
    sentencepiece.SentencePieceTrainer.Train(sentence_iterator=lines, model_writer=written, **defaults | settings)
    return written.getvalue()


@pytest.fixture(scope="module")
def raw() -> bytes:
    return train_tokenizer(TEXT, VOCAB)


@pytest.fixture(scope="module")
def tokenizer(raw) -> Tokenizer:
    return Tokenizer(raw)


@pytest.fixture(scope="module")
def model_file(raw, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tiny.model"
    path.write_bytes(raw)
    return path


@pytest.fixture(scope="module")
def text_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("source") / "text.txt"
    path.write_bytes(TEXT)
    return path


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITWISE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


# Tokenizers

ODD = ["", "a", " a", "  two  spaces ", "end ", "\n\nlines\n", "żółć — 漢字 🙂\x00\t", "a" * 70_000, "a  " * 40_000]


@pytest.mark.parametrize("text", [*ODD, TEXT.decode()], ids=range(len(ODD) + 1))
@pytest.mark.parametrize("prefix", [False, True])
def test_every_byte_is_counted_once_and_comes_back(tokenizer, text, prefix):
    if prefix:
        lossless = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True}
        tokenizer = Tokenizer(sentencepiece_model(**lossless))
    assert tokenizer.prefix == prefix
    ids = tokenizer.encode(text.encode())
    assert ids.dtype == np.uint16 and tokenizer.decode(ids) == text.encode()
    sizes = tokenizer.sizes(ids)
    assert sizes.sum() == len(text.encode())
    # A second oracle: the library's own pieces, in which a space is a marker and a byte a name.
    pieces = tokenizer._model.IdToPiece(ids.tolist())
    spelled = [1 if p.startswith("<0x") else len(p.replace("▁", " ").encode()) for p in pieces]
    assert (np.array(spelled[1:]) == sizes[1:]).all()


def test_a_marker_counts_only_where_the_text_had_a_space():
    told = Tokenizer(sentencepiece_model(byte_fallback=True))
    assert told.prefix
    the = told._model.PieceToId("▁the")
    assert told.sizes(np.array([the, the, told.start, the])).tolist() == [3, 4, 0, 3]
    assert told.decode(np.array([the, the, told.start, the])) == b"the thethe"
    with pytest.raises(UserError, match=r"does not give the text back: it differs from byte 4 on.*byte_fallback=true"):
        told.encode(b"line\n\nline")  # its own normalization makes spaces of both


def test_a_long_text_is_tokenized_as_the_library_would(tokenizer, monkeypatch):
    whole = tokenizer._model.EncodeAsIds(TEXT.decode())
    monkeypatch.setattr("tritwise.data.tokenizer.CHUNK", 1000)
    assert tokenizer.encode(TEXT).tolist() == whole


def test_what_is_no_tokenizer_is_refused(tmp_path, tokenizer):
    (tmp_path / "x.model").write_bytes(b"not a model")
    with pytest.raises(UserError, match=r"x\.model is no SentencePiece model"):
        Tokenizer.open(tmp_path / "x.model")
    with pytest.raises(UserError, match="no SentencePiece model"):
        Tokenizer(b"")
    with pytest.raises(UserError, match="neither a begin nor an end token"):
        Tokenizer(sentencepiece_model(bos_id=-1, eos_id=-1))
    with pytest.raises(UserError, match="byte 1 is not UTF-8"):
        tokenizer.encode(b"a\xff")
    with pytest.raises(UserError, match=r"no tokenizer of 9 tokens .* choose more than the 256 bytes"):
        train_tokenizer(TEXT[:1000], 9)
    with pytest.raises(UserError, match=r"no tokenizer of 60000 tokens .* choose at most \d+$") as most:
        train_tokenizer(TEXT[:1000], 60_000)
    assert train_tokenizer(TEXT[:1000], int(str(most.value).split()[-1]))


def test_a_tokenizer_that_cannot_be_leaves_no_folder(cli, tmp_path, text_file):
    for size in ("9", "-4"):
        refused = cli("tokenize", text_file, "--vocab", size, "--out", tmp_path / "shards")
        assert refused.code == 2 and "INTERNAL" not in refused.err and not (tmp_path / "shards").exists()


# Shards


def test_shards_come_back_in_order(tmp_path, tokenizer):
    ids = tokenizer.encode(TEXT)
    files = write_shards(ids, tmp_path, "part", 5000)
    assert len(files) == -(-len(ids) // 5000) > 2
    head = np.fromfile(files[0], "<i4", HEADER)
    assert head[:3].tolist() == [MAGIC, 1, 5000] and not head[3:].any()
    assert (np.fromfile(files[-1], "<u2")[2 * HEADER :] == ids[5000 * (len(files) - 1) :]).all()
    assert (open_shards(tmp_path, "all", VOCAB)["val"] == ids).all()
    assert (read_shard(files[1]) == ids[5000:10_000]).all()
    with pytest.raises(UserError, match="is there already"):
        write_shards(ids, tmp_path, "part", 5000)


def test_parts_by_name_or_by_rule(tmp_path):
    write_shards(np.arange(100, dtype=np.uint16), tmp_path, "web_train")
    write_shards(np.arange(100, 150, dtype=np.uint16), tmp_path, "web_val")
    named = open_shards(tmp_path, "named", VOCAB)
    assert {name: len(part) for name, part in named.items()} == {"train": 100, "val": 50} and named["val"][0] == 100
    retrieval = write_shards(np.arange(100, dtype=np.uint16), tmp_path, "retrieval_test")  # val is no word of it
    assert {n: len(part) for n, part in open_shards(tmp_path, "named", VOCAB).items()}["val"] == 50
    retrieval[0].unlink()
    cut = open_shards(tmp_path, "90/10", VOCAB)
    assert cut["val"].tolist() == list(range(135, 150))
    with pytest.raises(UserError, match="no shards for val"):
        open_shards(tmp_path / "web_train_000000.bin", "named", VOCAB)
    with pytest.raises(UserError, match="split named is for shards"):
        open_parts("shakespeare", "named")


DAMAGE = {
    "begins with 7, not 20240520": lambda raw: (7).to_bytes(4, "little") + raw[4:],
    "is a shard of version 9": lambda raw: raw[:4] + (9).to_bytes(4, "little") + raw[8:],
    "names 500 tokens and has 2,022 bytes, not 2,024": lambda raw: raw[:-2],
    "names 500 tokens and has 40 bytes": lambda raw: raw[:40],
    "holds token 499, and the tokenizer knows 400": lambda raw: raw,
}


@pytest.mark.parametrize("said", DAMAGE)
def test_bad_shards_are_refused_in_one_line(cli, tmp_path, model_file, said):
    (file,) = write_shards(np.arange(500, dtype=np.uint16), tmp_path, "train")
    file.write_bytes(DAMAGE[said](file.read_bytes()))
    done = cli("train", "--data", tmp_path, "--tokenizer", model_file, "--out", tmp_path / "run")
    assert done.code == 2 and said in done.err and done.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_shards_without_a_tokenizer_are_not_read_as_text(cli, tmp_path):
    write_shards(np.arange(300, dtype=np.uint16), tmp_path, "train")
    done = cli("train", "--data", tmp_path, "--out", tmp_path / "run")
    assert done.code == 2 and "holds shards of tokens, not text; name their tokenizer with --tokenizer" in done.err


# Scores


class Uniform:
    """Knows nothing about `vocab` tokens."""

    def __init__(self, vocab: int) -> None:
        self.context, self.vocab, self.seen = 32, vocab, set()

    def log_probs(self, ids: torch.Tensor) -> torch.Tensor:
        self.seen |= set(ids[:, 0].tolist())
        return torch.full((*ids.shape, self.vocab), -math.log(self.vocab))


def test_bits_are_divided_by_the_bytes_of_the_source(tokenizer):
    ids, model = tokenizer.encode(TEXT), Uniform(VOCAB)
    costs = np.empty(len(ids))
    found = score(model, ids, alphabet=tokenizer, into=costs)
    assert found.bytes == len(TEXT) and found.declared["tokens"] == len(ids) and found.declared["unit"] == "tokens"
    assert found.bpb == pytest.approx(len(ids) * math.log2(VOCAB) / len(TEXT))
    assert costs == pytest.approx(math.log(VOCAB)) and tokenizer.start in model.seen
    with pytest.raises(UserError, match="scored in the modes sliding and chunked"):
        score(model, ids, alphabet=tokenizer, mode="stream")


def test_tokens_above_255_reach_the_model(tokenizer):
    """A Predictor that knows the next token is charged nothing: nothing is cut to a byte on the way."""
    ids = tokenizer.encode(TEXT[:3000])
    assert ids.max() > 255

    class Oracle(Uniform):
        def log_probs(self, ids: torch.Tensor) -> torch.Tensor:
            told = torch.full((*ids.shape, VOCAB), -math.log(1e6))
            wanted = torch.tensor([follows.get(int(i), 0) for i in ids.reshape(-1)]).view(ids.shape)
            return torch.log_softmax(told.scatter(-1, wanted[..., None], 0.0), dim=-1)

    follows = dict(zip([tokenizer.start, *ids[:-1].tolist()], ids.tolist(), strict=True))
    costs = np.empty(len(ids))
    score(Oracle(VOCAB), ids, alphabet=tokenizer, into=costs)
    right = np.array([follows[before] == i for before, i in zip([tokenizer.start, *ids[:-1]], ids, strict=True)])
    assert costs[right].max() < 0.01 and costs[~right].min() > 10 and right.mean() > 0.05


# Runs

SMALL = {
    "width": 32,
    "depth": 1,
    "ctx": 16,
    "batch": 4,
    "steps": 6,
    "log_interval": 2,
    "eval_interval": 3,
    "save_interval": 3,
    "sample_bytes": 20,
}


@pytest.fixture(scope="module")
def shards(cli_once, text_file, model_file, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    done = cli_once("tokenize", text_file, "--out", folder, "--tokenizer", model_file, "--separator", r"\n\n", "--json")
    assert done.code == 0, done.err
    told = done.json["parts"]
    assert told["train"]["bytes"] + told["val"]["bytes"] == len(TEXT)
    assert told["val"]["tokens"] == len(read_shard(folder / "val_000000.bin"))
    return folder


@pytest.fixture(scope="module")
def run(cli_once, shards, model_file, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "tokens"
    words = ["--data", shards, "--set", "split=named", "--tokenizer", model_file, "--out", out]
    words += [word for key, value in SMALL.items() for word in ("--set", f"{key}={value}")]
    done = cli_once("train", "--recipe", "tiny", *words, "--set", "budget=60000", "--json")
    assert done.code == 0, done.err
    assert done.json["val"]["bytes"] == len(TEXT) - 36_000
    return out


def test_the_shards_hold_the_text_and_its_documents(shards, tokenizer):
    ids = read_shard(shards / "train_000000.bin")
    documents = TEXT[:36_000].split(b"\n\n")
    assert tokenizer.decode(ids) == TEXT[:36_000] and tokenizer.sizes(ids).sum() == 36_000
    assert ids[0] == tokenizer.start and (ids == tokenizer.start).sum() == len(documents)


def test_a_run_on_shards_ships_its_tokenizer_and_scores_bytes(run, cli, shards, model_file, raw, text_file):
    artifact = run / "model.tritwise"
    assert read_tokenizer(artifact) == raw == (run / "tokenizer.model").read_bytes()
    config, model, _, _ = load_run(run)
    assert config.model.vocab == VOCAB == read_artifact(artifact)[0].config.vocab
    told = cli("score", run, "--json").json
    shipped = cli("score", artifact, "--data", shards, "--split", "val", "--rule", "named", "--json").json
    assert told["bpb"] == shipped["bpb"] and told["bytes"] == len(TEXT) - 36_000
    # By hand: all nats of the tokens of val over the bytes of the source.
    ids = read_shard(shards / "val_000000.bin")
    nats = score(model, ids, alphabet=Tokenizer(raw), into=(costs := np.empty(len(ids)))).nats
    assert costs.sum() / math.log(2) / (len(TEXT) - 36_000) == pytest.approx(told["bpb"])
    assert nats * (len(TEXT) - 36_000) == pytest.approx(costs.sum())
    losses = [line["loss"] for line in map(json.loads, (run / "metrics.jsonl").open()) if "loss" in line]
    assert max(losses) < 1.2 * math.log(VOCAB) / 1.5  # per byte, in training as in evaluations
    again = cli("ship", run, "--out", run / "again.tritwise", "--score-bytes", 500, "--json").json
    assert again["streams"]["tokenizer"] > 0 and again["bpb_reread"] == again["bpb_before"] and again["scored"] > 500
    # A text is read with the tokenizer, and its bytes count.
    part = cli("score", artifact, "--data", text_file, "--split", "val", "--json").json
    assert part["bytes"] == 4000 and part["ladder"] and part["declared"]["tokens"] < 4000


def test_what_a_model_of_tokens_can_and_cannot(run, cli, trained, text_file, small_text, shards, tmp_path):
    artifact = run / "model.tritwise"
    written = cli("sample", artifact, "--prompt", "ROMEO: ", "--bytes", 30, "--json").json
    assert written["bytes"] == 30
    assert load(artifact).generate("a", bytes=5, seed=3) == load(run).generate("a", bytes=5, seed=3)
    compared = cli("score", artifact, trained, "--compare", "--data", text_file, "--split", "train", "--json")
    assert compared.code == 0, compared.err
    compared = compared.json
    assert compared["a"]["bytes"] == compared["b"]["bytes"] == 36_000
    refused = {
        ("compress", text_file, "--model", artifact, "--out", tmp_path / "x"): "coded byte by byte",
        ("score", artifact, "--data", text_file, "--mix"): "reads tokens: leave",
        ("score", trained, "--data", shards): "not all models have their tokenizer",
        ("score", run, "--ladder"): "a ladder is made of bytes",
        (
            "train",
            "--data",
            small_text,
            "--tokenizer",
            run / "config.json",
            "--out",
            tmp_path / "y",
        ): "no SentencePiece",
        ("train", "--tokenizer", run / "tokenizer.model", "--set", "vocab=300", "--out", tmp_path / "y"): "leave vocab",
        ("tokenize", small_text, "--out", tmp_path / "z"): "no tokenizer at",
    }
    for words, said in refused.items():
        done = cli(*words)
        assert done.code == 2 and said in done.err and done.err.count("\n") == 1, (words, done.err)


def test_a_resumed_run_on_tokens_ends_bit_equal(small_config, model_file, small_text, tmp_path, assert_same_state):
    config = small_config(tokenizer=str(model_file), steps=8, save_interval=4)
    train(config, tmp_path / "whole")
    train(small_config(tokenizer=str(model_file), steps=8, save_interval=4, keep=0), tmp_path / "cut")
    for later in (tmp_path / "cut/checkpoints").glob("*00000008*"):
        later.unlink()
    train(config, tmp_path / "cut", resume=True)
    assert_same_state(tmp_path / "whole", tmp_path / "cut")


def test_a_text_is_cut_by_bytes_and_tokenized_once(text_file, tokenizer, monkeypatch):
    parts = open_parts(text_file, "90/10", tokenizer)
    assert {name: int(tokenizer.sizes(part).sum()) for name, part in parts.items()} == {"train": 36_000, "val": 4_000}
    monkeypatch.setattr(Tokenizer, "encode", None)
    assert (tokens_of(np.frombuffer(TEXT[36_000:], np.uint8), tokenizer) == parts["val"]).all()


def test_a_budget_has_room_for_vocabulary_and_tokenizer(model_file, raw):
    base = base_config("shakespeare", "90/10", ctx=16, batch=2, steps=4, seconds=0, seed=0)
    of_bytes = entry("flat-ternary", base, 100_000, {})
    of_tokens = entry("flat-ternary", base, 100_000, {"tokenizer": str(model_file)})
    assert of_tokens.model.vocab == VOCAB and (of_tokens.model.width, of_tokens.model.depth) <= (
        of_bytes.model.width,
        of_bytes.model.depth,
    )


def test_contestants_of_tokens_have_a_table_more_of_ngrams_in_the_place_of_words(model_file):
    base = base_config("shakespeare", "90/10", ctx=16, batch=2, steps=3, seconds=0.0, seed=0)
    of_bytes = entry("flat-ternary-ngrams", base, 400_000, {}).model
    of_tokens = entry("flat-ternary-ngrams", base, 400_000, {"tokenizer": str(model_file)}).model
    assert of_bytes.word_tables > of_tokens.word_tables == 0
    assert of_tokens.hashed_tables == of_bytes.hashed_tables
    with pytest.raises(UserError, match=r"^word_tables are for models of bytes"):
        entry("flat-ternary-ngrams", base, 400_000, {"tokenizer": str(model_file), "word_tables": 1})
    recipe = shakespeare()
    made = override(recipe, {"tokenizer": str(model_file)}).model
    assert recipe.model.word_tables > made.word_tables == 0 and made.hashed_tables == recipe.model.hashed_tables
    with pytest.raises(UserError, match=r"^word_tables are for models of bytes"):
        override(recipe, {"tokenizer": str(model_file), "word_tables": 1})
