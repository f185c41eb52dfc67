"""A laboratory for update rules: many settings, one compiled model, a whole training step in one CUDA graph.

    python benchmarks/rule_lab.py RUNS.json --data enwik8 --out FILE.jsonl      one process for each GPU

RUNS.json is a list of objects; each changes some of DEFAULTS below. Here a rule is emulated in plain torch on stacks of
matrices of one shape, so that a new idea is a few lines; what proves itself moves into the package, and only the
package's own runs (`tritwise bench rules`) count as results. Every run sees the same batches for the same seed.
One JSON line a run: the settings that differ from the defaults, bits per byte of the validation part (chunked).
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tritwise.data.sampler import Sampler
from tritwise.data.source import describe
from tritwise.data.split import split
from tritwise.models import ByteLM, ModelConfig
from tritwise.nn import tensor_roles
from tritwise.ops.direction.reference import A, B, C
from tritwise.optim import rate_factor

DEFAULTS: dict[str, Any] = {
    "rule": "ours",  # ours, adamw, muon, bitnet-adamw, bitnet-muon
    "width": 512,
    "depth": 6,
    "ctx": 512,
    "batch": 64,
    "steps": 1200,
    "warmup": 100,
    "decay": 0.5,
    "seed": 0,
    "rate": 0.015,
    "beta": 0.95,
    "lead": 81,  # register units of one leading trit
    "limit": 1.5,  # largest register, in leading trits
    "span": 0.9,
    "ns": 3,
    "coef": None,  # other Newton-Schulz coefficients: [[a, b, c], ...] one triple a step
    "nesterov": 0.0,  # share of the fresh gradient added to the momentum before the direction
    "beta_end": 0.0,  # the decay to which beta moves while the rate falls; 0: it stays
    "pre_norm": 0,  # 1: rows and columns of the momentum are brought to equal RMS before Newton-Schulz
    "float_tables": 0,  # 1: embedding and head stay float and learn by AdamW, to see what their trits cost
    "row_memory": 0.0,  # decay of a mean square a row, by whose root the direction is divided (NorMuon); 0: none
    "parts": {},  # rates of some matrices over the rest: {"qkv": 0.5, "out": …, "up": …, "down": …}
    "power": 1.0,  # of the falling part of the rate's schedule
    "row_norm": 0.0,  # 1: rows of the direction are brought to equal RMS
    "mix": 0.0,  # share of the plain momentum (unit RMS) in the direction
    "cautious": 0.0,  # 1: no step where direction and gradient disagree
    "pull": 0.0,  # registers shrink by rate * pull a step
    "kick": 0.0,  # leading trits by which a register goes on when it flips, away from the boundary that it passed
    "levels": 127,  # of the momentum, each side; 0: float momentum
    "mgroup": 0,  # momentum values that share one power-of-two exponent; 0: a row
    "mu": 0.0,  # mu-law companding of the momentum's levels
    "fine": 0,  # 1: momentum's group scale is not rounded to a power of two
    "nearest": 0,  # 1: momentum is rounded to the nearest level, not at random
    "clip": 1.0,  # the largest level over the group's largest momentum; below 1 the largest saturate
    "exact": 0,  # 1: the direction is made of the momentum before it is rounded
    "shelves": None,  # levels of a register between 0 and 2 in leading trits, if they are not evenly spaced
    "weyl": 0,  # 1: low-discrepancy rounding instead of independent draws (registers), 2: momentum too
    "table_direction": "row_column",  # of embedding and head; or ns
    "embedding_rate": 1.0,
    "head_rate": 1.0,
    "scale_rate": 0.0,  # octaves a step
    "sgrid": 0,  # 8: scales are used rounded to 1/8 octave
    "sgroup": 0,  # inputs that share a scale; 0: a row
    "column": 0.0,  # octaves a step of a second scale a column, as a gain of the norm before it would be; 0: none
    "even": 0,  # 1: every gradient counts the same in the momentum (unit RMS); 2: rows and columns made equal too
    "branch": 1.0,  # factor of the scale of matrices that write to the residual stream
    "weight_decay": 0.0,
    "dtype": "bfloat16",  # of activations
    "compile": 1,
    "plain": 1,  # 0: the package's own backward of norms and rotation
}
GOLDEN = 0.6180339887498949


class Stack:
    """Matrices of one shape and role: weight [n, R, C], of which the model's parameters are views."""

    def __init__(self, role: str, weight: Tensor, parameters: list[torch.nn.Parameter]) -> None:
        self.role, self.weight, self.parameters = role, weight, parameters
        self.state: dict[str, Tensor] = {}

    def grad(self) -> Tensor:
        """All gradients as float32 [n, R, C]."""
        rows, columns = self.weight.shape[1:]
        return torch.cat([p.grad.view(-1, rows, columns) for p in self.parameters]).float()  # type: ignore[union-attr]


