"""Named runs: a recipe is a function that returns a config. Few flags change it; everything else is code."""

import difflib
from collections.abc import Callable

from tritwise.errors import UserError
from tritwise.models import ModelConfig
from tritwise.recipes.arb import audio, diffusion, mixture, text, vision
from tritwise.train import Config, TrainConfig


def shakespeare() -> Config:
    """The demo: the bundled text, about two minutes on two laptop cores, below the 5-gram's 1.669 nats per byte."""
    # Depths 2 to 4 reach the same loss in the same time; hashed n-grams are worth 0.1 nats of it, words in the place of
    # the longest and lookups that find nothing now and then .04 more (docs/LOG.md).
    return Config(
        "shakespeare",
        ModelConfig(width=128, depth=2, ctx=64, ngrams=3, word_tables=1, ngram_rows=8192, ngram_dropout=0.2),
        TrainConfig(
            steps=1600,
            batch=32,
            rate=0.015,
            decay=0.7,
            interval=4,
            save_interval=400,
            eval_interval=400,
            eval_bytes=0,  # all of val, so that the points in the plot can be held against the ladder's lines
        ),
    )


def tiny() -> Config:
    """A few seconds of training, to see that everything works."""
    return Config(
        "tiny",
        ModelConfig(width=32, depth=2, ctx=32),
        TrainConfig(
            steps=60, batch=16, log_interval=10, eval_interval=30, save_interval=20, eval_bytes=4096, sample_bytes=40
        ),
    )


RECIPES: dict[str, Callable[[], Config]] = {
    function.__name__: function for function in (shakespeare, tiny, text, vision, audio, diffusion, mixture)
}


def recipe(name: str) -> Config:
    """The config of the recipe called `name`. Raises UserError, naming the nearest, if there is none."""
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(RECIPES)}"
        raise UserError(f"there is no recipe {name!r}; {hint}")
    return RECIPES[name]()
