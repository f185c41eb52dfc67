"""What a run came to: the headline figures, the verdict beside the 5-gram, and the table beside the ladder."""

import math
from dataclasses import dataclass

from tritwise.report.markup import escape, facts, note
from tritwise.report.numbers import count, duration, exact_bytes, human_bytes, number, percent, significant
from tritwise.report.reader import Run, mapping, series

RIVAL = "5-gram"


@dataclass(frozen=True)
class Score:
    """Loss of the model on the validation split: nats and bits per byte, and which model was scored."""

    nats: float
    bpb: float
    source: str
    final: bool  # of a finished run; False for an evaluation on the way


def final_score(run: Run) -> Score | None:
    """The most trustworthy score there is: of the artifact read back, of the run's end, or of the last evaluation."""
    result = run.result
    reread = number(mapping(result.get("artifact")).get("bpb_reread"))
    if reread is not None:
        return Score(reread * math.log(2), reread, "artifact, read back from disk", True)
    bpb = number(mapping(result.get("val")).get("bpb"))
    if bpb is not None:
        return Score(bpb * math.log(2), bpb, "end of training; the artifact was not read back", True)
    steps, losses = series(run.evals, "step", "loss")
    if losses and not run.media:
        return Score(losses[-1], losses[-1] / math.log(2), f"evaluation at step {count(steps[-1])}", False)
    return None


def headline(run: Run, score: Score | None) -> str:
    """Cards with the figures that matter, leaving out those that the folder does not tell."""
    items = []
    if score:
        scored = number(mapping(run.result.get("val")).get("bytes"))
        sub = f"validation, {count(scored)} bytes" if scored and score.final else "validation"
        items.append(("Bits per byte", f"{score.bpb:.3f}", score.source))
        items.append(("Nats per byte", f"{score.nats:.3f}", sub))
    weights, artifact = number(run.audit.get("weights")), number(mapping(run.result.get("artifact")).get("bytes"))
    if artifact is not None:
        density = f"{significant(8 * artifact / weights)} bits a weight, " if weights else ""
        items.append(("Artifact", exact_bytes(artifact), f"{density}everything included"))
    if weights is not None:
        items.append(("Weights", count(weights), "each −1, 0 or +1"))
    state = number(run.audit.get("state_bytes_per_weight"))
    if state is not None:
        items.append(("Training state", f"{state:.2f} B/weight", "fp32 AdamW: 12, or 16 with gradients"))
    floats = number(run.audit.get("float_trainable"))
    if floats is not None:
        kept = number(run.audit.get("float_state_bytes"))
        sub = f"{exact_bytes(kept)} of float training state" if kept is not None else ""
        items.append(("Trainable floats", count(floats), sub))
    items += _time(run)
    lines = [note(text) for text in _absent(run)]
    return "\n".join([facts(items), *lines] if items else lines)


def verdict(run: Run, score: Score | None) -> str:
    """One sentence: by how much the model beats the 5-gram, or misses it."""
    rival = _rival(run)
    if score is None or rival is None:
        return ""
    gap = rival - score.nats
    size = f"{abs(gap):.3f} nats per byte ({percent(abs(gap) / rival, 2)})"
    words = f"beats the {RIVAL} by {size}" if gap > 0 else f"does not beat the {RIVAL}: it is {size} behind"
    return (
        f'<p class="verdict">{"The model" if score.final else "So far the model"} <strong>{escape(words)}</strong>.</p>'
    )


def ladder_table(run: Run, score: Score | None) -> str:
    """The ladder and this model from worst to best, with a bar for the bits per byte."""
    rows = [
        (str(row["name"]), str(row.get("note", "")), float(row["nats"]), float(row["bpb"]), False) for row in run.ladder
    ]
    if score:
        rows.append(("this model", score.source, score.nats, score.bpb, True))
    if not rows:
        return note("No score and no ladder.json: there is nothing to compare yet.")
    rows.sort(key=lambda row: -row[3])
    widest = rows[0][3]
    rival = _rival(run)
    lines = []
    for name, remark, nats, bpb, own in rows:
        gap = "" if rival is None else "—" if name == RIVAL else f"{nats - rival:+.3f}".replace("-", "−")
        numbers = "".join(f'<td class="num">{cell}</td>' for cell in (f"{nats:.3f}", f"{bpb:.3f}", gap))
        bar = f'<span style="width: {100 * max(bpb, 0) / widest:.1f}%"></span>' if widest > 0 else ""
        label = escape(name) + (f"<small>{escape(remark)}</small>" if remark else "")
        row = f'<td class="long">{label}</td>{numbers}<td class="bar">{bar}</td>'
        lines.append(f'<tr class="{"own" if own else "other"}">{row}</tr>\n')
    titles = "".join(
        f'<th scope="col" class="num">{title}</th>' for title in ("nats/byte", "bits/byte", f"to the {RIVAL}")
    )
    head = f'<thead><tr><th scope="col">Model</th>{titles}<th class="bar"></th></tr></thead>\n'
    whole = f'<div class="card ladder"><table>\n{head}<tbody>\n{"".join(lines)}</tbody></table></div>'
    return whole + "\n" + note(_ladder_note(run, score))


def _rival(run: Run) -> float | None:
    return next((float(row["nats"]) for row in run.ladder if row["name"] == RIVAL), None)


def _ladder_note(run: Run, score: Score | None) -> str:
    scored = number(mapping(run.result.get("val")).get("bytes"))
    if not run.ladder:
        return "No ladder.json: uniform, unigram, 5-gram and xz are left out."
    if run.ladder_bytes is None:
        return "ladder.json does not say on how many bytes it was measured."
    if score and score.final and scored and scored != run.ladder_bytes:
        text = f"Not the same text: the model was scored on {count(scored)} bytes"
        return f"{text}, the ladder on {count(run.ladder_bytes)}."
    return f"The ladder was measured on {count(run.ladder_bytes)} bytes, each scored once."


def _absent(run: Run) -> list[str]:
    lines = []
    if not run.result:
        lines.append("No result.json: the final score and the artifact's size are left out.")
    if not run.audit:
        lines.append("No audit.json: weights, training state and trainable floats are left out.")
    return lines


def _time(run: Run) -> list[tuple[str, str, str]]:
    """Time and bytes of training: from result.json, or as far as metrics.jsonl goes."""
    last = run.train[-1] if run.train else {}
    done = number(run.result.get("seconds")) is not None
    seconds, seen, steps = (
        number(run.result.get(key) if done else last.get(other))
        for key, other in (("seconds", "seconds"), ("bytes_seen", "bytes"), ("steps", "step"))
    )
    items = []
    if seconds is not None and seconds >= 0:
        speed = f"{human_bytes(seen / seconds)} of text a second" if seen and seconds else ""
        items.append(("Training time" if done else "Training time so far", duration(seconds), speed))
    if seen is not None:
        items.append(
            ("Text seen", human_bytes(seen), f"in {count(steps)} step{'s' * (steps != 1)}" if steps is not None else "")
        )
    return items
