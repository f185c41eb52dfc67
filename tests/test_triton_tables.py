"""What only the device knows, written into tables there: keys, rates and constants of a recording.

Run like tests/test_triton.py: in Triton's interpreter in a process of its own, and on a GPU with -m gpu.
"""

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from tritwise import ops
from tritwise.ops import gpu
from tritwise.ops.linear import triton
from tritwise.registers import Place, keys_at, make_key, rows_of_places

INTERPRETED = os.environ.get(gpu.INTERPRET) == "1"
on_each_device = pytest.mark.parametrize(
    "device", [*(["cpu"] if INTERPRETED else []), pytest.param("cuda", marks=pytest.mark.gpu)]
)
STEPS = [0, 1, 77_777, 2**31, 2**63 - 1]


def places_of(count: int) -> list[Place]:
    """Seeds, tensors and streams of every size, negative streams among them."""
    return [Place((2**64 - 1) // (n + 1), -1, n * n, (-1) ** n * n) for n in range(count)]


@on_each_device
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("count", [1, 255, 600])
def test_keys_of_a_step(device, step, count, poisoned):
    rows = torch.tensor(rows_of_places(places_of(count)))
    found = gpu.keys_at(torch.tensor(step, device=device), rows.to(device))
    assert found.dtype == torch.int64 and torch.equal(found.cpu(), keys_at(torch.tensor(step), rows))


def int8(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-121, 122, (count,), dtype=torch.int16, generator=generator).to(torch.int8)


@on_each_device
@pytest.mark.parametrize("spread", [True, False])
@pytest.mark.parametrize("sizes", [[5], [1, 2100, 64] + [3] * 300])
def test_rates_and_keys_that_lie_on_the_device_are_those_of_the_host(device, sizes, spread, poisoned):
    keys = [make_key(1, 2, number, 0) for number in range(len(sizes))]
    rates = [9.7] * len(sizes) if spread else [0.9 * 1.2 ** (n % 40) for n in range(len(sizes))]
    told = torch.tensor(rates, dtype=torch.float64, device=device)
    if spread:
        told = told[0].expand(len(sizes))
    directions = [torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in sizes]
    registers = [int8(n, seed) for seed, n in enumerate(sizes)]
    expected = [r.clone() for r in registers]
    with ops.backend("reference"):
        flips = ops.move_registers_many(expected, directions, rates, keys)
    moved, table = (
        [r.to(device, copy=True) for r in registers],
        torch.tensor([list(key) for key in keys], device=device),
    )
    with ops.backend("triton"):
        found = ops.move_registers_many(moved, [d.to(device) for d in directions], told, table)
    assert found.tolist() == flips.tolist()
    assert all(torch.equal(a.cpu(), b) for a, b in zip(moved, expected, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(expected, registers, strict=True))


@on_each_device
def test_keys_alone_and_nothing_at_all_leave_the_rest_of_a_table(device):
    table = torch.arange(30, device=device).view(3, 10)
    before, keys = table.clone(), torch.tensor([[-1, -2], [-3, -4], [-5, -6]], device=device)
    gpu.fill(table, None)
    assert torch.equal(table, before)
    gpu.fill(table, keys)
    assert torch.equal(table[:, 1:3], keys)
    table[:, 1:3] = before[:, 1:3]
    assert torch.equal(table, before)


# ---- tables of a recording


def test_a_shelf_holds_what_a_recording_asks_for_once_it_is_filled():
    device = torch.device("cpu")
    lines = [[[1, -2, 3]], [[4], [5]], [[2**62, -(2**62)]]]
    shelf = gpu.Shelf(device, numbers=64)
    with shelf:
        tables = [gpu.upload(one, device) for one in lines]
        for table in tables:
            table.fill_(7)  # as a recording's first kernels may find it
    shelf.fill()
    assert [table.tolist() for table in tables] == lines
    places = [table.data_ptr() - tables[0].data_ptr() for table in tables]
    assert places == [0, 128, 256]  # a kernel that is compiled for one of them serves all
    tables[0].fill_(9)
    after = gpu.upload([[6]], device)
    assert after.tolist() == [[6]] and tables[0].tolist() == [[9, 9, 9]]  # it catches nothing any more


def test_a_shelf_that_is_full_says_so():
    with gpu.Shelf(torch.device("cpu"), numbers=16), pytest.raises(AssertionError, match="too many tensors"):
        gpu.upload([list(range(17))], torch.device("cpu"))


@on_each_device
def test_matrices_are_decoded_by_one_launch_whose_table_waits_on_the_shelf(device, monkeypatch):
    """All but one with two groups to a tile and one whose rows begin anywhere."""
    matrices = [(128, 96, 96), (48, 80, 1 << 16), (80, 128, 32), (19, 130, 64), (70, 192, 64)]
    rounds = [(True, False), (True, True), (False, False), (False, False), (False, False)]
    registers = [int8(rows * columns, 0).view(rows, columns).to(device) for rows, columns, _ in matrices]
    exponents = [int8(rows * -(-c // g), 1).view(rows, -1).to(device) for rows, c, g in matrices]
    launched: list[tuple[Any, ...]] = []
    monkeypatch.setattr(gpu, "launch", lambda kernel, *given, **_: launched.append((kernel.fn.__name__, *given)))
    with ops.backend("triton"), gpu.Shelf(torch.device(device), numbers=64) as shelf:
        made = ops.decode_many(registers, exponents, [group for *_, group in matrices], torch.bfloat16, rounds)
    decoded = [call for call in launched if call[0] == "decode_many"]
    assert [call[0] for call in launched].count("decode") == 2 and len(decoded) == 1 and len(launched) == 3
    _, programs, _, table, tensors = decoded[0]
    assert tensors == 3 and programs == 2 * 2 + 1 * 2 + 2 * 3
    shelf.fill()
    for line, number, first in zip(table.tolist(), (0, 1, 4), (0, 4, 6), strict=True):
        rows, columns, group = matrices[number]
        given = registers[number].data_ptr(), exponents[number].data_ptr()
        places = [0 if part is None else part.data_ptr() for part in made[number][:4]]
        assert line == [first, *given, *places, rows, columns, min(group, columns)]


@on_each_device
@pytest.mark.parametrize("where", ["register", "exponent", "rows", "columns"])
def test_a_matrix_that_does_not_lie_well_is_decoded_by_itself(device, where):
    """It begins between multiples of 16 bytes, is turned to rows that do, or is strided."""
    rows, columns = (40 if where == "rows" else 32), (24 if where == "columns" else 32)
    flat = int8(rows * columns + 1, 0).to(device)
    register = (flat[1:] if where == "register" else flat[:-1]).view(rows, columns)
    exponent = int8(2 * rows, 1).to(device)[:: 2 if where == "exponent" else 1][:rows].view(rows, 1)
    assert triton._lies_well(register.clone(), exponent.clone(), 256, False) is (where != "columns")
    assert not triton._lies_well(register, exponent, 256, True)


@pytest.mark.gpu
def test_a_replay_reads_rates_and_tables_where_they_lie():
    device = torch.device("cuda")
    registers = [torch.zeros(4096, dtype=torch.int8, device=device) for _ in range(3)]
    directions = [torch.full((4096,), -1.0, device=device) for _ in registers]
    keys = torch.tensor([list(make_key(0, 0, n)) for n in range(3)], device=device)
    rates = torch.full((3,), 2.0, dtype=torch.float64, device=device)
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        ops.move_registers_many(registers, directions, rates, keys)
    torch.cuda.synchronize()
    graph, shelf = torch.cuda.CUDAGraph(), gpu.Shelf(device)
    with shelf, torch.cuda.graph(graph, stream=side):
        ops.move_registers_many(registers, directions, rates, keys)
    shelf.fill()
    for factor in (1.0, 3.0):
        rates.fill_(factor)
        graph.replay()
    assert all(bool((register == 6).all()) for register in registers)
