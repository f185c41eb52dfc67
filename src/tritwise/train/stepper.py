"""One optimizer step as one call: eager, compiled, or with forward and backward replayed as a CUDA graph.

A small model on a GPU is bound by launches: its kernels are shorter than the time Python takes to ask for them. With
`compile` the model's loss is one compiled function, and with `graph` its forward and backward are recorded once and
replayed, and where the optimizers allow it the update with them, so that a step costs the host a handful of launches.
Where layers move in turns, there is a recording for each turn. Gradients of ternary layers then wait in their ports
until backward is over, all at once, and matrices are decoded all at once before forward and let go of after backward,
which is for models that are small beside the GPU; otherwise every gradient is consumed the moment it is made, and each
product decodes its matrix for itself.

Nothing here waits for the GPU: the loss comes back as a tensor that may not have been computed yet.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tritwise.models import Arb, ByteLM, DecodeState
from tritwise.models.byte_lm import Compiled
from tritwise.nn import TritModule, TritMoE, decoded, noise_of, rms_norm, trit_modules
from tritwise.ops import gpu
from tritwise.optim import Muon, TritOptimizer
from tritwise.train.crew import Crew

WARM_UP = 3  # steps before a recording: libraries and the allocator settle, as torch.cuda.graph asks for
MOST_RECORDED = 64  # recordings at most; batches of further shapes run eagerly


class Stepper:
    """Runs `model.loss` forward and backward over `accum` micro-batches, then every optimizer.

    compile, blocks: of `loss_of`. graph: record forward and backward as a CUDA graph, one for every shape of batch and
    number of repeats, when it first comes, up to MOST_RECORDED. guard: a step whose gradients are no numbers moves
    nothing and counts as "skipped" in the optimizers' groups. Ternary optimizers see to that themselves, on the
    device, and on a GPU so do Muon and fused AdamW, which `settle` counts; for other float ones the host waits for the
    device once a step. clip: largest norm of all float gradients together; 0: none. crew: the processes that share a
    step's micro-batches; `accum` counts those of all. They exchange a layer's gradient the moment it is made, but for
    what a batch may leave out, which waits until backward is over: experts, and all of an ARB model. seed: of dropout,
    whose masks follow from it, from `taken`, the steps taken so far (set by whoever resumes a run), and from the number
    of the micro-batch. steady: nothing but rates will change from step to step, so that a step may be recorded whole.
    ValueError for a graph away from a GPU.
    """

    def __init__(
        self,
        model: ByteLM | Arb,
        optimizers: Sequence[torch.optim.Optimizer],
        accum: int = 1,
        *,
        compile: bool = False,
        blocks: bool = False,
        graph: bool = False,
        guard: bool = False,
        clip: float = 0.0,
        crew: Crew | None = None,
        seed: int = 0,
        steady: bool = True,
    ) -> None:
        self.model, self.optimizers, self.accum = model, list(optimizers), accum
        self.clip, self.crew, self.steady = clip, crew or Crew(), steady
        self._loss = loss_of(model, compile=compile, blocks=blocks)
        device = next(model.parameters()).device
        if graph and device.type != "cuda":
            raise ValueError(f"a CUDA graph cannot be recorded on {device}; leave out graph, or move the model to cuda")
        self.state: DecodeState | None = None  # what the model has read, where rows read on from step to step
        self._record = graph
        self.shares: list[Tensor] = []
        self.taken = 0
        self._seed = seed
        self._noise = (model.trunk if isinstance(model, Arb) else model).noise
        self._replays: dict[tuple[Any, ...], _Recording] = {}  # one for every shape, number of repeats and phase
        self._booth: _Booth | None = None
        self._versions: list[int] = []
        floats = [optimizer for optimizer in self.optimizers if not isinstance(optimizer, TritOptimizer)]
        self._guarded = guard and bool(floats)
        able = all(isinstance(o, Muon) or o.defaults.get("fused") for o in self.optimizers)
        # 0-d on the device: steps that were held back there, and not counted yet.
        self._held = torch.zeros((), device=device) if self._guarded and able and device.type == "cuda" else None
        self._floats = [p for optimizer in floats for group in optimizer.param_groups for p in group["params"]]
        self._optional = left_out(model) if self.crew.size > 1 else set()
        self._kept: dict[TritModule, Tensor] = {}  # gradients of those, until every process knows who has which
        if self.crew.size > 1:
            for optimizer in self._ternary:
                self._exchange(optimizer)

    def step(self, ids: Tensor, targets: Tensor) -> Tensor:
        """`step_over` a single batch of text."""
        return self.step_over([(ids, targets)])

    def step_over(self, batches: Iterable[tuple[Any, ...]], loops: int = 0) -> Tensor:
        """Train on this process's share of `accum` micro-batches, each the arguments of `model.loss` on its device (of
        a byte LM ids and targets, int64 [B, T]), with `loops` repeats of the core; 0: all. Returns the mean loss of all
        micro-batches, of text in nats per byte, a 0-d float32 tensor on the device, which may not have been computed
        yet; `shares` then has what each of this process's micro-batches gave to it."""
        step, self.taken = self.taken, self.taken + 1
        if self.records_whole_steps:
            (batch,) = batches
            self._draw(step, 0)
            if (recording := self._whole(batch, loops)) is not None:
                for optimizer in recording.updates:
                    optimizer.before_replay()
                self.shares = [recording(batch).clone()]  # the next replay writes over it
                return self.shares[0]
            batches = [batch]
        total: Tensor | None = None
        self.shares = []
        for micro, batch in zip(self.crew.micros(self.accum), batches, strict=True):
            self._draw(step, micro)
            loss = self._pass(batch, loops)
            self.shares.append(loss)
            total = loss if total is None else total + loss
        assert total is not None, "a step needs a batch"
        if not self._optional.isdisjoint(self._floats):
            self._fill_in()
        grads = [p.grad for p in self._floats if p.grad is not None]
        self.crew.add_up([total, *grads])
        norm = torch.nn.utils.get_total_norm(grads) if grads and (self.clip or self._guarded) else None
        if self.clip and norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self._floats, self.clip, norm)
        # A norm is finite where every gradient is.
        finite = (total if norm is None else total + norm).isfinite() if self._guarded else None
        if self._held is not None and finite is not None:
            self._step_unless(1 - finite.float())
        else:
            self._step_if(finite is None or bool(finite))  # the host waits here
        if not self._record:
            for optimizer in self.optimizers:
                optimizer.zero_grad(set_to_none=True)
        return total

    def _step_if(self, sound: bool) -> None:
        """Let every optimizer step, or count that it did not."""
        for optimizer in self.optimizers:
            if isinstance(optimizer, TritOptimizer):
                if not sound:
                    optimizer.refuse()
                optimizer.step()
            elif sound:
                optimizer.step()
            else:
                _count_skipped(optimizer, 1)

    def _step_unless(self, found_inf: Tensor) -> None:
        """Let every optimizer step, which holds itself back on the device where found_inf, float32 0-d, is 1."""
        assert self._held is not None
        self._held += found_inf
        for optimizer in self.optimizers:
            optimizer.found_inf = found_inf  # type: ignore[attr-defined]
            optimizer.step()
            optimizer.found_inf = None  # type: ignore[attr-defined]

    def settle(self) -> None:
        """Count as "skipped" what was held back on the device since the last time; the host waits for it."""
        if self._held is not None and (count := int(self._held)):
            self._held.zero_()
            for optimizer in self.optimizers:
                _count_skipped(optimizer, count)

    def _draw(self, step: int, micro: int) -> None:
        """Say what dropout is drawn from in the next pass; the host does not wait."""
        if self._noise is not None:
            self._noise.fill_(noise_of(self._seed, step, micro))

    def record(self, batch: tuple[Any, ...], loops: int = 0) -> None:
        """Record whole steps of this shape and depth, one for every phase of the optimizers, unless they are; every
        number stays as it was. Only where `records_whole_steps`."""
        for steps in range(self.phases):
            with ExitStack() as stack:
                for optimizer in self._ternary:
                    stack.enter_context(optimizer.ahead(steps))
                self._whole(batch, loops)

    @property
    def phases(self) -> int:
        """After so many steps it is the turn of the same layers again."""
        return math.lcm(*(optimizer.phases for optimizer in self._ternary))

    @property
    def _ternary(self) -> list[TritOptimizer]:
        return [optimizer for optimizer in self.optimizers if isinstance(optimizer, TritOptimizer)]

    def _whole(self, batch: tuple[Any, ...], loops: int) -> "_Recording | None":
        """The recording of a whole step. None if there are too many recordings for one more."""
        versions = [optimizer.version for optimizer in self._ternary]
        if self._versions != versions:
            self._replays.clear()  # made anew when an optimizer has changed since; its memory can serve the next one
            self._booth = None
        self._versions = versions
        return self._recording(batch, loops, self._ternary)

    def _recording(
        self, batch: tuple[Any, ...], loops: int, updates: Sequence[TritOptimizer] = ()
    ) -> "_Recording | None":
        """The recording for this shape, depth and phase of `updates`, made if there is room for it."""
        key = (loops, *(optimizer.phase for optimizer in updates), *shape_of(batch))
        if key not in self._replays or self._replays[key].updates != list(updates):
            if key not in self._replays and len(self._replays) >= MOST_RECORDED:
                return None
            if self._booth is None:
                self._booth = _Booth(next(self.model.parameters()).device)
            share = partial(self._share, loops=loops)
            self._replays[key] = _Recording(self.model, share, batch, self._booth, updates)
        return self._replays[key]

    @property
    def records_whole_steps(self) -> bool:
        """Whether the update is recorded too: one micro-batch, every optimizer can, together they train every layer."""
        mine = [optimizer for optimizer in self._ternary if optimizer.recordable]
        alone = self.accum == 1 and self.crew.size == 1
        if not (self._record and self.steady and alone) or not mine or len(mine) < len(self.optimizers):
            return False
        trained = {layer for optimizer in mine for layer in optimizer.layers}
        return all(layer in trained for _, layer in trit_modules(self.model) if layer.port is not None)

    def _pass(self, batch: tuple[Any, ...], loops: int) -> Tensor:
        """Forward and backward of one micro-batch; returns its share of the loss."""
        recording = self._recording(batch, loops) if self._record and not self.records_whole_steps else None
        if recording is None:
            if self._record:
                for p in self._floats:
                    p.grad = None  # it lies in a recording, which would be written over
            loss = self._share(*batch, loops=loops)
            loss.backward()
            loss = loss.detach()
        else:
            loss = recording(batch).clone()  # the next replay writes over it
            made = dict(recording.port_grads)
            self._kept = {layer: made.pop(layer) for layer in list(made) if layer in self._optional}
            _deliver(self.optimizers, made, self.crew)
        if self._optional:
            self._exchange_kept()
        return loss

    def _exchange(self, optimizer: TritOptimizer) -> None:
        """From now on every process's gradient of a layer goes into its momentum, those of lower ranks first."""

        def consume(layer: TritModule, grad: Tensor) -> None:
            if layer in self._optional:
                self._kept[layer] = grad
            else:
                _consume_all(optimizer, self.crew, [layer], [grad])

        for layer in optimizer.layers:
            layer.consumer = consume

    def _exchange_kept(self) -> None:
        """The same of what a batch may leave out, after a pass: processes talk of what any of them has a gradient of,
        all in one order, and no momentum takes a gradient that was not made."""
        kept, self._kept = self._kept, {}
        for optimizer in self._ternary:
            layers = [layer for layer in optimizer.layers if layer in self._optional]
            for layer, who in zip(layers, self._who_has([layer in kept for layer in layers]), strict=True):
                if any(who):
                    grad = kept.get(layer)
                    if grad is None:
                        grad = torch.zeros(layer.register.shape, device=layer.register.device)
                    for has, given in zip(who, self.crew.gather(grad), strict=True):
                        if has:
                            optimizer.consume([layer], [given])

    def _fill_in(self) -> None:
        """Float parameters of which another process has a gradient get one of zeros, to be added up with."""
        for p, who in zip(self._floats, self._who_has([p.grad is not None for p in self._floats]), strict=True):
            if p.grad is None and any(who):
                p.grad = torch.zeros_like(p)

    def _who_has(self, mine: list[bool]) -> list[list[bool]]:
        """Of each thing that this process has or has not, which ranks have it; the host waits for it."""
        told = self.crew.gather(torch.tensor(mine, dtype=torch.uint8, device=self.crew.device))
        return torch.stack(told, dim=1).bool().tolist()

    def _share(self, *batch: Any, loops: int) -> Tensor:
        given: dict[str, Any] = {"loops": loops} if loops else {}
        if self.state is not None:
            given["state"] = self.state
        loss = self._loss(*batch, **given)
        return loss / self.accum if self.accum > 1 else loss


