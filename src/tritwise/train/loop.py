"""The training loop: batches in, registers moved, numbers written down. Everything a run does is in `train`."""

import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor

from tritwise.errors import UserError
from tritwise.files import JsonLines, atomic_write
from tritwise.models import Arb, ByteLM
from tritwise.optim import TritOptimizer
from tritwise.ship import estimate, require_room
from tritwise.ship.container import OverBudgetError
from tritwise.train.average import Average
from tritwise.train.config import Config
from tritwise.train.course import Course
from tritwise.train.crew import Crew
from tritwise.train.device import (
    Pace,
    Speed,
    build_model,
    device_called,
    record_moves,
    round_products,
    speed_of,
    wait_for,
)
from tritwise.train.finish import raw_of, size_now, told_sizes
from tritwise.train.memory import activation_bytes, memory_by_role
from tritwise.train.meter import Meter
from tritwise.train.optimizers import build_optimizers, set_momentum, set_rates
from tritwise.train.progress import Display, Quiet
from tritwise.train.restore import pack_state, unpack_state
from tritwise.train.run import RunFolder
from tritwise.train.stepper import Stepper, shape_of
from tritwise.train.tasks import open_task
from tritwise.train.warm import graphs_compiled, warm_up

LOOKED = 64  # steps whose batches are looked at for shapes to record before the clock
STATE = "stream."
"""Before the names of tensors of a checkpoint that hold what a stream had read: see `DecodeState.tensors`."""


def train(config: Config, out: Path | str, *, resume: bool = False, display: Display | None = None) -> dict[str, Any]:
    """Train `config` in the run folder `out` to its last step, then score, ship and audit; returns result.json.

    resume: go on from the newest checkpoint in `out`; the registers end bit-equal to an uninterrupted run on the same
    machine and thread count. Ctrl-C finishes the step, saves, and returns {"interrupted": True, "steps": …}.
    Under torchrun every process calls this: they share the micro-batches of a step, and the first of them writes the
    folder and returns the result; the others return {"rank": …}.
    Raises UserError for data, folders and checkpoints that cannot be used; the previous checkpoint stays intact.
    """
    if Crew.size_asked() > 1 and config.train.device != "cpu" and torch.cuda.is_available():
        torch.cuda.set_device(Crew.local_rank())
    device = device_called(config.train.device)
    crew = Crew.join(device)
    return _train(config, RunFolder(out), crew, device, resume, (display if crew.first else None) or Quiet())


