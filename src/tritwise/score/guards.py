"""The guards that run with every score. A model that breaks one of the four conditions gets no number.

    1 strict causality      the probabilities of a byte depend on the bytes before it only
    2 a full distribution   they sum to 1 over the alphabet, whatever the byte turns out to be
    3 score before update   nothing is learned from a byte, or remembered of it, before its score stands
    4 every byte once       one pass from left to right over the bytes of the source text

How they are held:

- Probabilities are summed at sampled positions of every batch (2).
- Everything from a sampled byte on is changed, in all windows that a model is given at once: what was said of that byte
  and of those before it must stay as it was (1). What is asked again must be answered as before: a Predictor has no
  memory, and a Stream forgets at a reset (3).
- Before a piece of text is shown to a Stream, it says what it expects; the piece's first row must be just that (3).
- A tally of its own sees which bytes the losses belong to, and knows the length of the text from the text alone (4).

The guards see samples, and prove nothing about a program that notices when it is tested; a file that decompresses does.

Shape suffixes: N bytes, R rows, T time, V vocabulary.
"""

import math

import numpy as np
import torch
from torch import Tensor

from tritwise.errors import UserError
from tritwise.score.protocol import START, Predictor, Stream
from tritwise.score.windows import rows_of

CONDITIONS = {
    1: "condition 1, strict causality",
    2: "condition 2, a full distribution",
    3: "condition 3, score before update",
    4: "condition 4, every byte once",
}
ADVICE = "; turn dropout off, and give score_stream what learns while it reads"
SUM_TOLERANCE = 1e-4  # of the sum of the probabilities
MOVED = 1e-6  # of a probability that must stay, between two calls of one shape
ROUNDED = 0.02  # the same between calls of different shapes, the mean of a window: bfloat16 rounds them differently
TOLD = 1e-4  # of a probability that a stream has told, against the row that it is scored with
SUMMED = 64  # of so many positions, and in a batch at the least, whose probabilities are summed:
SUMMED_OF = 16384
SHARE = 0.02  # of all that is read: probes in full windows take no more
MOST = 6  # probes in full windows
UNKNOWN = 512  # bytes of the probe of a stream that does not tell its window
SHORTS, SHORT = 8, 32  # besides: so many probes of so many bytes


class NoNumberError(UserError):
    """A probability is zero or no number: what training that diverged leaves behind, and no cheat."""


def broken(condition: int, what: str) -> UserError:
    """The error that names the condition a model breaks."""
    return UserError(f"{what}; such a model cannot be scored ({CONDITIONS[condition]})")


class Tally:
    """Counts the scored bytes by itself and adds up what they cost.

    total: bytes of the source text. into: float array [total] that takes the nats of each byte.
    """

    def __init__(self, total: int, into: np.ndarray | None = None) -> None:
        if into is not None and into.shape != (total,):
            raise UserError(f"costs of {total} bytes do not fit an array of shape {into.shape}; give one of ({total},)")
        self.total, self.done, self.nats, self.into = total, 0, 0.0, into

    def add(self, first: int, nats_N: np.ndarray) -> None:
        """The nats of the bytes first … first + N - 1 of the text. UserError unless these are the next ones."""
        if first != self.done:
            raise broken(4, f"byte {first} was scored twice" if first < self.done else f"byte {self.done} was left out")
        self.done += len(nats_N)
        if self.done > self.total:
            raise broken(4, f"{self.done} bytes were scored of a text of {self.total}")
        self.nats += float(nats_N.sum(dtype=np.float64))
        if self.into is not None:
            self.into[first : self.done] = nats_N

    def close(self) -> float:
        """Nats of the whole text. UserError if bytes were left out at its end, or one has no finite cost."""
        if self.done != self.total:
            raise broken(4, f"{self.done} bytes were scored of a text of {self.total}")
        if not math.isfinite(self.nats):
            raise NoNumberError("the model gives some byte a probability of zero or no number; it cannot be scored")
        return self.nats