def stacks_of(model: ByteLM, dtype: torch.dtype) -> list[Stack]:
    """Group the model's parameters by role and shape; query, key and value are matrices of their own."""
    roles, found = tensor_roles(model), {}
    for name, p in model.named_parameters():
        blocks = 3 if p.shape[0] == 3 * p.shape[1] else 1
        found.setdefault((roles[name], p.shape[0] // blocks, p.shape[1]), []).append(p)
    stacks = []
    for (role, rows, columns), members in found.items():
        weight = torch.cat([p.data.view(-1, rows, columns) for p in members]).to(dtype).contiguous()
        at = 0
        for p in members:
            count = p.numel() // (rows * columns)
            p.data = weight[at : at + count].view(p.shape)
            at += count
        stacks.append(Stack(role, weight, members))
    return stacks


def unit_rms(x: Tensor) -> Tensor:
    return x / (x.square().mean(dim=(-2, -1), keepdim=True).sqrt() + 1e-30)


def ns(x: Tensor, run: dict[str, Any], steps: int) -> Tensor:
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-30)
    turned = x.shape[-2] > x.shape[-1]
    x = (x.mT if turned else x).bfloat16()
    for a, b, c in run["coef"] or [(A, B, C)] * steps:  # through the Gram matrix bfloat16 would lose small values
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return (x.mT if turned else x).float()


def row_column(x: Tensor) -> Tensor:
    for _ in range(2):
        x = x / (x.square().mean(dim=-1, keepdim=True).sqrt() + 1e-30)
        x = x / (x.square().mean(dim=-2, keepdim=True).sqrt() + 1e-30)
    return x


class Ours:
    """The register rule with all its dials."""

    def __init__(self, stack: Stack, run: dict[str, Any], step: Tensor) -> None:
        w, self.stack, self.run, self.step = stack.weight, stack, run, step
        device = w.device
        self.lead, self.top = float(run["lead"]), float(int(run["limit"] * run["lead"]))
        reach = int(run["span"] * run["lead"])
        self.register = torch.randint(-reach, reach + 1, w.shape, device=device).float()
        self.shelves: Tensor | None = None
        if run["shelves"]:
            half = sorted(run["shelves"])
            both = sorted({-x for x in half} | set(half))
            self.shelves = torch.tensor(both, device=device) * self.lead
            nearest = (self.register[..., None] - self.shelves).abs().argmin(dim=-1)
            self.register = self.shelves[nearest]
        self.momentum = torch.zeros(w.shape, device=device)
        density = (self.register.abs() > self.lead / 2).float().mean().item()
        fan_in = 1 if stack.role == "embedding" else w.shape[2]
        groups = w.shape[2] // (run["sgroup"] or w.shape[2])
        self.scale = torch.full((w.shape[0], w.shape[1], groups, 1), 1 / math.sqrt(fan_in * density), device=device)
        self.scale_momentum = torch.zeros_like(self.scale)
        self.column = torch.ones(w.shape[0], 1, w.shape[2], device=device)
        self.column_momentum = torch.zeros_like(self.column)
        self.row_square = torch.zeros(w.shape[0], w.shape[1], 1, device=device)
        self.part = torch.ones(w.shape[0], 1, 1, device=device)
        self.offset = torch.rand(w.shape, device=device) if run["weyl"] else None
        self.offset2 = torch.rand(w.shape, device=device) if run["weyl"] > 1 else None
        self.decode()

    def draw(self, like: Tensor, offset: Tensor | None) -> Tensor:
        if offset is None:
            return torch.rand_like(like)
        return torch.frac(offset + torch.frac(self.step.double() * GOLDEN).float())

    def trits(self) -> Tensor:
        return torch.round(self.register / self.lead).clamp_(-1, 1)

    def decode(self) -> None:
        grid, scale = self.run["sgrid"], self.scale
        if grid:
            scale = torch.exp2(torch.round(torch.log2(scale) * grid) / grid)
        by_row = (self.trits().view(*scale.shape[:3], -1) * scale).view(self.register.shape)
        self.stack.weight.copy_(by_row * self.column if self.run["column"] else by_row)

    def requantise(self, m: Tensor) -> Tensor:
        run, levels = self.run, self.run["levels"]
        if not levels:
            return m
        shape = m.shape
        g = m.view(*shape[:-1], -1, run["mgroup"] or shape[-1])
        peak = g.abs().amax(dim=-1, keepdim=True).clamp_(min=1e-30)
        peak = peak * run["clip"]
        unit = peak / levels if run["fine"] else torch.exp2(torch.ceil(torch.log2(peak / levels)))
        q = g / unit
        if run["mu"]:
            mu = run["mu"]
            top = float(levels)
            q = torch.sign(q) * torch.log1p(mu * q.abs() / top) * (top / math.log1p(mu))
            low = torch.floor(q)
            # Unbiased between neighbouring levels, which are not equally far apart.
            expand = lambda v: torch.sign(v) * torch.expm1(v.abs() * (math.log1p(mu) / top)) * (top / mu)  # noqa: E731
            a, b, x = expand(low), expand(low + 1), g / unit
            share = (x - a) / (b - a)
            up = (share > 0.5) if run["nearest"] else self.draw(m, self.offset2).view(g.shape) < share
            q = torch.where(up, b, a)
        else:
            bias = 0.5 if run["nearest"] else self.draw(m, self.offset2).view(g.shape)
            q = torch.floor(q + bias).clamp_(-levels, levels)
        return (q * unit).view(shape)

    def update(self, grad: Tensor, factor: Tensor) -> None:
        run, role = self.run, self.stack.role
        beta, raw = run["beta"], grad
        if run["even"]:
            grad = unit_rms(row_column(grad) if run["even"] > 1 else grad)
        if run["beta_end"]:
            beta = run["beta_end"] + (run["beta"] - run["beta_end"]) * factor
        whole = self.momentum * beta + grad
        m = self.requantise(whole)
        self.momentum.copy_(m)
        if run["exact"]:
            m = whole
        x = m + run["nesterov"] * grad if run["nesterov"] else m
        if role == "matrix" or run["table_direction"] == "ns":
            u = unit_rms(ns(row_column(x) if run["pre_norm"] else x, run, run["ns"]))
            if run["row_memory"]:
                self.row_square.lerp_(u.square().mean(dim=-1, keepdim=True), 1 - run["row_memory"])
                u = unit_rms(u / (self.row_square.sqrt() + 1e-12))
            if run["row_norm"]:
                u = unit_rms(u / (u.square().mean(dim=-1, keepdim=True).sqrt() + 1e-30))
            if run["mix"]:
                u = unit_rms(u + run["mix"] * unit_rms(x))
        else:
            u = unit_rms(row_column(x))
        if run["cautious"]:
            u = unit_rms(u * (u * grad > 0))
        rate = run["rate"] * factor * {"embedding": run["embedding_rate"], "head": run["head_rate"]}.get(role, 1.0)
        if run["scale_rate"]:
            s = (raw * self.trits() * self.column).view(*self.scale.shape[:3], -1).sum(
                dim=-1, keepdim=True
            ) * self.scale
            self.scale_momentum.mul_(run["beta"]).add_(s)
            rms = self.scale_momentum.square().mean(dim=(1, 2, 3), keepdim=True).sqrt() + 1e-30
            self.scale.mul_(torch.exp2(-run["scale_rate"] * factor * self.scale_momentum / rms))
        if run["column"]:
            c = (raw * self.stack.weight).sum(dim=1, keepdim=True)
            self.column_momentum.mul_(run["beta"]).add_(c)
            rms = self.column_momentum.square().mean(dim=(1, 2), keepdim=True).sqrt() + 1e-30
            self.column.mul_(torch.exp2(-run["column"] * factor * self.column_momentum / rms))
        target = self.register - u * (rate * self.lead) * self.part
        if run["pull"]:
            target -= self.register * (rate * run["pull"])
        if self.shelves is None:
            rounded = torch.floor(target + self.draw(target, self.offset)).clamp_(-self.top, self.top)
        else:
            shelves, inside = self.shelves, target.clamp(self.shelves[0], self.shelves[-1])
            above = torch.bucketize(inside, shelves).clamp_(1, len(shelves) - 1)
            low, high = shelves[above - 1], shelves[above]
            rounded = torch.where((inside - low) > self.draw(target, self.offset) * (high - low), high, low)
        if run["kick"]:
            flips = torch.round(rounded / self.lead).clamp_(-1, 1) - self.trits()
            rounded = (rounded + flips * round(run["kick"] * self.lead)).clamp_(-self.top, self.top)
        self.register.copy_(rounded)
        self.decode()

    def facts(self) -> dict[str, float]:
        t, n = self.trits(), self.register.numel()
        return {"zeros": float((t == 0).sum()) / n, "saturated": float((self.register.abs() >= self.top).sum()) / n}


class Floats:
    """AdamW, or Muon with AdamW for tables, on float32 weights; with `ternary`, BitNet b1.58's quantised forward."""

    def __init__(self, stack: Stack, run: dict[str, Any], step: Tensor) -> None:
        w = stack.weight
        self.stack, self.run, self.step = stack, run, step
        self.muon = run["rule"].endswith("muon") and stack.role == "matrix"
        self.ternary = run["rule"].startswith("bitnet") and stack.role != "embedding"
        std = 1.0 if stack.role == "embedding" else 1 / math.sqrt(w.shape[2])
        self.latent = torch.randn(w.shape, device=w.device) * std
        self.first = torch.zeros_like(self.latent)
        self.second = None if self.muon else torch.zeros_like(self.latent)
        self.decode()

    def decode(self) -> None:
        w = self.latent
        if self.ternary:
            mean = w.abs().mean(dim=(-2, -1), keepdim=True)
            w = (w / mean).round().clamp(-1, 1) * mean
        self.stack.weight.copy_(w)

    def update(self, grad: Tensor, factor: Tensor) -> None:
        run = self.run
        rate = run["rate"] * factor
        if run["float_tables"]:
            rate = 0.002 * factor
        if self.muon:
            self.first.lerp_(grad, 1 - run["beta"])
            u = ns(grad.lerp(self.first, run["beta"]), run, 5)
            self.latent.sub_(u * rate * max(1.0, grad.shape[-2] / grad.shape[-1]) ** 0.5)
        else:
            if run["rule"].endswith("muon"):
                rate = run.get("adam_rate", 0.002) * factor
            assert self.second is not None
            self.first.lerp_(grad, 0.1)
            self.second.lerp_(grad.square(), 0.05)
            t = self.step.float() + 1
            u = (self.first / (1 - 0.9**t)) / ((self.second / (1 - 0.95**t)).sqrt() + 1e-8)
            if run["weight_decay"]:
                self.latent.mul_(1 - rate * run["weight_decay"])
            self.latent.sub_(u * rate)
        self.decode()

    def facts(self) -> dict[str, float]:
        return {}


def run_one(run: dict[str, Any], model: ByteLM, loss_fn: Any, train: Tensor, val: np.ndarray) -> dict[str, Any]:
    """Train once from the start and score; a dict for the result file."""
    device, steps, ctx = train.device, run["steps"], run["ctx"]
    torch.manual_seed(run["seed"])
    step = torch.zeros(1, dtype=torch.int64, device=device)  # a 0-d index would be read by the host
    stacks = run["stacks"]
    ours = [run["rule"] == "ours" and not (run["float_tables"] and stack.role != "matrix") for stack in stacks]
    made = [(Ours if own else Floats)(stack, run, step) for own, stack in zip(ours, stacks, strict=True)]
    names = {p: n.split(".")[-2] for n, p in model.named_parameters()}
    for rule in made:
        at = 0
        for p in rule.stack.parameters:
            count = p.numel() // rule.stack.weight[0].numel()
            if isinstance(rule, Ours):
                if names[p] in ("out", "down"):
                    rule.scale[at : at + count].mul_(run["branch"])
                rule.part[at : at + count] = run["parts"].get(names[p], 1.0)
            at += count
        rule.decode()
    sampler = Sampler(run["train_np"], run["batch"], ctx, run["seed"])
    starts = torch.from_numpy(np.stack([sampler.starts_at(s) for s in range(steps + 4)])).to(device)
    factors = [rate_factor(s, steps, run["warmup"], run["decay"]) for s in range(steps)] + [0.0] * 4
    factors = [f ** run["power"] if s > run["warmup"] else f for s, f in enumerate(factors)]
    factors_t = torch.tensor(factors, dtype=torch.float32, device=device)
    losses = torch.zeros(steps + 4, device=device)
    columns = torch.arange(ctx + 1, device=device)

    def one() -> None:
        rows = train[starts.index_select(0, step).T + columns].long()
        for p in model.parameters():
            p.grad = None
        loss = loss_fn(rows[:, :-1], rows[:, 1:])
        loss.backward()
        with torch.no_grad():
            losses.index_copy_(0, step, loss.detach().view(1))
            for rule in made:
                rule.update(rule.stack.grad(), factors_t.index_select(0, step))
            step.add_(1)

    began = time.perf_counter()
    replay = one
    if device.type == "cuda":
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(2):
                one()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            one()
        torch.cuda.synchronize()
        replay = graph.replay
    ready, done = time.perf_counter(), int(step)
    while done < steps:
        for _ in range(min(100, steps - done)):
            replay()
        done = int(step)
        if not bool(torch.isfinite(losses[done - 1])):
            break
    seconds = time.perf_counter() - ready
    bpb = evaluate(loss_fn, val, run["batch"], ctx, device)
    n = sum(rule.stack.weight.numel() for rule in made)
    facts: dict[str, float] = {}
    for rule in made:
        for k, v in rule.facts().items():
            facts[k] = round(facts.get(k, 0.0) + v * rule.stack.weight.numel() / n, 4)
    curve = losses[:steps].view(-1, steps // 12).mean(1) if steps % 12 == 0 else losses[:steps][None].mean(1)
    return {
        "val_bpb": round(bpb, 4),
        "step_ms": round(1000 * seconds / steps, 2),
        "ready_s": round(ready - began, 1),
        "weights": n,
        **facts,
        "curve": [round(float(x) / math.log(2), 3) for x in curve],
    }


@torch.no_grad()
def evaluate(loss_fn: Any, val: np.ndarray, batch: int, ctx: int, device: torch.device) -> float:
    """Bits per byte of the windows that fill whole batches: chunked, each byte once."""
    windows = (len(val) - 1) // ctx // batch * batch
    text = torch.from_numpy(val[: windows * ctx + 1].astype(np.int64)).to(device)
    total = 0.0
    for first in range(0, windows, batch):
        part = text[first * ctx : (first + batch) * ctx + 1]
        total += float(loss_fn(part[:-1].view(batch, ctx), part[1:].view(batch, ctx)))
    return total / (windows / batch) / math.log(2)


def plain_functions() -> None:
    """Norms and rotation as compositions that autograd differentiates, in place of the package's own backward."""
    import tritwise.models.block
    import tritwise.models.byte_lm
    import tritwise.nn.attention
    import tritwise.nn.mlp

    def rms_norm(x: Tensor) -> Tensor:
        return torch.nn.functional.rms_norm(x, (x.shape[-1],), eps=1e-6)

    tritwise.models.block.rms_norm = rms_norm
    tritwise.models.byte_lm.rms_norm = rms_norm
    tritwise.nn.attention.rms_norm = rms_norm
    tritwise.nn.mlp.relu_squared_norm = lambda h, leak=0.0: rms_norm(torch.nn.functional.leaky_relu(h, leak).square())
    tritwise.nn.attention._Rotate.apply = tritwise.nn.attention._rotate  # type: ignore[method-assign]


def disagreement(model: ByteLM, one: Any, other: Any, ids: Tensor) -> tuple[float, str]:
    """The largest relative difference of a gradient between two ways to compute the loss, and whose it is."""
    grads = []
    for loss in (one, other):
        for p in model.parameters():
            p.grad = None
        loss(ids[:, :-1], ids[:, 1:]).backward()
        grads.append({n: p.grad.float() for n, p in model.named_parameters()})  # type: ignore[union-attr]
    found = {n: float((g - grads[1][n]).norm() / g.norm()) for n, g in grads[0].items()}
    worst = max(found, key=lambda n: found[n])
    return found[worst], worst


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("runs")
    parser.add_argument("--data", required=True)
    parser.add_argument("--split", default="first:38000000,last:2000000")
    parser.add_argument("--out", required=True)
    parser.add_argument("--part", default="0/1", help="which share of the runs, i/n")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no run after this many seconds")
    options = parser.parse_args()
    began = time.perf_counter()
    part, parts = (int(x) for x in options.part.split("/"))
    given = json.loads(Path(options.runs).read_text())[part::parts]
    data = split(describe(options.data).data, options.split)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train = torch.from_numpy(np.array(data["train"])).to(device)
    torch.backends.cuda.matmul.allow_tf32 = True
    models: dict[tuple[Any, ...], tuple[ByteLM, Any, list[Stack]]] = {}
    for changes in given:
        if time.perf_counter() - began > options.seconds:
            break
        run = {**DEFAULTS, **changes}
        shape = (run["width"], run["depth"], run["ctx"], run["batch"], run["dtype"], run["compile"], run["plain"])
        if shape not in models:
            config = ModelConfig(width=shape[0], depth=shape[1], ctx=shape[2], weights="float")
            if run["plain"]:
                plain_functions()
            torch.manual_seed(0)
            model = ByteLM(config, getattr(torch, run["dtype"])).to(device)
            loss_fn = torch.compile(model.loss, dynamic=False) if run["compile"] else model.loss
            models[shape] = (model, loss_fn, stacks_of(model, model.dtype))
            if run["compile"]:
                ids = torch.from_numpy(data["val"][: shape[3] * (shape[2] + 1)].astype(np.int64)).to(device)
                gap, name = disagreement(model, model.loss, loss_fn, ids.view(shape[3], -1))
                print(f"compiled against eager: {gap:.4f} at {name}", flush=True)
                if gap > 0.05:
                    models[shape] = (model, model.loss, models[shape][2])
        model, loss_fn, stacks = models[shape]
        result = run_one({**run, "stacks": stacks, "train_np": data["train"]}, model, loss_fn, train, data["val"])
        line = json.dumps({"changes": changes, **result})
        with Path(options.out).open("a") as file:
            file.write(line + "\n")
        print(f"{time.perf_counter() - began:6.0f} {line}", flush=True)


if __name__ == "__main__":
    main()
