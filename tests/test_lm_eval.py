"""Our models behind lm-eval's interface. Where lm-eval is not installed, its base class is replaced by a small one."""

import importlib
import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from tritwise.errors import UserError
from tritwise.models import ByteLM, ModelConfig
from tritwise.score import score
from tritwise.score.ngram import ngram_predictor

INSTALLED = importlib.util.find_spec("lm_eval") is not None
START = ord("\n")
CTX = 16


class Hook:
    """lm-eval's cache hook, as much of it as is called."""

    def __init__(self) -> None:
        self.seen: list[tuple] = []

    def add_partial(self, kind: str, arguments, answer) -> None:
        self.seen.append((kind, tuple(arguments), answer))


class SmallLM:
    """lm_eval.api.model.LM, as much of it as is used."""

    def __init__(self) -> None:
        self.cache_hook, self._device = Hook(), None


@pytest.fixture(scope="module")
def adapter():
    """The module tritwise.score.lm_eval."""
    with pytest.MonkeyPatch.context() as patch:
        if not INSTALLED:
            model = ModuleType("lm_eval.api.model")
            model.LM = SmallLM  # type: ignore[attr-defined]
            for name in ("lm_eval", "lm_eval.api"):
                patch.setitem(sys.modules, name, ModuleType(name))
            patch.setitem(sys.modules, "lm_eval.api.model", model)
        patch.delitem(sys.modules, "tritwise.score.lm_eval", raising=False)
        yield importlib.import_module("tritwise.score.lm_eval")
        sys.modules.pop("tritwise.score.lm_eval")


@pytest.fixture(scope="module")
def model() -> ByteLM:
    """A float model of one block with random weights, and logits far from even."""
    torch.manual_seed(0)
    made = ByteLM(ModelConfig(width=32, depth=1, heads=2, ctx=CTX, weights="float", ngrams=1)).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0, 0.3)
    return made


@pytest.fixture
def lm(adapter, model):
    return adapter.ByteEval(model)


def ask(*arguments) -> SimpleNamespace:
    """A request, as lm_eval.api.instance.Instance shows it."""
    return SimpleNamespace(args=arguments)


@torch.no_grad()
def said(model: ByteLM, before: bytes) -> torch.Tensor:
    """log p(next byte | before): float64 [256], by one plain call."""
    return model.log_probs(torch.tensor([[START, *before]]))[0, -1].double()


def test_loglikelihood(lm, model):
    for context, continuation in (("", "ab"), ("ab", "c"), ("hé", " é\n"), ("0123456789", "abcde")):
        ((found, greedy),) = lm.loglikelihood([ask(context, continuation)])
        raw, after, total = context.encode(), continuation.encode(), 0.0
        for place, byte in enumerate(after):
            total += float(said(model, raw + after[:place])[byte])
        assert found == pytest.approx(total, abs=1e-4) and not greedy
    assert lm.loglikelihood([ask("abc", "")]) == [(0.0, True)]


def test_what_is_greedy(lm, model):
    likeliest = chr(int(said(model, b"ab")[:128].argmax()))
    best = bytes([int(said(model, b"ab").argmax())])
    ((_, greedy),) = lm.loglikelihood([ask("ab", likeliest)])
    assert greedy == (best == likeliest.encode())
    text = next(p for p in map(chr, range(128)) if int(said(model, p.encode()).argmax()) < 128)
    follower = chr(int(said(model, text.encode()).argmax()))
    ((found, greedy),) = lm.loglikelihood([ask(text, follower)])
    assert greedy and found == pytest.approx(float(said(model, text.encode()).max()), abs=1e-4)


def test_the_chain_rule(lm):
    """p(bc | a) = p(b | a) · p(c | ab): what is context and what continuation makes no difference to the sum."""
    (whole, _), (first, _), (second, _) = lm.loglikelihood([ask("a", "bcdef"), ask("a", "bc"), ask("abc", "def")])
    assert whole == pytest.approx(first + second, abs=1e-4)


def test_of_a_long_context_the_end_is_read(lm, model):
    long = "".join(chr(97 + i * 7 % 26) for i in range(100))
    ((found, _),) = lm.loglikelihood([ask(long, "xyz")])
    kept = long[-(CTX - 1 - 3) :]
    ((expected, _),) = lm.loglikelihood([ask(kept, "xyz")])
    assert found == expected
    assert found != lm.loglikelihood([ask(kept[1:], "xyz")])[0][0]
    # A continuation longer than the window: every byte of it counts, once.
    ((found, _),) = lm.loglikelihood([ask("ab", long)])
    assert -15 * 101 < found < -2 * 100 and math.isfinite(found)


def test_rolling_is_the_score(lm, model):
    texts = ["", "x", "To be, or not to be: that is the question.\n" * 3, "日本語"]
    found = lm.loglikelihood_rolling([ask(text) for text in texts])
    assert found[0] == 0.0
    for text, value in zip(texts[1:], found[1:], strict=True):
        data = np.frombuffer(text.encode(), np.uint8)
        assert value == pytest.approx(-score(model, data).nats * len(data), rel=1e-12)
    # A text that fits the window has one probability, however it is asked for.
    assert found[3] == pytest.approx(lm.loglikelihood([ask("", "日本語")])[0][0], abs=1e-4)


