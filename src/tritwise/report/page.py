"""The page of a run: `write_report` turns a run folder into one HTML file and the plots beside it."""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tritwise.files import atomic_write, make_folder
from tritwise.report.drawing import Plot, choose_plots
from tritwise.report.headline import final_score, headline, ladder_table, verdict
from tritwise.report.markup import details, document, escape, note, picture, section, table
from tritwise.report.media import is_media, media_sections
from tritwise.report.numbers import count, exact_bytes, number, percent
from tritwise.report.plots import save_png
from tritwise.report.reader import Run, mapping, read_run, rows_of

OPEN_SAMPLES, MOST_SAMPLES = 3, 40


@dataclass(frozen=True)
class ReportResult:
    """Where a report was written."""

    page: Path
    plots: list[Path]


def write_report(run: Path, out: Path | None = None) -> ReportResult:
    """Write `index.html` and PNG plots about the run folder `run` into `out` (default: `report` inside the run folder).

    The page holds everything it shows, plots included; the PNG files are there to be used elsewhere. The same run
    folder gives the same bytes. What an unfinished run does not have yet is left out with a line that says so.

    Raises:
        UserError: `run` is not a run folder, matplotlib is not installed, or `out` cannot be written.
    """
    content = read_run(Path(run))
    folder = make_folder(Path(run) / "report" if out is None else Path(out))
    pictures: dict[str, str] = {}
    paths = []
    for name, plot in choose_plots(content).items():
        if isinstance(plot, Plot):
            paths.append(folder / f"{name}.png")
            pictures[name] = picture(save_png(plot.figure(), paths[-1]), plot.alt, plot.caption)
        else:
            pictures[name] = note(plot) if plot else ""
    page = folder / "index.html"
    atomic_write(page, render(content, pictures).encode("utf-8"))
    return ReportResult(page, paths)


def render(run: Run, pictures: dict[str, str]) -> str:
    """The page as HTML. `pictures` maps each name of `choose_plots` to a figure or to a line that says why not."""
    score = final_score(run)
    if is_media(run):
        learned = media_sections(run)
    else:
        learned = [section("Beside the ladder", ladder_table(run, score)), section("Learning", pictures["loss"])]
    parts = [
        _title(run),
        verdict(run, score),
        headline(run, score),
        *learned,
        section("Flips and zeros", pictures["layers"], _layer_details(run)),
        section("Registers", pictures["registers"], pictures["registers_by_layer"]),
        section("Memory", pictures["memory"], _tensor_details(run)),
        section("Samples", *_samples(run)),
        section("Pace", pictures["pace"]),
        section("How it was run", *_provenance(run)),
        _footer(run),
    ]
    return document(f"{run.name} · Tritwise", "\n".join(part for part in parts if part))


def _title(run: Run) -> str:
    model, train = mapping(run.config.get("model")), mapping(run.config.get("train"))
    facts = [f"recipe {run.config['recipe']}"] if run.config.get("recipe") else []
    facts += [f"{key} {model[key]}" for key in ("width", "depth") if key in model]
    steps = number(run.result.get("steps"))
    if steps is not None:
        facts.append(f"{count(steps)} steps, finished")
    elif run.train:
        goal = number(train.get("steps"))
        facts.append(
            f"at step {count(run.train[-1]['step'])}" + (f" of {count(goal)}" if goal else "") + ", not finished"
        )
    head = f'<header>\n<p class="eyebrow">Tritwise run report</p>\n<h1>{escape(run.name)}</h1>\n'
    line = f'<p class="muted">{escape(" · ".join(facts))}</p>\n' if facts else ""
    notes = "".join(f"<p>{escape(text)}</p>" for text in run.notes)
    return head + line + (f"<aside>{notes}</aside>\n" if notes else "") + "</header>"


def _layer_details(run: Run) -> str:
    if not run.layers:
        return ""
    last = run.layers[-1]
    columns = ("flip_rate", "zero_fraction", "saturation")
    rows = [
        (name, *(_share(mapping(values).get(key)) for key in columns))
        for name, values in mapping(last.get("layers")).items()
    ]
    head = ("Layer", "flips per step", "zeros", "saturated")
    title = f"Each layer at step {count(last['step'])}"
    return details(title, table(head, rows, numeric=(1, 2, 3), keys=(0,))) if rows else ""


def _share(value: object) -> str:
    share = number(value)
    return "" if share is None else percent(share)


def _tensor_details(run: Run) -> str:
    rows = [
        (
            row.get("name", ""),
            row.get("role", ""),
            row.get("dtype", ""),
            " × ".join(map(str, shape)) if isinstance(shape := row.get("shape"), list) else "",
            "" if (size := number(row.get("bytes"))) is None else exact_bytes(size),
        )
        for row in rows_of(run.audit.get("tensors"))
    ]
    head = ("Tensor", "Role", "Type", "Shape", "Size")
    return details(f"All {count(len(rows))} tensors", table(head, rows, numeric=(3, 4), keys=(0,))) if rows else ""


def _samples(run: Run) -> list[str]:
    samples = [row for row in reversed(run.samples) if isinstance(row.get("text"), str)]
    if not samples:
        return [note("No samples in metrics.jsonl.")]
    drawn = [_sample(row) for row in samples[:MOST_SAMPLES]]
    older = drawn[OPEN_SAMPLES:]
    parts = drawn[:OPEN_SAMPLES]
    if older:
        parts.append(details(f"{len(older)} earlier sample{'s' * (len(older) > 1)}", "\n".join(older)))
    if len(samples) > MOST_SAMPLES:
        parts.append(note(f"{count(len(samples) - MOST_SAMPLES)} still earlier samples are in metrics.jsonl."))
    return parts


def _sample(row: dict[str, Any]) -> str:
    """One sample; the prompt stands out at the head of the text whether or not the run wrote it there."""
    prompt, text = str(row.get("prompt") or ""), row["text"]
    step = number(row.get("step"))
    label = "" if step is None else f"step {count(step)}"
    body = f"<b>{escape(prompt)}</b>{escape(text.removeprefix(prompt))}"
    # A line break right after <pre> is dropped by the parser, so one is always put there.
    return f'<div class="sample"><p>{escape(label)}</p><div class="card"><pre dir="auto">\n{body}</pre></div></div>'


def _provenance(run: Run) -> list[str]:
    parts = []
    events = [
        (count(step) if (step := number(row.get("step"))) is not None else "", row["message"])
        for row in run.events
        if isinstance(row.get("message"), str)
    ]
    if events:
        parts.append(table(("Step", "Event"), events, keys=(0,)))
    for name, content in (("config.json", run.config), ("manifest.json", run.manifest)):
        title = name.removesuffix(".json").capitalize()
        parts.append(
            details(title, table(("Key", "Value"), _flat(content), keys=(0,))) if content else note(f"No {name}.")
        )
    return parts


def _flat(content: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested keys joined by dots, each with its value as people write it."""
    rows: list[tuple[str, str]] = []
    for key, value in content.items():
        if isinstance(value, dict) and value:
            rows += _flat(value, f"{prefix}{key}.")
        elif prefix + key == "command" and isinstance(value, list) and all(isinstance(word, str) for word in value):
            rows.append((key, shlex.join(value)))
        else:
            rows.append((prefix + key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)))
    return rows


def _footer(run: Run) -> str:
    told = [
        f"{word} {run.manifest[key]}"
        for key, word in (("tritwise", "Tritwise"), ("git_commit", "commit"), ("started", "started"))
        if isinstance(run.manifest.get(key), str)
    ]
    return f"<footer>{escape(' · '.join(told) or 'Tritwise')}</footer>"
