"""Any causal language model of `transformers`, scored in bits per byte of the source text (extra `hf`).

A model with 256 symbols and no tokenizer reads bytes: `HFBytes` is a Predictor like our own. A model with a tokenizer
is charged for its tokens, and the sum is divided by the bytes they stand for: bpb = nats of all tokens / ln 2 / bytes.
That is a code length of the bytes, for the tokens give the text back: their round trip is checked, byte for byte.
Other ways to write the same text in tokens would lower the figure a little if they were summed; nobody sums them.

Every window begins with the model's start token, as in training. It is not scored, and takes one place of the window.

Shape suffixes: B batch, T time, V vocabulary, N tokens.
"""

import math
import time
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from tritwise.data.tokenizer import require_same_text, utf8_of
from tritwise.errors import UserError
from tritwise.score.guards import MOVED, Tally, broken
from tritwise.score.protocol import fit_window
from tritwise.score.scorer import Mode, Score, spread
from tritwise.score.windows import windows_of

LONGEST_WINDOW = 2048  # where --window is not given: contexts of 128k are more than memory holds
BATCH_LOGITS = 1 << 26  # floats asked for at a time: 256 MB
INSTALL = "pip install 'tritwise[hf]'"


class Tokens(NamedTuple):
    """A text in tokens. ids: int64 [N]. ends: int64 [N], bytes of the text up to each token's end; None if unknown."""

    ids: np.ndarray
    ends: np.ndarray | None


