"""Our models in EleutherAI's lm-eval (extra `eval`): multiple choice, perplexity and short answers of its tasks.

    import lm_eval, tritwise
    from tritwise.score.lm_eval import ByteEval

    lm_eval.simple_evaluate(ByteEval(tritwise.load("runs/demo").model), tasks=["lambada_openai"])

Any Predictor will do: a ByteLM, an n-gram, a byte model of transformers (lm-eval has a class of its own for token
models). Text is UTF-8; what lm-eval counts in tokens is counted in bytes here, `max_gen_toks` among it.
"""

from typing import Any

import numpy as np
import torch

from tritwise.data.vocabulary import BYTES, VOCABULARY
from tritwise.errors import UserError
from tritwise.score.protocol import Predictor, Stream, device_of, stream_of
from tritwise.score.scorer import score

try:
    from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]
except ImportError as missing:
    raise UserError(f"lm-eval is not installed ({missing}); pip install 'tritwise[eval]'") from None

ANSWER = 256  # bytes of an answer where a task does not say
UNDERSTOOD = {"until", "max_gen_toks", "do_sample", "temperature"}


class ByteEval(LM):
    """A byte model as lm-eval's LM. A context longer than the model's counts with its last bytes.

    window, stride: of the stream and of rolling scores, as in `score`; 0 takes the model's context, and half of it.
    seed: of answers that a task wants sampled; each answer starts from it anew.
    """

    def __init__(self, model: Predictor, *, window: int = 0, stride: int = 0, seed: int = 0) -> None:
        super().__init__()
        shape = getattr(model, "config", None)
        if shape is not None and shape.vocab not in (BYTES, VOCABULARY):
            raise UserError("lm-eval gives models texts in bytes, and this one reads tokens; give a model of bytes")
        self.model, self.window, self.stride, self.seed = model, window or model.context, stride, seed
        self._device = device_of(model)

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """For each (context, continuation): ln p(continuation | context), and whether its bytes are the likeliest."""
        return [self._remember("loglikelihood", r, self._continue(*r.args)) for r in requests]

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """For each (text,): ln p(text), as `score` counts it, guards included. An empty text has 0."""
        return [self._remember("loglikelihood_rolling", r, self._whole(r.args[0])) for r in requests]

    def generate_until(self, requests: list[Any]) -> list[str]:
        """For each (context, settings): what follows, up to the first of the words in "until", which is left out.

        Raises UserError for a setting other than until, max_gen_toks, do_sample and temperature.
        """
        return [self._remember("generate_until", r, self._answer(*r.args)) for r in requests]

    def _remember(self, kind: str, request: Any, answer: Any) -> Any:
        self.cache_hook.add_partial(kind, request.args, answer)
        return answer

    def _after(self, context: str, room: int) -> Stream:
        """A stream that has read the context: of a long one its end, so that `room` more bytes fit into the window, or
        half a window of it where they do not. An empty one stands for the beginning of a text."""
        stream = stream_of(self.model, window=self.window, stride=self.stride, device=self._device)
        stream.read(_ids(context)[-max(1, self.window - 1 - room, self.window // 2) :])
        return stream

    def _continue(self, context: str, continuation: str) -> tuple[float, bool]:
        ids = _ids(continuation)
        rows = self._after(context, len(ids)).read(ids)[:, :256].double().cpu()
        chosen = rows.gather(1, ids[:, None])[:, 0]
        return float(chosen.sum()), bool((rows.argmax(dim=1) == ids).all())

    def _whole(self, text: str) -> float:
        data = _ids(text).numpy().astype(np.uint8)
        if not len(data):
            return 0.0
        found = score(self.model, data, window=self.window, stride=self.stride, device=self._device)
        return -found.nats * found.bytes

    @torch.inference_mode()
    def _answer(self, context: str, settings: dict[str, Any]) -> str:
        if unknown := set(settings) - UNDERSTOOD:
            raise UserError(f"a task wants {sorted(unknown)[0]}; tritwise knows {', '.join(sorted(UNDERSTOOD))}")
        until = settings.get("until") or []
        stops = [word.encode() for word in ([until] if isinstance(until, str) else until) if word]
        temperature = float(settings.get("temperature", 1.0)) if settings.get("do_sample") else 0.0
        count, generator = int(settings.get("max_gen_toks", ANSWER)), torch.Generator().manual_seed(self.seed)
        stream, told = self._after(context, count), bytearray()
        for _ in range(count):
            logs = stream.log_probs()[:256].double().cpu()
            if temperature > 0:
                byte = int(torch.multinomial(torch.softmax(logs / temperature, 0), 1, generator=generator))
            else:
                byte = int(logs.argmax())
            told.append(byte)
            stop = next((word for word in stops if told.endswith(word)), None)
            if stop:
                del told[-len(stop) :]
                break
            stream.read(torch.tensor([byte]))
        return told.decode("utf-8", errors="replace")


def _ids(text: str) -> torch.Tensor:
    """int64 [bytes]; what is no character, such as half a surrogate pair, becomes a question mark."""
    return torch.tensor(list(text.encode("utf-8", errors="replace")), dtype=torch.int64)
