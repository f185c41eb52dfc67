"""Turns a finished run into one small result file that can be committed: what README's numbers are made from.

python benchmarks/collect_demo.py runs/demo benchmarks/results/demo_cpu2_2026-01-31.json

The name says what ran (demo), where (two CPU cores) and when. README takes the newest; older ones stay as history.
"""

import sys
from pathlib import Path
from typing import Any

from tritwise.errors import UserError
from tritwise.files import read_json, read_json_lines, write_json

PROVENANCE = ("tritwise", "git_commit", "python", "torch", "cpu", "threads", "device", "backends", "seed", "started")


def collect(run: Path) -> dict[str, Any]:
    """The run's config, provenance, result, ladder, audit without its tensors, and loss curves, as plain JSON.

    Raises UserError if the run is missing or not finished.
    """
    if not (run / "result.json").exists():
        raise UserError(f"{run} holds no finished run; train one, for example with make demo")
    config, manifest, result, ladder, audit = (
        read_json(run / f"{name}.json") for name in ("config", "manifest", "result", "ladder", "audit")
    )
    lines = read_json_lines(run / "metrics.jsonl")
    if "artifact" in result:  # where the run lay says nothing to others
        result["artifact"]["path"] = Path(result["artifact"]["path"]).name
    result.pop("run", None)
    audit.pop("tensors", None)
    return {
        "kind": "demo",
        "format": 1,
        "config": config,
        "manifest": {key: manifest[key] for key in PROVENANCE},
        "result": result,
        "ladder": ladder,
        "audit": audit,
        "curves": {kind: _curve(lines, kind) for kind in ("train", "eval")},
    }


def _curve(lines: list[dict[str, Any]], kind: str) -> dict[str, list[float]]:
    chosen = [line for line in lines if line["kind"] == kind and line["loss"] is not None]
    return {"bytes": [line["bytes"] for line in chosen], "nats": [round(line["loss"], 5) for line in chosen]}


def main(arguments: list[str]) -> int:
    """Collect RUN into OUT; 0, or 2 with one line on what is wrong."""
    if len(arguments) != 2:
        print("usage: python benchmarks/collect_demo.py RUN OUT", file=sys.stderr)
        return 2
    try:
        write_json(Path(arguments[1]), collect(Path(arguments[0])))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{arguments[1]}; now: make readme")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
