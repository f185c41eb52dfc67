"""`tritwise.load`: a trained model from a run folder or an artifact, ready to score and to sample from."""

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tritwise.data.corpus import open_parts, tokens_of
from tritwise.data.media import read_image, read_sound
from tritwise.data.split import named_part
from tritwise.data.split import split as split_data
from tritwise.data.tokenizer import Tokenizer
from tritwise.encoders import Features
from tritwise.encoders.frozen import RATE
from tritwise.errors import UserError
from tritwise.models import Arb, AtDepth, ByteLM, draw
from tritwise.score import Score
from tritwise.score import score as score_text
from tritwise.ship import read_artifact, read_tokenizer
from tritwise.train import RunFolder, load_run
from tritwise.train.sources import encoder_for, known_images
from tritwise.train.telling import SAMPLES, consensus, draws, neighbours, tell
from tritwise.train.writing import generate_text


class LoadedModel:
    """A model and where it came from. `model` is the ByteLM or Arb, `about` what the file says of itself, `tokenizer`
    what a model of tokens reads with, `reader` the model at the depth that `at` chose."""

    def __init__(
        self, model: ByteLM | Arb, path: Path, about: dict[str, Any], tokenizer: Tokenizer | None = None
    ) -> None:
        self.model, self.path, self.about, self.tokenizer = model, path, about, tokenizer
        self.reader: ByteLM | AtDepth | Arb = model
        self._encoders: dict[tuple[str, str], Any] = {}
        self._known: dict[str | Path, Features] = {}

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "LoadedModel":
        """Move the model, and let it compute in `dtype` (float32 or bfloat16) if one is given; returns self."""
        self.model.to(device)
        self.model.dtype = dtype or self.model.dtype
        return self

    def at(self, loops: int) -> "LoadedModel":
        """Score and sample with `loops` repeats of the core from now on; returns self.

        Raises UserError for a model that does not repeat, or not so often.
        """
        if not isinstance(self.model, ByteLM) or self.model.config.loops == 1:
            raise UserError(f"the model of {self.path} does not repeat; leave --loops out")
        self.reader = self.model.at(loops)
        return self

    def generate(
        self, prompt: str | bytes = b"", bytes: int = 200, *, seed: int = 0, temperature: float = 0.8, top_k: int = 0
    ) -> bytes:
        """`bytes` bytes that continue `prompt`; the prompt is not repeated. The same seed gives the same bytes."""
        # A command line's bytes that are not UTF-8 reach us as lone surrogates; this makes them bytes again.
        raw = prompt.encode("utf-8", errors="surrogateescape") if isinstance(prompt, str) else prompt
        how = {"temperature": temperature, "top_k": top_k}
        return generate_text(self.reader, raw, bytes, self.tokenizer, seed=seed, **how)

    def score(
        self,
        data: np.ndarray | bytes | str | Path,
        *,
        split: str | None = None,
        rule: str = "90/10",
        window: int = 0,
        stride: int = 0,
    ) -> Score:
        """Bits per byte of `data`: an array of uint8, bytes, or the path of a file or folder.

        split: "train", "val" or "test" scores that part of the split `rule`; None scores everything.
        """
        device = next(self.model.parameters()).device
        how: dict[str, Any] = {"window": window, "stride": stride, "device": device, "alphabet": self.tokenizer}
        if isinstance(data, str | Path):
            parts = open_parts(data, rule if split is not None else "all", self.tokenizer)
            return score_text(self.reader, named_part(parts, split or "val"), **how)
        array = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else data
        if split is not None:
            array = named_part(split_data(array, rule), split)
        return score_text(self.reader, array if self.tokenizer is None else tokens_of(array, self.tokenizer), **how)

    def caption(
        self, image: np.ndarray | str | Path, *, encoder: str = "", most: int = 80, known: str | Path | None = None
    ) -> str:
        """What an image shows: uint8 [H, W, 3], or the path of a file. encoder: where the frozen encoder lies now.

        known: a collection of images with captions, or the .json of its features in the cache: the captions of the most
        similar images of its train part have half of the votes on what is told.
        Raises UserError if the model has no vision part, or encoder, image or collection cannot be used.
        """
        model = self._with_part("vision", "train vision")
        read = image if isinstance(image, np.ndarray) else read_image(image)
        if known is None:
            return self._told(model, "vision", read, encoder, most)
        frozen = self._encoder(model, "vision", encoder)
        features = frozen([read])
        (drawn,) = draws(model, features.to(next(model.parameters()).device), most)
        if known not in self._known:
            self._known[known] = known_images(frozen, Path(known))
        return consensus(drawn, neighbours(features.cpu(), self._known[known])[0])

    def transcribe(self, sound: np.ndarray | str | Path, *, encoder: str = "", most: int = 200) -> str:
        """What is said in a sound: float32 [samples] at 16,000 a second, or the path of a file. As `caption`."""
        model = self._with_part("audio", "train audio")
        read = sound if isinstance(sound, np.ndarray) else read_sound(sound, RATE)
        return self._told(model, "audio", read, encoder, most)

    def draw(
        self,
        what: int | str,
        count: int = 1,
        *,
        steps: int = 20,
        guidance: float = 1.5,
        seed: int = 0,
        progress: Callable[[int, int], None] | None = None,
    ) -> tuple[str, torch.Tensor]:
        """(name of the class, `count` pictures of it, uint8 [count, channels, H, W]). what: see `class_called`."""
        model = self._with_part("diffusion", "train diffusion")
        assert model.diffusion is not None
        label = class_called(model.parts.class_names, what)
        drawn = draw(model.diffusion, [label] * count, steps=steps, guidance=guidance, seed=seed, progress=progress)
        return model.parts.class_names[label], drawn.cpu()

    def _with_part(self, kind: str, command: str) -> Arb:
        if not isinstance(self.model, Arb) or getattr(self.model, kind) is None:
            raise UserError(f"{self.path} has no {kind} part; train one with tritwise {command}")
        return self.model

    def _encoder(self, model: Arb, kind: str, place: str) -> Any:
        if (kind, place) not in self._encoders:
            self._encoders[kind, place] = encoder_for(model.parts, kind, place)
        return self._encoders[kind, place]

    def _told(self, model: Arb, kind: str, media: np.ndarray, place: str, most: int) -> str:
        features = self._encoder(model, kind, place)([media])[0][None]
        tokens = features.shape[1] // (1 if kind == "vision" else model.parts.audio_stride)
        if tokens + 4 > model.context and (kind == "vision" or model.spell is None):
            raise UserError(
                f"the sound takes {tokens} of the model's {model.context} positions; cut it into shorter ones"
            )
        return tell(model, kind, features.to(next(model.parameters()).device), most, SAMPLES)[0]


