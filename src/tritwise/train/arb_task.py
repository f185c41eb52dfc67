"""The task of an ARB run: micro-batches of text, captions, transcripts and pictures, alone or as a mixture."""

import dataclasses
from typing import Any

import torch

from tritwise.data.collections import open_collection
from tritwise.data.tokenizer import Tokenizer
from tritwise.encoders import Features
from tritwise.errors import UserError
from tritwise.models import Arb
from tritwise.train.arb_finish import finish_arb
from tritwise.train.average import Average
from tritwise.train.config import Config
from tritwise.train.judge import Judge
from tritwise.train.restore import take_over
from tritwise.train.run import RunFolder
from tritwise.train.sources import open_features, told_by_features
from tritwise.train.streams import MediaStream, PictureStream, evened, generator_of, pictures_in
from tritwise.train.tasks import Records, Say, TextTask


class ArbTask:
    """Batches and evaluations of the kinds that config.media names."""

    scale = 1.0
    tokenizer: Tokenizer | None = None

    def __init__(self, config: Config, say: Say) -> None:
        media, settings = config.media, config.train
        self.shares = media.shares()
        self.kinds = tuple(self.shares)
        self.streams: dict[str, Any] = {}
        self.bytes_a_step = settings.batch * settings.accum * config.model.ctx
        features: dict[str, Features] = {}
        for kind in self.kinds:
            if kind in ("vision", "audio"):
                features[kind] = open_features(config, kind, say)
                config = told_by_features(config, kind, features[kind])
        if "diffusion" in self.kinds:
            config, self.streams["diffusion"], self.real = _pictures(config, say)
        for kind, found in features.items():
            stride = config.parts.audio_stride if kind == "audio" else 1
            stream = MediaStream(
                kind,
                found,
                batch=settings.batch,
                ctx=config.model.ctx,
                stride=stride,
                seed=settings.seed,
                noise=media.noise,
                hide=media.hide,
            )
            if stream.left_out:
                say(f"{stream.left_out} {kind} examples do not fit ctx {config.model.ctx} and are left out")
            self.streams[kind] = stream
        self.config = config
        self.text = TextTask(config) if "text" in self.kinds else None
        self.judge = Judge(config, self.streams, self.text)
        self.even = False
        self.shapes = "one" if self.kinds in (("text",), ("diffusion",)) else "few"
        if "audio" in self.kinds and config.parts.ctc:
            self.shapes = "many"  # CTC asks the device for lengths, which no recording can hold

    def begin(self, model: Arb) -> None:
        for kind, stream in self.streams.items():
            if isinstance(stream, MediaStream):
                getattr(model, kind).measure(stream.mean_D, stream.spread_D)
        if self.config.media.start:
            take_over(model, self.config.media.start)

    def state(self) -> dict[str, Any]:
        told = {kind: stream.state() for kind, stream in self.streams.items()}
        if self.text is not None:
            told["text"] = self.text.state()
        return told | {"shares": self.shares}

    def check(self, saved: dict[str, Any]) -> None:
        if self.text is not None and "text" in saved:
            self.text.check(saved["text"])
        now = self.state()
        for name in now:
            if name != "text" and saved.get(name) != now[name]:
                raise UserError(
                    f"the run learned {name} from other data or in other batches; resume it with what it had"
                )

    def begins(self, step: int) -> bool:
        return self.text is not None and self.text.begins(step)

    def kind(self, step: int, micro: int) -> str:
        if len(self.kinds) == 1:
            return self.kinds[0]
        weights = torch.tensor(list(self.shares.values()))
        place = generator_of(self.config.train.seed, step, micro, "kind")
        return self.kinds[int(torch.multinomial(weights, 1, generator=place))]

    def batch(self, device: torch.device, step: int, micro: int) -> tuple[Any, ...]:
        kind = self.kind(step, micro)
        if kind == "text":
            assert self.text is not None
            return ("text", *self.text.batch(device, step, micro))
        name, *tensors = self.streams[kind].batch_at(step, micro)
        if self.even and kind != "diffusion":
            tensors = evened(tensors, self.config.model.ctx)
        return (name, *(moved(tensor, device) for tensor in tensors))

    def evaluate(self, model: Arb, folder: RunFolder, where: dict[str, Any], device: torch.device) -> Records:
        model.eval()
        return self.judge.during(model, folder, where, device)

    def finish(
        self,
        folder: RunFolder,
        model: Arb,
        optimizers: list[torch.optim.Optimizer],
        done: dict[str, Any],
        device: torch.device,
        memory: dict[str, int | None],
        average: Average,
    ) -> dict[str, Any]:
        if self.kinds == ("text",):
            assert self.text is not None
            return self.text.finish(folder, model, optimizers, done, device, memory, average)
        return finish_arb(self.config, folder, model, optimizers, self.judge, done, device, memory)


def moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`tensor` on `device`, without waiting for a GPU."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _pictures(config: Config, say: Say) -> tuple[Config, PictureStream, torch.Tensor]:
    """The config with the shape of the pictures, their stream, and a few of them to look at."""
    media, parts = config.media, config.parts
    collection = open_collection(media.place_of("diffusion"), "images").first(media.limit)
    say(f"reading the pictures of {collection.path}")
    pictures, labels = pictures_in(collection, "train", parts.channels)
    names = collection.classes or ("picture",)
    shape = {"diffusion": True, "picture": pictures.shape[-1], "classes": "|".join(names)}
    config = dataclasses.replace(config, parts=dataclasses.replace(parts, **shape))
    stream = PictureStream(pictures, labels, len(names), batch=config.train.batch, seed=config.train.seed)
    return config, stream, pictures[:64]
