"""The shape of a byte language model: one dial, `width` and `depth`, and everything else derived from it.

Depth recurrence: of `depth` blocks the first `prelude` and the last `coda` run once, and those between them, the core,
`loops` times, so depth costs no bytes. With prelude = coda = 0 everything repeats; with loops = 1 nothing does.
"""

from dataclasses import dataclass
from typing import NamedTuple

from tritwise.errors import UserError
from tritwise.nn.moe import MOST_ITERS
from tritwise.nn.ngram import WORD_REACH
from tritwise.nn.trit import WEIGHT_TRITS

MOST = {"depth": 1024, "ctx": 1 << 20, "loops": 1024, "experts": 4096, "ngrams": 64, "value_tables": 64}
MOST_EXPERTS = 16_384
"""What takes time or memory whether or not there are weights for it, and experts of all blocks together: so a file of a
few bytes can ask for seconds, and no more."""


@dataclass(frozen=True)
class ModelConfig:
    """A byte LM. Set width and depth; a 0 elsewhere means "derive it".

    width      channels; the size of a head is 32 below width 128, else 64
    depth      blocks
    ctx        bytes (tokens, with a tokenizer) a position can look back on, itself included
    heads      attention heads; 0: width / size of a head
    kv_heads   key-value heads, a divisor of heads; 0: heads
    mlp_ratio  hidden size of the MLP over width
    window     sliding attention window in bytes; 0: none
    vocab      symbols, 256 bytes; a tokenizer sets it
    softcap    logits are softcap * tanh(z / softcap)
    group      inputs that share one scale exponent
    column_scales  inputs of every ternary matrix have scales of their own, which learn; float matrices need none
    ngrams     longest n-gram of bytes with a hashed embedding table of its own, 2 … ngrams; 1: none
    word_tables  further such tables: 1: by the letters of the word so far; 2: and by the word before too; of bytes
    ngram_rows entries of each such table
    ngram_width    numbers of an entry, of which a matrix makes what is added; 0: the width, added as they are
    mixer      what carries from position to position in a block: attention, or lstm, which has no heads and no window
    experts    experts of a mixture in the place of the MLP; 0: none
    active_experts  of them that a byte meets, which hold with the router as many weights as the MLP
    max_moe_iters   passes through the experts, as many of them as a byte learns to need, 1 … 4
    graph      whether bytes get messages from their neighbours and from what followed the same trigram before
    weights    "trit", or "float" for the baseline with the same shape
    weight_trits  trits that a weight of a matrix has, the first of its register: 1 to 5 for 3, 9, 27, 81 or 243 values;
               hashed tables and what draws pictures have one
    prelude    blocks at the start that run once; coda: at the end
    loops      times that the blocks between them run
    loop_embedding  a learned vector is added before every layer, one for each repeat of a block
    value_tables    embeddings of the byte that every layer adds, each channel as strongly as it learned to; 0: none
    repeat_skip     a repeat also adds what its block gave in the repeat before, as strongly as it learned to
    input_mix       a block starts from a learned mix of the stream and the model's input
    gains           a block learns a gain for each channel of its attention and of its MLP
    exclusive       layers at the end whose attention leaves out what lies along a position's own value
    leak            slope below zero of the MLP's relu, before it is squared
    dropout         share of the inputs, and of what attention and MLPs add, that is set to 0 in training
    ngram_dropout   share of the lookups in each table of n-grams that find nothing in training
    Raises UserError for a shape that cannot be built.
    """

    width: int = 128
    depth: int = 4
    ctx: int = 64
    heads: int = 0
    kv_heads: int = 0
    mlp_ratio: int = 4
    window: int = 0
    vocab: int = 256
    softcap: float = 15.0
    group: int = 256
    column_scales: bool = False
    ngrams: int = 1
    word_tables: int = 0
    ngram_rows: int = 4096
    ngram_width: int = 0
    mixer: str = "attention"
    experts: int = 0
    active_experts: int = 2
    max_moe_iters: int = 1
    graph: bool = False
    weights: str = "trit"
    weight_trits: int = 1
    prelude: int = 0
    coda: int = 0
    loops: int = 1
    loop_embedding: bool = False
    value_tables: int = 0
    repeat_skip: bool = False
    input_mix: bool = False
    gains: bool = False
    exclusive: int = 0
    leak: float = 0.0
    dropout: float = 0.0
    ngram_dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("width", "depth", "ctx", "mlp_ratio", "vocab", "group", "ngrams", "ngram_rows", "loops"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name, most in MOST.items():
            if getattr(self, name) > most:
                raise UserError(f"{name} is {getattr(self, name):,}; it must be at most {most:,}")
        if self.depth * self.experts > MOST_EXPERTS:
            raise UserError(f"{self.depth} blocks of {self.experts} experts are too many; {MOST_EXPERTS:,} is the most")
        for name in ("heads", "kv_heads", "window", "experts", "ngram_width"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 0 (0 derives it)")
        for name in ("prelude", "coda", "value_tables", "exclusive"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 0")
        if self.core < 1:
            raise UserError(
                f"prelude {self.prelude} and coda {self.coda} leave none of {self.depth} blocks to repeat; "
                "make depth larger than their sum"
            )
        if not 0 <= self.word_tables < len(WORD_REACH):
            raise UserError(f"word_tables is {self.word_tables}; choose 0 to {len(WORD_REACH) - 1}")
        if not 0 <= self.leak <= 1:
            raise UserError(f"leak is {self.leak}; it is a slope between 0 and 1")
        for name in ("dropout", "ngram_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it is a share, at least 0 and below 1")
        if not 0 < self.softcap < float("inf"):
            raise UserError(f"softcap is {self.softcap}; it must be above 0 and finite")
        if not 1 <= self.max_moe_iters <= MOST_ITERS:
            raise UserError(f"max_moe_iters is {self.max_moe_iters}; choose 1 to {MOST_ITERS}")
        if self.experts and not 1 <= self.active_experts <= self.experts:
            raise UserError(
                f"active_experts is {self.active_experts}; choose 1 to the number of experts, {self.experts}"
            )
        if self.mixer not in ("attention", "lstm"):
            raise UserError(f"mixer is {self.mixer!r}; choose attention or lstm")
        if self.weights not in ("trit", "float"):
            raise UserError(f"weights is {self.weights!r}; choose trit or float")
        if self.weight_trits not in WEIGHT_TRITS:
            raise UserError(f"weight_trits is {self.weight_trits}; choose {WEIGHT_TRITS[0]} to {WEIGHT_TRITS[-1]}")
        if self.weight_trits > 1 and self.weights != "trit":
            raise UserError("weight_trits is for ternary weights; use weights=trit, or leave it out")
        heads = self.heads or max(1, self.width // (32 if self.width < 128 else 64))
        kv_heads = self.kv_heads or heads
        object.__setattr__(self, "heads", heads)
        object.__setattr__(self, "kv_heads", kv_heads)
        if self.width % heads or self.width // heads % 2:
            raise UserError(
                f"width {self.width} does not divide into {heads} heads of an even size; choose a multiple of 64"
            )
        if heads % kv_heads:
            raise UserError(f"{heads} heads do not divide into {kv_heads} kv_heads; choose a divisor")

    @property
    def head_size(self) -> int:
        """Channels of one attention head."""
        return self.width // self.heads

    @property
    def hidden_of_expert(self) -> int:
        """Hidden units of an expert: a byte meets as many weights as in an MLP, of which the router's are taken off; in
        wide models a few less, as matrix units like multiples of 16."""
        own = max(1, (2 * self.mlp_ratio * self.width - self.experts) // (2 * self.active_experts))
        return own if own < 128 else own // 16 * 16

    @property
    def hashed_tables(self) -> int:
        """Tables that are looked up by what was read last: those of n-grams, and of words."""
        return self.ngrams - 1 + self.word_tables

    @property
    def reach(self) -> int:
        """Bytes before a byte that its lookups depend on."""
        return max(self.ngrams - 1, WORD_REACH[self.word_tables])

    @property
    def core(self) -> int:
        """Blocks that repeat."""
        return self.depth - self.prelude - self.coda

    def layers(self, loops: int = 0) -> list["Layer"]:
        """The layers that a pass with `loops` repeats runs, in order; 0: the config's. UserError beyond 1 … loops."""
        loops = loops or self.loops
        if not 1 <= loops <= self.loops:
            raise UserError(f"the model repeats its core 1 to {self.loops} times, not {loops}; choose one of these")
        before, after = self.prelude, self.prelude + self.core * self.loops
        found = [Layer(block, block, 0) for block in range(before)]
        found += [
            Layer(before + block, before + repeat * self.core + block, repeat)
            for repeat in range(loops)
            for block in range(self.core)
        ]
        return found + [Layer(before + self.core + block, after + block, 0) for block in range(self.coda)]


class Layer(NamedTuple):
    """One run of a block: which block, which number of the layer at full depth, and which repeat it is, from 0.

    A layer has the same number at every depth, so that what was learned for it is found again when depth grows.
    """

    block: int
    number: int
    repeat: int
