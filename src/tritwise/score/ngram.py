"""An n-gram of the ladder as a Predictor: counting, scored by the same scorer, guards and coder as a neural model.

`NGram.nats` is the quick way to the mean; this is the way to every byte's price, for `score --compare`, for a stream
and for a coder.
"""

import numpy as np
import torch
from torch import Tensor

from tritwise.score.ladder import NGRAM_TRAIN_LIMIT, NGram, Smoothing, count_ngrams


class NGramPredictor:
    """Predictor and Cached. A position uses the last order − 1 ids up to its own, or all there are.

    model: with its counts, which never change. context: ids that one call may read; any number will do.
    """

    def __init__(self, model: NGram, context: int = 1024) -> None:
        self.model, self.context = model, context

    def log_probs(self, ids: Tensor) -> Tensor:
        """int64 [B, T] -> natural logs float32 [B, T, 256]."""
        return self(ids, self.new_state(len(ids)))

    def new_state(self, batch: int = 1) -> list[Tensor]:
        """An empty state: a list with one tensor, int64 [B, up to order − 1], the newest ids that were read."""
        return [torch.empty(batch, 0, dtype=torch.int64)]

    def __call__(self, ids: Tensor, state: list[Tensor]) -> Tensor:
        """As `log_probs`, for ids that continue what the state has read."""
        reach, held = self.model.order - 1, state[0].shape[1]
        seen = torch.cat((state[0], ids.cpu()), dim=1)
        state[0] = seen[:, max(0, seen.shape[1] - reach) :]
        known = np.minimum(np.arange(held + 1, seen.shape[1] + 1), reach)  # bytes of context of each position
        packed = np.zeros(ids.shape, np.uint64)
        for back in range(reach - 1, -1, -1):  # the oldest byte first
            place = np.arange(held, seen.shape[1]) - back
            byte = np.where(place >= 0, seen.numpy()[:, np.maximum(place, 0)], 0).astype(np.uint64)
            packed = packed << np.uint64(8) | byte
        p = np.empty((*ids.shape, 256))
        for length in np.unique(known):
            columns = known == length
            p[:, columns] = self.model.distributions(packed[:, columns].reshape(-1), int(length)).reshape(
                len(ids), -1, 256
            )
        return torch.from_numpy(np.log(p)).float().to(ids.device)


def ngram_predictor(train: np.ndarray, order: int, smoothing: Smoothing = "Kneser–Ney") -> NGramPredictor:
    """An n-gram of `order` counted in train (uint8 [bytes]; of a long one the last bytes, as in the ladder).

    Raises UserError when the order is not within 1 to 8.
    """
    return NGramPredictor(NGram(count_ngrams(train[-NGRAM_TRAIN_LIMIT:], order), smoothing))