def _count_skipped(optimizer: torch.optim.Optimizer, count: int) -> None:
    group = optimizer.param_groups[0]
    group["skipped"] = group.get("skipped", 0) + count


def shape_of(batch: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a recording of a batch depends on: the sizes of its tensors, and what is none."""
    return tuple(tuple(part.shape) if isinstance(part, Tensor) else part for part in batch)


def loss_of(model: ByteLM | Arb, *, compile: bool = False, blocks: bool = False) -> Callable[..., Tensor]:
    """`model.loss` for batches of one shape: as it is, or compiled as one, or with every block compiled. Blocks share
    one code, so that however many layers and depths a model has, it is compiled once for each kind; steps are a few
    percent slower than compiled as one, where it fuses what lies between blocks."""
    if compile:
        return torch.compile(model.loss, dynamic=False)
    return _ByBlocks(model) if blocks else model.loss


def left_out(model: ByteLM | Arb) -> set[TritModule | nn.Parameter]:
    """What a batch may have no gradient of, ternary layers and float parameters: experts that no position goes to, and
    of an ARB model anything, as it depends on the kind of the batch."""
    parts = [model] if isinstance(model, Arb) else [m.experts for m in model.modules() if isinstance(m, TritMoE)]
    layers = {layer for part in parts for _, layer in trit_modules(part)}
    return layers | {p for part in parts for p in part.parameters() if p.requires_grad}


class _ByBlocks:
    """The loss with compiled blocks, and compiled one by one what comes before and after them, which no depth changes;
    whoever else calls the model, to score it or to copy it, finds it as it is."""

    def __init__(self, model: ByteLM | Arb) -> None:
        self._model, self._trunk = model, model.trunk if isinstance(model, Arb) else model
        trunk, compiled = self._trunk, partial(torch.compile, dynamic=False)
        blocks = [compiled(block) for block in trunk.blocks]
        self._compiled = Compiled(blocks, compiled(trunk.embedded), compiled(trunk.values_of), compiled(rms_norm))

    def __call__(self, *batch: Any, **given: Any) -> Tensor:
        self._trunk.compiled = self._compiled
        try:
            return self._model.loss(*batch, **given)
        finally:
            self._trunk.compiled = None


class _Booth:
    """Where steps are recorded: a stream, and memory that all recordings share, as never two replay at once."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()


class _Recording:
    """Forward and backward of one batch shape as a CUDA graph. Gradients lie where the recording put them: they are
    written anew by every replay, so they are neither added up nor set to None.

    updates: optimizers whose step belongs to the recording. To be recorded it must have been taken before, so a few
    steps are taken and taken back.
    """

    def __init__(
        self,
        model: ByteLM | Arb,
        loss: Callable[..., Tensor],
        batch: tuple[Any, ...],
        booth: _Booth,
        updates: Sequence[TritOptimizer] = (),
    ) -> None:
        self.updates, self._model = list(updates), model
        self._layers = [layer for _, layer in trit_modules(model)]
        self._floats = [p for p in model.parameters() if p.requires_grad]
        self._loss_of = loss
        self._batch = [part.clone() if isinstance(part, Tensor) else part for part in batch]
        device = next(model.parameters()).device
        self._shelf = gpu.Shelf(device)
        self.port_grads: dict[TritModule, Tensor] = {}
        consumers = [layer.consumer for layer in self._layers]
        for layer in self._layers:
            layer.consumer = None  # the gradient stays in the port
        side = booth.stream
        side.wait_stream(torch.cuda.current_stream(device))
        with ExitStack() as stack:
            changed = [t for optimizer in self.updates for t in stack.enter_context(optimizer.recording())]
            kept = [tensor.clone() for tensor in changed]
            with torch.cuda.stream(side):
                for _ in range(WARM_UP):
                    self._run()
                for tensor, before in zip(changed, kept, strict=True):
                    tensor.copy_(before)
            torch.cuda.current_stream(device).wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            stack.enter_context(self._shelf)
            with gpu.recorded(self._graph, booth.pool, side):
                self._loss = self._run()
        self._shelf.fill()
        for layer, consumer in zip(self._layers, consumers, strict=True):
            layer.consumer = consumer
        self._float_grads = [(p, p.grad) for p in self._floats]
        self.flips = [dict(optimizer.flips_by_layer) for optimizer in self.updates]

    def _run(self) -> Tensor:
        """One pass, and what belongs to the recording after it."""
        for tensor in [*(layer.port for layer in self._layers), *self._floats]:
            if tensor is not None:
                tensor.grad = None
        with decoded(self._model, self._model.dtype):
            loss = self._loss_of(*self._batch)
            loss.backward()
        self.port_grads = {}
        for layer in self._layers:
            if layer.port is not None and layer.port.grad is not None:
                self.port_grads[layer], layer.port.grad = layer.port.grad, None
        if self.updates:
            _deliver(self.updates, self.port_grads)
            self.port_grads = {}
            for optimizer in self.updates:
                optimizer.step()
        # Whoever kept the loss's history would keep the nodes that gather gradients too, and those belong to this
        # recording's stream: another recording of the same model could not use them.
        return loss.detach()

    def __call__(self, batch: tuple[Any, ...]) -> Tensor:
        for place, part in zip(self._batch, batch, strict=True):
            if isinstance(place, Tensor):
                place.copy_(part)
        self._graph.replay()
        for p, grad in self._float_grads:
            p.grad = grad
        for optimizer, flips in zip(self.updates, self.flips, strict=True):
            optimizer.flips_by_layer = flips
        return self._loss


def _deliver(
    optimizers: Sequence[torch.optim.Optimizer], port_grads: dict[TritModule, Tensor], crew: Crew | None = None
) -> None:
    """Hand the gradients of ternary layers to whoever consumes them, a whole model in one call if it can."""
    waiting = dict(port_grads)
    for optimizer in optimizers:
        if isinstance(optimizer, TritOptimizer):
            mine = [layer for layer in optimizer.layers if layer in waiting]
            _consume_all(optimizer, crew or Crew(), mine, [waiting.pop(layer) for layer in mine])
    for layer, grad in waiting.items():
        if layer.consumer is not None:
            layer.consumer(layer, grad)


def _consume_all(optimizer: TritOptimizer, crew: Crew, layers: list[TritModule], grads: list[Tensor]) -> None:
    told = [crew.gather(grad) for grad in grads]
    for rank in range(crew.size):
        optimizer.consume(layers, [of_all[rank] for of_all in told])
