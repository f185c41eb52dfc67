"""Which parts an ARB model has beside its byte trunk, and their shapes."""

from dataclasses import dataclass

from tritwise.errors import UserError
from tritwise.models.config import MOST


@dataclass(frozen=True)
class PartsConfig:
    """Parts of an ARB model. What is read off the data and the encoders when a run begins may stay 0 or empty.

    vision, audio, diffusion   whether the model has the part
    vision_encoder, audio_encoder   the frozen encoder: a folder, or a name on the hub
    vision_layer, audio_layer  its layer whose hidden states are features; 0: the last
    vision_pixels              side of the square that it sees; 0: as its processor says
    vision_grid                features of an image: its class token, and patches averaged over a grid of so many cells
    vision_size, audio_size    channels of a feature, read off the encoder
    vision_digest, audio_digest   checksum of the encoder's weights, read off it
    audio_stride               frames of 20 ms that make one token of the stream
    bridge_depth               residual blocks of a bridge
    bridge_reach               frames to either side that a block of the audio bridge reads along
    ctc                        whether the audio bridge also spells by itself, frame by frame (Graves et al. 2006)
    picture, channels          side and channels of the pictures that the diffusion part draws, read off the data
    patch                      side of the square of pixels that is one token of it
    draw_width, draw_depth     its channels and blocks
    classes                    names of what it draws, joined by |, read off the data
    Raises UserError for a shape that cannot be built.
    """

    vision: bool = False
    audio: bool = False
    diffusion: bool = False
    vision_encoder: str = ""
    audio_encoder: str = ""
    vision_layer: int = 0
    audio_layer: int = 0
    vision_pixels: int = 0
    vision_grid: int = 3
    vision_size: int = 0
    audio_size: int = 0
    vision_digest: str = ""
    audio_digest: str = ""
    audio_stride: int = 4
    bridge_depth: int = 1
    bridge_reach: int = 2
    ctc: bool = False
    picture: int = 0
    channels: int = 1
    patch: int = 4
    draw_width: int = 128
    draw_depth: int = 4
    classes: str = ""

    def __post_init__(self) -> None:
        for name in ("vision_grid", "audio_stride", "channels", "patch", "draw_width", "draw_depth"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("vision_layer", "audio_layer", "vision_pixels", "vision_size", "audio_size", "picture"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 0 (0 derives it)")
        for name in ("bridge_depth", "bridge_reach"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 0")
        for name in ("bridge_depth", "draw_depth"):
            if getattr(self, name) > MOST["depth"]:
                raise UserError(f"{name} is {getattr(self, name):,}; it must be at most {MOST['depth']:,}")
        if 32 % self.audio_stride:
            raise UserError(f"audio_stride is {self.audio_stride}; it must divide 32, the frames of a block of sound")
        if self.picture % self.patch:
            raise UserError(f"patch is {self.patch}; it must divide the side of a picture, {self.picture}")

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of what the diffusion part draws."""
        return tuple(self.classes.split("|")) if self.classes else ()
