"""The processes that train one model together, started by torchrun: who is who, and what they tell each other.

Every process has all of the model and reads every size-th micro-batch of a step. Gradients of ternary layers are not
summed in float: each process gets those of all, one micro-batch after the other, in the order of a single process that
accumulates them, and adds them into the integer momentum in that order. So the registers are those of that process to
the last bit (given the same kernels: a GPU's atomics or another number of threads round a gradient differently), and
need no broadcast. Float weights take the sum of all gradients, whose order of addition is the library's: the same on
every process, and that of one process for two.
"""

import atexit
import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress

import torch
import torch.distributed as dist
from torch import Tensor

from tritwise.errors import UserError

PATIENCE = datetime.timedelta(minutes=30)  # the first process evaluates while the others wait


@contextmanager
def _talking() -> Iterator[None]:
    """Within it processes wait for each other: whoever waits for one that has ended is told so, and not by a trace."""
    try:
        yield
    except RuntimeError as error:  # gloo has no error of its own
        if isinstance(error, torch.OutOfMemoryError) or "CUDA error" in str(error):
            raise  # of this process, and only told of here
        said = str(error).strip().partition("\n")[0]
        raise UserError(
            f"another process of this run has ended, or cannot be reached ({said}); see what it said, then go on with "
            "--resume"
        ) from error


def _part() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


class Crew:
    """This process's `rank` among `size`. A single process is a crew of one, which talks to nobody."""

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device | None = None) -> None:
        self.rank, self.size, self.device = rank, size, device or torch.device("cpu")

    @staticmethod
    def size_asked() -> int:
        """How many processes torchrun started; 1 without it."""
        return int(os.environ.get("WORLD_SIZE", "1"))

    @staticmethod
    def local_rank() -> int:
        """This process's number on its machine, which is that of its GPU."""
        return int(os.environ.get("LOCAL_RANK", "0"))

    @classmethod
    def join(cls, device: torch.device) -> "Crew":
        """The crew that torchrun's environment describes: NCCL between GPUs, gloo between CPUs. It is the same for as
        long as the process lives. UserError if the others cannot be reached."""
        if cls.size_asked() == 1:
            return cls(device=device)
        if not dist.is_initialized():
            with _talking():
                dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
            atexit.register(_part)
        return cls(dist.get_rank(), dist.get_world_size(), device)

    def leave(self) -> None:
        """Wait until all have trained: a process that ends while others talk to it would end them. The first one, which
        has what is left to do, goes on if another has ended by now."""
        if self.size > 1:
            with suppress(UserError) if self.first else nullcontext(), _talking():
                dist.barrier()

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and talks to people."""
        return self.rank == 0

    def micros(self, accum: int) -> range:
        """Which of a step's micro-batches are this process's. UserError if they cannot be shared evenly."""
        if accum % self.size:
            raise UserError(
                f"accum is {accum}: the micro-batches of a step must divide among {self.size} processes; "
                f"set accum to a multiple of {self.size}, and batch to the sequences of one micro-batch"
            )
        return range(self.rank, accum, self.size)

    def most(self, number: float) -> float:
        """The largest number of any process, the same everywhere."""
        if self.size == 1:
            return number
        told = torch.tensor(number, dtype=torch.float64, device=self.device)
        with _talking():
            dist.all_reduce(told, dist.ReduceOp.MAX)
        return told.item()

    def any(self, asked: bool) -> bool:
        """Whether any process was asked, the same everywhere."""
        return asked if self.size == 1 else self.most(float(asked)) > 0

    def add_up(self, tensors: list[Tensor]) -> None:
        """Each tensor becomes its sum over all processes, in place."""
        if self.size > 1:
            with _talking():
                for tensor in tensors:
                    dist.all_reduce(tensor)

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensor of every process, by rank, on every process."""
        if self.size == 1:
            return [tensor]
        found = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(self.size)]
        with _talking():
            dist.all_gather(found, tensor.contiguous())
        return found

    def require_same(self, tensors: list[Tensor]) -> None:
        """Raises UserError, everywhere, unless every process holds the same bytes in `tensors`."""
        if self.size == 1:
            return
        # A sum weighted by place, modulo 2**63: what moved, or changed places, changes it.
        total = torch.zeros((), dtype=torch.int64, device=self.device)
        for tensor in tensors:
            flat = tensor.detach().contiguous().view(torch.uint8).reshape(-1).to(torch.int64)
            total = total * 1_000_003 + (flat * (torch.arange(len(flat), device=flat.device) % 65_521 + 1)).sum()
        if len({int(told) for told in self.gather(total)}) > 1:
            raise UserError("the processes' weights have drifted apart; resume from the newest checkpoint, report this")
