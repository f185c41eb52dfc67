"""What an ARB run reads and learns: the task, its collections, and how features are spoiled to teach more with less."""

import math
from dataclasses import dataclass

from tritwise.errors import UserError

KINDS = ("text", "vision", "audio", "diffusion")
TASKS = ("", *KINDS, "mixture")


@dataclass(frozen=True)
class MediaConfig:
    """What a run learns beside or instead of plain text. Raises UserError for a value that cannot work.

    task           text, vision (captions), audio (transcripts), diffusion (pictures) or mixture; empty: the byte LM
    images, sounds, pictures   collections for captions, transcripts and drawing: see tritwise.data.collections; for the
                   first two also the .json of features in the cache
    limit          train examples of a collection, and a tenth as many of val; 0: all
    mixture        weights of the kinds of a mixture, such as text=1,vision=2: how often a micro-batch is of each
    start          a run folder whose weights this run starts from; empty: new ones
    noise          normal noise on features, in units of the deviation of their channels
    hide           share of the features, in spans, that a batch does not see
    eval_examples  examples of val that an evaluation during training looks at; 0: all
    judge_pictures pictures that a classifier, trained for it at the end, is to recognise; 0: none
    guidance, draw_steps   of the pictures drawn at evaluations: how far beyond "any" picture, and in how many steps
    """

    task: str = ""
    images: str = ""
    sounds: str = ""
    pictures: str = ""
    limit: int = 0
    mixture: str = ""
    start: str = ""
    noise: float = 0.1
    hide: float = 0.1
    eval_examples: int = 64
    judge_pictures: int = 0
    guidance: float = 1.5
    draw_steps: int = 20

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise UserError(f"task is {self.task!r}; choose one of {', '.join(filter(None, TASKS))}")
        for name, least in (("limit", 0), ("eval_examples", 0), ("judge_pictures", 0), ("draw_steps", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        for name, most in (("noise", 10.0), ("hide", 0.9), ("guidance", 100.0)):
            value = getattr(self, name)
            if not (math.isfinite(value) and 0 <= value <= most):
                raise UserError(f"{name} is {value}; it must be between 0 and {most:g}")
        if self.task == "mixture":
            self.shares()

    def shares(self) -> dict[str, float]:
        """Kind -> how often a micro-batch is of it; they add up to one. Raises UserError for a mixture that is none."""
        if self.task != "mixture":
            return {self.task or "text": 1.0}
        found: dict[str, float] = {}
        for word in filter(None, self.mixture.split(",")):
            kind, _, weight = word.partition("=")
            try:
                found[kind.strip()] = float(weight)
            except ValueError:
                raise UserError(f"mixture has {word!r}; write for example text=1,vision=2,audio=1") from None
        unknown = [kind for kind in found if kind not in KINDS]
        if unknown or not found or not all(math.isfinite(w) and w > 0 for w in found.values()):
            raise UserError(
                f"mixture is {self.mixture!r}; give weights above 0 of {', '.join(KINDS)}, as in text=1,audio=2"
            )
        return {kind: weight / sum(found.values()) for kind, weight in found.items()}

    def place_of(self, kind: str) -> str:
        """Where the collection of "vision", "audio" or "diffusion" lies. Raises UserError if none was named."""
        setting = {"vision": "images", "audio": "sounds", "diffusion": "pictures"}[kind]
        if not getattr(self, setting):
            raise UserError(f"no {setting} were given to learn {kind} from; name a collection with --{setting}")
        return getattr(self, setting)
