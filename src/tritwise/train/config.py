"""What a run is: the shape of the model and how it is trained, as two frozen dataclasses that can be diffed."""

import dataclasses
import difflib
import functools
import math
from dataclasses import dataclass, field
from typing import Any, get_type_hints

from tritwise.data.split import Split
from tritwise.data.tokenizer import MOST, Tokenizer
from tritwise.data.vocabulary import VOCABULARY
from tritwise.errors import UserError
from tritwise.models import ModelConfig, PartsConfig
from tritwise.ops.direction import METHODS
from tritwise.ship import WAYS
from tritwise.train.course import plan_of_depth
from tritwise.train.media_config import MediaConfig

OPTIMIZERS = ("trit", "adamw", "muon")


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained. Raises UserError for a value that cannot work.

    data           text to learn: a file or folder (plain, .gz, .zst, .xz, .zip), or "shakespeare", the bundled text
    split          how train, val and test are cut from it, e.g. 90/10 or 90/5/5; named: by the names of shards
    tokenizer      SentencePiece model whose tokens are learned, of a text or of shards (.bin); empty: bytes
    steps          optimizer steps; batch: sequences a step and micro-batch; accum: micro-batches a step
    preserve_state rows read on from step to step, and what a model remembers (an LSTM's state, the ledger of a sliding
                   window) goes on with them; false: random windows, each read from nothing
    seconds        training also ends after so many seconds, those of scores and checkpoints not counted; then the rate
                   and the depth go by time and not by steps; 0: no limit
    depth_plan     how often the core repeats up to which share of the run, as in 0.4:2,0.65:3,1:4; empty: at all times
                   as often as it can
    seed           of the initial registers, the batches and the rounding
    optimizer      trit (ternary weights), adamw or muon (float weights)
    rate           step of a register in leading-trit units (learning rate of a float optimizer)
    momentum       decay of the momentum (beta1 of AdamW)
    momentum_start, momentum_warmup   momentum at the first step, and steps until it has risen to `momentum`; 0: at once
    nesterov       for trit: directions count the newest gradient once more; one byte a weight more within a step
    direction      balanced, newton_schulz, row_column, rms or sign, for matrices
    row_memory     decay of the running mean of squares by which rows of matrices are steadied; 0: they are not
    interval       a matrix moves at every interval-th step, by interval times as much, and matrices take turns;
                   0: as often as keeps the directions near a seventh of the time of a step, 8 at the most
    scale_rate     step of a scale in octaves; 0: scales stay as they start
    embedding_rate, head_rate   rates of these roles over `rate`; 0: 2 for trit, 1 for others
    compact        register and momentum of a weight share one byte (optimizer trit, without n-gram tables)
    warmup         steps of linear rise; decay: share of the steps, at the end, of linear fall
    weight_decay   of the float optimizers
    clip           largest norm of all float gradients together; 0: none
    average_every, average_from   every so many steps, from that share of the run, at full depth, the weights are added
                   to a mean, which is scored beside the last ones; 0: never
    eval_bytes     bytes of val (tokens, with a tokenizer) scored at an evaluation during training; 0: all
    stride         of the final score's window; 0: half the context
    budget         bytes that the shipped file may have; 0: any number
    ship_as        how float weights ship: int8, int7, int6, int8+zlib, auto: the first of the first three that fits the
                   budget; none: not at all. Ternary weights ship as they are
    ship_small     float tensors of up to so many numbers ship as float16
    ship_average   whether the mean weights ship where they score better on val than the last ones
    log_interval, eval_interval, save_interval   in steps; eval and save 0: only at the end
    keep           checkpoints that stay; 0: all
    save           False: no checkpoint is ever written
    sample_bytes   length of the samples; 0: none
    device         auto, cpu or cuda
    dtype          of the activations: float32, bfloat16, or auto: bfloat16 on a GPU that has it, else float32
    compile        true, false, or auto: on a GPU, where the forward and backward pass of a model that is small beside
                   it are also recorded once and replayed; graph: they are recorded there, and not compiled; blocks:
                   block by block, which is ready sooner where there are many layers or depths, for slower steps
    checkpoint     block: of a block only its input is kept for backward, which computes the rest again; none
    loss_chunk     positions whose logits exist at one time; 0: all of a micro-batch
    fp8            what large ternary matrices multiply in training, from a width of 512 on, is rounded to float8, which
                   saves time on GPUs with matrix units for it; needs group=65536. Scores, samples, what ships are exact
    """

    data: str = "shakespeare"
    split: str = "90/10"
    tokenizer: str = ""
    steps: int = 1000
    seconds: float = 0.0
    depth_plan: str = ""
    preserve_state: bool = False
    batch: int = 32
    accum: int = 1
    seed: int = 0
    optimizer: str = "trit"
    rate: float = 0.015
    momentum: float = 0.9
    momentum_start: float = 0.0
    momentum_warmup: int = 0
    direction: str = "newton_schulz"
    nesterov: bool = False
    row_memory: float = 0.95
    interval: int = 0
    scale_rate: float = 0.0
    embedding_rate: float = 0.0
    head_rate: float = 0.0
    compact: bool = False
    warmup: int = 20
    decay: float = 0.5
    weight_decay: float = 0.0
    clip: float = 0.0
    average_every: int = 0
    average_from: float = 0.5
    budget: int = 0
    ship_as: str = "none"
    ship_small: int = 65_536
    ship_average: bool = False
    eval_bytes: int = 32768
    stride: int = 0
    log_interval: int = 20
    eval_interval: int = 200
    save_interval: int = 200
    keep: int = 2
    save: bool = True
    sample_bytes: int = 200
    device: str = "auto"
    dtype: str = "auto"
    compile: str = "auto"
    checkpoint: str = "none"
    loss_chunk: int = 0
    fp8: bool = False

    def __post_init__(self) -> None:
        for name, least in (
            ("steps", 1),
            ("batch", 1),
            ("accum", 1),
            ("interval", 0),
            ("log_interval", 1),
            ("seed", 0),
            ("warmup", 0),
            ("eval_bytes", 0),
            ("stride", 0),
            ("eval_interval", 0),
            ("save_interval", 0),
            ("keep", 0),
            ("sample_bytes", 0),
            ("loss_chunk", 0),
            ("momentum_warmup", 0),
            ("average_every", 0),
            ("budget", 0),
            ("ship_small", 0),
        ):
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        for name in ("rate", "scale_rate", "embedding_rate", "head_rate", "weight_decay", "seconds", "clip"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise UserError(f"{name} is {value}; it must be a finite number, 0 or more")
        for name in ("momentum", "momentum_start", "row_memory"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 0 and below 1")
        for name in ("decay", "average_from"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} is {getattr(self, name)}; it is a share of the steps, 0 to 1")
        for name, known in (
            ("optimizer", OPTIMIZERS),
            ("direction", METHODS),
            ("device", ("auto", "cpu", "cuda")),
            ("dtype", ("auto", "float32", "bfloat16")),
            ("compile", ("auto", "true", "blocks", "false", "graph")),
            ("checkpoint", ("none", "block")),
            ("ship_as", ("none", *WAYS)),
        ):
            if getattr(self, name) not in known:
                raise UserError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(known)}")
        Split(self.split)  # says what is wrong with a rule before any data is read


_PARTS: dict[str, Any] = {"model": ModelConfig, "train": TrainConfig, "parts": PartsConfig, "media": MediaConfig}
_ARB = ("parts", "media")  # written down only where they say something


@dataclass(frozen=True)
class Config:
    """One run: the recipe's name, the model, its training; of an ARB run its parts, and what they learn from."""

    recipe: str = "custom"
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parts: PartsConfig = field(default_factory=PartsConfig)
    media: MediaConfig = field(default_factory=MediaConfig)

    def __post_init__(self) -> None:
        if (self.model.weights == "trit") != (self.train.optimizer == "trit"):
            raise UserError(
                f"optimizer {self.train.optimizer} does not train {self.model.weights} weights; "
                "use trit with weights=trit, adamw or muon with weights=float"
            )
        if self.train.compact and (self.train.optimizer != "trit" or self.model.hashed_tables):
            raise UserError(
                "compact is for ternary layers without hashed tables; use optimizer=trit, ngrams=1 and word_tables=0"
            )
        if self.model.weight_trits > 1 and (self.train.compact or self.train.fp8):
            raise UserError("compact and fp8 are for weights of one trit; set weight_trits=1, or leave them out")
        if self.train.tokenizer and self.model.word_tables:
            raise UserError("word_tables are for models of bytes; set word_tables=0, or leave the tokenizer out")
        if self.train.fp8 and self.train.optimizer != "trit":
            raise UserError(
                "fp8 is for ternary layers, whose trits are exact in it; use optimizer=trit, or leave fp8 off"
            )
        if self.train.preserve_state:
            if self.model.mixer == "attention" and not self.model.window:
                raise UserError(
                    "attention without a window has no state to preserve; use --set window=64 or mixer=lstm"
                )
            once = self.train.accum > 1 or self.train.checkpoint != "none" or self.train.compile in ("true", "blocks")
            if once or self.train.seconds or self.train.depth_plan:
                raise UserError(
                    "preserve_state carries state from step to step; use accum=1, checkpoint=none, compile=auto, "
                    "and leave seconds and depth_plan out"
                )
        if self.train.nesterov and (self.train.compact or self.train.optimizer != "trit"):
            raise UserError(
                "nesterov is for ternary weights with a momentum of their own byte (Muon has it anyway); use "
                "optimizer=trit and compact=false, or leave it out"
            )
        if self.train.clip and self.train.optimizer == "trit":
            raise UserError(
                "clip is for float gradients; the step of a ternary weight has a fixed size, so leave it out"
            )
        if self.train.ship_average and not self.train.average_every:
            raise UserError("ship_average needs a mean; set average_every, for example to 50")
        plan_of_depth(self.train.depth_plan, self.model.loops)  # says what is wrong with a plan before anything runs
        needed, of = (VOCABULARY, "an ARB model") if self.media.task else (256, "a model of bytes")
        if self.train.tokenizer and (self.media.task or not 2 <= self.model.vocab <= MOST):
            raise UserError(
                f"vocab is {self.model.vocab}; a model of tokens has 2 to {MOST:,}, and an ARB model has no tokenizer"
            )
        if self.model.vocab != needed and not self.train.tokenizer:
            raise UserError(f"vocab is {self.model.vocab}; {of} needs {needed}")
        if self.media.task and (self.train.depth_plan or self.train.average_every):
            raise UserError("an ARB model has one depth and no mean; leave depth_plan and average_every out")
        if self.media.task not in ("", "text") and self.train.preserve_state:
            raise UserError("preserve_state is for text alone; leave it out")
        if self.train.stride > self.model.ctx:
            raise UserError(f"stride is {self.train.stride}; the score's window moves by at most ctx, {self.model.ctx}")

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON; `from_dict` reads it back."""
        return {
            "format": 1,
            "recipe": self.recipe,
            "model": dataclasses.asdict(self.model),
            "train": dataclasses.asdict(self.train),
        } | {name: dataclasses.asdict(own) for name in _ARB if (own := getattr(self, name)) != _PARTS[name]()}

    def require_sense(self) -> None:
        """Raises UserError for what does nothing, or not what was meant. Of new runs alone: older ones that had it are
        read, shipped and gone on with."""
        if self.train.weight_decay and self.train.optimizer == "trit":
            raise UserError("weight_decay is of float optimizers; a register's size has no meaning, so leave it out")
        last = plan_of_depth(self.train.depth_plan, self.model.loops)[-1].loops
        if last != self.model.loops:
            raise UserError(
                f"depth_plan {self.train.depth_plan!r} ends with {last} repeats, and the model is scored with "
                f"{self.model.loops}; end it with 1:{self.model.loops}, or set loops={last}"
            )

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "Config":
        """The config in a run's config.json. Raises UserError if it is none this version understands."""
        try:
            if values["format"] != 1:
                raise UserError(f"this run's config has format {values['format']}; upgrade tritwise to read it")
            told = {name: {} for name in _ARB} | values
            return Config(values["recipe"], **{name: cls(**told[name]) for name, cls in _PARTS.items()})
        except (KeyError, TypeError) as error:
            raise UserError(f"this run's config is damaged or from another version ({error}); train again") from None


