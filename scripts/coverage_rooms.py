"""Fails unless each room that holds the arithmetic is covered by the tests, each on its own.

python scripts/coverage_rooms.py build/coverage.json      the JSON report of coverage.py

Triton's kernels run in its interpreter, in processes whose lines tests have counted too. Where Triton is not
installed its files are left out, and that is said; so is TileLang's. Single lines that only a GPU can run are left out
too; they say so themselves in a `pragma: no cover`, and are counted.
"""

import importlib.util
import json
import sys
from pathlib import Path, PurePath
from typing import Any

ROOMS = ("registers", "ops", "optim")
LEAST = 95.0  # percent of lines
NEEDED = {  # library -> files that run only where it is installed
    "triton": ("triton.py", "triton_kernels.py", "kernels.py", "gpu.py"),
    "tilelang": ("tilelang_kernels.py",),
}


def without(library: str, report: dict[str, Any]) -> dict[str, Any]:
    """The report less the files that run only where `library` is installed."""
    kept = {name: entry for name, entry in report["files"].items() if PurePath(name).name not in NEEDED[library]}
    return report | {"files": kept}


def room_percents(report: dict[str, Any]) -> dict[str, float]:
    """Room -> percent of its statements that ran. A room without a measured statement has 0."""
    totals = {room: [0, 0] for room in ROOMS}
    for name, entry in report["files"].items():
        parts = PurePath(name).parts
        room = parts[parts.index("tritwise") + 1] if "tritwise" in parts[:-1] else ""
        if room in totals:
            totals[room][0] += entry["summary"]["covered_lines"]
            totals[room][1] += entry["summary"]["num_statements"]
    return {room: 100.0 * covered / max(count, 1) for room, (covered, count) in totals.items()}


def thinnest_files(report: dict[str, Any], count: int = 3) -> list[str]:
    """The files with the most lines that never ran, as "path: lines 3, 4, 9"."""
    missing = {name: entry["missing_lines"] for name, entry in report["files"].items() if entry["missing_lines"]}
    worst = sorted(missing, key=lambda name: -len(missing[name]))[:count]
    return [f"{name}: lines {', '.join(map(str, missing[name]))}" for name in worst]


def main(path: str) -> int:
    """Print each room's coverage; 0 if all reach LEAST, else 1."""
    report = json.loads(Path(path).read_text(encoding="utf-8"))
    for library, files in NEEDED.items():
        if importlib.util.find_spec(library) is None:
            report = without(library, report)
            print(f"{library} is not installed: left out: {', '.join(files)}")
    percents = room_percents(report)
    for room, percent in percents.items():
        print(f"line coverage of {room}: {percent:.1f} %" + ("" if percent >= LEAST else f", below {LEAST:.0f} %"))
    excluded = sum(len(entry.get("excluded_lines", ())) for entry in report["files"].values())
    print(f"lines that only a GPU can run, left out: {excluded}")
    if min(percents.values()) >= LEAST:
        return 0
    print("\n".join(thinnest_files(report)))
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
