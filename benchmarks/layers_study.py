"""Each further layer shown to learn, beside its float twin or the model without it: one row of a table each.

    python benchmarks/layers_study.py lstm|vq|graph|moe|stream [--seeds 0,1] [--out FILE.json] [--device cuda]

    lstm     a byte LM whose mixer is an LSTM, on tinyshakespeare; beside a 4-gram and the float twin under AdamW
    vq       an autoencoder of 4 x 4 patches of Fashion-MNIST through a codebook; beside the same in float under AdamW
    graph    the byte LM with a graph before its blocks and without, with as many weights
    moe      the byte LM with 8 experts, 2 of them active, and with an MLP of as many active weights
    stream   a model with a sliding window, read without an end through ledgers, and in windows

Rows are appended to FILE as they are made, and those that it holds already are left out: an interrupted study goes on.
--fashion: folder of Fashion-MNIST's IDX files, for vq. --size gpu: larger models, for one GPU. --quick: seconds, to see
that it works. Text is scored on the whole val part, 111,540 bytes, by sliding windows. --text FILE: graph and moe learn
its first part, less the last megabyte, of which half is scored: on a GPU they would read tinyshakespeare ten times.
"""

import argparse
import functools
import gzip
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tritwise.bench.harness import load_parts
from tritwise.bench.rules import rule_called
from tritwise.data import Sampler, open_bytes
from tritwise.files import read_json, write_json
from tritwise.models import ByteLM, ModelConfig
from tritwise.nn import (
    FloatEmbedding,
    FloatLinear,
    TritEmbedding,
    TritLinear,
    TritMoE,
    TritVQ,
    relu_squared_norm,
    rms_norm,
    trit_modules,
)
from tritwise.optim import TritOptimizer, rate_factor
from tritwise.score import EndlessStream, score, score_stream
from tritwise.score.ladder import ngram_nats
from tritwise.train.audit import audit
from tritwise.train.device import batch_on
from tritwise.train.optimizers import float_optimizers, keep_initial_rates, set_rates
from tritwise.train.run import surroundings
from tritwise.train.stepper import Stepper

Row = dict[str, Any]
Items = Iterator[tuple[str, Callable[[], Row]]]
"""What is run, by a name that tells it from all others, and how."""


# Text

SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "cpu": {
        "lstm": {"width": 256, "depth": 1, "ctx": 64, "batch": 32, "steps": 500},
        "graph": {"width": 128, "depth": 2, "ctx": 256, "batch": 8, "steps": 300},
        "moe": {"width": 128, "depth": 2, "ctx": 64, "batch": 32, "steps": 300},
        "stream": {"width": 128, "depth": 2, "ctx": 256, "batch": 8, "steps": 60},
    },
    "gpu": {
        "lstm": {"width": 256, "depth": 1, "ctx": 64, "batch": 32, "steps": 1000},
        "graph": {"width": 256, "depth": 2, "ctx": 256, "batch": 64, "steps": 1000},
        "moe": {"width": 256, "depth": 2, "ctx": 256, "batch": 64, "steps": 1000},
        "stream": {"width": 256, "depth": 4, "ctx": 512, "batch": 32, "steps": 200},
    },
}
QUICK = {"width": 32, "ctx": 64, "batch": 8, "steps": 8, "depth": 1}


SCORED = 500_000  # bytes of val of a text that is not the bundled one


@functools.cache
def text(path: Path | None = None) -> dict[str, np.ndarray]:
    """Train and val parts of the bundled text, or of another."""
    if path is None:
        return load_parts("shakespeare", "90/10", 1, 1)
    size = len(open_bytes(path))
    parts = load_parts(str(path), f"first:{size - 2 * SCORED},last:{2 * SCORED}", 1, 1)
    return {"train": parts["train"], "val": parts["val"][:SCORED]}


