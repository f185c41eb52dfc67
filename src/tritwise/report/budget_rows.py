"""Records of models under a budget of bytes: how they lie in a result file, and which of them belong together.

A record is what `bench/budget.py` says of one run, and two words more: its `stage`, "bench" for `tritwise bench budget`
and else one of `benchmarks/budget_study.py`, and where parts are taken away, the `variant`. A result file holds
{"common": what all of its records share, "records": [the rest of each], "failed": [runs that left no model]}.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from tritwise.files import canonical_json
from tritwise.report.machine import machine_name

Record = dict[str, Any]
STAGES = ("bench", "tune", "main", "main4", "seeds", "ablate", "small")
CONTESTS = ("bench", "main", "main4", "seeds")  # whose records are compared under one budget
WHOLE = "as it is"  # the variant with every part


def packed(records: Sequence[Record]) -> dict[str, Any]:
    """Records as a result file holds them: what they share stands there once. `unpacked` gives them back."""
    common = _shared(records) if records else {}
    return {"common": common, "records": [_rest(record, common) for record in records]}


def unpacked(file: Mapping[str, Any]) -> list[Record]:
    """The records of a result file."""
    return [_merged(file.get("common", {}), record) for record in file["records"]]


def _shared(values: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values[0].items():
        every = [one.get(key) for one in values]
        if all(isinstance(one, dict) for one in every):
            if inner := _shared([one for one in every if one is not None]):
                found[key] = inner
        elif value is not None and all(one == value for one in every):
            found[key] = value
    return found


def _rest(value: Mapping[str, Any], common: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, own in value.items():
        if key not in common:
            found[key] = own
        elif isinstance(own, dict) and (inner := _rest(own, common[key])):
            found[key] = inner
    return found


def _merged(common: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(common)
    for key, value in own.items():
        found[key] = _merged(common[key], value) if key in common else value
    return found


class Where(NamedTuple):
    """What the runs of one contest have in common. seconds 0: they went by steps; steps 0: by time."""

    device: str
    data: str
    split: str
    ctx: int
    batch: int
    budget: int
    seconds: float
    steps: int

    @property
    def length(self) -> str:
        """How long each trained: 400 s, 800 steps."""
        return f"{self.seconds:g} s" if self.seconds else f"{self.steps:,} steps"

    @property
    def place(self) -> str:
        """The machine and the text."""
        name = {"shakespeare": "tinyshakespeare"}.get(self.data, self.data)
        return f"{self.device}; {name}, split {self.split}, context {self.ctx}, batch {self.batch}"

    @property
    def short(self) -> str:
        """Bytes and length, which tell contests of one place apart."""
        return f"{self.budget:,} bytes, {self.length}"


def where_of(record: Record) -> Where:
    """The contest that a record is part of."""
    model, train = record["config"]["model"], record["config"]["train"]
    seconds, steps = train["seconds"], train["steps"]
    place = (machine_name(record), train["data"], train["split"], model["ctx"], train["batch"], record["budget"])
    return Where(*place, seconds, 0 if seconds else steps)


def contests(records: Iterable[Record], stages: Sequence[str] = CONTESTS) -> list[tuple[Where, list[Record]]]:
    """The records of these stages by contest: GPUs before CPUs, most bytes and longest training first."""
    found: dict[Where, list[Record]] = {}
    for record in records:
        if record["stage"] in stages:
            found.setdefault(where_of(record), []).append(record)
    on_cpu = {where_of(record) for own in found.values() for record in own if record["device"] == "cpu"}
    return sorted(found.items(), key=lambda pair: (pair[0] in on_cpu, -pair[0].budget, -pair[0].seconds, pair[0]))


def places(records: Iterable[Record], stages: Sequence[str] = CONTESTS) -> dict[str, list[tuple[Where, list[Record]]]]:
    """The contests of each place, in the same order."""
    found: dict[str, list[tuple[Where, list[Record]]]] = {}
    for where, own in contests(records, stages):
        found.setdefault(where.place, []).append((where, own))
    return found


def alike(records: Iterable[Record], *apart: str) -> list[list[Record]]:
    """The records in groups that differ in nothing but their seed, and in the settings of training named `apart`."""
    groups: dict[bytes, list[Record]] = {}
    for record in records:
        config = record["config"]
        train = {key: value for key, value in config["train"].items() if key not in ("seed", *apart)}
        shared = {"model": config["model"], "train": train, "recipe": "" if apart else record["recipe"]}
        groups.setdefault(canonical_json(shared), []).append(record)
    return list(groups.values())


def trits_of(record: Record) -> int:
    """How many trits a weight of its matrices has; 0 in float. Older records do not say: one."""
    model = record["config"]["model"]
    return model.get("weight_trits", 1) if model["weights"] == "trit" else 0


def bpb_of(record: Record) -> float:
    """What a record is judged by: bits per byte of val, read by a sliding window, of the file read back."""
    return record["scores"]["val_sliding"]["bpb"]


def mean_bpb(group: Iterable[Record]) -> float:
    """The mean of that over seeds."""
    return statistics.fmean(map(bpb_of, group))
