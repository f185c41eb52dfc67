"""What a run learns, as the loop sees it: where batches come from, what is evaluated, what is written at the end."""

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch

from tritwise.data.corpus import open_parts
from tritwise.data.sampler import Sampler
from tritwise.data.tokenizer import Tokenizer
from tritwise.errors import UserError
from tritwise.models import Arb, AtDepth, ByteLM
from tritwise.score import score
from tritwise.train.average import Average
from tritwise.train.config import Config, tokenizer_of
from tritwise.train.device import batch_on
from tritwise.train.finish import finish
from tritwise.train.run import RunFolder
from tritwise.train.writing import generate_text

LOOKED_AT = 1 << 20  # tokens of train that tell how many bytes one has

Records = list[dict[str, Any]]
Say = Callable[[str], None]


class Task(Protocol):
    """One kind of run. `config` has what was read off the data and the encoders filled in; `kinds` are the kinds of its
    batches, ("text",) for a byte LM; `bytes_a_step` are the bytes that a step reads, at most, and `scale` turns the
    loss of a position into that of a byte: 1, or less where positions are tokens of `tokenizer`. `shapes` says whether
    all batches have "one" shape, or a "few" that can be recorded, or "many", whose steps are eager. Where `even` is
    set, rows are padded to few lengths, because every length has a recording of its own."""

    config: Config
    kinds: tuple[str, ...]
    bytes_a_step: int
    scale: float
    tokenizer: Tokenizer | None
    shapes: str
    even: bool

    def begin(self, model: Any) -> None:
        """A new run starts: take weights over from another run, if the config names one."""
        ...

    def check(self, saved: dict[str, Any]) -> None:
        """Raises UserError if `saved`, a `state` from a checkpoint, belongs to other batches."""
        ...

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as plain JSON."""
        ...

    def begins(self, step: int) -> bool:
        """Whether the rows of this step read on from nowhere: see `Sampler.begins`."""
        ...

    def kind(self, step: int, micro: int) -> str:
        """The kind of a micro-batch."""
        ...

    def batch(self, device: torch.device, step: int, micro: int) -> tuple[Any, ...]:
        """The arguments of `model.loss` for a micro-batch, on `device`."""
        ...

    def evaluate(self, model: Any, folder: RunFolder, where: dict[str, Any], device: torch.device) -> Records:
        """Lines for metrics.jsonl, of the kinds "eval" and "sample"."""
        ...

    def finish(
        self,
        folder: RunFolder,
        model: Any,
        optimizers: list[torch.optim.Optimizer],
        done: dict[str, Any],
        device: torch.device,
        memory: dict[str, int | None],
        average: Average,
    ) -> dict[str, Any]:
        """Write what the report needs and the artifact; returns result.json."""
        ...


class TextTask:
    """Bytes in, the next byte out; or tokens."""

    kinds: tuple[str, ...] = ("text",)
    shapes, even = "one", False

    def __init__(self, config: Config) -> None:
        config, self.tokenizer = tokenizer_of(config)
        self.config, settings = config, config.train
        self.parts = open_parts(settings.data, settings.split, self.tokenizer)
        if "train" not in self.parts:
            raise UserError(f"split {settings.split} leaves nothing to train on; use 90/10")
        train, mode = self.parts["train"], "stream" if settings.preserve_state else "random"
        self.sampler = Sampler(train, settings.batch, config.model.ctx, settings.seed, mode, accum=settings.accum)
        self.scale = 1.0
        if self.tokenizer is not None:
            self.scale /= max(1e-9, float(self.tokenizer.sizes(train[:LOOKED_AT]).mean()))
        self.bytes_a_step = round(settings.batch * settings.accum * config.model.ctx / self.scale)

    def begin(self, model: ByteLM) -> None:
        """Nothing is taken over."""

    def check(self, saved: dict[str, Any]) -> None:
        self.sampler.check(saved)

    def state(self) -> dict[str, Any]:
        return self.sampler.state()

    def begins(self, step: int) -> bool:
        return self.sampler.begins(step)

    def kind(self, step: int, micro: int) -> str:
        return "text"

    def batch(self, device: torch.device, step: int, micro: int) -> tuple[Any, ...]:
        return batch_on(device, self.sampler, step, micro)

    def evaluate(
        self, model: ByteLM | AtDepth | Arb, folder: RunFolder, where: dict[str, Any], device: torch.device
    ) -> Records:
        settings = self.config.train
        records = [evaluated(model, self.parts, settings.eval_bytes, where, device, self.tokenizer)]
        if settings.sample_bytes:
            text = generate_text(model, b"\n", settings.sample_bytes, self.tokenizer, seed=settings.seed)
            told = {"prompt": "\n", "text": text.decode("utf-8", errors="replace")}
            records.append({"kind": "sample", **where, **told})
        return records

    def finish(
        self,
        folder: RunFolder,
        model: ByteLM | Arb,
        optimizers: list[torch.optim.Optimizer],
        done: dict[str, Any],
        device: torch.device,
        memory: dict[str, int | None],
        average: Average,
    ) -> dict[str, Any]:
        return finish(self.config, folder, model, optimizers, self.parts, done, device, memory, average, self.tokenizer)


def evaluated(
    model: ByteLM | AtDepth | Arb,
    parts: dict[str, np.ndarray],
    count: int,
    where: dict[str, Any],
    device: torch.device,
    tokenizer: Tokenizer | None = None,
) -> dict[str, Any]:
    """Chunked score (stride = window) of the first `count` symbols of val: quick, and the same every time."""
    result = score(model, parts["val"][: count or None], stride=model.context, device=device, alphabet=tokenizer)
    return {"kind": "eval", **where, "split": "val", "loss": result.nats, "bpb": result.bpb, "scored": result.bytes}


def open_task(config: Config, say: Say) -> Task:
    """The task that `config` names, its data opened. `say` is told what takes long.

    Raises UserError for data and encoders that cannot be used.
    """
    if not config.media.task:
        return TextTask(config)
    from tritwise.train.arb_task import ArbTask

    return ArbTask(config, say)
