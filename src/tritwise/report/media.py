"""The part of a page that an ARB run has: its figures, examples with their pictures, confusions, what it drew.

Pictures lie in the run folder as .npy: uint8 [H, W] or [H, W, 3]; a spectrogram has its lowest band in the first row.
"""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tritwise.report import media_plots
from tritwise.report.figures import look, png_bytes
from tritwise.report.markup import escape, note, picture, section, table
from tritwise.report.numbers import count, number, percent
from tritwise.report.reader import Run, mapping, series

MOST_GRIDS = 6
TITLES = {"vision": "Captions", "audio": "Transcripts", "diffusion": "Pictures drawn", "text": "Text"}


def is_media(run: Run) -> bool:
    """Whether the run learned something else than, or beside, plain text."""
    return mapping(run.config.get("media")).get("task", "") not in ("", "text")


def media_sections(run: Run) -> list[str]:
    """Sections in the order of the page: figures, learning, examples, confusions, pictures over time."""
    parts = [section("What it can do", _figures(run)), section("Learning", *_curves(run))]
    for kind in ("vision", "audio"):
        rows = [row for row in run.examples if row.get("of") == kind]
        if rows:
            parts.append(section(TITLES[kind], *_examples(run, rows)))
    if run.confusion:
        parts.append(section("Confusions", _confusion(run)))
    if run.pictures:
        parts.append(section(TITLES["diffusion"], *_grids(run)))
    return parts


def _figures(run: Run) -> str:
    rows = []
    for kind, figures in mapping(run.result.get("val")).items():
        for name, figure in mapping(figures).items():
            told = figure if isinstance(figure, dict) else {"": figure}
            rows += [(kind, f"{name} {key}".strip(), _value(name, key, value)) for key, value in told.items()]
    if not rows:
        return note("The run is not finished: no figures over all of val yet.")
    return table(("Kind", "Figure", "Value"), rows, numeric=(2,), keys=(0,))


def _value(name: str, key: str, value: Any) -> str:
    found = number(value)
    if found is None:
        return str(value)
    shares = ("exact", "cer", "recognised", "classifier_accuracy")
    return percent(found, 2) if name in shares or key in shares else f"{found:g}"


def _curves(run: Run) -> list[str]:
    losses = {"mean of the batches": series(run.train, "step", "loss")}
    kinds = sorted({kind for row in run.train for kind in mapping(row.get("losses"))})
    for kind in kinds:
        rows = [{"step": row.get("step"), "loss": mapping(row.get("losses")).get(kind)} for row in run.train]
        losses[kind] = series(rows, "step", "loss")
    scores: dict[str, tuple[list[float], list[float]]] = {}
    for kind in sorted({str(row.get("of")) for row in run.media}):
        rows = [row for row in run.media if row.get("of") == kind]
        for name in ("loss", "exact", "cer"):
            line = series(rows, "step", name)
            if line[0]:
                scores[f"{kind}: {'right' if name == 'exact' else name}, val"] = line
    if not any(line[0] for line in losses.values()):
        return [note("No losses in metrics.jsonl: the learning curve is left out.")]
    drawn = png_bytes(media_plots.learning_figure(losses, scores))
    caption = "Left: loss of the batches. Right: on val, while it learned."
    return [picture(drawn, "Losses and scores against steps", caption)]


def _examples(run: Run, rows: Sequence[dict[str, Any]]) -> list[str]:
    last = max(number(row.get("step")) or 0 for row in rows)
    parts = [note(f"Examples of val at step {count(last)}: what was told, and what was meant.")]
    for row in rows:
        if number(row.get("step")) != last:
            continue
        drawn = _drawn(run.folder, row.get("file"), sound=row.get("of") == "audio")
        right = row.get("told") == row.get("meant")
        told = f"“{row.get('told')}”" + ("" if right else f", meant: “{row.get('meant')}”")
        if drawn is None:
            parts.append(note(f"{row.get('name')}: {told}"))
        else:
            parts.append(picture(drawn, f"{row.get('meant')}", f"{'✓' if right else '✗'} {told}"))
    return parts


def _confusion(run: Run) -> str:
    names, counts = run.confusion["names"], run.confusion["counts"]
    right = sum(row[place] for place, row in enumerate(counts))
    total = sum(map(sum, counts))
    drawn = png_bytes(media_plots.confusion_figure(names, counts))
    caption = f"{count(right)} of {count(total)} right. Rows: what it was; columns: what was told; last: no class."
    return picture(drawn, "Confusion matrix", caption)


def _grids(run: Run) -> list[str]:
    names = str(mapping(run.config.get("parts")).get("classes", "")).split("|")
    rows = run.pictures
    if len(rows) > MOST_GRIDS:  # the first and the last, and those between evenly
        rows = [rows[place * (len(rows) - 1) // (MOST_GRIDS - 1)] for place in range(MOST_GRIDS)]
    parts = [f"<p>{escape('Rows from above: ' + ', '.join(names))}</p>"] if names[0] else []
    for row in rows:
        drawn = _drawn(run.folder, row.get("file"))
        label = f"step {count(number(row.get('step')) or 0)}"
        parts.append(note(f"{label}: {row.get('file')} is missing") if drawn is None else picture(drawn, label, label))
    return parts


def _drawn(folder: Path, file: Any, *, sound: bool = False) -> bytes | None:
    """The picture in a .npy of the run folder as PNG; None if it is not there or is none."""
    if not isinstance(file, str) or ".." in file or not (folder / file).is_file():
        return None
    try:
        array = np.load(folder / file)
    except (OSError, ValueError, EOFError):
        return None
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or not array.size:
        return None
    larger = max(1, 320 // max(array.shape[:2])) if not sound else 2
    array = array.repeat(larger, axis=0).repeat(larger, axis=1)
    return image_png(array[::-1] if sound else array, "viridis" if sound else "gray")


def image_png(array: np.ndarray, colours: str) -> bytes:
    """uint8 [H, W] in a colour map, or [H, W, 3], as a PNG that is the same bytes every time."""
    save: Callable[..., None]
    with look():
        from matplotlib.image import imsave as save

        buffer = io.BytesIO()
        options: dict[str, Any] = {} if array.ndim == 3 else {"cmap": colours, "vmin": 0, "vmax": 255}
        save(buffer, array, format="png", metadata={"Software": None}, **options)
    return buffer.getvalue()
