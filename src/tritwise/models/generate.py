"""Sampling from a model, one symbol at a time, with a KV cache."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from tritwise.errors import UserError

if TYPE_CHECKING:
    from tritwise.models.arb import Arb
    from tritwise.models.byte_lm import AtDepth, ByteLM


def generate(
    model: "ByteLM | AtDepth | Arb",
    prompt: bytes,
    count: int,
    *,
    seed: int = 0,
    temperature: float = 0.8,
    top_k: int = 0,
) -> Iterator[int]:
    """Yield `count` bytes that continue `prompt` (an empty prompt continues a newline). The rest is as in
    `generate_symbols`; of a model with more symbols than bytes only those are written.
    """
    more = range(256, model.config.vocab)
    start = list(prompt or b"\n")
    return generate_symbols(model, start, count, seed=seed, temperature=temperature, top_k=top_k, without=more)


@torch.inference_mode()
def generate_symbols(
    model: "ByteLM | AtDepth | Arb",
    prompt: list[int],
    count: int,
    *,
    seed: int = 0,
    temperature: float = 0.8,
    top_k: int = 0,
    without: Sequence[int] = (),
) -> Iterator[int]:
    """Yield `count` symbols that continue `prompt`, none of them in `without`.

    temperature divides the logits; 0 takes the likeliest byte. top_k keeps the k likeliest bytes; 0 keeps all.
    The same seed gives the same bytes on one machine. When the context is full, its last half is read again.
    Raises UserError for a negative count or temperature.
    """
    if count < 0:
        raise UserError(f"cannot sample {count} bytes; ask for 0 or more")
    if not 0 <= temperature < float("inf"):
        raise UserError(f"temperature is {temperature}; it must be 0 or more and finite")
    if not 0 <= top_k <= model.config.vocab:
        raise UserError(f"top_k is {top_k}; it must be between 0 (off) and {model.config.vocab}")
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    ctx = model.config.ctx
    text, never = list(prompt), torch.tensor(without, dtype=torch.int64)
    pending, state = text[-ctx:], model.new_state()
    for _ in range(count):
        if state.used + len(pending) > ctx:
            pending, state = text[-max(1, ctx // 2) :], model.new_state()
        logits = model(torch.tensor([pending], device=device), state)[0, -1].float().cpu()
        logits[never] = -float("inf")
        if temperature == 0:
            choice = int(logits.argmax())
        else:
            if top_k:
                logits[logits < logits.topk(top_k).values[-1]] = -float("inf")
            # The likeliest byte at 0, in double precision: no temperature, however small, overflows.
            scaled = (logits - logits.max()).double() / temperature
            choice = int(torch.multinomial(torch.softmax(scaled, 0), 1, generator=generator))
        text.append(choice)
        pending = [choice]
        yield choice
