"""A switch between a predictor that is trusted and one that may be better: never more than 0.0007 bits a byte worse.

It is the Bayesian mixture of all ways to change between the two along the text, where each byte is another
chance of LEAVE to change ("fixed share": Herbster and Warmuth, "Tracking the best expert", Machine Learning 32, 1998):

    p(x) = v · p_trusted(x) + (1 − v) · p_candidate(x)           a distribution if both are
    v'   = v · p_trusted(x) / p(x)                               Bayes, once x is known
    v   <- v' · (1 − LEAVE) + (1 − v') · LEAVE                   before the next byte

Before the first byte v is 1 − LEAVE. Always staying with the trusted one has the prior (1 − LEAVE)^N over N bytes, and
a mixture costs at most the logarithm of that more than any of its parts: whatever the text and the candidate, the code
is at most N · log2(1 / (1 − LEAVE)) = 0.00071 · N bits longer than that of the trusted one.

Shape suffixes: T time, V bytes (256).
"""

import math

import numpy as np

LEAVE = 2.0**-11
WORST_BITS = -math.log2(1 - LEAVE)
"""Bits a byte by which the mixture can be worse than the trusted predictor: a theorem, not a measurement."""
_FAR = 500.0  # nats between the two on one byte: e to it is still a number


class Switch:
    """The weight of the trusted predictor, moved by the bytes that were scored.

    trusted: v, for the next byte.
    """

    def __init__(self) -> None:
        self.trusted = 1 - LEAVE

    def peek(self, trusted_V: np.ndarray, candidate_V: np.ndarray) -> np.ndarray:
        """The mixture for the next byte: natural logs float32 [V] of the two -> float32 [V]. Nothing moves."""
        return _mixture(trusted_V[None], candidate_V[None], np.array([self.trusted]))[0]

    def blend(self, trusted_TV: np.ndarray, candidate_TV: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """The mixtures that stood before each byte of ids (integers [T]) was known: natural logs float32 [T, V] of the
        two -> float32 [T, V]. Then v has moved on."""
        row = np.arange(len(ids))
        far = candidate_TV[row, ids].astype(np.float64) - trusted_TV[row, ids]
        weights, v = np.empty(len(ids)), self.trusted
        for i, nats in enumerate(far.tolist()):
            weights[i] = v
            after = v / (v + (1 - v) * math.exp(max(-_FAR, min(_FAR, nats))))
            v = after * (1 - LEAVE) + (1 - after) * LEAVE
        self.trusted = v
        return _mixture(trusted_TV, candidate_TV, weights)


def _mixture(trusted_TV: np.ndarray, candidate_TV: np.ndarray, v_T: np.ndarray) -> np.ndarray:
    most_TV = np.maximum(trusted_TV, candidate_TV)
    p_TV = np.exp(trusted_TV - most_TV)
    p_TV *= v_T.astype(np.float32)[:, None]
    q_TV = np.exp(candidate_TV - most_TV)
    q_TV *= (1 - v_T).astype(np.float32)[:, None]
    p_TV += q_TV
    np.log(p_TV, out=p_TV)
    p_TV += most_TV
    return p_TV
