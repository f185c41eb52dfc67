"""The ARB model: bytes, images and sound in one network whose trainable tensors are all integers.

The trunk is the byte model over 288 symbols. An image or a sound enters as tokens in its stream, in the place of the
symbols IMAGE_SLOT and AUDIO_SLOT behind a begin mark; they come from a frozen encoder, whose features (float16, no part
of the model) pass a ternary bridge. A picture is drawn by the diffusion part.

Shape suffixes: B batch, T time, F frames or tokens of features, P tokens of an image or a sound, D size of a feature,
C width, V vocabulary, L letters of a transcript.
"""

import torch
from torch import Tensor, nn

from tritwise.models.arb_parts import PartsConfig
from tritwise.models.bridge import Bridge
from tritwise.models.byte_lm import ByteLM, DecodeState, add_column_scales
from tritwise.models.config import ModelConfig
from tritwise.models.denoiser import Denoiser
from tritwise.nn import FloatLinear, TritLinear, of_trits, rms_norm

IGNORED = -100  # a target that is not scored
CTC_SHARE = 0.5  # of the loss of a sound, where its bridge spells too


def skeleton(config: ModelConfig, parts: PartsConfig | None = None) -> "ByteLM | Arb":
    """The model of this shape without its numbers, on the meta device: no memory is taken, and names and sizes told."""
    with torch.device("meta"):
        return ByteLM(config) if parts is None else Arb(config, parts)


class Arb(nn.Module):
    """A byte trunk with the parts that `parts` names; float weights where config.weights says so, for baselines.

    `trunk(ids)` is the language model. loss(kind, …) is what a batch of that kind costs, a 0-d float32 tensor:

        "text"       ids, targets int64 [B, T]
        "vision"     ids, targets, features [B, P, D]; the image's tokens are at the positions 1 … P
        "audio"      the same with features [B, F, D] and P = F / stride; with CTC also letters int64 [B, L] and their
                     number [B], of which each costs its share
        "diffusion"  pictures, noise [B, channels, H, W], t float32 [B], labels int64 [B]
    """

    def __init__(
        self,
        config: ModelConfig,
        parts: PartsConfig,
        dtype: torch.dtype = torch.float32,
        *,
        checkpoint: bool = False,
        loss_chunk: int = 0,
    ) -> None:
        super().__init__()
        self.parts = parts
        self.trunk = ByteLM(config, dtype, checkpoint=checkpoint, loss_chunk=loss_chunk)
        linear = of_trits(TritLinear, config.weight_trits) if config.weights == "trit" else FloatLinear
        bridge = {"depth": parts.bridge_depth, "linear": linear, "group": config.group}
        self.vision = Bridge(parts.vision_size, config.width, stride=1, reach=0, **bridge) if parts.vision else None
        self.audio = self.spell = None
        if parts.audio:
            self.audio = Bridge(
                parts.audio_size, config.width, stride=parts.audio_stride, reach=parts.bridge_reach, **bridge
            )
            if parts.ctc:
                self.spell = linear(config.width, config.vocab, role="head", group=config.group)
        self.diffusion = None
        if parts.diffusion:
            self.diffusion = Denoiser(parts, dtype, weights=config.weights, group=config.group)
        if config.column_scales:
            for part in (self.vision, self.audio, self.spell, self.diffusion):
                if part is not None:
                    add_column_scales(part)

    @property
    def config(self) -> ModelConfig:
        """The shape of the trunk."""
        return self.trunk.config

    @property
    def dtype(self) -> torch.dtype:
        """The type of the activations."""
        return self.trunk.dtype

    @dtype.setter
    def dtype(self, dtype: torch.dtype) -> None:
        self.trunk.dtype = dtype
        if self.diffusion is not None:
            self.diffusion.dtype = dtype

    @property
    def context(self) -> int:
        """Bytes that one call can read: the scorer's window."""
        return self.trunk.context

    def forward(self, ids: Tensor, state: DecodeState | None = None) -> Tensor:
        """Logits of the trunk, float32 [B, T, V]."""
        return self.trunk(ids, state)

    def log_probs(self, ids: Tensor) -> Tensor:
        """As of `ByteLM`."""
        return self.trunk.log_probs(ids)

    def new_state(self, batch: int = 1, *, endless: bool = False) -> DecodeState:
        """As of `ByteLM`."""
        return self.trunk.new_state(batch, endless=endless)

    def hidden_of(self, kind: str, features_BFD: Tensor) -> Tensor:
        """Features of an image ("vision") or a sound ("audio") as hidden states of its bridge, [B, F, C]."""
        bridge = self.vision if kind == "vision" else self.audio
        assert bridge is not None, f"the model has no {kind} part"
        return bridge.hidden(features_BFD, self.dtype)

    def logits_after(
        self,
        kind: str,
        ids: Tensor,
        hidden_BFC: Tensor,
        state: DecodeState | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Logits float32 [B, T, V] where the positions 1 … P of ids are the tokens of an image or a sound. noise: as of
        `ByteLM.read`."""
        bridge = self.vision if kind == "vision" else self.audio
        assert bridge is not None
        tokens_BPC = bridge.tokens(hidden_BFC)
        x_BTC, tokens_BPC = self.trunk.embedded(ids, state, noise), rms_norm(tokens_BPC)
        x_BTC = torch.cat((x_BTC[:, :1], tokens_BPC, x_BTC[:, 1 + tokens_BPC.shape[1] :]), dim=1)
        return self.trunk.logits(self.trunk.read(x_BTC, ids, state, noise=noise))

    def spelled(self, hidden_BFC: Tensor) -> Tensor:
        """Logits float32 [B, F, V] of what the audio bridge spells by itself; symbol 256 is CTC's blank."""
        assert self.spell is not None, "the model has no ctc"
        return self.trunk.capped(self.spell(rms_norm(hidden_BFC)))

    def loss(self, kind: str, *batch: Tensor, state: DecodeState | None = None) -> Tensor:
        """The cost of a batch: see the class. state: of text that goes on from what was read, as of `ByteLM`."""
        if kind == "text":
            ids, targets = batch
            return self.trunk.loss(ids, targets, state=state)
        if kind == "diffusion":
            assert self.diffusion is not None, "the model has no diffusion part"
            return self.diffusion.loss(*batch)
        ids, targets, features_BFD, *letters = batch
        hidden_BFC = self.hidden_of(kind, features_BFD)
        logits = self.logits_after(kind, ids, hidden_BFC, noise=self.trunk.noise_now())
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
        if kind == "audio" and self.spell is not None:
            loss = (1 - CTC_SHARE) * loss + CTC_SHARE * self._ctc(hidden_BFC, *letters)
        return loss

    def _ctc(self, hidden_BFC: Tensor, letters_BL: Tensor, count_B: Tensor) -> Tensor:
        """Mean of the nats a letter that CTC takes; transcripts longer than their sound allows cost nothing."""
        log_probs_FBV = torch.log_softmax(self.spelled(hidden_BFC), dim=-1).transpose(0, 1)
        frames = torch.full_like(count_B, hidden_BFC.shape[1])
        return nn.functional.ctc_loss(
            log_probs_FBV, letters_BL, frames, count_B, blank=self.config.vocab - 32, zero_infinity=True
        )
