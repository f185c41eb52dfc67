"""The training loop: batches in, registers moved, numbers written down. Everything a run does is in `train`."""

import signal
import threading
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import numpy as np
import torch

from tritwise.data.sampler import Sampler
from tritwise.data.source import describe
from tritwise.data.split import split
from tritwise.errors import UserError
from tritwise.files import JsonLines
from tritwise.models import ByteLM, generate
from tritwise.optim import TritOptimizer, rate_factor
from tritwise.score import score
from tritwise.train.config import Config
from tritwise.train.device import Speed, batch_on, build_model, device_called, speed_of, wait_for
from tritwise.train.finish import finish
from tritwise.train.memory import activation_bytes, memory_by_role
from tritwise.train.meter import Meter
from tritwise.train.optimizers import build_optimizers, set_rates
from tritwise.train.progress import Display, Quiet
from tritwise.train.restore import pack_state, unpack_state
from tritwise.train.run import RunFolder
from tritwise.train.stepper import Stepper

STATE = "stream."
"""Before the names of tensors of a checkpoint that hold what a stream had read: see `DecodeState.tensors`."""


def train(config: Config, out: Path | str, *, resume: bool = False, display: Display | None = None) -> dict[str, Any]:
    """Train `config` in the run folder `out` to its last step, then score, ship and audit; returns result.json.

    resume: go on from the newest checkpoint in `out`; the registers end bit-equal to an uninterrupted run on the same
    machine and thread count. Ctrl-C finishes the step, saves, and returns {"interrupted": True, "steps": …}.
    Raises UserError for data, folders and checkpoints that cannot be used; the previous checkpoint stays intact.
    """
    settings, folder, display = config.train, RunFolder(out), display or Quiet()
    device = device_called(settings.device)
    source = describe(settings.data)
    parts = split(source.data, settings.split)
    if "train" not in parts:
        raise UserError(f"split {settings.split} leaves nothing to train on; use 90/10")
    mode = "stream" if settings.preserve_state else "random"
    sampler = Sampler(parts["train"], settings.batch, config.model.ctx, settings.seed, mode, accum=settings.accum)

    torch.manual_seed(settings.seed)
    model = build_model(config, device)
    optimizers = build_optimizers(model, settings)
    store = folder.store(settings.keep)
    step, saved, seconds = 0, 0, 0.0
    remembered: dict[str, torch.Tensor] = {}
    folder.begin(resume=resume)
    if resume and store.steps():
        checkpoint = store.load()
        sampler.check(checkpoint.meta["sampler"])
        if checkpoint.step > settings.steps:
            raise UserError(
                f"{out} is at step {checkpoint.step} already; resume it with --steps {checkpoint.step} or more"
            )
        unpack_state(checkpoint, model, optimizers)
        step, saved, seconds = checkpoint.step, checkpoint.step, checkpoint.meta["seconds"]
        remembered = {n.removeprefix(STATE): t for n, t in checkpoint.tensors.items() if n.startswith(STATE)}
        del checkpoint
    # A resumed run may have been given more steps, and the next resume must know: they are part of the schedule.
    folder.write("config", config.as_dict())
    folder.write_manifest(config, device)

    def save() -> None:
        nonlocal saved
        tensors, meta = pack_state(model, optimizers)
        if stepper.state is not None:
            tensors |= {f"{STATE}{name}": tensor for name, tensor in stepper.state.tensors().items()}
        store.save(step, tensors, meta | {"seconds": seconds, "sampler": sampler.state()})
        saved = step

    def where() -> dict[str, Any]:
        return {"step": step, "bytes": step * bytes_a_step, "seconds": round(seconds, 3)}

    def log(record: dict[str, Any]) -> None:
        metrics.write(record)
        display.record(record)

    bytes_a_step = settings.batch * settings.accum * config.model.ctx
    meter, since, began, first = Meter(model), 0, time.perf_counter() - seconds, step
    speed = Speed(False, False) if settings.preserve_state else speed_of(settings.compile, model, settings.accum)
    stepper = Stepper(model, optimizers, settings.accum, **speed._asdict(), guard=True)
    if remembered:
        stepper.state = model.new_state(settings.batch, endless=True).restore(remembered)
    # On a GPU the measured peak tells; elsewhere it counts the whole process, Python and torch included.
    activations = None if device.type == "cuda" else activation_bytes(model, *batch_on(device, sampler, step))

    def memory() -> dict[str, int | None]:
        return memory_by_role(model, optimizers, activations=activations, together=speed.graph)

    with JsonLines(folder.metrics) as metrics, StopSignal() as stop:
        if resume:
            metrics.truncate_after(step)
            log({"kind": "event", **where(), "message": f"resumed from step {step}"})
            display.say(f"resumed from step {step}")
        display.start(step, settings.steps)
        try:
            while step < settings.steps and not stop.asked:
                step_began = time.perf_counter()
                factor = rate_factor(step, settings.steps, settings.warmup, settings.decay)
                set_rates(optimizers, factor)
                if settings.preserve_state and sampler.begins(step):
                    stepper.state = model.new_state(settings.batch, endless=True)
                loss = stepper.step_over(batch_on(device, sampler, step, micro) for micro in range(settings.accum))
                step, since = step + 1, since + 1
                last = step == settings.steps
                logs = last or step % settings.log_interval == 0
                if logs:
                    wait_for(device)
                now = time.perf_counter()
                seconds = now - began
                meter.add(loss, bytes_a_step, now - step_began, optimizers[0])
                if logs:
                    if last or step - first <= settings.log_interval:
                        display.record({"kind": "memory", **memory()})
                    for record in meter.records(since, where(), settings.rate * factor, _skipped(optimizers)):
                        log(record)
                    since = 0
                if last or (settings.eval_interval and step % settings.eval_interval == 0):
                    log(_evaluate(model, parts, settings.eval_bytes, where(), device))
                    if settings.sample_bytes:
                        log(_sample(model, settings.sample_bytes, settings.seed, where()))
                    seconds = time.perf_counter() - began
                if settings.save and settings.save_interval and step % settings.save_interval == 0:
                    save()
                    seconds = time.perf_counter() - began
            # Here and not in the loop: a signal may come at any moment, between the last lines of a step too.
            if settings.save and step > saved:
                save()
        finally:
            display.stop()
        held = memory()
        folder.write_manifest(config, device)  # again: now the backends that ran are known
        if stop.asked and step < settings.steps:
            kept = "saved; go on with --resume" if settings.save else "not saved (--no-save)"
            log({"kind": "event", **where(), "message": f"stopped at step {step}"})
            display.say(f"stopped at step {step}, {kept}")
            return {"interrupted": True, "steps": step, "seconds": seconds, "run": str(folder.path)}
    done = {"steps": step, "seconds": round(seconds, 3), "bytes_seen": step * bytes_a_step}
    return finish(config, folder, model, optimizers, parts, done, device, held)


def _skipped(optimizers: list[torch.optim.Optimizer]) -> int:
    return max(
        optimizer.skipped if isinstance(optimizer, TritOptimizer) else optimizer.param_groups[0].get("skipped", 0)
        for optimizer in optimizers
    )


def _evaluate(
    model: ByteLM, parts: dict[str, np.ndarray], count: int, where: dict[str, Any], device: torch.device
) -> dict[str, Any]:
    """Chunked score (stride = window) of the first `count` bytes of val: quick, and the same bytes every time."""
    part = parts["val"][: count or None]
    result = score(model, part, stride=model.context, device=device)
    return {"kind": "eval", **where, "split": "val", "loss": result.nats, "bpb": result.bpb, "scored": result.bytes}


def _sample(model: ByteLM, count: int, seed: int, where: dict[str, Any]) -> dict[str, Any]:
    text = bytes(generate(model, b"\n", count, seed=seed)).decode("utf-8", errors="replace")
    return {"kind": "sample", **where, "prompt": "\n", "text": text}


class StopSignal:
    """While entered, the first Ctrl-C (or SIGTERM) sets `asked`; a second Ctrl-C stops at once, unsaved."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():  # only there may handlers be set
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
