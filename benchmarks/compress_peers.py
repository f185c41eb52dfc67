"""A text compressed by a model and by xz, zstd and bzip2: bytes, time and peak memory, both ways.

    python benchmarks/compress_peers.py MODEL [--data shakespeare] [--split val] [--rule 90/10] [--lanes N]
                                              [--device cpu] [--window N] [--stride N] [--out FILE.json]

MODEL is an artifact or a finished run. Every program is a process of its own; its time is the wall clock from start to
end (ours includes loading torch), its memory the most it held at once. The general compressors bring no model; ours is
counted without it (both sides have it) and with it (as `--embed` writes it). Every file is decompressed and compared.
Exit code 1 if one comes back changed, or if ours without the model is over what the model claims by more than --limit.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tritwise.data.source import describe
from tritwise.data.split import named_part, split
from tritwise.errors import UserError
from tritwise.files import write_json
from tritwise.train.config import Config
from tritwise.train.run import manifest

PEERS = {
    "xz -9e": (["xz", "-9e", "-T1", "-c"], ["xz", "-d", "-c"]),
    "zstd -22 --ultra": (["zstd", "-22", "--ultra", "-T1", "-q", "-c"], ["zstd", "-d", "-q", "-c"]),
    "zstd -22 --ultra --long": (["zstd", "-22", "--ultra", "--long=27", "-T1", "-q", "-c"], ["zstd", "-d", "-q", "-c"]),
    "bzip2 -9": (["bzip2", "-9", "-c"], ["bzip2", "-d", "-c"]),
}


# A process counts its parent's memory as its own until it becomes another program. This parent holds torch, so a bare
# interpreter stands between; what it holds itself, some 10 MiB, is the least that can be measured.
BETWEEN = """
import json, os, resource, subprocess, sys, time
began = time.perf_counter()
with open(sys.argv[1], "wb") as out:
    code = subprocess.call(sys.argv[2:], stdout=out)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
peak = used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
print(json.dumps([code, time.perf_counter() - began, used.ru_utime + used.ru_stime, peak]))
"""


class Cost(NamedTuple):
    """Of a process: seconds by the clock, seconds of processors (which other work on the machine hardly moves), and the
    most bytes it held."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int


def timed(command: list[str], out: Path) -> Cost:
    """What a process costs that writes its stdout to `out`. Exits with its words if it fails."""
    run = subprocess.run([sys.executable, "-I", "-c", BETWEEN, str(out), *command], capture_output=True, text=True)
    code, *cost = json.loads(run.stdout)
    if code:
        sys.exit(f"{' '.join(command)} failed: {run.stderr.strip()}")
    return Cost(*cost)


def row(name: str, text: Path, packed: Path, back: Path, costs: list[Cost], model: int) -> dict[str, Any]:
    """One line of the table. `costs`: of compressing and decompressing; `model`: its bytes."""
    total, size = text.stat().st_size, packed.stat().st_size
    return {
        "name": name,
        "bytes": size,
        "bytes_with_model": size + model,
        "bpb": 8 * size / total,
        "bpb_with_model": 8 * (size + model) / total,
        **{f"compress_{name}": value for name, value in costs[0]._asdict().items()},
        **{f"decompress_{name}": value for name, value in costs[1]._asdict().items()},
        "identical": text.read_bytes() == back.read_bytes(),
    }


def measure_peer(name: str, text: Path, folder: Path) -> dict[str, Any]:
    """A general compressor on `text`."""
    packed, back = folder / "peer", folder / "peer.back"
    forth, reverse = PEERS[name]
    costs = [timed([*forth, str(text)], packed), timed([*reverse, str(packed)], back)]
    return row(name, text, packed, back, costs, 0)


def measure_ours(model: str, text: Path, folder: Path, options: list[str]) -> dict[str, Any]:
    """`tritwise compress` on `text`, with what it reports of itself."""
    packed, back, told = folder / "ours.twz", folder / "ours.back", folder / "told"
    call = [sys.executable, "-m", "tritwise"]
    there = timed([*call, "compress", str(text), "--model", model, "--out", str(packed), "--json", *options], told)
    report = json.loads(told.read_text().splitlines()[-1])
    back_cost = timed([*call, "decompress", str(packed), "--model", model, "--out", str(back), "--json"], told)
    inner = {
        "compress_inner": report["seconds"],
        "decompress_inner": json.loads(told.read_text().splitlines()[-1])["seconds"],
    }
    found = row("tritwise", text, packed, back, [there, back_cost], report["model"])
    kept = ("claimed_bits", "over_claim", "lane_bits", "lanes", "window", "stride", "header")
    return found | inner | {key: report[key] for key in kept}


def main() -> int:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--data", default="shakespeare")
    parser.add_argument("--split", default="val", help="train, val, test or all")
    parser.add_argument("--rule", default="90/10")
    parser.add_argument("--device", default="cpu")
    for name in ("lanes", "window", "stride", "jobs"):
        parser.add_argument(f"--{name}", type=int, default=0)
    parser.add_argument("--limit", type=float, default=1e-3)
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    try:
        data = describe(chosen.data).data
        part = data if chosen.split == "all" else named_part(split(data, chosen.rule), chosen.split)
    except UserError as error:
        parser.error(str(error))
    options = [f"--device={chosen.device}"]
    options += [f"--{name}={getattr(chosen, name)}" for name in ("lanes", "window", "stride")]
    options += [f"--jobs={chosen.jobs}"]
    rows = []
    with tempfile.TemporaryDirectory(prefix="tritwise-") as name:
        folder = Path(name)
        text = folder / "text"
        text.write_bytes(part.tobytes())
        rows.append(measure_ours(chosen.model, text, folder, options))
        for peer, (command, _) in PEERS.items():
            if shutil.which(command[0]):
                rows.append(measure_peer(peer, text, folder))
            else:
                print(f"{peer} is not installed and left out", file=sys.stderr)
    for one in rows:
        print(
            f"{one['name']:18} {one['bytes']:>11,} bytes, {one['bytes_with_model']:>11,} with model, "
            f"{one['bpb']:.4f} bpb, {one['compress_seconds']:8.2f} s and {one['decompress_seconds']:8.2f} s back, "
            f"{one['compress_peak_bytes'] >> 20:,} and {one['decompress_peak_bytes'] >> 20:,} MiB"
        )
    print(f"over claim {rows[0]['over_claim']:+.4%}, lanes {rows[0]['lanes']}")
    if chosen.out:
        about = manifest(Config(), torch.device(chosen.device))
        named = {"bench": "compress", "data": Path(chosen.data).name, "split": chosen.split, "rule": chosen.rule}
        record = named | {"text_bytes": len(part), "manifest": about, "rows": rows}
        write_json(chosen.out, record)
    return int(not all(one["identical"] for one in rows) or rows[0]["over_claim"] > chosen.limit)


if __name__ == "__main__":
    sys.exit(main())
