"""The training loop: batches in, registers moved, numbers written down. Everything a run does is in `train`."""

import signal
import threading
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch

from tritwise.errors import UserError
from tritwise.files import JsonLines
from tritwise.optim import TritOptimizer, rate_factor
from tritwise.train.config import Config
from tritwise.train.device import build_model, device_called, speed_of, wait_for
from tritwise.train.memory import activation_bytes, memory_by_role
from tritwise.train.meter import Meter
from tritwise.train.optimizers import build_optimizers, set_rates
from tritwise.train.progress import Display, Quiet
from tritwise.train.restore import pack_state, unpack_state
from tritwise.train.run import RunFolder
from tritwise.train.stepper import Stepper
from tritwise.train.tasks import open_task


def train(config: Config, out: Path | str, *, resume: bool = False, display: Display | None = None) -> dict[str, Any]:
    """Train `config` in the run folder `out` to its last step, then score, ship and audit; returns result.json.

    resume: go on from the newest checkpoint in `out`; the registers end bit-equal to an uninterrupted run on the same
    machine and thread count. Ctrl-C finishes the step, saves, and returns {"interrupted": True, "steps": …}.
    Raises UserError for data, folders and checkpoints that cannot be used; the previous checkpoint stays intact.
    """
    settings, folder, display = config.train, RunFolder(out), display or Quiet()
    device = device_called(settings.device)
    task = open_task(config, display.say)
    config = task.config

    torch.manual_seed(settings.seed)
    model = build_model(config, device)
    optimizers = build_optimizers(model, settings)
    store = folder.store(settings.keep)
    step, saved, seconds = 0, 0, 0.0
    folder.begin(resume=resume)
    if resume and store.steps():
        checkpoint = store.load()
        task.check(checkpoint.meta["sampler"])
        if checkpoint.step > settings.steps:
            raise UserError(
                f"{out} is at step {checkpoint.step} already; resume it with --steps {checkpoint.step} or more"
            )
        unpack_state(checkpoint, model, optimizers)
        step, saved, seconds = checkpoint.step, checkpoint.step, checkpoint.meta["seconds"]
        del checkpoint
    else:
        task.begin(model)
    # A resumed run may have been given more steps, and the next resume must know: they are part of the schedule.
    folder.write("config", config.as_dict())
    folder.write_manifest(config, device)

    def save() -> None:
        nonlocal saved
        tensors, meta = pack_state(model, optimizers)
        store.save(step, tensors, meta | {"seconds": seconds, "sampler": task.state()})
        saved = step

    def where() -> dict[str, Any]:
        return {"step": step, "bytes": step * bytes_a_step, "seconds": round(seconds, 3)}

    def log(record: dict[str, Any]) -> None:
        metrics.write(record)
        display.record(record)

    bytes_a_step = task.bytes_a_step
    meter, since, began, first = Meter(model), 0, time.perf_counter() - seconds, step
    # What is compiled and recorded is one kind of batch of one shape: rows of captions and sounds differ in length.
    settled = task.kinds in (("text",), ("diffusion",))
    speed = speed_of(settings.compile if settled else "false", model, settings.accum)
    stepper = Stepper(model, optimizers, settings.accum, **speed._asdict(), guard=True)
    # On a GPU the measured peak tells; elsewhere it counts the whole process, Python and torch included.
    activations = None if device.type == "cuda" else activation_bytes(model, *task.batch(device, step, 0))

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
                loss = stepper.step_over(task.batch(device, step, micro) for micro in range(settings.accum))
                step, since = step + 1, since + 1
                last = step == settings.steps
                logs = last or step % settings.log_interval == 0
                if logs:
                    wait_for(device)
                now = time.perf_counter()
                seconds = now - began
                meter.add(loss, bytes_a_step, now - step_began, optimizers[0])
                if len(task.kinds) > 1:
                    kinds = (task.kind(step - 1, micro) for micro in range(settings.accum))
                    meter.add_by_kind(zip(kinds, stepper.shares, strict=True), settings.accum)
                if logs:
                    if last or step - first <= settings.log_interval:
                        display.record({"kind": "memory", **memory()})
                    for record in meter.records(since, where(), settings.rate * factor, _skipped(optimizers)):
                        if task.kinds != ("text",):
                            record.pop("bpb", None)  # the loss is not of bytes alone
                        log(record)
                    since = 0
                if last or (settings.eval_interval and step % settings.eval_interval == 0):
                    for record in task.evaluate(model, folder, where(), device):
                        log(record)
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
    return task.finish(folder, model, optimizers, done, device, held)


def _skipped(optimizers: list[torch.optim.Optimizer]) -> int:
    return max(
        optimizer.skipped if isinstance(optimizer, TritOptimizer) else optimizer.param_groups[0].get("skipped", 0)
        for optimizer in optimizers
    )


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