def _train(
    config: Config, folder: RunFolder, crew: Crew, device: torch.device, resume: bool, display: Display
) -> dict[str, Any]:
    if not resume:
        config.require_sense()
    task = open_task(config, display.say)
    config, settings = task.config, task.config.train
    micros, course = crew.micros(settings.accum), course_of(config)

    torch.manual_seed(settings.seed)
    model = build_model(config, device)
    rounding = round_products(model) if settings.fp8 else 0
    optimizers = build_optimizers(model, settings)
    require_room(model, settings.budget)
    store, average = folder.store(settings.keep), Average()
    step, saved, seconds, trained = 0, 0, 0.0, 0.0
    remembered: dict[str, Tensor] = {}
    if crew.first:
        folder.begin(resume=resume)
    if resume and store.steps():
        checkpoint = store.load()
        task.check(checkpoint.meta["sampler"])
        if checkpoint.step > settings.steps:
            raise UserError(
                f"{folder.path} is at step {checkpoint.step} already; resume it with --steps {checkpoint.step} or more"
            )
        unpack_state(checkpoint, model, optimizers, average)
        step, saved, seconds = checkpoint.step, checkpoint.step, checkpoint.meta["seconds"]
        trained = checkpoint.meta.get("trained", seconds)
        remembered = {n.removeprefix(STATE): t for n, t in checkpoint.tensors.items() if n.startswith(STATE)}
        del checkpoint
    else:
        task.begin(model)
    if crew.first:
        # A resumed run may have been given more steps, and the next resume must know: they are part of the schedule.
        folder.write("config", config.as_dict())
        if task.tokenizer is not None:
            atomic_write(folder.tokenizer, task.tokenizer.raw)
        folder.write_manifest(config, device)

    def save(alone: bool = False) -> None:
        nonlocal saved
        stepper.settle()
        if not alone:
            crew.require_same(list(model.parameters()))
        if crew.first:
            tensors, meta = pack_state(model, optimizers, average)
            if stepper.state is not None:
                tensors |= {f"{STATE}{name}": tensor for name, tensor in stepper.state.tensors().items()}
            store.save(step, tensors, meta | {"seconds": seconds, "trained": trained, "sampler": task.state()})
        saved = step

    def where() -> dict[str, Any]:
        return {"step": step, "bytes": step * bytes_a_step, "seconds": round(seconds, 3)}

    def due(interval: int) -> bool:
        """Whether what happens every so many steps happens after this one; 0: never."""
        return interval > 0 and step % interval == 0

    def log(record: dict[str, Any]) -> None:
        metrics.write(record)
        display.record(record)

    def event(message: str, shown: str = "") -> None:
        log({"kind": "event", **where(), "message": message})
        display.say(shown or message)

    def batches(at: int) -> list[tuple[Any, ...]]:
        return [task.batch(device, at, micro) for micro in micros]

    pauses = settings.log_interval, settings.eval_interval, settings.save_interval if settings.save else 0
    bytes_a_step = task.bytes_a_step
    meter, since, first = Meter(model, task.scale), 0, step
    speed = Speed(False, False)  # whatever goes on from step to step, or comes in too many shapes
    if not settings.preserve_state and task.shapes != "many":
        # What is compiled is one kind of batch of one shape; rows of captions and sounds differ in length.
        varied = task.shapes == "few" and settings.compile != "false"
        speed = speed_of("graph" if varied else settings.compile, model, len(micros))
    task.even = speed.graph
    stepper = stepper_of(config, model, optimizers, speed, crew)
    if remembered:
        stepper.state = model.new_state(settings.batch, endless=True).restore(remembered)
    # On a GPU the measured peak tells; elsewhere it counts the whole process, Python and torch included.
    activations = None if device.type == "cuda" else activation_bytes(model, *task.batch(device, step, 0))
    warmed = None
    if (settings.seconds or len(course.depths) > 1) and not course.over(step, trained):
        warmed = time.perf_counter()
        # A batch of every shape that the first steps bring to any process; where shapes are many no code is of one.
        looked = ((at, m) for at in range(step, step + LOOKED) for m in range(settings.accum))
        if task.shapes != "few":
            looked = ((step, 0),)
        some = list({shape_of(one): one for one in (task.batch(device, *at) for at in looked)}.values())
        warm_up(stepper, model, optimizers, some, [loops % config.model.loops for loops in course.depths])
        wait_for(device)
        warmed = time.perf_counter() - warmed
    compiled, pace = graphs_compiled(), Pace(device)
    began = time.perf_counter() - seconds

    def memory() -> dict[str, int | None]:
        return memory_by_role(model, optimizers, activations=activations, together=speed.graph)

    with JsonLines(folder.metrics) if crew.first else NoLines() as metrics, StopSignal() as stop:
        if resume:
            metrics.truncate_after(step)
            event(f"resumed from step {step}")
        if warmed is not None:
            event(f"warmed {', '.join(map(str, course.depths))} repeats in {warmed:.1f} s, before the clock")
        if rounding:
            event(f"{rounding} matrices multiply in float8")
        if settings.budget:
            way = settings.ship_as if settings.ship_as != "none" else "auto"
            sizes = estimate(model, way, settings.ship_small, raw_of(task.tokenizer))
            event(f"about {sizes['total']:,} bytes when shipped, of {settings.budget:,}: {told_sizes(sizes)}")
            ships = config.model.weights == "trit" or settings.ship_as != "none"
            fits = config.model.weights == "trit" and sizes["total"] <= settings.budget  # an estimate never too small
            if crew.first and ships and not fits and size_now(model, settings, task.tokenizer) > settings.budget:
                event(
                    "likely more than the budget, and then nothing ships: make the model smaller or the budget larger"
                )
        display.start(step, settings.steps, settings.seconds)
        depth = 0
        try:
            while not course.over(step, trained) and not crew.any(stop.asked):
                step_began = time.perf_counter()
                factor, loops = course.factor(step, trained), course.loops(step, trained)
                if depth and loops != depth:
                    event(f"{loops} repeats from step {step}, share {course.share(step, trained):.3f}")
                depth = loops
                set_rates(optimizers, factor)
                if (momentum := course.momentum(step)) is not None:
                    set_momentum(optimizers, momentum)
                if settings.preserve_state and task.begins(step):
                    stepper.state = model.new_state(settings.batch, endless=True)
                stepper.taken = step
                loss = stepper.step_over(batches(step), loops % config.model.loops)  # 0: full depth
                counts, step, since = course.full(step, trained), step + 1, since + 1
                if settings.seconds and any(map(due, pauses)):
                    wait_for(device)  # else this step would be done in the pause, outside the clock
                elif settings.seconds:
                    pace.keep()
                trained += time.perf_counter() - step_began
                if settings.seconds:
                    trained = crew.most(trained)
                last = course.over(step, trained)
                counts = counts and course.share(step, trained) >= settings.average_from
                if settings.average_every and counts and (last or step % settings.average_every == 0):
                    average.add(model)
                logs = last or due(settings.log_interval)
                if logs:
                    wait_for(device)
                now = time.perf_counter()
                seconds = now - began
                if crew.first:
                    meter.add(loss, bytes_a_step, now - step_began, optimizers[0])
                    if len(task.kinds) > 1:
                        kinds = (task.kind(step - 1, micro) for micro in micros)
                        meter.add_by_kind(zip(kinds, stepper.shares, strict=True), settings.accum)
                if logs and crew.first:
                    stepper.settle()
                    if last or step - first <= settings.log_interval:
                        display.record({"kind": "memory", **memory()})
                    for record in meter.records(since, where(), settings.rate * factor, _skipped(optimizers)):
                        if task.kinds != ("text",):
                            record.pop("bpb", None)  # the loss is not of bytes alone
                        log(record)
                    since = 0
                if last or due(settings.eval_interval):
                    if crew.first:
                        at = {"loops": loops, "rate": settings.rate * factor, "phase": course.part(step - 1, trained)}
                        shown = model if isinstance(model, Arb) or loops == config.model.loops else model.at(loops)
                        for record in task.evaluate(shown, folder, where(), device):
                            log(record | at if record["kind"] == "eval" else record)
                        if settings.budget:
                            size = size_now(model, settings, task.tokenizer)
                            log({"kind": "size", **where(), "bytes": size, "budget": settings.budget})
                    seconds = time.perf_counter() - began
                if settings.save and due(settings.save_interval):
                    save()
                    seconds = time.perf_counter() - began
            # Here and not in the loop: a signal may come at any moment, between the last lines of a step too.
            if settings.save and step > saved:
                save()
        finally:
            display.stop()
        done = {
            "steps": step,
            "seconds": round(seconds, 3),
            "trained_seconds": round(trained, 3),
            "bytes_seen": step * bytes_a_step,
        }
        crew.leave()  # whoever has no files to write need not wait while they are scored
        if not crew.first:
            return {"rank": crew.rank, **done}
        held = memory()
        folder.write_manifest(config, device)  # again: now the backends that ran are known
        if not course.over(step, trained):
            kept = "saved; go on with --resume" if settings.save else "not saved (--no-save)"
            event(f"stopped at step {step}", f"stopped at step {step}, {kept}")
            return {"interrupted": True, "steps": step, "seconds": seconds, "run": str(folder.path)}
    if warmed is not None:
        done |= {"warm_seconds": round(warmed, 3), "compiled_in_clock": graphs_compiled() - compiled}
    refused = folder.path / "refused.json"
    try:
        result = task.finish(folder, model, optimizers, done, device, held, average)
        refused.unlink(missing_ok=True)  # of an earlier try with a smaller budget
        return result
    except OverBudgetError as error:
        if step > saved:
            save(alone=True)  # whatever --no-save said: nothing else is left of the training
        folder.write(refused.stem, {"recipe": config.recipe, **done, **error.found, "error": str(error)})
        (folder.path / "result.json").unlink(missing_ok=True)  # of an earlier end of this run
        raise OverBudgetError(
            f"{str(error).partition(';')[0]}; the training is kept: "
            f"tritwise ship {folder.path} --budget N --out FILE ships it, or train a smaller model"
        ) from error


