"""Text that a model writes, whether it reads bytes or tokens."""

import numpy as np

from tritwise.data.tokenizer import Tokenizer
from tritwise.models import Arb, AtDepth, ByteLM, generate
from tritwise.models.generate import generate_symbols


def generate_text(
    model: ByteLM | AtDepth | Arb,
    prompt: bytes,
    count: int,
    tokenizer: Tokenizer | None = None,
    *,
    seed: int = 0,
    temperature: float = 0.8,
    top_k: int = 0,
) -> bytes:
    """`count` bytes that continue `prompt`; the last token is cut off where they end. Arguments and errors as in
    `generate`; with a tokenizer the prompt must be UTF-8, and the text begins with it."""
    if tokenizer is None:
        return bytes(generate(model, prompt, count, seed=seed, temperature=temperature, top_k=top_k))
    text = [tokenizer.start, *tokenizer.encode(prompt).tolist()]
    more = generate_symbols(
        model, text, count, seed=seed, temperature=temperature, top_k=top_k, without=tokenizer.controls
    )
    left = count
    for token in more:
        text.append(token)
        left -= int(tokenizer.sizes(np.array(text[-2:]))[1])
        if left <= 0:
            break
    return tokenizer.decode(np.array(text))[len(prompt) : len(prompt) + count]
