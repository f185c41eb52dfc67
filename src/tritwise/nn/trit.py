"""The base of every ternary layer: registers, scale exponents, the gradient port, and the roles of tensors."""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from tritwise.registers import (
    TRITS,
    exponent_for,
    init_registers,
    lead_of,
    leading_number,
    make_key,
    scale_table,
    zero_fraction,
)

ROLES = ("matrix", "embedding", "head", "vector", "scale", "table", "count")
"""matrix, embedding, head, vector: weights by what they do. scale: scale exponents. table: constants, not trained.
count: integers that a layer counts with while it is trained."""

WEIGHT_TRITS = tuple(range(1, TRITS + 1))
"""How many of a register's first trits can be its weight."""

Consumer = Callable[["TritModule", Tensor], None]
Layer = TypeVar("Layer", bound="TritModule")


class TritModule(nn.Module):
    """A layer with one ternary matrix W [rows, columns] = leading_trit(register) * 2**(exponent/8).

    register  int8 Parameter [rows, columns], five-trit registers
    exponent  int8 Parameter [rows, ceil(columns/group)], scale exponents; `group` inputs share one
    column_exponent  None, or after `add_column_scales` an int8 Parameter [columns]: scales of the columns of W, which
              layers put on the vector that the columns meet. Ternary rows cannot weigh their inputs; these can.
    port      float32 [rows, columns] of stride 0 and one element: autograd leaves dL/dW in `port.grad`. It is no
              parameter, is never saved and holds no weight. None while the layer is frozen.

    consumer: called with (layer, dL/dW) as soon as backward has made the gradient; set by the optimizer. Without one
    the gradient stays in `port.grad`.

    role: what the matrix is for, one of ROLES; the optimizer makes its groups from it.
    fan_in: terms of the sum that the scale normalises; W starts with standard deviation 1/sqrt(fan_in).
    sparse: only rows that received a gradient are updated (large embeddings).
    weight_trits: 1, or how many of a register's first trits are its weight: with two W has nine values, round(R / 27)
    times the scale, and ships as two trits a weight; with five it is the register. `lead` is what 1 of W is worth in a
    register: 81, 27, 9, 3, 1.
    blocks: how many matrices lie one above the other in the rows (3 for query, key and value in one).
    Initial registers come from torch's default generator, so `torch.manual_seed` fixes them.
    """

    learns_scale = True  # whether an optimizer may move the exponents

    def __init__(
        self,
        rows: int,
        columns: int,
        *,
        role: str,
        fan_in: int,
        group: int = 256,
        blocks: int = 1,
        sparse: bool = False,
        weight_trits: int = 1,
    ) -> None:
        super().__init__()
        if weight_trits not in WEIGHT_TRITS:
            raise ValueError(f"weight_trits is {weight_trits}; choose one of {', '.join(map(str, WEIGHT_TRITS))}")
        if rows < 1 or columns < 1:
            raise ValueError(f"a ternary matrix needs at least one row and one column, not {rows} x {columns}")
        if role not in ROLES:
            raise ValueError(f"there is no role {role!r}; choose one of {', '.join(ROLES)}")
        if group < 1 or blocks < 1:
            raise ValueError(f"group is {group} and blocks is {blocks}; both must be at least 1")
        if rows % blocks:
            raise ValueError(f"{rows} rows do not divide into {blocks} blocks; make rows a multiple of blocks")
        self.group, self.blocks, self.fan_in, self.sparse = group, blocks, fan_in, sparse
        self.weight_trits, self.lead = weight_trits, lead_of(weight_trits)
        self.roles = {"register": role, "exponent": "scale"}
        groups = -(-columns // group)
        self.register = nn.Parameter(torch.empty(rows, columns, dtype=torch.int8), requires_grad=False)
        self.exponent = nn.Parameter(torch.empty(rows, groups, dtype=torch.int8), requires_grad=False)
        self.column_exponent: nn.Parameter | None = None
        self._scales = scale_table(self.exponent.device)  # the table of all scales, where the registers are
        self.port: Tensor | None = None
        self.consumer: Consumer | None = None
        self.reset_parameters()
        self.trainable(True)

    @property
    def role(self) -> str:
        """The role of the matrix, one of ROLES."""
        return self.roles["register"]

    def trits(self) -> Tensor:
        """The weights that a matmul uses now, in units of their scales: leading trits, or the numbers that several
        make, int8 [rows, columns]."""
        return leading_number(self.register, self.lead)

    def add_column_scales(self) -> None:
        """Give every column of W a scale of its own, 1 at first, which the optimizer trains like the others."""
        columns, device = self.register.shape[1], self.register.device
        zeros = torch.zeros(columns, dtype=torch.int8, device=device)
        self.column_exponent = nn.Parameter(zeros, requires_grad=False)
        self.roles = self.roles | {"column_exponent": "scale"}

    def exponents(self) -> list[Tensor]:
        """Every tensor of scale exponents: those of rows, then those of columns where there are any."""
        return [self.exponent] if self.column_exponent is None else [self.exponent, self.column_exponent]

    def column_scales(self, dtype: torch.dtype) -> Tensor | None:
        """The scales of the columns as `dtype` [columns]; None without any."""
        if self.column_exponent is None:
            return None
        return self._scales[self.column_exponent.int() + 128].to(dtype)

    def scale_columns(self, x: Tensor) -> Tensor:
        """x [..., columns], each column times its scale: what W's columns meet. Without column scales x itself."""
        scales = self.column_scales(x.dtype)
        return x if scales is None else x * scales

    @torch.no_grad()
    def reset_parameters(self, span: float = 0.9) -> None:
        """New registers, uniform within +-span of a leading trit, and the scale that gives W its standard deviation."""
        if self.register.is_meta:
            return  # a layer without numbers, made to know its shape
        key = make_key(int(torch.randint(2**62, ())))
        self.register.copy_(init_registers(tuple(self.register.shape), key, span))
        self.exponent.fill_(exponent_for(1.0 / math.sqrt(self.fan_in * max(self._mean_square(), 1e-6))))
        if self.column_exponent is not None:
            self.column_exponent.zero_()

    def _mean_square(self) -> float:
        """Of the weights in units of their scales; of one trit it is the share that is not 0."""
        if self.weight_trits == 1:
            return 1.0 - zero_fraction(self.register)
        return float(self.trits().float().square().mean())

    def trainable(self, flag: bool = True) -> "TritModule":
        """Open (True) or close (False) the gradient port. Closed, the layer is frozen and costs no weight gradient."""
        if flag:
            zero = torch.zeros(1, device=self.register.device)
            self.port = zero.as_strided(tuple(self.register.shape), (0, 0)).requires_grad_()
            self.port.register_post_accumulate_grad_hook(self._deliver)
        else:
            self.port = None
        return self

    def _deliver(self, port: Tensor) -> None:
        """Hand a finished weight gradient to the consumer and let go of it. Called by autograd."""
        if self.consumer is not None and port.grad is not None:
            grad, port.grad = port.grad, None
            self.consumer(self, grad)

    def __getstate__(self) -> dict[str, Any]:
        # Copies and worker processes make their own port; an optimizer must be attached to them anew.
        return self.__dict__ | {"port": None, "consumer": None, "_open": self.port is not None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        is_open = state.pop("_open")
        super().__setstate__(state)
        self.trainable(is_open)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "TritModule":
        # .to() and .cuda() change Parameters in place; the port is made again where the registers now are.
        super()._apply(fn, recurse)
        if self.register.dtype != torch.int8:
            raise ValueError("ternary layers hold int8 registers; move them with .to(device), not .to(dtype)")
        if self.port is not None and self.port.device != self.register.device:
            self.trainable(True)
        self._scales = scale_table(self.register.device)
        return self

    def extra_repr(self) -> str:
        rows, columns = self.register.shape
        return f"rows={rows}, columns={columns}, role={self.role}, group={self.group}, blocks={self.blocks}" + (
            f", weight_trits={self.weight_trits}" * (self.weight_trits > 1)
        )


def of_trits(layer: type[Layer], weight_trits: int) -> type[Layer]:
    """The class `layer`, TritLinear or TritEmbedding, with so many trits a weight, to be called as the class is."""
    made = functools.partial(layer, weight_trits=weight_trits) if weight_trits > 1 else layer
    return cast(type[Layer], made)


def trit_modules(model: nn.Module) -> Iterator[tuple[str, TritModule]]:
    """(name, layer) of every ternary layer of `model`, each once, in the order of definition."""
    for name, module in model.named_modules():
        if isinstance(module, TritModule):
            yield name, module


def tensor_roles(model: nn.Module) -> dict[str, str]:
    """Role of every parameter and buffer by its full name. ValueError naming the first tensor that declares none.

    A module declares roles in an attribute `roles`: own tensor name -> one of ROLES.
    """
    found: dict[str, str] = {}
    for prefix, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
        declared = getattr(module, "roles", {})
        for name in own:
            full = f"{prefix}.{name}" if prefix else name
            if declared.get(name) not in ROLES:
                raise ValueError(f"tensor {full} has no role; declare it in {type(module).__name__}.roles")
            found[full] = declared[name]
    return found