def check_sums(log_probs: Tensor, seed: int, where: np.ndarray | None = None) -> None:
    """UserError unless the probabilities at sampled positions sum to 1 within 1e-4.

    log_probs: natural logs [..., V]. where: bool [...], the positions that count; None: all.
    """
    rows_NV = log_probs.reshape(-1, log_probs.shape[-1])
    places = np.arange(len(rows_NV)) if where is None else np.flatnonzero(where)
    most = max(SUMMED, SUMMED * len(rows_NV) // SUMMED_OF)
    if len(places) > most:
        places = np.random.default_rng(seed).choice(places, most, replace=False)
    sums = rows_NV[torch.from_numpy(places).to(rows_NV.device)].double().exp().sum(dim=-1).cpu()
    wrong = sums[~((sums - 1).abs() <= SUM_TOLERANCE)]
    if len(wrong):
        error = broken(2, f"the model's probabilities sum to {float(wrong[0]):.6f}, not 1")
        raise NoNumberError(str(error)) if wrong.isnan().any() else error


@torch.inference_mode()
def check_predictor(
    model: Predictor, data: np.ndarray, windows: np.ndarray, device: torch.device | str, start_id: int = START
) -> dict[int, np.ndarray]:
    """Hold a Predictor to conditions 1 to 3 on sampled windows of the text, and on short pieces of it.

    windows: int64 [R, 4], those that will be scored; start_id: stands before a text. Returns, for some of them by
    number, the probabilities of their bytes; when they are scored, `check_again` wants the same. UserError naming the
    condition that is broken.
    """
    rng = np.random.default_rng(len(data))
    lengths = windows[:, 1] - windows[:, 0]
    wanted = int(SHARE * lengths.sum() / (4 * lengths.max()))  # a probe is two windows, each read twice
    firsts = rng.choice(len(windows), min(len(windows), MOST, max(1, wanted)), replace=False)
    # Neighbours are changed alike, so that a model which looks into the other rows of its batch is seen as well.
    numbers = np.stack((firsts, np.minimum(firsts + 1, len(windows) - 1)), axis=1)
    cuts = rng.integers(windows[firsts, 0], np.maximum(windows[numbers[:, 1], 1] - 1, windows[firsts, 0] + 1))
    found = _probe(model, data, windows[numbers.reshape(-1)], cuts.repeat(2), rng, device, start_id)

    size = min(SHORT, int(lengths.max()))
    starts = rng.integers(0, len(data) - size + 1, SHORTS)
    stops = starts + size
    short = np.stack((starts, stops, starts, starts == 0), axis=1)
    _probe(model, data, short, rng.integers(starts, np.maximum(stops - 1, starts + 1)), rng, device, start_id)
    return dict(zip(numbers.reshape(-1).tolist(), found, strict=True))


def _probe(
    model: Predictor,
    data: np.ndarray,
    windows: np.ndarray,
    cuts_R: np.ndarray,
    rng: np.random.Generator,
    device: torch.device | str,
    start_id: int,
) -> list[np.ndarray]:
    """Ask for windows as they are and with every byte from `cuts_R` on changed; p(byte) of the former, row by row."""
    starts, stops, opens = windows[:, :1], windows[:, 1:2], windows[:, 3:] > 0
    rows = rows_of(data, windows, start_id)
    columns = np.arange(rows.shape[1])
    byte = starts - 1 + columns  # of the text, in each column
    late = (byte >= cuts_R[:, None]) & (byte < stops) & ~(opens & (columns == 0))

    def ask(ids: np.ndarray) -> Tensor:
        return model.log_probs(torch.from_numpy(ids[:, :-1].astype(np.int64)).to(device))

    first = ask(rows)
    noise = rng.integers(0, 2**20, 4093)  # by place in the text: changed alike in every row
    other = np.where(late, _others(rows, noise[byte % len(noise)], first.shape[-1]), rows)
    inside = byte[:, 1:] < stops
    check_sums(first, len(data), inside)
    wrong = _moved(first, ask(other)) * (inside & (byte[:, 1:] <= cuts_R[:, None]))
    if (wrong > MOVED).any():
        forgets = (_moved(first, ask(rows)) * inside <= MOVED).all()
        row, column = np.unravel_index(wrong.argmax(), wrong.shape)
        if not forgets:
            raise broken(
                3, f"asked twice for the same windows, the model changed its mind by {wrong.max():.3g}{ADVICE}"
            )
        raise broken(
            1,
            f"the probabilities of byte {byte[row, column + 1]} moved by {wrong.max():.3g} when the bytes from "
            f"{cuts_R[row]} on were changed",
        )
    targets = torch.from_numpy(rows[:, 1:].astype(np.int64)).to(first.device)
    probabilities = first.gather(2, targets[..., None])[..., 0].exp().double().cpu().numpy()
    return [p[mask] for p, mask in zip(probabilities, inside, strict=True)]


def check_again(told_T: np.ndarray, now_T: np.ndarray) -> None:
    """UserError unless a window is scored with the probabilities that the guards were told; both float [T]."""
    moved = float(np.abs(told_T - now_T).mean())
    if not moved <= ROUNDED:
        raise broken(3, f"asked twice for the same window, the model changed its mind by {moved:.3g} a byte{ADVICE}")


def check_stream(stream: Stream, data: np.ndarray, length: int) -> None:
    """Hold a Stream to conditions 1 to 3 on a sampled piece of the text, and on short ones.

    length: bytes of the sampled piece; less where the text is short, and 0 where the stream's window is not known.
    UserError naming the condition that is broken. The stream is left as after a reset.
    """
    rng = np.random.default_rng(len(data))
    length = max(SHORT, min(length or UNKNOWN, int(SHARE * len(data) / 2)))
    for size in (length, *[SHORT] * SHORTS):
        start = int(rng.integers(0, max(1, len(data) - size + 1)))
        piece = np.array(data[start : start + size])
        cut = int(rng.integers(len(piece)))
        first = _from_start(stream, piece)
        check_sums(first, len(data))
        other = piece.copy()
        other[cut:] = _others(piece[cut:], rng.integers(0, 2**20, len(piece) - cut), first.shape[-1])
        moved = _moved(first, _from_start(stream, other))[: cut + 1]
        if (moved > MOVED).any():
            byte, worst = start + cut, moved.max()
            if (_moved(first, _from_start(stream, piece)) > MOVED).any():
                raise broken(3, f"after a reset the stream still remembers, and changed its mind by {worst:.3g}")
            if (moved[:cut] > MOVED).any():
                raise broken(1, f"probabilities moved by {worst:.3g} when a later byte, {byte}, was changed")
            raise broken(3, f"the probabilities of byte {byte} moved by {worst:.3g} when that byte itself was changed")
    stream.reset()


def _from_start(stream: Stream, piece: np.ndarray) -> Tensor:
    stream.reset()
    return stream.read(torch.from_numpy(piece.astype(np.int64))).detach().clone()


def check_told(told_V: Tensor, row_V: Tensor, byte: int) -> None:
    """UserError unless byte number `byte` is scored with the probabilities that a stream told before it saw it."""
    moved = float((told_V.exp() - row_V.exp()).abs().max())
    if not moved <= TOLD:
        raise broken(3, f"the stream told other probabilities of byte {byte} before it saw it, by {moved:.3g}")


def _others(bytes_: np.ndarray, noise: np.ndarray, symbols: int) -> np.ndarray:
    """For every byte another one that a model of so many symbols knows, chosen by noise (integers >= 0)."""
    symbols = min(symbols, 256)
    return ((bytes_ + 1 + noise % max(1, symbols - 1)) % symbols).astype(np.uint8)


def _moved(one: Tensor, two: Tensor) -> np.ndarray:
    """The largest change of a probability at each position: float64, the shape without V. No number counts as 1."""
    return torch.nan_to_num((one.exp() - two.exp()).abs().amax(dim=-1).double(), nan=1.0).cpu().numpy()
