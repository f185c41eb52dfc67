"""Several commands on several GPUs within one span of time, and what they leave in one archive, whatever happens.

    python benchmarks/side_by_side.py FOLDER --seconds 560 --pack all.tgz \
        --run 0 "python benchmarks/rule_study.py steady --data enwik8.gz --out FOLDER/rules" \
        --run 0 "python -m tritwise bench step --seconds {seconds} --out FOLDER/step.json" \
        --run 1,2 "python benchmarks/budget_study.py tune --minutes {minutes} --data enwik8.gz --out FOLDER/budget"

A GPU that is rented by the minute goes when the time is up, and with it what was to be packed at the end. So here
commands on the same GPUs run one after another, those on others beside them; {seconds} and {minutes} stand for what is
left when a command starts, GRACE less. At the end of the time all are told to stop and then made to, with the
processes that they started, which have GRACE to save what they have, whatever their command does; none starts after it.
FOLDER, but for checkpoints and shipped models, is packed as they go and once more at the end. What a command prints is
in FOLDER/logs. Returns 0 if every command did, else 1.
"""

import argparse
import contextlib
import io
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

LEFT_OUT = ("checkpoints", "*.tritwise", "*.partial")
GRACE = 10.0  # seconds from being told to stop to being made to
AGAIN = 20.0  # seconds between two archives


@dataclass
class Lane:
    """Commands that share their GPUs, in order, and the one that runs now."""

    gpus: str
    waiting: list[str] = field(default_factory=list)
    process: "subprocess.Popen[bytes] | None" = None
    command: str = ""
    began: float = 0.0

    def start(self, folder: Path, left: float) -> None:
        """Start the next command; left: seconds that it has."""
        self.command, self.began = self.waiting.pop(0), time.monotonic()
        told = self.command.replace("{seconds}", f"{left:.0f}").replace("{minutes}", f"{left / 60:.2f}")
        with (folder / "logs" / f"gpu{self.gpus.replace(',', '_')}.log").open("ab") as log:
            log.write(f"$ {told}\n".encode())
            self.process = subprocess.Popen(
                ["bash", "-c", told],
                stdout=log,
                stderr=log,
                env=os.environ | {"CUDA_VISIBLE_DEVICES": self.gpus},
                start_new_session=True,  # so that what it starts can be stopped with it
            )

    def has_children(self) -> bool:
        """Whether anything that the command started runs; what has ended and nobody asked after does not."""
        assert self.process is not None
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                state, _, group, *_ = stat.read_text().rpartition(")")[2].split()
                if int(group) == self.process.pid and state != "Z":
                    return True
        return False

    def signal(self, number: signal.Signals) -> None:
        """To the command that runs and all that it started."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)


def pack(folder: Path, archive: Path) -> None:
    """The folder's files as a .tgz, which is complete or not there at all."""
    partial = archive.with_name(archive.name + ".partial")
    with tarfile.open(partial, "w:gz") as tar:
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder)
            if path == archive or any(fnmatch(part, pattern) for part in name.parts for pattern in LEFT_OUT):
                continue
            with contextlib.suppress(FileNotFoundError):  # what took its place is in the next archive
                if path.is_file():
                    data, info = path.read_bytes(), tarfile.TarInfo(str(name))  # at once: it may change meanwhile
                    info.size, info.mtime = len(data), int(path.stat().st_mtime)
                    tar.addfile(info, io.BytesIO(data))
    partial.replace(archive)


def run(folder: Path, lanes: Sequence[Lane], seconds: float, archive: Path | None) -> int:
    """Run all lanes for so long; how many commands failed, were stopped or never began."""
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    began = packed = time.monotonic()
    ends, wrong, warned = began + seconds, 0, False
    while True:
        now = time.monotonic()
        for lane in lanes:
            if lane.process is not None and (code := lane.process.poll()) is not None:
                if warned and now < ends and lane.has_children():
                    continue  # told to stop with it, they save what they have
                print(f"[{now - began:5.0f} s] gpu {lane.gpus}: {lane.command}: {code}, {now - lane.began:.0f} s")
                lane.signal(signal.SIGKILL)  # what it left running
                lane.process, wrong = None, wrong + (code != 0)
            if lane.process is None and lane.waiting and now < ends - GRACE:
                lane.start(folder, ends - GRACE - now)
        busy = [lane for lane in lanes if lane.process is not None]
        if not busy:
            break
        if now >= ends:
            for lane in busy:
                lane.signal(signal.SIGKILL)
        elif now >= ends - GRACE and not warned:
            warned = True
            for lane in busy:
                lane.signal(signal.SIGTERM)
        if archive is not None and now - packed >= AGAIN:
            pack(folder, archive)
            packed = time.monotonic()
        time.sleep(0.1)
    for command in (command for lane in lanes for command in lane.waiting):
        print(f"never began: {command}")
        wrong += 1
    if archive is not None:
        pack(folder, archive)
    return wrong


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, required=True, help="for everything")
    parser.add_argument("--run", nargs=2, action="append", required=True, metavar=("GPUS", "COMMAND"))
    parser.add_argument("--pack", type=Path, help="the archive")
    given = parser.parse_args(arguments)
    lanes: dict[str, Lane] = {}
    for gpus, command in given.run:
        lanes.setdefault(gpus, Lane(gpus)).waiting.append(command)
    return int(run(given.folder, list(lanes.values()), given.seconds, given.pack) > 0)


if __name__ == "__main__":
    sys.exit(main())
