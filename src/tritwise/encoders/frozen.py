"""Frozen encoders: ViT, DINOv2 or CLIP-vision for images, Whisper for sounds, from a local folder or the hub.

They are never trained and never saved with a model: the only floats beside a ternary network. Features are the hidden
states of a layer behind the encoder's own last norm, with gains of about one.

Shape suffixes: B batch, F tokens (image) or frames (sound), D size of a feature.
"""

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tritwise.data.media import resized
from tritwise.errors import UserError

INSTALL = "pip install 'tritwise[hf,media]'"
VISION = ("vit", "dinov2", "dinov2_with_registers", "clip_vision_model", "clip")
AUDIO = ("whisper",)
RATE = 16000  # samples a second that Whisper hears
FRAME = 320  # samples of one of its frames: 20 ms
BLOCK = 32  # a sound's frames are a multiple of this: it is followed by silence up to there


class FrozenEncoder(nn.Module):
    """What both kinds share. `size`: D. `layer`: whose hidden states are taken; the last has the number of layers."""

    kind = ""

    def __init__(self, network: nn.Module, where: str, layer: int, layers: int, size: int) -> None:
        super().__init__()
        if not 0 <= layer <= layers:
            raise UserError(f"layer is {layer}; {where} has the layers 1 to {layers} (0 means the last)")
        self.network, self.where, self.layer, self.size = network.eval(), where, layer or layers, size
        self.digest = weights_digest(network)  # now: the windows of sounds will cut the positions
        for parameter in self.network.parameters():
            parameter.requires_grad_(False)

    @property
    def _norm(self) -> nn.Module:
        """The norm behind the last layer."""
        for name in ("layernorm", "layer_norm", "post_layernorm"):
            if hasattr(self.network, name):
                return getattr(self.network, name)
        raise UserError(f"{self.where} has no last norm that is known; use a ViT, DINOv2, CLIP or Whisper")

    def settings(self) -> dict[str, Any]:
        """What decides the features beside the data, as plain JSON: part of the key of the cache."""
        return {"kind": self.kind, "encoder": self.digest, "layer": self.layer}


class VisionEncoder(FrozenEncoder):
    """Images to features [B, 1 + grid * grid, D]: the class token, and patches averaged over a grid of cells.

    pixels: side of the square that the network sees; 0: the size that its processor names.
    """

    kind = "vision"

    def __init__(
        self, network: nn.Module, processor: Any, where: str, layer: int = 0, grid: int = 3, pixels: int = 0
    ) -> None:
        config: Any = network.config
        super().__init__(network, where, layer, config.num_hidden_layers, config.hidden_size)
        self.processor, self.grid, self.patch = processor, grid, config.patch_size
        named = getattr(processor, "crop_size", None) or getattr(processor, "size", {})
        self.pixels = pixels or int(named.get("height") or named.get("shortest_edge") or config.image_size)
        if not 1 <= grid <= self.pixels // self.patch:
            raise UserError(
                f"grid is {grid}; {self.pixels} pixels hold 1 to {self.pixels // self.patch} patches a side"
            )

    @torch.inference_mode()
    def forward(self, images: Sequence[np.ndarray]) -> Tensor:
        """uint8 [H, W, 3] each, of any size -> float32 [B, 1 + grid * grid, D]."""
        side = {"height": self.pixels, "width": self.pixels}
        found = self.processor(images=list(images), return_tensors="pt", size=side, crop_size=side)
        pixels = found["pixel_values"].to(next(self.network.parameters()).device)
        config: Any = self.network.config
        # DINOv2 fits its positions to the size by itself.
        options = {} if config.model_type.startswith("dinov2") else {"interpolate_pos_encoding": True}
        told = self.network(pixel_values=pixels, output_hidden_states=True, **options)
        x_BFD = self._norm(told.hidden_states[self.layer])
        patches = self.pixels // self.patch
        # Registers, where an encoder has them, stand between the class token and the patches.
        square = x_BFD[:, -patches * patches :].transpose(1, 2).unflatten(2, (patches, patches))
        cells = nn.functional.adaptive_avg_pool2d(square, self.grid).flatten(2).transpose(1, 2)
        return torch.cat((x_BFD[:, :1], cells), dim=1)

    def preview(self, image: np.ndarray) -> Tensor:
        """The image at most 96 pixels high and wide, uint8 [H, W, 3]."""
        shrink = min(1.0, 96 / max(image.shape[:2]))
        return torch.from_numpy(resized(image, *(max(1, round(side * shrink)) for side in image.shape[:2])).copy())

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"grid": self.grid, "pixels": self.pixels}


