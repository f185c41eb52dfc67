"""`tritwise.load`: a trained model from a run folder or an artifact, ready to score and to sample from."""

import builtins
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tritwise.data.source import open_bytes
from tritwise.data.split import named_part
from tritwise.data.split import split as split_data
from tritwise.models import Arb, ByteLM
from tritwise.models import generate as generate_bytes
from tritwise.score import Score
from tritwise.score import score as score_text
from tritwise.ship import read_artifact
from tritwise.train import load_run


class LoadedModel:
    """A model and where it came from. `model` is the ByteLM or Arb, `about` what the file says of itself."""

    def __init__(self, model: ByteLM | Arb, path: Path, about: dict[str, Any]) -> None:
        self.model, self.path, self.about = model, path, about

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "LoadedModel":
        """Move the model, and let it compute in `dtype` (float32 or bfloat16) if one is given; returns self."""
        self.model.to(device)
        self.model.dtype = dtype or self.model.dtype
        return self

    def generate(
        self, prompt: str | bytes = b"", bytes: int = 200, *, seed: int = 0, temperature: float = 0.8, top_k: int = 0
    ) -> bytes:
        """`bytes` bytes that continue `prompt`; the prompt is not repeated. The same seed gives the same bytes."""
        # A command line's bytes that are not UTF-8 reach us as lone surrogates; this makes them bytes again.
        raw = prompt.encode("utf-8", errors="surrogateescape") if isinstance(prompt, str) else prompt
        chosen = generate_bytes(self.model, raw, bytes, seed=seed, temperature=temperature, top_k=top_k)
        return builtins.bytes(chosen)

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
        if isinstance(data, str | Path):
            array = open_bytes(data)
        else:
            array = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else data
        if split is not None:
            array = named_part(split_data(array, rule), split)
        device = next(self.model.parameters()).device
        return score_text(self.model, array, window=window, stride=stride, device=device)


def load(path: Path | str) -> LoadedModel:
    """The model of a run folder (its newest checkpoint) or of an artifact file.

    Raises UserError if there is nothing at `path`, or it is damaged, newer than this version, or something else.
    """
    place = Path(path)
    if place.is_dir():
        config, model, _, checkpoint = load_run(place)
        about = {"recipe": config.recipe, "steps": checkpoint.step, "train": config.as_dict()["train"]}
        return LoadedModel(model, place, about)
    model, header = read_artifact(place)
    return LoadedModel(model, place, header["about"])
