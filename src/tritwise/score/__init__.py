"""Everything that turns a model into a number: bits per byte, and the ladder of simple baselines beside it."""

from tritwise.score.guards import NoNumberError
from tritwise.score.ladder import LADDER_BYTES, ladder
from tritwise.score.protocol import EndlessStream, Predictor, Stream, stream_of
from tritwise.score.scorer import Score, score, score_stream, score_unless_diverged

__all__ = [
    "LADDER_BYTES",
    "EndlessStream",
    "NoNumberError",
    "Predictor",
    "Score",
    "Stream",
    "ladder",
    "score",
    "score_stream",
    "score_unless_diverged",
    "stream_of",
]
