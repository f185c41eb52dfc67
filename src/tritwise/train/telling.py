"""What a trained ARB model says of an image or a sound, and how far that is from what it should say.

Shape suffixes: B batch, F frames or tokens of features, D size of a feature, P tokens of the stream.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor

from tritwise.data.vocabulary import BYTES, Special, text_of
from tritwise.encoders import Features
from tritwise.models import Arb
from tritwise.train.streams import opening

SAMPLES = 16  # captions of which the one nearest to all others is told
NEIGHBOURS = 4  # of an image among those of a collection, whose captions may have a say


@torch.inference_mode()
def draws(model: Arb, features_BFD: Tensor, most: int = 80, samples: int = SAMPLES) -> list[list[str]]:
    """`samples` captions of each of B images, as the model finds them likely."""
    told = told_by_trunk(model, "vision", model.hidden_of("vision", features_BFD), most, samples)
    return [told[at : at + samples] for at in range(0, len(told), samples)]


@torch.inference_mode()
def tell(model: Arb, kind: str, features_BFD: Tensor, most: int = 80, samples: int = 0) -> list[str]:
    """Caption ("vision") or transcript ("audio") of each of B media with as many features each.

    most: bytes of the longest. samples: captions are the `consensus` of so many; 0: the likeliest symbol each time, as
    in transcripts. A sound is spelled by its bridge if that has learned to (`ctc`), else told by the trunk.
    """
    if kind == "vision" and samples:
        return [consensus(told) for told in draws(model, features_BFD, most, samples)]
    hidden_BFC = model.hidden_of(kind, features_BFD)
    if kind == "audio" and model.spell is not None:
        return [collapsed(row.tolist()) for row in model.spelled(hidden_BFC).argmax(dim=-1)]
    return told_by_trunk(model, kind, hidden_BFC, most)


@torch.inference_mode()
def told_by_trunk(model: Arb, kind: str, hidden_BFC: Tensor, most: int, samples: int = 0) -> list[str]:
    """What the trunk says of each, byte after byte: the likeliest, or `samples` texts of each drawn as it finds them
    likely, those of a medium one after another. The luck of the draw is the same for every medium and every time."""
    hidden_BFC = hidden_BFC.repeat_interleave(max(1, samples), dim=0)
    batch, frames = hidden_BFC.shape[:2]
    tokens = frames // (1 if kind == "vision" else model.parts.audio_stride)
    start_T = torch.from_numpy(opening(kind, tokens)).to(hidden_BFC.device)
    state, luck = model.new_state(batch), torch.Generator().manual_seed(0)
    logits_BV = model.logits_after(kind, start_T.repeat(batch, 1), hidden_BFC, state)[:, -1]
    found, running = [[] for _ in range(batch)], torch.ones(batch, dtype=torch.bool)
    for _ in range(min(most, model.context - len(start_T))):
        logits_BV[:, BYTES : Special.EOS] = -torch.inf
        logits_BV[:, Special.EOS + 1 :] = -torch.inf
        if samples:  # the greatest of logits with Gumbel noise is a draw from their softmax
            noise_SV = -torch.empty(samples, logits_BV.shape[1]).exponential_(generator=luck).log()
            logits_BV = logits_BV + noise_SV.to(logits_BV.device).repeat(batch // samples, 1)
        chosen_B = logits_BV.argmax(dim=-1)
        running &= (chosen_B != Special.EOS).cpu()
        if not running.any():
            break
        for row, symbol in enumerate(chosen_B.tolist()):
            if running[row]:
                found[row].append(symbol)
        if state.used + 1 > model.context:
            break
        logits_BV = model(chosen_B[:, None], state)[:, -1].clone()
    return [text_of(row).decode("utf-8", errors="replace") for row in found]


def consensus(texts: Sequence[str], others: Sequence[str] = ()) -> str:
    """The text with the fewest edits to all of `texts` together: the least expected error if they are draws of what is
    likely (Kumar and Byrne 2004). `others`, where there are any, together weigh as much as all of `texts`, so that what
    is likely and, say, what is told of the nearest neighbours agree. Of equals the first."""
    counts = Counter({text: count * max(1, len(others)) for text, count in Counter(texts).items()})
    for text in others:
        counts[text] += len(texts)
    costs = dict.fromkeys(counts, 0)
    for one, other in combinations(counts, 2):
        far = edits(one, other)
        costs[one] += far * counts[other]
        costs[other] += far * counts[one]
    return min(counts, key=lambda text: costs[text])


def collapsed(symbols: Sequence[int]) -> str:
    """What CTC means by a row of symbols: repeats count once, then blanks and other specials are left out."""
    kept = [now for now, before in zip(symbols, [-1, *symbols], strict=False) if now != before and now < BYTES]
    return bytes(kept).decode("utf-8", errors="replace")


def edits(told: str, meant: str) -> int:
    """Letters to insert, delete or replace to make one of the other (Levenshtein 1966).

    A row of the table is two sets of bits, where it rises and where it falls (Myers 1999; Hyyrö 2003), so a letter of
    `told` costs a dozen operations on whole numbers, however long `meant` is.
    """
    if not meant:
        return len(told)
    places: dict[str, int] = {}
    for place, letter in enumerate(meant):
        places[letter] = places.get(letter, 0) | 1 << place
    full, last = (1 << len(meant)) - 1, 1 << (len(meant) - 1)
    rises, falls, far = full, 0, len(meant)
    for letter in told:
        same = places.get(letter, 0)
        level = (((same & rises) + rises) ^ rises) | same | falls  # as far as the place before it in either direction
        more, less = falls | ~(level | rises) & full, level & rises
        far += bool(more & last) - bool(less & last)
        more, less = more << 1 | 1, less << 1
        rises, falls = (less | ~(level | more)) & full, more & level & full
    return far


def marks(told: Sequence[str], meant: Sequence[str]) -> dict[str, float]:
    """exact: share of texts told without a fault. cer: edits over the letters that were meant."""
    faults = sum(edits(a, b) for a, b in zip(told, meant, strict=True))
    right = sum(a == b for a, b in zip(told, meant, strict=True))
    return {"exact": right / max(1, len(meant)), "cer": faults / max(1, sum(map(len, meant)))}


def nearest(features: Tensor, known: Tensor, count: int = 1) -> list[list[int]]:
    """For each row of features [N, D] the `count` rows of `known` [M, D] with the greatest cosines, those first."""
    a, b = (torch.nn.functional.normalize(x.float(), dim=-1) for x in (features, known))
    return (a @ b.T).topk(min(count, len(known)), dim=-1).indices.tolist()


def neighbours(features_BFD: Tensor, known: Features) -> list[list[str]]:
    """Captions of the NEIGHBOURS images of the train part of `known` whose features are most similar, for each of B."""
    train = known.part("train")
    near = nearest(features_BFD.flatten(1), torch.stack([known.of(i).flatten() for i in train]), NEIGHBOURS)
    return [[known.examples[train[place]].text for place in places] for places in near]
