"""Streams that learn from what they read, put together from plain settings, and scored.

`learning_stream` is what a decoder builds as well: from the same model, settings and train text it makes the same
probabilities, given the bytes in the same pieces.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from tritwise.errors import UserError
from tritwise.score.adapt import Adapted
from tritwise.score.mix import Mixed
from tritwise.score.protocol import Predictor, Stream, stream_of
from tritwise.score.scorer import Score, score_stream


class Learning(NamedTuple):
    """How a predictor learns while it reads; plain values, so that they can be written down.

    adapt   "none", or test-time training of "all" weights or of the "scales" only; see `Adapted`
    piece   bytes between two steps of it; 0: the stride
    rate    of the steps; 0: the default for what is trained
    guard   False: without the second reader that bounds the loss, in half the time
    mix     with counts of orders 0 … 5; see `Mixed`
    """

    adapt: Literal["none", "all", "scales"] = "none"
    piece: int = 0
    rate: float = 0.0
    guard: bool = True
    mix: bool = False


def learning_stream(
    model: Predictor, how: Learning, *, window: int = 0, stride: int = 0, train: np.ndarray | None = None
) -> Stream:
    """`model` as a Stream that learns as `how` says. window, stride: as in `stream_of`. train: uint8 [N], counted
    before the text when mixing. Raises UserError for settings that cannot work."""
    if how.adapt == "none" and (how.piece or how.rate):
        raise UserError("piece and rate are of test-time training; choose what it trains, all or scales")
    if how.adapt == "none":
        stream = stream_of(model, window=window, stride=stride)
    else:
        stream = Adapted(
            model,
            window=window,
            stride=stride,
            piece=how.piece,
            rate=how.rate,
            train=how.adapt,
            guard=how.guard,
        )
    return Mixed(stream, train=train) if how.mix else stream


def score_learning(
    model: Predictor,
    data: np.ndarray,
    how: Learning,
    *,
    window: int = 0,
    stride: int = 0,
    train: np.ndarray | None = None,
    documents: Sequence[int] | np.ndarray | None = None,
    separator: bytes = b"",
    into: np.ndarray | None = None,
) -> Score:
    """Score `data` (uint8 [N]) with a predictor that learns as it reads; what it did is in `Score.declared`.

    Arguments as in `learning_stream` and `score`; a document begins with everything forgotten.
    """
    stream = learning_stream(model, how, window=window, stride=stride, train=train)
    result = score_stream(stream, data, documents=documents, separator=separator, into=into)
    extra = result.declared["extra_bytes"] + result.declared.get("mix_train_bytes", 0)
    return result._replace(declared=result.declared | {"extra_bytes": extra})