def tokenizer_of(config: Config) -> tuple[Config, Tokenizer | None]:
    """The config with the number of tokens of its tokenizer as vocab, and that tokenizer; None for bytes.

    Raises UserError for a tokenizer that cannot be read, and a vocab that is another's.
    """
    if not config.train.tokenizer:
        return config, None
    tokenizer = Tokenizer.open(config.train.tokenizer)
    if config.model.vocab not in (ModelConfig.vocab, tokenizer.size):
        raise UserError(
            f"vocab is {config.model.vocab}, and {config.train.tokenizer} has {tokenizer.size} tokens; leave vocab out"
        )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab=tokenizer.size)), tokenizer


def flat(config: Config) -> dict[str, Any]:
    """Every setting of the model and its training by its key."""
    return {key: value for name in _PARTS for key, value in dataclasses.asdict(getattr(config, name)).items()}


@functools.cache
def _types() -> dict[str, tuple[str, type]]:
    """Every key -> (part of the config, its type). Keys are unique across the parts."""
    found: dict[str, tuple[str, type]] = {}
    for part, cls in _PARTS.items():
        for name, kind in get_type_hints(cls).items():
            assert name not in found, f"{name} is in two parts of the config"
            found[name] = (part, kind)
    return found


def parsed(changes: dict[str, Any]) -> dict[str, Any]:
    """Settings of which values may be strings, as given on a command line, with values of their types.

    Raises UserError for an unknown key (naming the nearest) or a value of the wrong type.
    """
    types = _types()
    for key in changes:
        if key not in types:
            near = difflib.get_close_matches(key, types, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(sorted(types))}"
            raise UserError(f"there is no setting {key!r}; {hint}")
    return {key: parse_value(key, value, types[key][1]) for key, value in changes.items()}