def test_window_and_stride(adapter, model):
    text = "To be, or not to be: that is the question.\n"
    narrow = adapter.ByteEval(model, window=8, stride=2)
    data = np.frombuffer(text.encode(), np.uint8)
    (found,) = narrow.loglikelihood_rolling([ask(text)])
    assert found == pytest.approx(-score(model, data, window=8, stride=2).nats * len(data), rel=1e-12)
    with pytest.raises(UserError, match="window 17 does not fit the model"):
        adapter.ByteEval(model, window=17).loglikelihood([ask("a", "b")])


# generation, by a model that has learned one sentence


SENTENCE = "the cat sat. the dog ran. é! "


@pytest.fixture(scope="module")
def parrot(adapter):
    return adapter.ByteEval(ngram_predictor(np.frombuffer((SENTENCE * 50).encode(), np.uint8), 8))


@pytest.mark.parametrize(
    ("settings", "answer"),
    [
        ({"until": ["."]}, "t sat"),
        ({"until": "."}, "t sat"),
        ({"until": ["dog", "zebra"]}, "t sat. the "),
        ({"until": ["é"]}, "t sat. the dog ran. "),
        ({"until": ["", "!"], "max_gen_toks": 9}, "t sat. th"),
        ({"until": [], "max_gen_toks": 0}, ""),
        ({"until": ["."], "do_sample": False, "temperature": 0.7}, "t sat"),
        ({"until": ["."], "do_sample": True, "temperature": 0.01}, "t sat"),
        ({"until": ["."], "do_sample": True, "temperature": 0.0}, "t sat"),
        ({"max_gen_toks": 21}, "t sat. the dog ran. \ufffd"),
    ],
)
def test_generate_until(parrot, settings, answer):
    assert parrot.generate_until([ask("the ca", settings)]) == [answer]


def test_an_answer_is_256_bytes_long_unless_told(parrot):
    endless = (SENTENCE * 20).encode()[6:]
    assert parrot.generate_until([ask("the ca", {})]) == [endless[:256].decode()]


def test_samples_depend_on_the_seed_alone(adapter, model):
    def answers(seed: int) -> list[str]:
        settings = {"do_sample": True, "temperature": 1.5, "max_gen_toks": 30}
        return adapter.ByteEval(model, seed=seed).generate_until([ask("a", settings), ask("a", settings)])

    one = answers(1)
    assert one == answers(1) != answers(2) and one[0] == one[1]


def test_generation_goes_on_beyond_the_context(lm, model):
    from tritwise.models import generate

    (found,) = lm.generate_until([ask("abc", {"max_gen_toks": CTX - 4})])
    assert found == bytes(generate(model, b"\nabc", CTX - 4, temperature=0)).decode(errors="replace")
    (longer,) = lm.generate_until([ask("abc", {"max_gen_toks": 5 * CTX})])
    assert len(longer.encode(errors="replace")) >= CTX


def test_a_setting_that_is_not_understood(parrot):
    with pytest.raises(UserError, match="a task wants num_beams; tritwise knows do_sample, max_gen_toks"):
        parrot.generate_until([ask("a", {"num_beams": 4, "until": ["."]})])


def test_answers_are_offered_to_the_cache(adapter, model):
    lm = adapter.ByteEval(model)
    lm.cache_hook = hook = Hook()
    lm.loglikelihood([ask("a", "b")])
    lm.loglikelihood_rolling([ask("a")])
    lm.generate_until([ask("a", {"max_gen_toks": 1})])
    assert [seen[:2] for seen in hook.seen] == [
        ("loglikelihood", ("a", "b")),
        ("loglikelihood_rolling", ("a",)),
        ("generate_until", ("a", {"max_gen_toks": 1})),
    ]


def test_without_lm_eval(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    monkeypatch.delitem(sys.modules, "tritwise.score.lm_eval", raising=False)
    with pytest.raises(UserError, match=r"lm-eval is not installed .*; pip install 'tritwise\[eval\]'"):
        importlib.import_module("tritwise.score.lm_eval")


@pytest.mark.skipif(not INSTALLED, reason="lm-eval is not installed (extra eval)")
def test_it_is_an_lm(adapter, lm):
    from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]

    assert isinstance(lm, LM) and lm.rank == 0 and lm.world_size == 1 and lm.device == torch.device("cpu")


TASKS = {
    "choice": """output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: "{{[good, bad]}}"
doc_to_target: 0
target_delimiter: ""
metric_list: [{metric: acc}]
""",
    "rolling": """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
""",
    "answer": """output_type: generate_until
doc_to_text: "{{q}}"
doc_to_target: "{{good}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}


@pytest.mark.skipif(not INSTALLED, reason="lm-eval is not installed (extra eval)")
def test_tasks_of_lm_eval_itself(lm, model, tmp_path: Path):
    import lm_eval
    from lm_eval.tasks import TaskManager

    text = "To be or not to be"
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"q": "A", "good": "B", "bad": "\u00ff", "text": text}))
    for name, rest in TASKS.items():
        start = (
            f"task: {name}\ntest_split: test\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {rows}}}}}\n"
        )
        (tmp_path / f"{name}.yaml").write_text(start + rest)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = lm_eval.simple_evaluate(lm, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0)["results"]
    data = np.frombuffer(text.encode(), np.uint8)
    assert found["rolling"]["bits_per_byte,none"] == pytest.approx(score(model, data).bpb, rel=1e-6)
    assert found["choice"]["acc,none"] in (0, 1) and found["answer"]["exact_match,none"] in (0, 1)
