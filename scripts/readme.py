"""Fills the generated blocks of README and the pages of docs from benchmarks/results, with pictures.

python scripts/readme.py            draw docs/*.png, docs/images/*.png and write the blocks
python scripts/readme.py --check    change nothing; say what is stale and exit 1

A block is what stands between `<!-- generated:NAME -->` and `<!-- end:NAME -->`. Result files are named
KIND_YYYY-MM-DD.json or .jsonl; the newest of a kind, by name, counts:

    demo_cpu2        made by benchmarks/collect_demo.py
    step_cost_cpu2   {"rows": [{"width", "batch", "tritwise_ms", "adamw_ms", "ratio"}, …], …}
    rules_h100       the rows.jsonl of `tritwise bench rules`; ablation_h100, scaling_h100 and robustness_h100 likewise,
                     for what is not in the same file, and grid_h100 of `tritwise bench optimizer-grid`; with h200 for
                     h100 what another device measured, which counts beside them
    score_study_cpu2, score_study_h100, score_slice_cpu2, score_small_cpu2
                     the study.json of benchmarks/score_study.py: one model and one text each, or the beginning of one
    step_19m_h100, step_124m_h100, step_1.3b_h100, memory_3b_h100
                     made by `tritwise bench step`; with h200 for h100 what another device measured: the newest counts
    capacity_h100    made by `tritwise bench capacity`; h200 likewise
    drawn_trit_cpu2  the last grid of pictures of such a run, .npy
    arb_cpu2, arb_h100, layers_cpu2, layers_h100, recipes_cpu2
                     {"rows": […]} of benchmarks/arb_study.py, one for each run of an ARB model, of layers_study.py, and
                     of recipe_times.py

    budget_cpu2, budget_h100, budget_h200
                     made by benchmarks/collect_budget.py, each with all runs on that kind of machine

README has all of its blocks. docs/RULE.md, if it is there, has any of `RULE_BLOCKS`, docs/SCORING.md of `SCORE_BLOCKS`,
docs/ARB.md of `ARB_BLOCKS`, docs/RECURRENCE.md of `BUDGET_BLOCKS`.

A picture cannot be compared byte for byte, for matplotlib's versions draw differently. So the block beside it holds the
checksums of the picture and of the file it was drawn from, and either one changing makes the block stale.
"""

import hashlib
import json
import re
import sys
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tritwise.files import atomic_write
from tritwise.report import arb_tables
from tritwise.report.bench_markdown import (
    ablation_markdown,
    recipe_markdown,
    rules_markdown,
    short_markdown,
    texts_markdown,
)
from tritwise.report.bench_plots import choose_bench_plots
from tritwise.report.bench_rows import read_bench
from tritwise.report.budget_rows import unpacked
from tritwise.report.budget_tables import TABLES as BUDGET_TABLES
from tritwise.report.budget_tables import budget_sources, budget_table, short_budget
from tritwise.report.engine_tables import capacity_markdown, engine_markdown, newest_of_each
from tritwise.report.score_tables import TABLES, score_sources, score_table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = "benchmarks/results"
README, RULE, SCORING, ARB = "README.md", "docs/RULE.md", "docs/SCORING.md", "docs/ARB.md"
RECURRENCE = "docs/RECURRENCE.md"
LOSS, COST = "docs/loss.png", "docs/step_cost.png"
RULE_PLOTS = ("loss", "state", "rates", "activity", "scaling", "robustness")  # as choose_bench_plots names them
RULE_TABLES = {
    "table": rules_markdown,
    "ablation": ablation_markdown,
    "grid": texts_markdown,
    "nanogpt": partial(recipe_markdown, name="nanogpt"),
}
DEVICES = ("h100", "h200")
STEPS = ("step_19m", "step_19m_batch128", "step_124m", "step_1.3b", "memory_3b")
RULE_BLOCKS = tuple(f"rules_{name}" for name in (*RULE_TABLES, *RULE_PLOTS))
SCORE_STUDIES = ("score_study_cpu2", "score_study_h100", "score_slice_cpu2", "score_small_cpu2")
SCORE_BLOCKS = tuple(f"score_{name}" for name in ("sources", *TABLES))
ARB_STUDIES = ("arb_cpu2", "arb_h100")
LAYER_STUDIES = ("layers_cpu2", "layers_h100")
RECIPE_STUDIES = ("recipes_cpu2",)
DRAWN, GRID = "drawn_trit_cpu2", "docs/images/drawn.png"
ARB_BLOCKS = tuple(f"arb_{name}" for name in ("sources", "picture", *arb_tables.TABLES))
BUDGET_STUDIES = (*(f"budget_{device}" for device in DEVICES), "budget_cpu2")
BUDGET_BLOCKS = tuple(f"budget_{name}" for name in ("sources", *BUDGET_TABLES))
DATE = "[0-9]" * 4 + "-[0-9][0-9]-[0-9][0-9]"


