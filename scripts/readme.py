"""Fills README's generated blocks, and draws its pictures, from the newest result files in benchmarks/results.

python scripts/readme.py            draw docs/*.png and write the blocks
python scripts/readme.py --check    change nothing; say what is stale and exit 1

A block is what stands between `<!-- generated:NAME -->` and `<!-- end:NAME -->`. Result files are named
KIND_YYYY-MM-DD.json; the newest of a kind, by name, counts:

    demo_cpu2        made by benchmarks/collect_demo.py
    step_cost_cpu2   {"rows": [{"width", "batch", "tritwise_ms", "adamw_ms", "ratio"}, …], …}

A picture cannot be compared byte for byte, for matplotlib's versions draw differently. So the block beside it holds the
checksums of the picture and of the file it was drawn from, and either one changing makes the block stale.
"""

import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = "benchmarks/results"
LOSS, COST = "docs/loss.png", "docs/step_cost.png"
DATE = "[0-9]" * 4 + "-[0-9][0-9]-[0-9][0-9]"


def newest(root: Path, kind: str) -> Path | None:
    """The newest result file of `kind` under `root`, or None."""
    return max((root / RESULTS).glob(f"{kind}_{DATE}.json"), default=None)


def blocks(root: Path) -> dict[str, str]:
    """Block name -> its text, made from the newest results and the pictures as they are now."""
    demo, cost = newest(root, "demo_cpu2"), newest(root, "step_cost_cpu2")
    return {
        "picture": _loss(root, demo) if demo else "A picture will stand here once a demo is recorded.",
        "result": _result(root, demo) if demo else "No demo has been recorded yet; `make demo` makes one.",
        "cost": _cost(root, cost) if cost else "The cost of a step has not been recorded yet.",
    }


def draw(root: Path) -> list[str]:
    """Draw the pictures of the newest results; returns their paths, relative to `root`. Needs the extra `report`."""
    from tritwise.report.plots import loss_figure, save_png, step_cost_figure

    drawn = []
    if demo := newest(root, "demo_cpu2"):
        record = _read(demo)
        train, val = ((curve["bytes"], curve["nats"]) for curve in (record["curves"][k] for k in ("train", "eval")))
        rungs = [(row["name"], row["nats"]) for row in record["ladder"]["rows"]]
        save_png(loss_figure(train, val, rungs), root / LOSS)
        drawn.append(LOSS)
    if cost := newest(root, "step_cost_cpu2"):
        save_png(step_cost_figure(_read(cost)["rows"]), root / COST)
        drawn.append(COST)
    return drawn


def fill(text: str, made: dict[str, str]) -> str:
    """README's text with every block replaced. ValueError unless it has exactly the blocks of `made`, each once."""
    found = re.findall(r"<!-- generated:(\w+) -->", text)
    if sorted(found) != sorted(made):
        raise ValueError(f"README has the generated blocks {sorted(found)}, and they should be {sorted(made)}")
    for name, content in made.items():
        pattern = rf"(<!-- generated:{name} -->\n).*?(<!-- end:{name} -->)"
        text, count = re.subn(pattern, lambda m, c=content: f"{m[1]}{c}\n{m[2]}", text, flags=re.DOTALL)
        if count != 1:
            raise ValueError(f"README's block {name} has no end; write <!-- end:{name} --> after it")
    return text


def stale(root: Path) -> list[str]:
    """What of README is not what the results say, in words; empty when all is current."""
    text, made = (root / "README.md").read_text(encoding="utf-8"), blocks(root)
    fill(text, made)  # the markers themselves
    return [name for name, content in made.items() if f"<!-- generated:{name} -->\n{content}\n<!-- end" not in text]


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12] if path.exists() else "missing"


def _picture(root: Path, path: str, caption: str, source: Path) -> str:
    origin = f"<!-- {path} {_digest(root / path)} was drawn from {source.name} {_digest(source)} -->"
    return f"{origin}\n![{caption}]({path})"


def _loss(root: Path, source: Path) -> str:
    picture = _picture(root, LOSS, "Loss of the demo against bytes seen, with the ladder as lines", source)
    scored = _read(source)["config"]["train"]["eval_bytes"]
    part = f"the first {scored:,} validation bytes" if scored else "all validation bytes"
    return f"{picture}\n\nThe points are quick scores during training: {part}, in windows that do not overlap."


def _result(root: Path, path: Path) -> str:
    record = _read(path)
    result, audit, manifest, config = record["result"], record["audit"], record["manifest"], record["config"]
    own = "**this model, ternary, re-read from its file**"
    rungs = [(row["name"], row["nats"], row["bpb"]) for row in record["ladder"]["rows"]]
    rungs.append((own, result["val"]["nats"], result["artifact"]["bpb_reread"]))
    rows = [f"| {name} | {nats:.4f} | {bpb:.4f} |" for name, nats, bpb in sorted(rungs, key=lambda rung: -rung[1])]
    bits = 8 * result["artifact"]["bytes"] / result["weights"]
    commit = f", commit {manifest['git_commit'][:10]}" if manifest["git_commit"] else ""
    return "\n".join(
        [
            f"| {result['val']['bytes']:,} bytes of validation text | nats/byte | bits/byte |",
            "|:--|--:|--:|",
            *rows,
            "",
            f"Trained in **{result['seconds']:.0f} s** on {manifest['threads']} CPU threads ({manifest['cpu']}): "
            f"{result['steps']:,} steps, {result['bytes_seen']:,} bytes read. {audit['weights']:,} weights; while "
            f"training, {audit['state_bytes_per_weight']:.2f} bytes each with all optimizer state, and "
            f"{audit['float_trainable']:,} trainable floats. The shipped file has "
            f"{result['artifact']['bytes']:,} bytes, {bits:.2f} bits a weight. "
            f"Recipe {config['recipe']}, seed {manifest['seed']}, torch {manifest['torch']}{commit}; "
            f"all of it in [{path.name}]({path.relative_to(root).as_posix()}).",
        ]
    )


def _cost(root: Path, path: Path) -> str:
    rows = _read(path)["rows"]
    ratios = [row["ratio"] for row in rows]
    widths, batches = (sorted({row[key] for row in rows}) for key in ("width", "batch"))
    return "\n".join(
        [
            f"A step takes {min(ratios):.2f}× to {max(ratios):.2f}× the time of the same model in float under AdamW, "
            f"over widths {widths[0]} to {widths[-1]} and batches {batches[0]} to {batches[-1]} "
            f"([{path.name}]({path.relative_to(root).as_posix()})).",
            "",
            _picture(root, COST, "Milliseconds a step against width and batch, beside float AdamW", path),
        ]
    )


def main(arguments: list[str]) -> int:
    """Write or check README; returns the exit code."""
    if arguments not in ([], ["--check"]):
        print("usage: python scripts/readme.py [--check]", file=sys.stderr)
        return 2
    if arguments:
        old = stale(ROOT)
        print(f"README.md is stale: {', '.join(old)}; run make readme" if old else "README.md is current")
        return 1 if old else 0
    drawn = draw(ROOT)
    readme = ROOT / "README.md"
    readme.write_text(fill(readme.read_text(encoding="utf-8"), blocks(ROOT)), encoding="utf-8")
    print(", ".join(["README.md", *drawn]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