def for_tokens(ngrams: int, word_tables: int) -> dict[str, int]:
    """The hashed tables of a model of tokens in the place of those of a model of bytes: words are told by bytes, so
    each table of words gives way to one more of n-grams."""
    return {"ngrams": ngrams + word_tables, "word_tables": 0}


def override(config: Config, changes: dict[str, Any]) -> Config:
    """`config` with changed values; with a tokenizer tables of words that were not asked for go, as `for_tokens` says.
    Raises as `parsed` does."""
    parts: dict[str, dict[str, Any]] = {name: {} for name in _PARTS}
    for key, value in parsed(changes).items():
        parts[_types()[key][0]][key] = value
    if parts["train"].get("tokenizer") and config.model.word_tables:
        parts["model"] = for_tokens(config.model.ngrams, config.model.word_tables) | parts["model"]
    # What was derived from a changed value is derived again, unless it was given too.
    if "width" in parts["model"]:
        parts["model"].setdefault("heads", 0)
    if "heads" in parts["model"]:
        parts["model"].setdefault("kv_heads", 0)
    return Config(config.recipe, **{name: _replace(getattr(config, name), own) for name, own in parts.items()})


def _replace(instance: Any, changes: dict[str, Any]) -> Any:
    return dataclasses.replace(instance, **changes) if changes else instance


def parse_value(key: str, value: Any, kind: type) -> Any:
    """`value` as an int, float, bool or str, which a string may spell. UserError naming `key` if it is none."""
    if isinstance(value, bool) and kind is not bool:
        raise UserError(f"{key} is {value}; it must be {_KINDS[kind]}")
    if not isinstance(value, str):
        return kind(value)
    text = value.strip()
    try:
        if kind is bool:
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[text.lower()]
        return kind(text)
    except (KeyError, ValueError):
        raise UserError(f"{key} is {value!r}; it must be {_KINDS[kind]}") from None


_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