def newest(root: Path, kind: str, suffix: str = "json") -> Path | None:
    """The newest result file of `kind` under `root`, or None."""
    return max((root / RESULTS).glob(f"{kind}_{DATE}.{suffix}"), default=None)


def newest_of(root: Path, kinds: Iterable[str], suffix: str = "json") -> list[Path]:
    """The newest result file of each kind, where there is one."""
    return [file for kind in kinds if (file := newest(root, kind, suffix))]


def links_of(root: Path, files: Iterable[Path]) -> list[str]:
    """Files as links from a page in docs."""
    return [f"[{file.name}](../{file.relative_to(root).as_posix()})" for file in files]


def blocks(root: Path) -> dict[str, str]:
    """Block of README -> its text, made from the newest results and the pictures as they are now."""
    demo, cost = newest(root, "demo_cpu2"), newest(root, "step_cost_cpu2")
    return {
        "picture": _loss(root, demo) if demo else "A picture will stand here once a demo is recorded.",
        "result": _result(root, demo) if demo else "No demo has been recorded yet; `make demo` makes one.",
        "cost": _cost(root, cost) if cost else "The cost of a step has not been recorded yet.",
        "rules": _rules(root),
        "engine": _engine(root),
        "budget": _budget(root),
    }


def rule_blocks(root: Path, wanted: Iterable[str]) -> dict[str, str]:
    """Each wanted block of docs/RULE.md -> its text; names that are not in RULE_BLOCKS are left out."""
    made = {}
    for block in dict.fromkeys(wanted):
        name = block.removeprefix("rules_")
        sources = _rule_sources(root, name)
        if block not in RULE_BLOCKS:
            continue
        if not sources:
            made[block] = "Nothing has been recorded for this yet; `tritwise bench rules` measures it."
        elif name in RULE_TABLES:
            links = " and ".join(links_of(root, sources))
            made[block] = f"{RULE_TABLES[name](read_bench(*sources))}\n\nAll of it in {links}."
        else:
            plot = choose_bench_plots(read_bench(*sources)).get(name)
            path = _rule_picture(name)
            shown = f"{_picture(root, path, plot.alt, sources, 'docs/')}\n\n{plot.caption}" if plot else ""
            names = " and ".join(source.name for source in sources)
            made[block] = shown or f"{names} {'has' if len(sources) == 1 else 'have'} too few rows for this picture."
    return made


def score_blocks(root: Path, wanted: Iterable[str]) -> dict[str, str]:
    """Each wanted block of docs/SCORING.md -> its text; names that are not in SCORE_BLOCKS are left out."""
    files = newest_of(root, SCORE_STUDIES)
    records = [_read(file) for file in files]
    links = links_of(root, files)
    made = {}
    for block in dict.fromkeys(wanted):
        name = block.removeprefix("score_")
        if block in SCORE_BLOCKS:
            made[block] = score_sources(records, links) if name == "sources" else score_table(name, records)
    return made