def train(
    rule: str, rate: float, seed: int, size: dict[str, Any], shape: dict[str, Any], options: argparse.Namespace
) -> tuple[ByteLM, Row]:
    """One run of one of the rules of `tritwise bench rules`: the model, and what it cost and reached."""
    size = {"decay": 0.7, "warmup": 20} | size | (QUICK if options.quick else {})
    batch, ctx, steps, device = size["batch"], size["ctx"], size["steps"], torch.device(options.device)
    config = ModelConfig(width=size["width"], depth=size["depth"], ctx=ctx, **shape)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model, optimizers = rule_called(rule).build(config, {"rate": rate}, seed, dtype, steps, device)
    parts = text(options.text)
    sampler, stepper = Sampler(parts["train"], batch, ctx, seed), Stepper(model, optimizers, seed=seed)
    began, losses = time.perf_counter(), []
    for step in range(steps):
        set_rates(optimizers, rate_factor(step, steps, size["warmup"], size["decay"]))
        losses.append(stepper.step(*batch_on(device, sampler, step)))
    train_nats = float(torch.stack(losses[-max(1, steps // 20) :]).mean())
    seconds = time.perf_counter() - began
    val = parts["val"][: 4096 if options.quick else None]
    told, about = score(model, val, device=device), audit(model, optimizers)
    row = {"rule": rule, "rate": rate, "seed": seed, **size, "shape": shape}
    row |= {"val_nats": told.nats, "val_bpb": told.bpb, "scored": told.bytes, "train_nats": train_nats}
    row |= {"seconds": round(seconds, 1), "bytes_seen": batch * ctx * steps}
    row["text"] = options.text.name.split(".")[0] if options.text else "tinyshakespeare"
    return model, row | {name: about[name] for name in ("weights", "float_trainable", "state_bytes_per_weight")}


def lstm(options: argparse.Namespace) -> Items:
    """An LSTM in the place of attention, and the 4-gram."""
    size, options = SIZES[options.size]["lstm"], argparse.Namespace(**{**vars(options), "text": None})

    def counted() -> Row:
        val = text()["val"]
        return {"val_nats": ngram_nats(text()["train"], val, 4), "scored": len(val)}

    def run(rule: str, rate: float, seed: int) -> Row:
        return train(rule, rate, seed, size, {"mixer": "lstm"}, options)[1]

    yield "4-gram", counted
    for seed in options.seeds:
        yield f"ternary, seed {seed}", functools.partial(run, "ours", 0.02, seed)
        yield f"float AdamW, seed {seed}", functools.partial(run, "adamw", 0.004, seed)


def graph(options: argparse.Namespace) -> Items:
    """With one key-value head for two a block has width^2 fewer weights, as many as a block's share of the graph."""
    size = SIZES[options.size]["graph"]
    heads = max(1, size["width"] // 64)
    grouped = {"kv_heads": heads // 2} if not options.quick else {}
    relations = 2  # one of neighbours, one of trigrams: 2 width^2 weights, which two blocks with fewer heads give back

    def run(shape: dict[str, Any], seed: int) -> Row:
        return train("ours", 0.02, seed, size, shape, options)[1]

    assert options.quick or size["depth"] == relations
    for seed in options.seeds:
        yield f"with a graph, seed {seed}", functools.partial(run, {"graph": True, **grouped}, seed)
        yield f"without, as many weights, seed {seed}", functools.partial(run, {}, seed)
        yield f"without, fewer heads too, seed {seed}", functools.partial(run, grouped, seed)


def moe(options: argparse.Namespace) -> Items:
    """Experts for the MLP: how their load spreads over the val part, and passes of those that repeat."""
    size = SIZES[options.size]["moe"]

    def run(shape: dict[str, Any], seed: int) -> Row:
        model, row = train("ours", 0.02, seed, size, shape, options)
        return row | (spread(model, options) if shape else {})

    shapes = {"MLP of the active weights": {}, "8 experts, 2 active": {"experts": 8}}
    passing = {"8 experts, up to 3 passes": {"experts": 8, "max_moe_iters": 3}}
    for some in (shapes, passing):
        for seed in options.seeds:
            for name, shape in some.items():
                yield f"{name}, seed {seed}", functools.partial(run, shape, seed)


def spread(model: ByteLM, options: argparse.Namespace) -> Row:
    """The most and the least that an expert of any block is used, over its even share; mean passes of a byte."""
    layers = [module for module in model.modules() if isinstance(module, TritMoE)]
    loads = [torch.zeros(len(layer.experts)) for layer in layers]
    passes: list[float] = []

    def watch(layer: TritMoE, load: Tensor) -> Any:
        def count(_: Any, inputs: tuple[Tensor, ...]) -> None:
            x_NC = inputs[0].reshape(-1, inputs[0].shape[-1])
            load.add_(torch.bincount(layer.route(x_NC)[0].flatten().cpu(), minlength=len(load)))
            passes.append(float(layer.passes(x_NC).float().mean()))

        return layer.register_forward_pre_hook(count)

    hooks = [watch(layer, load) for layer, load in zip(layers, loads, strict=True)]
    val, ctx = text(options.text)["val"], model.context
    with torch.no_grad():
        for first in range(0, len(val) - ctx if not options.quick else 8 * ctx, 64 * ctx):
            rows = val[first : first + 64 * ctx]
            rows = rows[: len(rows) // ctx * ctx].reshape(-1, ctx)
            model(torch.from_numpy(rows.astype(np.int64)).to(options.device))
    for hook in hooks:
        hook.remove()
    even = [load / load.mean() for load in loads]
    return {
        "load_most": max(float(load.max()) for load in even),
        "load_least": min(float(load.min()) for load in even),
        "passes": statistics.mean(passes),
    }


def stream(options: argparse.Namespace) -> Items:
    """A byte is scored by windows long enough to hold all that it can see, and by a stream that is never read again."""
    size = SIZES[options.size]["stream"]
    ctx, depth = (QUICK | {} if options.quick else size)["ctx"], (QUICK if options.quick else size)["depth"]
    window = ctx // 2 // depth  # depth * (window - 1) bytes before a position can be seen: at most half the context

    def run(shape: dict[str, Any]) -> Row:
        model, row = train("ours", 0.02, 0, size, shape, options)
        model.dtype = torch.float32
        val = text(options.text)["val"][: 2048 if options.quick else 32768]
        windowed, streamed = np.zeros(len(val)), np.zeros(len(val))
        one = score(model, val, stride=ctx // 2, into=windowed, device=options.device)
        two = score_stream(EndlessStream(model, options.device), val, into=streamed)
        return row | {
            "windowed_nats": one.nats,
            "streamed_nats": two.nats,
            "mean_difference": abs(one.nats - two.nats),
            "largest_difference": float(np.abs(windowed - streamed).max()),
            "compared": len(val),
        }

    yield f"window {window}", functools.partial(run, {"window": window})


# Pictures


TUNED: dict[str, dict[str, tuple[tuple[float, float], ...]]] = {
    "cpu": {"ours": ((0.03, 0.3),), "adamw": ((0.003, 1.0),)},
    "gpu": {"ours": ((0.02, 0.3), (0.03, 0.3), (0.03, 1.0)), "adamw": ((0.003, 0.3), (0.003, 1.0), (0.006, 1.0))},
}
"""Rates, and weights of the codebook's loss: on the CPU the best of what was tried for each rule."""

SCALE_RATE = 0.01  # octaves; at the default of 0.005 the ternary one reconstructs 5 to 7 % worse


class Autoencoder(nn.Module):
    """Patches [N, 16] -> a code each -> patches. A constant input stands for the biases that no layer has."""

    def __init__(self, codes: int, width: int, hidden: int, *, ternary: bool) -> None:
        super().__init__()
        linear = TritLinear if ternary else FloatLinear
        self.up, self.down = linear(17, hidden), linear(hidden, width)
        self.vq = TritVQ(codes, width, embedding=TritEmbedding if ternary else FloatEmbedding)
        self.back, self.out = linear(width + 1, hidden), linear(hidden, 16)
        for _, layer in trit_modules(self):
            layer.add_column_scales()

    def forward(self, x_NP: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The patches again, their codes, and the codebook's loss."""
        one_N1 = x_NP.new_ones(len(x_NP), 1)
        z_ND = rms_norm(self.down(relu_squared_norm(self.up(torch.cat((x_NP, one_N1), dim=1)))))
        q = self.vq(z_ND)
        y_NP = self.out(relu_squared_norm(self.back(torch.cat((q.vectors, one_N1), dim=1))))
        return y_NP, q.codes, q.loss


def patches(folder: Path, part: str) -> Tensor:
    """Patches of 4 x 4 pixels of "train" or "t10k", about zero and of about unit variance: float32 [N, 16]."""
    pixels = np.frombuffer(gzip.decompress((folder / f"{part}-images-idx3-ubyte.gz").read_bytes()), np.uint8, offset=16)
    cut = torch.from_numpy(pixels.copy()).view(-1, 7, 4, 7, 4).permute(0, 1, 3, 2, 4).reshape(-1, 16)
    return (cut.float() - 73) / 90


def vq(options: argparse.Namespace) -> Items:
    """A codebook of 256; reconstruction of the test images' patches, and which codes they need."""
    size: dict[str, Any] = {
        "codes": 256,
        "width": 64,
        "hidden": 512,
        "batch": 1024,
        "steps": 2000,
    }
    size |= {"hidden": 64, "codes": 32, "steps": 20} if options.quick else {}

    def run(rule: str, rate: float, weight: float, seed: int) -> Row:
        data = {part: patches(options.fashion, part).to(options.device) for part in ("train", "t10k")}
        torch.manual_seed(seed)
        model = Autoencoder(size["codes"], size["width"], size["hidden"], ternary=rule == "ours").to(options.device)
        optimizers: list[torch.optim.Optimizer] = (
            [TritOptimizer(model, rate, scale_rate=SCALE_RATE, seed=seed)]
            if rule == "ours"
            else float_optimizers(model, "adamw", rate)
        )
        keep_initial_rates(optimizers)
        generator, began = torch.Generator().manual_seed(seed), time.perf_counter()
        for step in range(size["steps"]):
            set_rates(optimizers, rate_factor(step, size["steps"], 20, 1.0))
            chosen = torch.randint(len(data["train"]), (size["batch"],), generator=generator)
            x_NP = data["train"][chosen.to(options.device)]
            y_NP, _, loss = model(x_NP)
            ((y_NP - x_NP).square().mean() + weight * loss).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        seconds = time.perf_counter() - began
        model.eval()
        with torch.no_grad():
            parts = [(x, *model(x)) for x in data["t10k"].split(1 << 14)]
        squared = sum(float((y - x).square().sum()) for x, y, _, _ in parts) / data["t10k"].numel()
        usage, about = model.vq.usage(torch.cat([codes for _, _, codes, _ in parts])), audit(model, optimizers)
        row = {
            "rule": rule,
            "rate": rate,
            "codebook": weight,
            "seed": seed,
            **size,
            "squared_error": squared,
            **usage._asdict(),
        }
        row |= {"variance": float(data["t10k"].square().mean()), "patches": len(data["t10k"]), "seconds": seconds}
        return row | {name: about[name] for name in ("weights", "float_trainable", "state_bytes_per_weight")}

    for seed in options.seeds:
        for rule, name in (("ours", "ternary"), ("adamw", "float AdamW")):
            for rate, weight in TUNED[options.size][rule]:
                item = f"{name}, rate {rate}, codebook {weight}, seed {seed}"
                yield item, functools.partial(run, rule, rate, weight, seed)


STUDIES: dict[str, Callable[[argparse.Namespace], Items]] = {f.__name__: f for f in (lstm, vq, graph, moe, stream)}


def main(arguments: list[str] | None = None) -> int:
    """Run one study, or all; print and keep its rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("study", choices=[*STUDIES, "all"])
    parser.add_argument("--seeds", default="0,1", type=lambda words: [int(word) for word in words.split(",")])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", choices=list(SIZES), default="cpu")
    parser.add_argument("--fashion", type=Path, default=Path("../shared/data/fashion-mnist"))
    parser.add_argument("--text", type=Path)
    parser.add_argument("--seconds", type=float, default=0.0, help="no row is begun after so many; 0: no limit")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(arguments)
    found: Row = {"rows": []}
    began = time.perf_counter()
    if options.out and options.out.exists():
        found = read_json(options.out)
    known = {
        (row["study"], row["item"], row["size"]) for row in found["rows"] if row.get("quick", False) == options.quick
    }
    for name in STUDIES if options.study == "all" else [options.study]:
        for item, run in STUDIES[name](options):
            late = options.seconds and time.perf_counter() - began > options.seconds
            if (name, item, options.size) in known or late:
                continue
            about = surroundings(torch.device(options.device))
            where = {key: about[key] for key in ("device", "cpu", "threads", "torch", "git_commit")}
            row = {"study": name, "item": item, "size": options.size, **run(), **where}
            row |= {"quick": True} if options.quick else {}
            found["rows"].append(row)
            print(name, item, {k: round(v, 5) for k, v in row.items() if isinstance(v, float)}, flush=True)
            if options.out:
                write_json(options.out, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
