"""One optimizer step as one call: eager, compiled, or with forward and backward replayed as a CUDA graph.

A small model on a GPU is bound by launches: its kernels are shorter than the time Python takes to ask for them. With
`compile` the model's loss is one compiled function, and with `graph` its forward and backward are recorded once and
replayed, so that a step costs the host a handful of launches. Gradients of ternary layers then wait in their ports
until the replay is over, all at once, which is for models that are small beside the GPU; otherwise every gradient is
consumed the moment it is made.

Nothing here waits for the GPU: the loss comes back as a tensor that may not have been computed yet.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from tritwise.models import ByteLM
from tritwise.nn import TritModule, trit_modules
from tritwise.optim import TritOptimizer

WARM_UP = 3  # steps before a recording: libraries and the allocator settle, as torch.cuda.graph asks for


class Stepper:
    """Runs `model.loss` forward and backward over `accum` micro-batches, then every optimizer.

    compile: torch.compile the loss, for batches of one shape. graph: record forward and backward as a CUDA graph at
    the first step; every later batch must have that shape. guard: a step whose gradients are no numbers moves nothing
    and counts as "skipped" in the optimizers' groups. Ternary optimizers see to that themselves, on the device; for
    float ones the host waits for the device once a step. ValueError for a graph away from a GPU.
    """

    def __init__(
        self,
        model: ByteLM,
        optimizers: Sequence[torch.optim.Optimizer],
        accum: int = 1,
        *,
        compile: bool = False,
        graph: bool = False,
        guard: bool = False,
    ) -> None:
        self.model, self.optimizers, self.accum = model, list(optimizers), accum
        self._loss = torch.compile(model.loss, dynamic=False) if compile else model.loss
        device = next(model.parameters()).device
        if graph and device.type != "cuda":
            raise ValueError(f"a CUDA graph cannot be recorded on {device}; leave out graph, or move the model to cuda")
        self._record = graph
        self._replay: _Recording | None = None
        floats = [optimizer for optimizer in self.optimizers if not isinstance(optimizer, TritOptimizer)]
        self._guarded = floats if guard else []

    def step(self, ids: Tensor, targets: Tensor) -> Tensor:
        """`step_over` a single batch."""
        return self.step_over([(ids, targets)])

    def step_over(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
        """Train on `accum` micro-batches (ids, targets), int64 [B, T] each on the model's device. Returns their mean
        loss in nats per byte, a 0-d float32 tensor on the device, which may not have been computed yet."""
        total: Tensor | None = None
        for ids, targets in batches:
            loss = self._pass(ids, targets)
            total = loss if total is None else total + loss
        assert total is not None, "a step needs a batch"
        sound = not self._guarded or self._is_sound(total)
        for optimizer in self.optimizers:
            if isinstance(optimizer, TritOptimizer):
                if not sound:
                    optimizer.refuse()
                optimizer.step()
            elif sound:
                optimizer.step()
            else:
                optimizer.param_groups[0]["skipped"] = optimizer.param_groups[0].get("skipped", 0) + 1
            if not self._record:
                optimizer.zero_grad(set_to_none=True)
        return total

    def _pass(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Forward and backward of one micro-batch; returns its share of the loss."""
        if not self._record:
            loss = self._share(ids, targets)
            loss.backward()
            return loss.detach()
        if self._replay is None:
            self._replay = _Recording(self.model, self._share, ids, targets)
        loss = self._replay(ids, targets).detach().clone()  # the next replay writes over it
        self._deliver(self._replay)
        return loss

    def _share(self, ids: Tensor, targets: Tensor) -> Tensor:
        loss = self._loss(ids, targets)
        return loss / self.accum if self.accum > 1 else loss

    def _is_sound(self, loss: Tensor) -> bool:
        groups = [group for optimizer in self._guarded for group in optimizer.param_groups]
        sums = [p.grad.sum() for group in groups for p in group["params"] if p.grad is not None]
        return bool(torch.isfinite(torch.stack([loss, *(total.float() for total in sums)])).all())

    def _deliver(self, recording: "_Recording") -> None:
        """Hand the gradients of ternary layers to whoever consumes them, a whole model in one call if it can."""
        waiting = dict(recording.port_grads)
        for optimizer in self.optimizers:
            if isinstance(optimizer, TritOptimizer):
                mine = [layer for layer in optimizer.layers if layer in waiting]
                optimizer.consume(mine, [waiting.pop(layer) for layer in mine])
        for layer, grad in waiting.items():
            if layer.consumer is not None:
                layer.consumer(layer, grad)


class _Recording:
    """Forward and backward of one batch shape as a CUDA graph. Gradients lie where the recording put them: they are
    written anew by every replay, so they are neither added up nor set to None."""

    def __init__(self, model: ByteLM, loss: Callable[[Tensor, Tensor], Tensor], ids: Tensor, targets: Tensor) -> None:
        layers = [layer for _, layer in trit_modules(model)]
        consumers = [layer.consumer for layer in layers]
        floats = [p for p in model.parameters() if p.requires_grad]
        self._ids, self._targets = ids.clone(), targets.clone()
        for layer in layers:
            layer.consumer = None  # the gradient stays in the port
        side = torch.cuda.Stream(ids.device)
        side.wait_stream(torch.cuda.current_stream(ids.device))
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                _forget(layers, floats)
                loss(self._ids, self._targets).backward()
        torch.cuda.current_stream(ids.device).wait_stream(side)
        _forget(layers, floats)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=side):
            self._loss = loss(self._ids, self._targets)
            self._loss.backward()
        self.port_grads: dict[TritModule, Tensor] = {}
        for layer, consumer in zip(layers, consumers, strict=True):
            layer.consumer = consumer
            if layer.port is not None and layer.port.grad is not None:
                self.port_grads[layer], layer.port.grad = layer.port.grad, None
        self._float_grads = [(p, p.grad) for p in floats]

    def __call__(self, ids: Tensor, targets: Tensor) -> Tensor:
        self._ids.copy_(ids)
        self._targets.copy_(targets)
        self._graph.replay()
        for p, grad in self._float_grads:
            p.grad = grad
        return self._loss


def _forget(layers: Sequence[TritModule], floats: Sequence[Tensor]) -> None:
    for tensor in [*(layer.port for layer in layers), *floats]:
        if tensor is not None:
            tensor.grad = None
