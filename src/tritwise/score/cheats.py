"""The four cheats that the guards exist for, to be put around any model: gain or no gain, each must be rejected.

    EntropyExpert      breaks condition 2: exp(-entropy) enters a mixture as if it were a probability of the byte
    Peeking            breaks condition 1: reads bytes that are yet to be predicted
    Remembering        breaks condition 3: a cache keyed by what is being scored, kept between calls
    counted_twice      breaks condition 4: windows that score some bytes again

`believed` says what bits per byte a scorer without guards would have reported.
"""

import math

import numpy as np
import torch
from torch import Tensor

from tritwise.score.protocol import Predictor
from tritwise.score.windows import rows_of


class Around:
    """A Predictor that says what `model` says. The cheats change it."""

    def __init__(self, model: Predictor) -> None:
        self.model, self.context = model, model.context

    def log_probs(self, ids: Tensor) -> Tensor:
        """int64 [B, T] -> natural logs float32 [B, T, V]."""
        return self.model.log_probs(ids)


class EntropyExpert(Around):
    """Half the model, half a pseudo-expert that gives every byte, whatever it is, exp(-entropy of the model).

    The "probabilities" sum to more than 1, and every byte becomes cheaper.
    """

    def log_probs(self, ids: Tensor) -> Tensor:
        honest = super().log_probs(ids)
        entropy = -(honest.exp() * honest).sum(dim=-1, keepdim=True)
        return torch.logaddexp(honest, -entropy) - math.log(2)


class Peeking(Around):
    """Looks `ahead` bytes too far, wherever its window holds them, at every `share`-th position, and believes what it
    sees with `strength`."""

    def __init__(self, model: Predictor, ahead: int = 1, strength: float = 0.9, share: int = 1) -> None:
        super().__init__(model)
        self.ahead, self.strength, self.share = ahead, strength, share

    def log_probs(self, ids: Tensor) -> Tensor:
        found = super().log_probs(ids).exp()
        known = ids[:, self.ahead :]
        sure = torch.nn.functional.one_hot(known, found.shape[-1]).float() * self.strength
        sure[:, torch.arange(known.shape[1]) % self.share != 0] = 0
        part = found[:, : known.shape[1]]
        found[:, : known.shape[1]] = part * (1 - sure.sum(dim=-1, keepdim=True)) + sure
        return torch.log(found)


class Remembering(Around):
    """A cache from the last four bytes to the byte that followed, filled while scoring from call `from_call` on.

    Windows overlap, and a text can be scored twice: then the answer is in the cache before it is scored.
    """

    def __init__(self, model: Predictor, from_call: int = 0) -> None:
        super().__init__(model)
        self.cache: dict[bytes, int] = {}
        self.calls, self.from_call = 0, from_call

    def log_probs(self, ids: Tensor) -> Tensor:
        found = super().log_probs(ids).exp()
        rows = ids.cpu().numpy().astype(np.uint8)
        for row, told in zip(rows, found, strict=True):
            for p in range(4, len(row)):
                if row[p - 3 : p + 1].tobytes() in self.cache:
                    told[p] *= 0.1
                    told[p, self.cache[row[p - 3 : p + 1].tobytes()]] += 0.9
        if self.calls >= self.from_call:
            for row in rows:
                self.cache |= {row[p - 3 : p + 1].tobytes(): int(row[p + 1]) for p in range(4, len(row) - 1)}
        self.calls += 1
        return torch.log(found)


def counted_twice(windows: np.ndarray, where: int | np.ndarray) -> np.ndarray:
    """The windows (int64 [R, 4], of `windows_of`) with number `where` twice: its bytes are cheap, for they lie deep in
    a window, and who divides by all that he scored has a better mean."""
    return np.insert(windows, where, windows[where], axis=0)


@torch.inference_mode()
def believed(model: Predictor, data: np.ndarray, windows: np.ndarray, device: torch.device | str = "cpu") -> float:
    """Bits per scored byte of `data` (uint8 [N]) in these windows, one at a time, with nobody looking."""
    nats, count = 0.0, 0
    for window in windows:
        start, stop, new, _ = window.tolist()
        row = torch.from_numpy(rows_of(data, window[None]).astype(np.int64)).to(device)
        costs = -model.log_probs(row[:, :-1]).gather(-1, row[:, 1:, None])[0, new - start : stop - start, 0]
        nats, count = nats + float(costs.double().sum()), count + stop - new
    return nats / count / math.log(2)