def class_called(names: tuple[str, ...], what: int | str) -> int:
    """The class that `what` names: its number, its name, or words that hold its name. UserError naming the classes."""
    asked = str(what).strip().lower()
    if asked.isdecimal() and int(asked) < len(names):
        return int(asked)
    held = [place for place, name in enumerate(names) if name.lower() in asked]
    if held:
        return max(held, key=lambda place: len(names[place]))  # "ankle boot" rather than "boot", "t-shirt" than "shirt"
    near = difflib.get_close_matches(asked, names, n=1)
    hint = f"did you mean {near[0]}?" if near else f"it knows {', '.join(names)}"
    raise UserError(f"the model draws no {str(what)!r}; {hint}")


def load(path: Path | str) -> LoadedModel:
    """The model of a run folder (its newest checkpoint) or of an artifact file.

    Raises UserError if there is nothing at `path`, or it is damaged, newer than this version, or something else.
    """
    place = Path(path)
    if place.is_dir():
        config, model, _, checkpoint = load_run(place)
        tokenizer = Tokenizer.open(RunFolder(place).tokenizer) if config.train.tokenizer else None
        about = {"recipe": config.recipe, "steps": checkpoint.step, "train": config.as_dict()["train"]}
        return LoadedModel(model, place, about, tokenizer)
    model, header = read_artifact(place)
    raw = read_tokenizer(place)
    return LoadedModel(model, place, header["about"], Tokenizer(raw, f"the tokenizer of {place}") if raw else None)
