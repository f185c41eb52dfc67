"""SentencePiece tokenizers (extra `sentencepiece`), and how many bytes of the source text each token stands for.

Bits per byte need the bytes of the text, not of what a library prints. So every piece has its bytes here:

- the marker ▁ in a piece is one byte, a space, though its UTF-8 has three;
- a byte-fallback piece such as <0xE2> is one byte;
- a mark (begin, end, padding), an unused piece and the unknown one are none;
- the marker that SentencePiece puts before a text is none where a text begins: at the first token, and after a mark.

`encode` refuses a text that these bytes do not give back, so counts add up to the text to the last byte. Tokens that
came from elsewhere are counted as the bytes that they decode to.

Shapes: N tokens.
"""

import io
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from tritwise.errors import UserError
from tritwise.files import read_bytes, sha256_of

MOST = 1 << 16  # tokens that two bytes can name
SPACE = "▁"
CHUNK = 1 << 16  # characters given to the library at a time
LOSSLESS = "normalization_rule_name=identity, remove_extra_whitespaces=false, byte_fallback=true"
INSTALL = "pip install 'tritwise[sentencepiece]'"


class Tokenizer:
    """A SentencePiece model. raw: the bytes of its file. name: for messages.

    size: tokens that it knows. start: the token before the first one of a text: begin, else end of text.
    Raises UserError if the library is missing, or for bytes that are no model, or one of more than 65,536 tokens or
    without a token that could stand before a text.
    """

    def __init__(self, raw: bytes, name: str = "the tokenizer") -> None:
        library = _library()
        self.raw = raw
        self._model: Any = library.SentencePieceProcessor()
        try:
            known = bool(raw) and self._model.LoadFromSerializedProto(raw)
        except (RuntimeError, OSError):
            known = False
        if not known:
            raise UserError(f"{name} is no SentencePiece model; give the .model file that its training wrote")
        self.size = int(self._model.vocab_size())
        if self.size > MOST:
            raise UserError(f"{name} has {self.size:,} tokens, and two bytes name {MOST:,}; give a smaller one")
        self.start = next((n for n in (self._model.bos_id(), self._model.eos_id()) if n >= 0), -1)
        if self.start < 0:
            raise UserError(f"{name} has neither a begin nor an end token; train one with bos_id=1")
        ids = range(self.size)
        self._boundary = np.array([self._model.IsControl(n) or self._is_nothing(n) for n in ids])
        self._bytes = [b"" if self._boundary[n] else self._bytes_of(n) for n in ids]
        self._sizes = np.array([len(piece) for piece in self._bytes], np.int32)
        first = self._model.EncodeAsPieces("a")
        self.prefix = bool(first) and first[0].startswith(SPACE)  # whether a text gets a marker that it did not have
        self._marked = np.array([self.prefix and piece.startswith(b" ") for piece in self._bytes])

    @staticmethod
    def open(path: Path | str) -> "Tokenizer":
        """The tokenizer in a file. Raises UserError."""
        return Tokenizer(read_bytes(path), str(path))

    @cached_property
    def digest(self) -> str:
        """sha256 of the model."""
        return sha256_of(self.raw)

    @property
    def controls(self) -> list[int]:
        """Tokens that stand for no text."""
        return np.flatnonzero(self._boundary).tolist()

    def encode(self, text: bytes) -> np.ndarray:
        """The tokens of a text that begins here, without a mark before it: uint16 [N].

        Raises UserError for what is not UTF-8, and unless the tokens give back every byte.
        """
        words = utf8_of(text)
        pieces = [np.array(self._model.EncodeAsIds(part), np.uint16) for part in self._parts(words)]
        ids = np.concatenate([np.empty(0, np.uint16), *pieces])
        require_same_text(text, self.decode(ids), f"train one with {LOSSLESS}")
        return ids

    def decode(self, ids: np.ndarray) -> bytes:
        """The bytes that tokens (integers [N]) stand for, marks left out."""
        skips = self._marked[ids] & self._begins(ids)
        return b"".join(self._bytes[n][skip:] for n, skip in zip(ids.tolist(), skips.tolist(), strict=True))

    def sizes(self, ids: np.ndarray) -> np.ndarray:
        """How many bytes each of the tokens (integers [N], the first one the first of a text) stands for: int32 [N]."""
        return self._sizes[ids] - (self._marked[ids] & self._begins(ids))

    def _begins(self, ids: np.ndarray) -> np.ndarray:
        """Whether a text begins with the token: bool [N]."""
        return np.concatenate((np.ones(1, bool), self._boundary[ids[:-1]]))[: len(ids)]

    def _is_nothing(self, n: int) -> bool:
        return self._model.IsUnknown(n) or self._model.IsUnused(n)

    def _bytes_of(self, n: int) -> bytes:
        piece = self._model.IdToPiece(n)
        return bytes([int(piece[3:5], 16)]) if self._model.IsByte(n) else piece.replace(SPACE, " ").encode()

    def _parts(self, words: str) -> Iterator[str]:
        """The text in parts that are encoded one by one: the library takes minutes over a text of many megabytes.

        Cut before a space. Where a part gets a marker of its own, the marker stands for that space.
        """
        begin = 0
        while begin < len(words):
            cut = words.find(" ", begin + CHUNK)
            end = cut if 0 <= cut < len(words) - 1 else len(words)
            yield words[begin:end]
            begin = end + (self.prefix and end < len(words))


def train_tokenizer(text: bytes, size: int) -> bytes:
    """A byte-pair SentencePiece model of `size` tokens, learned from the lines of a text, that loses nothing: its file.

    Raises UserError if the library is missing, the text is not UTF-8, or the size does not suit it.
    """
    library, written = _library(), io.BytesIO()
    lines = (line for line in utf8_of(text).split("\n") if line)
    try:
        library.SentencePieceTrainer.Train(
            sentence_iterator=lines,
            model_writer=written,
            vocab_size=size,
            model_type="bpe",
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            byte_fallback=True,
            add_dummy_prefix=False,
            max_sentence_length=1 << 20,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        # What the library says names its own source and options; what is wrong is the size, too small or too large.
        most = re.search(r"value <= (\d+)", str(error))
        remedy = (
            f"at most {most[1]}" if most else "more than the 256 bytes, 3 signs and letters of the text, such as 1024"
        )
        raise UserError(f"no tokenizer of {size} tokens can be trained on this text; choose {remedy}") from None
    return written.getvalue()


def utf8_of(text: bytes) -> str:
    """The characters of a text. Raises UserError, naming the first byte that is no UTF-8."""
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"byte {error.start} is not UTF-8, and the model's tokenizer reads text only; cut the text elsewhere or "
            f"choose a model that reads bytes"
        ) from None


def require_same_text(text: bytes, back: bytes, remedy: str) -> None:
    """Raises UserError unless what tokens decode to is the text they were made from, byte for byte."""
    if back != text:
        same = np.frombuffer(back[: len(text)], np.uint8) == np.frombuffer(text[: len(back)], np.uint8)
        at = int(same.argmin()) if not same.all() else len(same)
        raise UserError(
            f"the tokenizer does not give the text back: it differs from byte {at} on ({len(back):,} bytes for "
            f"{len(text):,}), and bits per byte would be those of another text; {remedy}"
        )


def _library() -> Any:
    try:
        import sentencepiece  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(f"sentencepiece is not installed ({error}); {INSTALL}") from None
    return sentencepiece
