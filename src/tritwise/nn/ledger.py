"""A ledger of keys and values that outlives a call: attention with a sliding window over a stream without an end.

Shape suffixes: B batch, K key-value heads, T time, D size of a head.
"""

import torch
from torch import Tensor


class KVLedger:
    """Keys and values of the last `window - 1` positions of one attention layer, whatever was read before them.

    In the place of a `KVCache`, it never fills up: a position sees itself and window - 1 positions before it, so older
    ones can be forgotten, and a stream read in pieces of any size gives what one call over the whole text would.
    No gradient goes back into it: what a training step leaves here is only read by the next.
    """

    endless = True
    NAMES = ("keys", "values")

    def __init__(self, window: int) -> None:
        self.window, self.used = window, 0
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def append(self, k_BKTD: Tensor, v_BKTD: Tensor) -> tuple[Tensor, Tensor]:
        """Add T positions; returns the keys and values of what was kept and of these, [B, K, P + T, D], P < window."""
        self.used += k_BKTD.shape[2]
        if self.keys is not None and self.values is not None:
            k_BKTD, v_BKTD = torch.cat((self.keys, k_BKTD), dim=2), torch.cat((self.values, v_BKTD), dim=2)
        first = max(0, k_BKTD.shape[2] - (self.window - 1))
        # Copies: a view would keep all that was read in memory.
        self.keys, self.values = k_BKTD[:, :, first:].detach().clone(), v_BKTD[:, :, first:].detach().clone()
        return k_BKTD, v_BKTD

    def tensors(self) -> dict[str, Tensor]:
        """What is kept, by name; once something has been read."""
        assert self.keys is not None and self.values is not None
        return {"keys": self.keys, "values": self.values}

    def restore(self, keys: Tensor, values: Tensor, *, used: int) -> None:
        """Become a ledger that read `used` positions and kept these."""
        self.keys, self.values, self.used = keys.clone(), values.clone(), used