class AudioEncoder(FrozenEncoder):
    """Sounds to features [F, D], 50 frames a second.

    A sound is followed by silence up to a multiple of BLOCK frames, and the encoder hears just that: Whisper's
    positions are cut to the window, so that a short sound costs little. Sounds longer than its window of 30 s are
    read in windows.
    """

    kind = "audio"

    def __init__(self, network: nn.Module, extractor: Any, where: str, layer: int = 0) -> None:
        config: Any = network.config
        super().__init__(network, where, layer, config.encoder_layers, config.d_model)
        self.extractor, self.longest = extractor, int(config.max_source_positions)
        self._positions: Tensor = network.embed_positions.weight.data  # type: ignore[union-attr]

    @torch.inference_mode()
    def forward(self, sounds: Sequence[np.ndarray]) -> list[Tensor]:
        """float32 [samples] each, at RATE -> float32 [F, D] each."""
        pieces: list[tuple[int, np.ndarray]] = []
        for index, samples in enumerate(sounds):
            step = self.longest * FRAME
            pieces += [(index, samples[at : at + step]) for at in range(0, max(1, len(samples)), step)]
        by_length: dict[int, list[int]] = {}
        for place, (_, samples) in enumerate(pieces):
            by_length.setdefault(self._frames(len(samples)), []).append(place)
        found: dict[int, Tensor] = {}
        for frames, places in by_length.items():
            heard = self._hear(frames, [pieces[place][1] for place in places])
            found |= dict(zip(places, heard, strict=True))
        parts: list[list[Tensor]] = [[] for _ in sounds]
        for place, (index, _) in enumerate(pieces):
            parts[index].append(found[place])
        return [torch.cat(own) for own in parts]

    def _frames(self, samples: int) -> int:
        return min(self.longest, BLOCK * max(1, math.ceil(samples / FRAME / BLOCK)))

    def preview(self, samples: np.ndarray) -> Tensor:
        """The spectrogram that the encoder hears, of the first ten seconds: uint8 [bands, 100 a second], low first."""
        mel = self._mel(min(500, self._frames(len(samples))), [samples])[0]
        return ((mel - mel.min()) / (mel.max() - mel.min()).clamp(min=1e-6) * 255).to(torch.uint8)

    def _mel(self, frames: int, sounds: list[np.ndarray]) -> Tensor:
        """Logarithmic spectrograms float32 [B, bands, 2 * frames]."""
        options = {"sampling_rate": RATE, "padding": "max_length", "truncation": True, "return_tensors": "pt"}
        return self.extractor(sounds, max_length=frames * FRAME, **options)["input_features"]

    def _hear(self, frames: int, sounds: list[np.ndarray]) -> Tensor:
        mel = self._mel(frames, sounds)
        network: Any = self.network
        network.config.max_source_positions = frames
        network.embed_positions = nn.Embedding.from_pretrained(self._positions[:frames])
        options = {"output_hidden_states": True} if self.layer < network.config.encoder_layers else {}
        result = network(mel.to(self._positions.device), **options)
        if not options:
            return result.last_hidden_state
        return self._norm(result.hidden_states[self.layer])


def load_encoder(where: str, *, layer: int = 0, grid: int = 3, pixels: int = 0) -> VisionEncoder | AudioEncoder:
    """The frozen encoder in a local folder, or of that name on the hub, in float32.

    layer: whose hidden states; 0: the last. grid, pixels: see VisionEncoder; sounds ignore them. Only safetensors are
    read, and no code that comes with a model is run. Raises UserError: transformers is missing, there is no such
    encoder, or it is neither a vision transformer nor Whisper.
    """
    try:
        import transformers as hub  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(f"transformers is missing; {INSTALL}") from None
    safe: dict[str, Any] = {"trust_remote_code": False}
    weights = safe | {"dtype": torch.float32, "use_safetensors": True}
    if looks_local(where) and not Path(where).expanduser().is_dir():
        raise UserError(f"there is no encoder at {where}; name a folder with config.json, or a model of the hub")
    place = str(Path(where).expanduser()) if Path(where).expanduser().is_dir() else where
    try:
        config = hub.AutoConfig.from_pretrained(place, **safe)
        if config.model_type in AUDIO:
            from transformers.models.whisper import modeling_whisper  # pyright: ignore[reportMissingImports]

            if (config.architectures or [""])[0] == "WhisperEncoder":
                network = modeling_whisper.WhisperEncoder.from_pretrained(place, **weights)
            else:
                network = modeling_whisper.WhisperModel.from_pretrained(place, **weights).encoder
            extractor = hub.WhisperFeatureExtractor.from_pretrained(place)
            return AudioEncoder(network, extractor, where, layer)
        if config.model_type in VISION:
            is_clip = config.model_type.startswith("clip")
            network = (hub.CLIPVisionModel if is_clip else hub.AutoModel).from_pretrained(place, **weights)
            network = getattr(network, "vision_model", network)
            return VisionEncoder(network, hub.AutoImageProcessor.from_pretrained(place), where, layer, grid, pixels)
    except UserError:
        raise
    except Exception as error:  # the library raises what its parts raise: OSError, ValueError, HTTP errors, …
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"cannot load the encoder {where}: {reason}; check the folder or the name on the hub") from None
    raise UserError(
        f"{where} is a {config.model_type}, which is no encoder that is known; use a ViT, DINOv2, CLIP or Whisper"
    )


def looks_local(where: str) -> bool:
    """Whether `where` is written as a path, not as a name on the hub (owner/name)."""
    return where.startswith((".", "/", "~")) or where.count("/") != 1


def weights_digest(network: nn.Module) -> str:
    """sha256 over the weights of a network, names and values: the same for a folder and its copy."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(
            name.encode() + tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()