def stepper_of(
    config: Config,
    model: ByteLM | Arb,
    optimizers: Sequence[torch.optim.Optimizer],
    speed: Speed,
    crew: Crew | None = None,
) -> Stepper:
    """What takes the steps of a run, at this speed."""
    settings = config.train
    record_moves(optimizers, any(speed))
    return Stepper(
        model,
        optimizers,
        settings.accum,
        **speed._asdict(),
        guard=True,
        clip=settings.clip,
        crew=crew,
        seed=settings.seed,
        steady=course_of(config).momentum(0) is None,
    )


def course_of(config: Config) -> Course:
    """The course that a config asks for."""
    names = ("steps", "seconds", "warmup", "decay", "momentum", "momentum_start", "momentum_warmup", "depth_plan")
    return Course(**{name: getattr(config.train, name) for name in names}, loops=config.model.loops)


def _skipped(optimizers: list[torch.optim.Optimizer]) -> int:
    return max(
        optimizer.skipped if isinstance(optimizer, TritOptimizer) else optimizer.param_groups[0].get("skipped", 0)
        for optimizer in optimizers
    )


class NoLines:
    """What `JsonLines` is to a process that writes no files."""

    def write(self, record: dict[str, Any]) -> None: ...

    def truncate_after(self, step: int) -> None: ...

    def __enter__(self) -> "NoLines":
        return self

    def __exit__(self, *_: object) -> None: ...


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
