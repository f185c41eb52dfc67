"""Everything that turns a model into a number: bits per byte, and the ladder of simple baselines beside it."""

from tritwise.score.ladder import ladder
from tritwise.score.scorer import Predictor, Score, score

__all__ = ["Predictor", "Score", "ladder", "score"]
