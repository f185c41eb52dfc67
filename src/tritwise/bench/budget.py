"""The best model that fits into a number of bytes: contestants train for one time or for as many steps, and ship.

Every run leaves a record: its folder holds config, manifest (commit, versions, hardware), the log, the shipped file,
and `record.json`, whose size is the file system's and whose scores are of the file, read back from the disk again.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tritwise.data.corpus import open_parts
from tritwise.errors import UserError
from tritwise.files import canonical_json, read_json, sha256_of, write_json
from tritwise.score import score
from tritwise.ship import read_artifact
from tritwise.ship.container import OverBudgetError
from tritwise.train import Config, RunFolder, train
from tritwise.train.config import tokenizer_of
from tritwise.train.device import device_called, dtype_called
from tritwise.train.progress import Display


class StoppedError(UserError):
    """A run that was told to stop before its end, and saved: the same call goes on with it."""


def run_record(
    config: Config, folder: Path, display: Display | None = None, parts: Sequence[str] = ("val", "test")
) -> dict[str, Any]:
    """Train `config` in `folder`, or go on where it stopped; its record, as plain JSON. A finished one is only read.

    parts: of the text that are scored, if it has them; val must be one.

    Raises UserError for a folder with another config, and for a model that does not fit its budget, StoppedError for
    a run that was told to stop.
    """
    config, place, run = tokenizer_of(config)[0], folder / "record.json", RunFolder(folder)
    if (folder / "config.json").exists() and run.config() != config:
        raise UserError(f"{folder} is a run with other settings; choose another --out, or give its settings")
    if place.exists():
        return read_json(place)
    if not (folder / "result.json").exists():
        begun = (folder / "config.json").exists()
        if display is not None:
            display.say(f"{config.recipe}, seed {config.train.seed}")
        try:
            result = train(config, folder, resume=begun, display=display)
        except UserError as error:
            raise type(error)(f"{config.recipe}: {error}") from error
        if result.get("interrupted"):
            raise StoppedError(
                f"stopped {config.recipe} at step {result['steps']}; give the same command again to go on"
            )
    record = recorded(config, run, parts)
    write_json(place, record)
    return record


def recorded(config: Config, run: RunFolder, wanted: Sequence[str] = ("val", "test")) -> dict[str, Any]:
    """What can be said of a finished run, from its files."""
    result, manifest = run.read("result"), run.read("manifest")
    device = device_called(config.train.device)
    model, _ = read_artifact(run.artifact)
    model.to(device).dtype = dtype_called(config.train.dtype, device)
    tokenizer = tokenizer_of(config)[1]
    parts = open_parts(config.train.data, config.train.split, tokenizer)
    # Training's last score is of the file too, as it was read back.
    known = {key: result["val"][key] for key in ("bpb", "bytes", "stride")} | {"seconds": result["seconds_scoring"]}
    scores = {"val_sliding": known}
    left = [("val_chunked", "val", model.context), ("test_sliding", "test", config.train.stride)]
    for name, part, stride in left:
        if part in wanted and part in parts:
            told = score(model, parts[part], stride=stride, device=device, alphabet=tokenizer)
            found = {"bpb": told.bpb, "bytes": told.bytes, "stride": told.stride}
            scores[name] = found | {"seconds": round(told.seconds, 3)}
    settings = config.as_dict()
    for key in ("data", "tokenizer"):
        settings["train"][key] = Path(settings["train"][key]).name  # where they lie is nobody's business
    before = result.get("before", result["val"])["bpb"]
    return {
        "recipe": config.recipe,
        "config": settings,
        "seed": config.train.seed,
        "commit": manifest["git_commit"],
        "torch": manifest["torch"],
        "device": manifest["device"],
        "cpu": manifest["cpu"],
        "threads": manifest["threads"],
        "log": run.metrics.name,
        "file": run.artifact.name,
        "sha256": sha256_of(run.artifact),
        "bytes": run.artifact.stat().st_size,
        "budget": config.train.budget,
        "way": result["artifact"]["way"],
        "streams": result["artifact"]["streams"],
        "weights": result["weights"],
        "steps": result["steps"],
        "bytes_seen": result["bytes_seen"],
        "seconds": result["trained_seconds"],
        "warm_seconds": result.get("warm_seconds"),
        "compiled_in_clock": result.get("compiled_in_clock"),
        "rate": config.train.rate,
        "bpb_before": before,
        "ship_gap": scores["val_sliding"]["bpb"] - before,
        "averaged": result.get("averaged"),
        "scores": scores,
    }


def run_budget(configs: Sequence[Config], out: Path, display: Display | None = None) -> Iterator[list[dict[str, Any]]]:
    """Run every config in its own folder under out/records; after each, all records so far.

    A record that is there already is kept. Raises UserError as `run_record` does; the records before it stay. A model
    that does not fit its budget keeps none of the others from running: OverBudgetError comes after them.
    """
    records: list[dict[str, Any]] = []
    refused: list[str] = []
    for config in configs:
        try:
            records.append(run_record(config, out / "records" / folder_name(config), display))
        except OverBudgetError as error:
            refused.append(str(error))
            if display is not None:
                display.say(str(error))
            continue
        yield records
    if refused:
        more = f", and {len(refused) - 1} more do not fit" if len(refused) > 1 else ""
        raise OverBudgetError(f"{refused[0]}{more}")


def folder_name(config: Config) -> str:
    """Recipe, seed, and a few digits of everything else that shapes the run."""
    settings = dataclasses.asdict(config.train) | {"model": dataclasses.asdict(config.model)}
    return f"{config.recipe}-{config.train.seed}-{sha256_of(canonical_json(settings))[:8]}"