class HFBytes(nn.Module):
    """A Predictor: a causal LM whose 256 symbols are the bytes. `score` takes it like any other."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.context = model, _context(model)

    def log_probs(self, ids: Tensor) -> Tensor:
        """int64 [B, T] -> natural logs float32 [B, T, 256]."""
        return torch.log_softmax(self.model(input_ids=ids, use_cache=False).logits.float(), dim=-1)


class HFTokens(nn.Module):
    """A causal LM with its tokenizer. It cannot be a Predictor, for it says nothing of single bytes; it has `score`.

    context: tokens that one call can read, start token included.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__()
        self.model, self.tokenizer, self.context = model, tokenizer, _context(model)
        self.start = _start(model, tokenizer)

    def encode(self, data: np.ndarray) -> Tokens:
        """The tokens of a text (uint8 [bytes]), none added. Raises UserError unless they give back every byte."""
        raw = data.tobytes()
        text = utf8_of(raw)
        fast = self.tokenizer.is_fast
        coded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=fast, verbose=False)
        ids = coded["input_ids"]
        back = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False).encode()
        require_same_text(raw, back, "the model cannot be scored on it")
        if max(ids) >= self.model.config.get_text_config().vocab_size:
            raise UserError("the tokenizer has tokens that the model does not know; give the model its own tokenizer")
        ends = _bytes_up_to(text, [end for _, end in coded["offset_mapping"]]) if fast else None
        return Tokens(np.array(ids, np.int64), ends)

    @torch.inference_mode()
    def score(
        self,
        data: np.ndarray,
        *,
        mode: Mode = "sliding",
        window: int = 0,
        stride: int = 0,
        into: np.ndarray | None = None,
    ) -> Score:
        """Score `data` (uint8 [bytes], at least one) as `score` does, with window and stride counted in tokens.

        mode: sliding or chunked. window: tokens that a call reads, start token included; 0 takes the context, or 2,048
        where it is longer. into: float array [bytes] that takes the nats of each byte; a token's stand at its last
        byte, so that a stretch of text has its cost up to the token that crosses its edge.
        Raises UserError for an empty text, one that the tokenizer does not give back, a window or stride that does not
        fit, and a model that sees later tokens or finds one impossible.
        """
        began = time.perf_counter()
        if not len(data):
            raise UserError("there is nothing to score: the text is empty; name another --data or --split")
        if mode not in ("sliding", "chunked"):
            raise UserError(f"a model that reads tokens knows no mode {mode!r}; choose sliding or chunked")
        window = window or min(self.context, LONGEST_WINDOW)
        limits: Any = self  # not a Predictor, but it has the context that is asked for
        window, stride = fit_window(limits, window, stride or (window if mode == "chunked" else 0))
        ids, ends = self.encode(data)
        costs = np.empty(len(ids))
        tally = Tally(len(ids), costs)
        windows = windows_of(np.zeros(1, np.int64), len(ids), window, stride)
        self._check_causal(self._rows(ids, windows[len(windows) // 2][None])[:, :-1])
        batch = max(1, BATCH_LOGITS // (window * self.model.config.get_text_config().vocab_size))
        for first in range(0, len(windows), batch):
            group = windows[first : first + batch]
            rows = self._rows(ids, group)
            logits_BTV = self._logits(rows[:, :-1])
            chosen = logits_BTV.gather(2, rows[:, 1:, None])[..., 0]
            nats = (logits_BTV.logsumexp(dim=-1) - chosen).double().cpu().numpy()
            for row, (start, stop, new, _) in zip(nats, group.tolist(), strict=True):
                tally.add(new, row[new - start : stop - start])
        total = tally.close()
        if into is not None:
            self._spread(costs, ends, into)
        mean, seconds = total / len(data), time.perf_counter() - began
        declared = {
            "mode": "chunked" if stride == window else "sliding",
            "unit": "tokens",
            "window": window,
            "stride": stride,
            "tokens": len(ids),
            "start_token": self.tokenizer.convert_ids_to_tokens(self.start),
            "reset": "never",
            "adaptation": "none",
            "extra_bytes": 0,
            "seconds": seconds,
        }
        return Score(mean, mean / math.log(2), len(data), window, stride, seconds, declared)

    def _rows(self, ids: np.ndarray, windows: np.ndarray) -> Tensor:
        """int64 [B, T + 1]: the start token, and the tokens that each window predicts."""
        rows = [np.concatenate(([self.start], ids[start:stop])) for start, stop, _, _ in windows.tolist()]
        return torch.from_numpy(np.stack(rows)).to(self.model.device)

    def _logits(self, rows_BT: Tensor) -> Tensor:
        return self.model(input_ids=rows_BT, use_cache=False).logits.float()

    def _check_causal(self, rows_BT: Tensor) -> None:
        """Condition 1: with every token from the middle on exchanged, what was said before them stays."""
        if (cut := rows_BT.shape[1] // 2) == 0:
            return
        other = rows_BT.clone()
        other[:, cut:] = self.start
        one, two = (torch.softmax(self._logits(rows)[:, :cut], dim=-1) for rows in (rows_BT, other))
        moved = float((one - two).abs().max())
        if not moved <= MOVED:
            raise broken(1, f"the probabilities of a token moved by {moved:.3g} when later tokens were changed")

    def _spread(self, costs: np.ndarray, ends: np.ndarray | None, into: np.ndarray) -> None:
        if ends is None:
            raise UserError("this tokenizer does not say where its tokens stand in the text; give the model a fast one")
        spread(costs, ends, into)


def load_hf(where: str, device: torch.device | str = "cpu") -> HFBytes | HFTokens:
    """A causal LM in float32 from a folder or, by its name, from the Hugging Face hub or its cache.

    Only safetensors are read, and no code that comes with a model is run. Raises UserError if transformers is not
    installed, if there is no such model, and for a model without a tokenizer whose vocabulary is not the 256 bytes.
    """
    try:
        from transformers import AutoModelForCausalLM  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(f"transformers is not installed ({error}); {INSTALL}") from None
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32, use_safetensors=True)
    except (OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"cannot load {where} with transformers: {reason}") from None
    model = model.to(device).eval()
    tokenizer = _tokenizer(where)
    if tokenizer is not None:
        return HFTokens(model, tokenizer)
    if (vocabulary := model.config.get_text_config().vocab_size) != 256:
        raise UserError(
            f"{where} has no tokenizer and {vocabulary} symbols, not the 256 bytes; save its tokenizer beside it"
        )
    return HFBytes(model)


def _tokenizer(where: str) -> Any | None:
    """The tokenizer of a model, or None: transformers makes an empty one up where there are no files for it."""
    from transformers import AutoTokenizer  # pyright: ignore[reportMissingImports]

    try:
        tokenizer = AutoTokenizer.from_pretrained(where)
    except (OSError, ValueError, KeyError, TypeError, ImportError):
        return None
    return tokenizer if set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens) else None


def _context(model: Any) -> int:
    """Positions that one call can read; a model that has no such limit gets the longest window."""
    return int(getattr(model.config.get_text_config(), "max_position_embeddings", None) or LONGEST_WINDOW)


def _start(model: Any, tokenizer: Any) -> int:
    """The token before the first: begin of text, else end of text (which GPT-2 begins with), else a newline."""
    config = model.config.get_text_config()
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, config.bos_token_id, config.eos_token_id)
    ids = (*ids, *tokenizer("\n", add_special_tokens=False)["input_ids"])
    found = next((n for n in ids if isinstance(n, int) and 0 <= n < config.vocab_size), None)
    if found is None:
        raise UserError("the model has no start token and no newline; it cannot be scored from the first token on")
    return found


def _bytes_up_to(text: str, ends: list[int]) -> np.ndarray:
    """Bytes of UTF-8 up to each of the character offsets, never falling: int64 [N]."""
    code = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    width = 1 + (code >= 0x80) + (code >= 0x800) + (code >= 0x10000)
    return np.maximum.accumulate(np.concatenate(([0], np.cumsum(width)))[ends])