def arb_blocks(root: Path, wanted: Iterable[str]) -> dict[str, str]:
    """Each wanted block of docs/ARB.md -> its text; names that are not in ARB_BLOCKS are left out."""
    runs, layers, recipes = (newest_of(root, studies) for studies in (ARB_STUDIES, LAYER_STUDIES, RECIPE_STUDIES))
    files = [*runs, *layers, *recipes]
    links = ", ".join(links_of(root, files))
    made = {}
    for block in dict.fromkeys(wanted):
        name = block.removeprefix("arb_")
        if name == "picture":
            grid = newest(root, DRAWN, "npy")
            told = "Clothes drawn by a ternary network: a row a class of Fashion-MNIST"
            made[block] = _picture(root, GRID, told, [grid], "docs/") if grid else "No picture has been kept yet."
        elif block in ARB_BLOCKS:
            read = {"layers": layers, "recipes": recipes}.get(name, runs)
            rows = [row for file in read for row in _read(file)["rows"]]
            made[block] = f"All rows: {links or 'none yet'}." if name == "sources" else arb_tables.arb_table(name, rows)
    return made


def budget_blocks(root: Path, wanted: Iterable[str]) -> dict[str, str]:
    """Each wanted block of docs/RECURRENCE.md -> its text; names that are not in BUDGET_BLOCKS are left out."""
    files = newest_of(root, BUDGET_STUDIES)
    links = links_of(root, files)
    read = [_read(file) for file in files]
    records = [record for file in read for record in unpacked(file)]
    made = {}
    for block in dict.fromkeys(wanted):
        name = block.removeprefix("budget_")
        if block in BUDGET_BLOCKS:
            made[block] = budget_sources(read, links) if name == "sources" else budget_table(name, records)
    return made


PAGES = {RULE: rule_blocks, SCORING: score_blocks, ARB: arb_blocks, RECURRENCE: budget_blocks}


def pages(root: Path) -> dict[str, dict[str, str]]:
    """Page -> its blocks, of the pages that are there."""
    found = {README: blocks(root)}
    for page, fill_in in PAGES.items():
        if (root / page).exists():
            found[page] = fill_in(root, _block_names((root / page).read_text(encoding="utf-8")))
    return found


def draw(root: Path) -> list[str]:
    """Draw the pictures of the newest results; returns their paths, relative to `root`. Needs the extra `report`."""
    import numpy as np

    from tritwise.report.media import image_png
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
    if grid := newest(root, DRAWN, "npy"):
        array = np.load(grid, allow_pickle=False)
        (root / GRID).parent.mkdir(parents=True, exist_ok=True)
        (root / GRID).write_bytes(image_png(array.repeat(2, axis=0).repeat(2, axis=1), "gray"))
        drawn.append(GRID)
    page = (root / RULE).read_text(encoding="utf-8") if (root / RULE).exists() else ""
    for name in RULE_PLOTS:
        sources = _rule_sources(root, name)
        if not sources or f"rules_{name}" not in _block_names(page):
            continue
        if plot := choose_bench_plots(read_bench(*sources)).get(name):
            path = _rule_picture(name)
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            save_png(plot.figure(), root / path)
            drawn.append(path)
    return drawn


def fill(text: str, made: dict[str, str], page: str = README) -> str:
    """A page's text with every block replaced. ValueError unless it has exactly the blocks of `made`, each once."""
    found = _block_names(text)
    if sorted(found) != sorted(made):
        raise ValueError(f"{page} has the generated blocks {sorted(found)}, and they should be {sorted(made)}")
    for name, content in made.items():
        pattern = rf"(<!-- generated:{name} -->\n).*?(<!-- end:{name} -->)"
        text, count = re.subn(pattern, lambda m, c=content: f"{m[1]}{c}\n{m[2]}", text, flags=re.DOTALL)
        if count != 1:
            raise ValueError(f"{page}: block {name} has no end; write <!-- end:{name} --> after it")
    return text


