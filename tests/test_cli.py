"""The command line: every command with and without --json, its options, its help, and pipes that close early."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

import tritwise
from tritwise.cli import app as module
from tritwise.cli import main, output
from tritwise.cli.app import app
from tritwise.files import read_json
from tritwise.loading import load
from tritwise.ship import read_artifact

COMMANDS = (
    "train",
    "pretrain",
    "finetune",
    "caption",
    "transcribe",
    "generate",
    "score",
    "sample",
    "ship",
    "compress",
    "decompress",
    "tokenize",
    "audit",
    "report",
    "doctor",
    "bench",
)


def run(*arguments: object, **options) -> subprocess.CompletedProcess:
    """The command line in a process of its own."""
    command = [sys.executable, "-m", "tritwise", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, timeout=120, **{"text": True, **options})


# train


def test_train(small_text: Path, tmp_path: Path, cli):
    flags = {"recipe": "tiny", "data": small_text, "steps": 4, "batch": 2, "ctx": 8, "width": 64, "depth": 1}
    flags |= {"rate": 0.02, "accum": 2, "seed": 7, "log-interval": 2, "eval-interval": 2, "save-interval": 2}
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    done = cli("train", *words, "--out", tmp_path / "run", "--set", "softcap=20", "--set", "keep = 1", "--json")
    assert done.code == 0 and len(done.out.splitlines()) == 1
    assert done.json == read_json(tmp_path / "run/result.json")
    assert done.json["val"].keys() == {"nats", "bpb", "bytes", "window", "stride"}
    assert done.json["artifact"].keys() == {"path", "bytes", "bpb_reread", "way", "streams"}
    saved = read_json(tmp_path / "run/config.json")
    for name, value in flags.items():
        key = name.replace("-", "_")
        where = saved if key == "recipe" else saved["model"] if key in saved["model"] else saved["train"]
        assert where[key] == (str(value) if key == "data" else value)
    assert saved["model"]["softcap"] == 20 and saved["train"]["keep"] == 1 and saved["train"]["save"] is True
    assert "val bpb" in done.err and "state while training" in done.err


def test_train_for_people(small_text: Path, tmp_path: Path, cli, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--data", small_text, "--steps", 2, "--batch", 2, "--width", 32, "--depth", 1, "--ctx", 8]
    done = cli("train", "--recipe", "tiny", *flags, "--no-save")
    assert done.code == 0 and not done.err
    for words in ("this model", "5-gram", "uniform", "2 steps", "(ternary)", "bits per byte, re-read", "runs/tiny"):
        assert words in done.out
    assert (tmp_path / "runs/tiny/model.tritwise").exists() and not (tmp_path / "runs/tiny/checkpoints").exists()
    floats = ["--set", "weights=float", "--set", "optimizer=adamw"]
    done = cli("train", "--recipe", "tiny", *flags, "--run", "other", *floats)
    assert done.code == 0 and "(float)" in done.out and "re-read" not in done.out
    assert (tmp_path / "runs/other/result.json").exists()
    done = cli("train", "--recipe", "tiny", *flags, "--run", "two", "--set", "weight_trits=2")
    assert done.code == 0 and "(2 trits each in matrices)" in done.out and "re-read" in done.out


# score


def test_score(trained: Path, text: Path, cli):
    whole = cli("score", trained, "--json")
    assert whole.code == 0 and len(whole.out.splitlines()) == 1
    result = read_json(trained / "result.json")["val"]
    assert {key: whole.json[key] for key in result} == result
    assert whole.json["data"] == "text.txt" and whole.json["split"] == "val"
    assert {"uniform", "unigram", "5-gram", "xz"} <= {row["name"] for row in whole.json["ladder"]}
    artifact = cli("score", trained / "model.tritwise", "--data", text, "--split", "val", "--json").json
    assert artifact == whole.json | {name: artifact[name] for name in ("seconds", "declared")}

    asked = cli("score", trained, "--data", text, "--split", "test", "--rule", "70/20/10", "--no-ladder", "--json").json
    assert asked["bytes"] == 6000 and asked["split"] == "test" and asked["ladder"] == []
    everything = cli("score", trained, "--data", text, "--window", 16, "--stride", 16, "--no-ladder", "--json").json
    assert everything["bytes"] == 60_000 and everything["split"] == "all"
    assert (everything["window"], everything["stride"]) == (16, 16)
    assert everything["nats"] == load(trained).score(text, window=16, stride=16).nats


def test_score_for_people(trained: Path, cli):
    told = cli("score", trained)
    assert told.code == 0 and not told.err
    assert re.search(r"text.txt val: \d\.\d{4} bits per byte, \d\.\d{4} nats, 6,000 bytes \(window 32, ", told.out)
    assert ", sliding, reset: never, adaptation: none, 0 extra bytes, " in told.out
    names = [name for name in ("uniform", "unigram", "this model", "5-gram") if name in told.out]
    assert sorted(names, key=told.out.index) == names  # from worst to best


def test_score_of_an_artifact_that_names_no_text(trained: Path, text: Path, tmp_path: Path, cli):
    from tritwise.ship import write_artifact

    write_artifact(read_artifact(trained / "model.tritwise")[0], tmp_path / "bare.tritwise")
    refused = cli("score", tmp_path / "bare.tritwise")
    assert refused.code == 2 and "does not say what it was trained on; name a text with --data" in refused.err
    assert cli("score", tmp_path / "bare.tritwise", "--data", text, "--no-ladder", "--json").json["bytes"] == 60_000


# sample


def test_sample(trained: Path, cli):
    artifact = trained / "model.tritwise"
    one = cli("sample", artifact, "--prompt", "ROMEO:", "--bytes", 40, "--seed", 3)
    assert one.code == 0 and one.out.startswith("ROMEO:") and not one.err
    assert cli("sample", trained, "--prompt", "ROMEO:", "--bytes", 40, "--seed", 3).out == one.out
    assert cli("sample", artifact, "--prompt", "ROMEO:", "--bytes", 40, "--seed", 4).out != one.out
    told = cli("sample", artifact, "--prompt", "ROMEO:", "--bytes", 40, "--seed", 3, "--json")
    assert told.json == {"prompt": "ROMEO:", "text": one.out[6:-1], "bytes": 40, "seed": 3}
    assert len(told.out.splitlines()) == 1


def test_sample_options(trained: Path, cli):
    def text(*flags: object) -> str:
        done = cli("sample", trained, "--bytes", 30, "--json", *flags)
        assert done.code == 0
        return done.json["text"]

    greedy = text("--temperature", 0)
    assert greedy == text("--temperature", 0, "--seed", 9) == text("--top-k", 1) != text("--temperature", 2)
    assert text("--prompt", "") and text("--bytes", 0) == ""
    assert cli("sample", trained, "--prompt", "\udcff", "--bytes", 3).code == 0


# ship


def test_ship(trained: Path, text: Path, tmp_path: Path, cli):
    out = tmp_path / "model.tritwise"
    done = cli("ship", trained, "--out", out, "--json")
    assert done.code == 0 and len(done.out.splitlines()) == 1
    assert done.json["bytes"] == out.stat().st_size and done.json["path"] == str(out)
    assert done.json["bits_per_weight"] == pytest.approx(8 * done.json["bytes"] / done.json["weights"])
    assert done.json["bpb_reread"] == cli("score", out, "--data", text, "--split", "val", "--json").json["bpb"]
    assert done.json["bpb_reread"] == read_json(trained / "result.json")["val"]["bpb"]
    assert set(done.json["streams"]) == {"trits", "scales"}
    told = cli("ship", trained, "--out", out)
    assert told.code == 0 and "bits a weight" in told.out and f"{done.json['bytes']:,} bytes" in told.out


def test_ship_after_more_training(copied: Path, cli, tmp_path: Path):
    assert cli("train", "--resume", "--out", copied, "--steps", 62).code == 0
    assert cli("ship", copied, "--out", tmp_path / "new").code == 0
    assert load(tmp_path / "new").about["steps"] == 62


# audit


def test_audit(trained: Path, cli):
    done = cli("audit", trained, "--json")
    assert done.code == 0 and len(done.out.splitlines()) == 1
    assert done.json["float_trainable"] == 0 and done.json["float_state_bytes"] == 0
    assert done.json["state_bytes_per_weight"] <= 2.06 + 2 / 64  # 2.05 from width 64 on: see test_train
    names = {row["name"] for row in done.json["tensors"]}
    assert {"embed.register", "embed.exponent", "embed.momentum", "blocks.1.mlp.down.row_exponent"} <= names
    for row in done.json["tensors"]:
        assert row.keys() == {"name", "role", "dtype", "shape", "numbers", "bytes", "trainable", "state"}
    told = cli("audit", trained)
    assert told.code == 0 and "0 trainable floats, 0 bytes of float state" in told.out and "embed.register" in told.out


def test_audit_of_width_64(small_text: Path, tmp_path: Path, cli):
    flags = ["--data", small_text, "--width", 64, "--depth", 1, "--ctx", 8, "--batch", 2, "--steps", 1]
    assert cli("train", "--recipe", "tiny", *flags, "--out", tmp_path).code == 0
    assert cli("audit", tmp_path, "--json").json["state_bytes_per_weight"] <= 2.05


# report and doctor


def test_report(copied: Path, tmp_path: Path, cli):
    pytest.importorskip("matplotlib")
    done = cli("report", copied, "--json")
    assert done.code == 0
    assert done.json["page"] == str(copied / "report/index.html") and Path(done.json["page"]).is_file()
    assert done.json["plots"] and all(Path(path).is_file() for path in done.json["plots"])
    told = cli("report", copied, "--out", tmp_path / "page")
    assert told.code == 0 and f"{tmp_path / 'page/index.html'} and" in told.out


def test_doctor(cli):
    found = cli("doctor", "--json")
    assert found.code == 0 and len(found.out.splitlines()) == 1
    assert set(found.json["checks"].values()) == {"ok"} and len(found.json["checks"]) >= 3
    assert found.json["tritwise"] == tritwise.__version__ and found.json["matmul_gflops"] > 0
    assert {"linear", "embedding", "update", "direction"} <= found.json["backends"].keys()
    assert found.json.keys() >= {"python", "torch", "platform", "cpu", "threads", "gpu", "compiler"}


def test_a_doctor_who_finds_something(cli, monkeypatch):
    from tritwise.cli import doctor

    def broken(*arguments):
        raise OSError("the disk is gone")

    monkeypatch.setattr(doctor, "write_artifact", broken)
    monkeypatch.setattr(doctor, "_matmul_rate", lambda: 1.0)
    told = cli("doctor")
    assert told.code == 2 and "BAD  an artifact survives the disk: OSError: the disk is gone" in told.out
    assert "ok   the bundled text is whole" in told.out
    again = cli("doctor", "--json")
    assert again.code == 2 and again.json["checks"]["an artifact survives the disk"] == "OSError: the disk is gone"


# help, options, versions


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command: str, cli):
    told = cli(command, "--help")
    assert told.code == 0 and told.out.startswith(f"Usage: tritwise {command}") and not told.err
    for option in typer.main.get_command(app).commands[command].params:  # type: ignore[attr-defined]
        assert option.opts[-1] in told.out.lower()
        assert getattr(option, "help", None), f"{command} {option.name} has no help"


def test_the_whole_and_the_empty_command_line(cli):
    for told in (cli(), cli("--help")):
        assert told.code == 0 and all(command in told.out for command in COMMANDS)
    assert tuple(typer.main.get_command(app).commands) == COMMANDS  # type: ignore[attr-defined]
    assert cli("--version").out == f"{tritwise.__version__}\n"


PROMISED = {
    "train": "--recipe --data --steps --batch --ctx --width --depth --rate --accum --seed --out --resume --run "
    "--log-interval --eval-interval --save-interval --no-save --set --json",
    "score": "--data --split --json",
    "sample": "--prompt --bytes --seed --json",
    "ship": "--out --json",
    "audit": "--json",
    "report": "--json",
    "doctor": "--json",
}


@pytest.mark.parametrize("command", PROMISED)
def test_promised_options_exist(command: str):
    parameters = typer.main.get_command(app).commands[command].params  # type: ignore[attr-defined]
    assert set(PROMISED[command].split()) <= {name for option in parameters for name in option.opts}


def test_help_and_version_do_not_wait_for_torch():
    code = "import sys\nfrom tritwise.cli import main\nassert main(sys.argv[1:]) == 0 and 'torch' not in sys.modules"
    for arguments in (["--version"], ["train", "--help"]):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


# processes and pipes


def test_the_console_script_and_a_machine_without_a_compiler(trained: Path, tmp_path: Path):
    script = shutil.which("tritwise", path=str(Path(sys.executable).parent))
    if script is None:
        pytest.skip("the package is not installed with its script")
    bare = {**os.environ, "PATH": str(tmp_path), "CC": "", "TRITWISE_CACHE": str(tmp_path), "TRITWISE_BACKEND": ""}
    done = subprocess.run(
        [script, "sample", trained, "--bytes", "2", "--json"], capture_output=True, text=True, env=bare
    )
    assert done.returncode == 0 and json.loads(done.stdout)["bytes"] == 2
    # What falls back says so, once and in one line each.
    told = done.stderr.splitlines()
    assert told and len(set(told)) == len(told)
    assert all(
        re.match(r"warning: \w+ falls back from cpu on cpu: there is no C compiler; install", line) for line in told
    )


@pytest.mark.parametrize("command", ["audit", "sample"])
def test_a_reader_that_leaves_early(command: str, trained: Path):
    process = subprocess.Popen(
        [sys.executable, "-m", "tritwise", command, str(trained)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()  # type: ignore[union-attr]
    told = process.stderr.read().decode()  # type: ignore[union-attr]
    process.wait(timeout=60)
    assert process.returncode in (0, 1)
    assert "Traceback" not in told and "Exception" not in told and "BrokenPipe" not in told


def test_a_terminal_that_knows_only_ascii(trained: Path):
    plain = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = run("sample", trained, "--prompt", "Åß€", "--bytes", 5, "--json", env=plain, text=False)
    assert done.returncode == 0 and not done.stderr
    assert json.loads(done.stdout)["prompt"] == "???" and done.stdout.isascii()


def test_an_error_in_a_process_of_its_own(tmp_path: Path):
    done = run("score", tmp_path / "none", "--json")
    assert done.returncode == 2
    assert done.stderr == f"error: {tmp_path / 'none'} does not exist; check the path\n"
    assert json.loads(done.stdout) == {"error": f"{tmp_path / 'none'} does not exist; check the path"}


# errors that are not the user's


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (MemoryError("80 PB"), 2, "error: there is not enough memory for this; choose a smaller --batch"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "error: there is not enough memory"),
        (RuntimeError("CUDA out of memory. Tried"), 2, "error: there is not enough memory"),
        (PermissionError(13, "Permission denied", "/a/b"), 2, "error: cannot write /a/b: its permissions"),
        (OSError(28, "No space left on device"), 2, "error: cannot write a file: no space left"),
        (KeyboardInterrupt(), 130, "stopped"),
        (BrokenPipeError(), 0, ""),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_what_may_go_wrong_anywhere(error: BaseException, code: int, told: str, monkeypatch, capfd):
    def fail(**_):
        raise error

    monkeypatch.setattr(module, "app", fail)
    monkeypatch.setattr(module.os, "dup2", lambda *_: None)
    assert main(["train", "--json"]) == code
    out, err = capfd.readouterr()
    assert err.startswith(told) and len(err.splitlines()) == (1 if told else 0)
    if code == 2:
        assert json.loads(out) == {"error": err.removeprefix("error: ").rstrip()}
    elif code == 130:
        assert json.loads(out) == {"interrupted": True}


def test_bugs_are_not_hidden(monkeypatch):
    def fail(**_):
        raise RuntimeError("a bug")

    monkeypatch.setattr(module, "app", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["audit"])


# output


def test_json_is_strict(capsys):
    output.print_json({"a": float("nan"), "b": [float("inf"), 1.5], "c": {"d": (1, -float("inf"))}, "e": "é"})
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {
        "a": None,
        "b": [None, 1.5],
        "c": {"d": [1, None]},
        "e": "é",
    }
