"""The one error type that reaches a user as a single line.

Source: house rule. A message says what is wrong and, after a semicolon or full stop, the remedy.
"""


class UserError(ValueError):
    """Something the user can put right: one line, what is wrong and the remedy. The command line exits with code 2."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed. torch has a type for a full GPU, but on a CPU only its allocator's words tell."""
    told = str(error)
    return isinstance(error, MemoryError) or "out of memory" in told or "DefaultCPUAllocator" in told