def stale(root: Path) -> list[str]:
    """The blocks that are not what the results say; empty when all is current."""
    old = []
    for page, made in pages(root).items():
        text = (root / page).read_text(encoding="utf-8")
        fill(text, made, page)  # the markers themselves
        old += [name for name, content in made.items() if f"<!-- generated:{name} -->\n{content}\n<!-- end" not in text]
    return old


def write(root: Path) -> list[str]:
    """Fill every page that is there; returns their names."""
    written = []
    for page, made in pages(root).items():
        path = root / page
        atomic_write(path, fill(path.read_text(encoding="utf-8"), made, page).encode())
        written.append(page)
    return written


def _block_names(text: str) -> list[str]:
    return re.findall(r"<!-- generated:(\w+) -->", text)


def _rule_sources(root: Path, name: str) -> list[Path]:
    """Where the block of that name comes from: files of its own kind, or those with the rules, one of each device."""
    for kind in (name, "rules"):
        if files := newest_of(root, (f"{kind}_{device}" for device in DEVICES), "jsonl"):
            return files
    return []


def _rule_picture(name: str) -> str:
    return f"docs/images/rules_{name}.png"


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12] if path.exists() else "missing"


def _picture(root: Path, path: str, caption: str, sources: Sequence[Path], folder: str = "") -> str:
    """The picture at `path` under `root`, on a page that lies in `folder`."""
    drawn = " and ".join(f"{source.name} {_digest(source)}" for source in sources)
    origin = f"<!-- {path} {_digest(root / path)} was drawn from {drawn} -->"
    return f"{origin}\n![{caption}]({path.removeprefix(folder)})"


def _loss(root: Path, source: Path) -> str:
    picture = _picture(root, LOSS, "Loss of the demo against bytes seen, with the ladder as lines", [source])
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


def _rules(root: Path) -> str:
    sources = _rule_sources(root, "rules")
    if not sources:
        return "No rules have been compared yet; `tritwise bench rules` does it."
    return f"{short_markdown(read_bench(*sources))}\n\nAll of it, with seeds and rates: [docs/RULE.md]({RULE})."


def _engine(root: Path) -> str:
    files = [file for kind in STEPS for file in (root / RESULTS).glob(f"{kind}_h[12]00_{DATE}.json")]
    if not files:
        return "No step on a GPU has been recorded yet; `tritwise bench step` does it."
    read = {file: _read(file) for file in files}
    kept = newest_of_each((_date(file), made) for file, made in read.items())
    names = sorted(file.name for file, made in read.items() if any(made is one for one in kept))
    told = engine_markdown(kept)
    capacity = max(newest_of(root, (f"capacity_{name}" for name in DEVICES)), default=None, key=_date)
    if capacity:
        names.append(capacity.name)
        told += f"\n\n{capacity_markdown(_read(capacity))}"
    links = ", ".join(f"[{name}]({RESULTS}/{name})" for name in names)
    return f"{told}\n\nFrom {links}."


def _budget(root: Path) -> str:
    files = newest_of(root, BUDGET_STUDIES)
    told = short_budget([record for file in files for record in unpacked(_read(file))])
    if not told:
        return "No contest on a GPU has been recorded yet; `benchmarks/budget_study.py` measures it."
    return f"{told}\n\nAll contestants, rates and ways to ship: [{RECURRENCE}]({RECURRENCE}#the-contest)."


def _date(file: Path) -> str:
    return file.stem.rsplit("_", 1)[1]


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
            _picture(root, COST, "Milliseconds a step against width and batch, beside float AdamW", [path]),
        ]
    )


def main(arguments: list[str]) -> int:
    """Write or check the pages; returns the exit code."""
    if arguments not in ([], ["--check"]):
        print("usage: python scripts/readme.py [--check]", file=sys.stderr)
        return 2
    if arguments:
        old = stale(ROOT)
        print(f"stale: {', '.join(old)}; run make readme" if old else f"{', '.join([README, *PAGES])} are current")
        return 1 if old else 0
    drawn = draw(ROOT)
    print(", ".join([*write(ROOT), *drawn]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
