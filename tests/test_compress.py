"""compress and decompress: what comes back is what went in, and the file is as small as claimed; or they say why."""

import contextlib
import io
import math
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tritwise.compress import Report, compress, decompress
from tritwise.compress import archive as archive_module
from tritwise.compress import header as head
from tritwise.compress import lanes as lanes_module
from tritwise.compress import walk as walk_module
from tritwise.compress.coder import TOTAL, Damaged, RangeDecoder, RangeEncoder
from tritwise.compress.lanes import Lanes, divide, one_thread
from tritwise.compress.quantise import cumulative
from tritwise.data import open_bytes
from tritwise.errors import UserError
from tritwise.models import ByteLM, ModelConfig
from tritwise.score.protocol import stream_of
from tritwise.ship import write_artifact

# The coder


def code(tables: list[list[int]], symbols: list[int]) -> bytes:
    coder, out = RangeEncoder(), b""
    for table, symbol in zip(tables, symbols, strict=True):
        coder.encode([table[symbol]], [table[symbol + 1]])
        out += coder.take()
    return out + coder.finish()


def decode(data: bytes, tables: list[list[int]]) -> list[int]:
    coder = RangeDecoder(io.BytesIO(data).read)
    found = [coder.decode(table, 1, len(table))[0] for table in tables]
    coder.finish()
    return found


def drawn(seed: int, count: int) -> tuple[list[list[int]], list[int]]:
    """Tables of 2 to 5 symbols, some of them as lopsided as can be, and symbols that need not be likely."""
    draw = random.Random(seed)
    tables = []
    for _ in range(count):
        inner = {
            draw.choice([1, 2, TOTAL - 1, TOTAL // 2, draw.randrange(1, TOTAL)]) for _ in range(draw.randint(1, 4))
        }
        tables.append([0, *sorted(inner), TOTAL])
    return tables, [draw.randrange(len(table) - 1) for table in tables]


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32), st.integers(0, 60))
def test_symbols_come_back_and_cost_what_they_should(seed: int, count: int):
    tables, symbols = drawn(seed, count)
    data = code(tables, symbols)
    assert decode(data, tables) == symbols
    bits = sum(math.log2(TOTAL / (t[s + 1] - t[s])) for t, s in zip(tables, symbols, strict=True))
    assert bits - 1e-6 <= 8 * len(data) + 8 and 8 * len(data) < bits + 8 + 1e-6


def test_a_carry_runs_through_what_was_written():
    tables = [[0, TOTAL - 1, TOTAL]] * 40 + [[0, 1, TOTAL - 1, TOTAL]] * 3
    for last in ([0, 0, 0], [1, 1, 2], [2, 2, 2]):  # after a long run of 255s
        symbols = [1] * 40 + last
        assert decode(code(tables, symbols), tables) == symbols
    carries = 0
    for seed in range(100):
        coder = RangeEncoder()
        for table, symbol in zip(*drawn(seed, 60), strict=True):
            before = bytes(coder._out)
            coder.encode([table[symbol]], [table[symbol + 1]])
            carries += not bytes(coder._out).startswith(before)
    assert carries > 5  # so the random streams above have them too


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_no_changed_code_passes_for_the_right_one(data: st.DataObject):
    tables, symbols = drawn(data.draw(st.integers(0, 2**32)), data.draw(st.integers(1, 40)))
    whole = code(tables, symbols)
    kind = data.draw(st.sampled_from(["flip", "cut", "add"] if whole else ["add"]))
    place = data.draw(st.integers(0, max(0, len(whole) - 1)))
    changed = bytearray(whole)
    if kind == "flip":
        changed[place] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "cut":
        del changed[place:]
    else:
        changed += bytes([data.draw(st.integers(0, 255))])
    with contextlib.suppress(Damaged):
        assert decode(bytes(changed), tables) != symbols


def test_evenly_likely_bytes():
    coder = RangeEncoder()
    coder.encode_bytes(bytes(range(256)))
    data = coder.take() + coder.finish()
    assert len(data) <= 257
    decoder = RangeDecoder(io.BytesIO(data).read)
    assert decoder.decode_bytes(256) == bytes(range(256))
    decoder.finish()


# Probabilities as integers


def rows_of(seed: int, sharpness: float, count: int = 50, symbols: int = 256) -> torch.Tensor:
    noise = torch.randn(count, symbols, generator=torch.Generator().manual_seed(seed))
    return torch.log_softmax(sharpness * noise, dim=-1)


@pytest.mark.parametrize("sharpness", [0.0, 1.0, 4.0, 30.0, 1000.0])
def test_integers_hold_every_probability(sharpness: float):
    log_probs = rows_of(0, sharpness)
    table = cumulative(log_probs)
    shares = table.diff(dim=-1)
    assert table.shape == (50, 257) and table.dtype == torch.int64
    assert (table[:, 0] == 0).all() and (table[:, -1] == TOTAL).all() and (shares >= 1).all()
    p = log_probs.double().exp()
    assert ((shares / TOTAL - p).abs() <= 2e-4 * p + 258 / TOTAL).all()
    loss = (p * (log_probs.double() - (shares / TOTAL).log())).sum(-1).mean() / math.log(2)
    assert loss < 2.5e-5  # bits a byte: .001 % of a score of 2


def test_what_is_no_probability_gets_the_floor():
    log_probs = rows_of(1, 1.0)[:4]
    log_probs[0, 3], log_probs[1, 5], log_probs[2] = -math.inf, math.nan, math.nan
    shares = cumulative(log_probs).diff(dim=-1)
    assert shares[0, 3] == shares[1, 5] == 1
    assert (shares[2] == TOTAL // 256).all() and (shares.sum(-1) == TOTAL).all()


def test_spare_symbols_get_nothing():
    wide = rows_of(2, 1.0, symbols=300)
    alone = torch.log_softmax(wide[:, :256], dim=-1)
    assert (cumulative(wide) - cumulative(alone)).abs().max() <= TOTAL * 1e-4
    assert (cumulative(wide)[:, -1] == TOTAL).all()


# Lanes


def tiny(seed: int = 0, **shape: object) -> ByteLM:
    torch.manual_seed(seed)
    return ByteLM(ModelConfig(**({"width": 32, "depth": 1, "ctx": 16, "ngrams": 2} | shape))).eval()  # type: ignore[arg-type]


def probs_of(model: ByteLM, text: np.ndarray, lanes: int, jobs: int = 1, **shape: int) -> torch.Tensor:
    """log-probabilities [T, S, V] for a text [T, S]."""
    reader = Lanes(model, lanes, **({"window": 16, "stride": 8} | shape), jobs=jobs)
    reader.begin(torch.tensor([10]))
    found = []
    with one_thread():
        for row in torch.from_numpy(text.astype(np.int64)):
            found.append(reader.log_probs())
            reader.read(row)
    reader.close()
    return torch.stack(found)


def text_of(steps: int, lanes: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (steps, lanes), dtype=np.uint8)


@pytest.mark.parametrize(("window", "stride"), [(16, 8), (16, 16), (16, 1), (9, 4), (1, 1)])
def test_a_lane_is_a_stream(window: int, stride: int):
    model, text = tiny(), text_of(40, 3)
    found = probs_of(model, text, 3, window=window, stride=stride)
    for lane in range(3):
        stream = stream_of(model, window=window, stride=stride)
        expected = stream.read(torch.from_numpy(text[:, lane].astype(np.int64)))
        torch.testing.assert_close(found[:, lane], expected, rtol=0, atol=2e-5)


def test_a_model_without_a_cache_can_be_read():
    model, text = tiny(), text_of(40, 2)

    class Bare:
        context = 16

        def log_probs(self, ids: torch.Tensor) -> torch.Tensor:
            return model.log_probs(ids)

    torch.testing.assert_close(probs_of(Bare(), text, 2), probs_of(model, text, 2), rtol=0, atol=2e-5)  # type: ignore[arg-type]


def test_neither_jobs_nor_threads_change_a_bit(monkeypatch):
    monkeypatch.setattr(lanes_module, "BATCH", 3)
    model, text = tiny(), text_of(30, 8)
    expected = probs_of(model, text, 8)
    torch.set_num_threads(2)
    try:
        assert torch.equal(probs_of(model, text, 8, jobs=4), expected)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_divide():
    assert divide(10, 4) == [3, 3, 2, 2] and divide(0, 2) == [0, 0] and divide(6, 3) == [2, 2, 2]


# Files

TEXTS = {
    "text": bytes(open_bytes("shakespeare")[:800]),
    "all bytes": bytes(range(256)),
    "noise": np.random.default_rng(1).bytes(333),
    "one byte": b"x",
    "no byte": b"",
    "fewer than lanes": b"abcde",
    "as many as lanes": b"abcdefgh",
    "zeros": bytes(300),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """The artifact of a model that knows nothing."""
    path = tmp_path_factory.mktemp("model") / "model.tritwise"
    write_artifact(tiny(), path)
    return path


@pytest.fixture
def pack(model: Path, tmp_path: Path) -> Callable[..., tuple[Path, Report]]:
    """pack(text, …): a compressed file and its report."""

    def make(text: bytes, name: str = "packed", **options: object) -> tuple[Path, Report]:
        source = tmp_path / f"{name}.txt"
        source.write_bytes(text)
        out = tmp_path / name
        artifact = options.pop("model", model)
        return out, compress(source, out, artifact, **({"lanes": 8} | options))  # type: ignore[arg-type]

    return make


@pytest.mark.parametrize("embed", [False, True], ids=["reference", "embedded"])
@pytest.mark.parametrize("name", TEXTS)
def test_what_comes_back_is_what_went_in(name: str, embed: bool, pack, model: Path, tmp_path: Path):
    text = TEXTS[name]
    packed, report = pack(text, embed=embed)
    assert report.text == len(text) and report.file == packed.stat().st_size and report.embedded == embed
    assert report.lanes == max(1, min(8, len(text)))
    back = decompress(packed, tmp_path / "back", None if embed else model)
    assert (tmp_path / "back").read_bytes() == text
    assert back[:6] == report[:6] and back.claimed_bits is None
    added = model.stat().st_size + 3 if embed else 0
    assert report.file <= report.claimed_bits / 8 + report.header + added + 8


@pytest.mark.parametrize("lanes", [4, 32])
def test_a_trained_model_claims_what_the_file_holds(lanes: int, trained: Path, pack, tmp_path: Path):
    text = bytes(open_bytes("shakespeare")[60_000:62_000])
    artifact = trained / "model.tritwise"
    packed, report = pack(text, model=artifact, lanes=lanes)
    coded = 8 * (report.file - report.header - walk_module.CHECKSUM)
    assert report.claimed_bits < 4.5 * len(text)  # it did learn
    assert -8 < coded - report.claimed_bits < 8 + 1e-4 * report.claimed_bits
    assert report.lane_bits is not None or lanes == 32  # 32 lanes of 78 bytes: nothing but beginnings
    decompress(packed, tmp_path / "back", artifact)
    assert (tmp_path / "back").read_bytes() == text


def test_one_lane_claims_what_the_stream_scores(pack, model: Path):
    text = TEXTS["text"][:300]
    report = pack(text, lanes=1)[1]
    assert report.lane_bits == 0
    ids = torch.tensor(list(text))
    log_probs = stream_of(tiny()).read(ids)
    assert report.claimed_bits == pytest.approx(
        float(-log_probs.gather(1, ids[:, None]).double().sum()) / math.log(2), rel=1e-6
    )


def test_frames_go_on_from_the_one_before(pack, model: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(walk_module, "FRAME_BYTES", 400)
    monkeypatch.setattr(walk_module, "FRAME_LANE_BYTES", 40)
    sizes = []

    def watched(*arguments):
        read = reading(*arguments)
        return lambda count: sizes.append(count) or read(count)

    reading = walk_module.reading
    monkeypatch.setattr(walk_module, "reading", watched)
    packed, report = pack(TEXTS["text"])
    assert report.frames == 2 and max(sizes) <= 400  # memory is bounded by the frame, whatever the file's size
    pieces = []
    write = archive_module.atomic_write
    monkeypatch.setattr(
        archive_module, "atomic_write", lambda path, data: write(path, (pieces.append(len(p)) or p for p in data))
    )
    decompress(packed, tmp_path / "back", model)
    assert (tmp_path / "back").read_bytes() == TEXTS["text"] and sum(pieces) == 800 and max(pieces) <= 400


@pytest.mark.parametrize(("window", "stride"), [(0, 0), (16, 1), (5, 5), (1, 1)])
def test_window_and_stride_are_kept_in_the_file(window: int, stride: int, pack, model: Path, tmp_path: Path):
    packed, report = pack(TEXTS["text"][:400], window=window, stride=stride)
    assert (report.window, report.stride) == (window or 16, stride or 8)
    decompress(packed, tmp_path / "back", model)
    assert (tmp_path / "back").read_bytes() == TEXTS["text"][:400]


def test_the_same_file_whatever_the_threads(pack, model: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(lanes_module, "BATCH", 3)
    first = pack(TEXTS["all bytes"], "first", jobs=1)[0].read_bytes()
    assert pack(TEXTS["all bytes"], "again", jobs=1)[0].read_bytes() == first
    torch.set_num_threads(2)
    try:
        assert pack(TEXTS["all bytes"], "threads", jobs=3)[0].read_bytes() == first
        decompress(tmp_path / "first", tmp_path / "back", model, jobs=2)
    finally:
        torch.set_num_threads(1)
    assert (tmp_path / "back").read_bytes() == TEXTS["all bytes"]


def test_the_header_is_small(pack):
    _, report = pack(TEXTS["text"])
    assert report.header <= 17


def test_lanes_are_chosen_by_size_and_memory():
    cpu, small = torch.device("cpu"), ModelConfig(width=64, depth=2)
    chosen = [archive_module.choose_lanes(length, small, cpu) for length in (0, 1, 20_000, 2_000_000, 10**9)]
    assert chosen == [1, 1, 4, 256, 256]  # 4 KiB each: a context of 64
    assert archive_module.choose_lanes(20_000, ModelConfig(width=64, depth=2, ctx=512), cpu) == 2  # 8 KiB each
    assert archive_module.choose_lanes(10**9, small, torch.device("cuda")) == 1024
    large = ModelConfig(width=1024, depth=12, ctx=2048)  # 201 MB a lane
    assert archive_module.choose_lanes(10**9, large, cpu) == 5
    again = ModelConfig(width=1024, depth=12, ctx=2048, loops=2)  # 24 layers, each with its own
    assert archive_module.choose_lanes(10**9, again, cpu) == 2


def test_progress_is_told(pack, model: Path, tmp_path: Path):
    told: list[tuple[int, int]] = []
    packed, _ = pack(TEXTS["text"], progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (800, 800) and len(told) > 1
    told.clear()
    decompress(packed, tmp_path / "back", model, progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (800, 800) and len(told) > 1


# Damage


def refused(path: Path, out: Path, model: Path | None) -> str:
    """What decompress says, after checking that it left nothing behind."""
    before = set(out.parent.iterdir())
    with pytest.raises(UserError) as caught:
        decompress(path, out, model)
    assert set(out.parent.iterdir()) == before
    assert ";" in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.filterwarnings("ignore:.*was made with another")
def test_no_changed_byte_passes(pack, model: Path, tmp_path: Path):
    packed, _ = pack(TEXTS["text"][:40], lanes=8)
    whole, changed = packed.read_bytes(), tmp_path / "changed"
    for place in range(len(whole)):
        changed.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        refused(changed, tmp_path / "back", model)


def test_no_cut_or_lengthened_file_passes(pack, model: Path, tmp_path: Path):
    packed, _ = pack(TEXTS["text"][:40], lanes=8)
    whole, changed = packed.read_bytes(), tmp_path / "changed"
    for end in range(len(whole)):
        changed.write_bytes(whole[:end])
        refused(changed, tmp_path / "back", model)
    for more in (b"\0", b"\xff", whole):
        changed.write_bytes(whole + more)
        assert "does not give back the text" in refused(changed, tmp_path / "back", model)


def test_an_embedded_model_is_verified(pack, tmp_path: Path):
    packed, report = pack(TEXTS["text"][:60], embed=True)
    whole, changed = bytearray(packed.read_bytes()), tmp_path / "changed"
    whole[report.header + 2000] ^= 1
    changed.write_bytes(whole)
    assert "damaged or cut short in the model that it holds" in refused(changed, tmp_path / "back", None)
    changed.write_bytes(packed.read_bytes()[:3000])
    assert "damaged or cut short in the model that it holds" in refused(changed, tmp_path / "back", None)


def test_a_wrong_model_or_none(pack, model: Path, tmp_path: Path):
    packed, _ = pack(TEXTS["text"][:60])
    write_artifact(tiny(1), tmp_path / "other")
    assert "another model than" in refused(packed, tmp_path / "back", tmp_path / "other")
    assert "name it with --model" in refused(packed, tmp_path / "back", None)
    assert "does not exist" in refused(packed, tmp_path / "back", tmp_path / "none")


def test_files_that_are_none_of_ours(model: Path, tmp_path: Path):
    other = tmp_path / "other"
    for content, message in (
        (b"", "is empty; name a file"),
        (b"\xd3", "is not a compressed file"),
        (b"BZh91AY&SY", "is not a compressed file"),
        (model.read_bytes(), "is not a compressed file"),
        (head.MAGIC + b"\x20" + bytes(20), "has format 2 and this version reads 1"),
        (head.MAGIC + b"\x10" + b"\xff" * 20, "is damaged or cut short in its header"),
        (head.MAGIC + b"\x10" + bytes(20), "is damaged in its header"),
    ):
        other.write_bytes(content)
        assert message in refused(other, tmp_path / "back", model)
    assert "does not exist" in refused(tmp_path / "none", tmp_path / "back", model)
    assert "it is a folder" in refused(tmp_path, tmp_path / "back", model)


def test_a_header_made_by_hand_is_not_believed(pack, model: Path, tmp_path: Path):
    packed, _ = pack(TEXTS["text"][:60], lanes=4)
    about = head.parse(io.BytesIO(packed.read_bytes()).read, packed)
    body = packed.read_bytes()[len(head.spell(about)) :]
    for change in ({"length": 2**40}, {"length": 59}, {"lanes": 3}, {"window": 99}, {"stride": 17}, {"lanes": 1 << 17}):
        (tmp_path / "made").write_bytes(head.spell(about._replace(**change)) + body)
        refused(tmp_path / "made", tmp_path / "back", model)


def test_another_machine_is_warned_of(pack, model: Path, tmp_path: Path, monkeypatch):
    packed, _ = pack(TEXTS["text"][:60])
    monkeypatch.setattr(head, "software_mark", lambda: b"zz")
    with pytest.warns(UserWarning, match="made with another version of torch or Tritwise; if probabilities differ"):
        decompress(packed, tmp_path / "back", model)
    assert (tmp_path / "back").read_bytes() == TEXTS["text"][:60]
    monkeypatch.setattr(head, "machine_mark", lambda device: b"z")
    monkeypatch.setattr(walk_module, "cumulative", lambda log_probs: cumulative(log_probs.flip(-1)))
    with pytest.warns(UserWarning, match="Tritwise and another processor"):
        message = refused(packed, tmp_path / "back2", model)
    assert "it was made with another version of torch or Tritwise and another processor; decompress it" in message


def test_a_file_made_on_a_gpu_wants_one(pack, model: Path, tmp_path: Path, monkeypatch):
    packed, _ = pack(TEXTS["text"][:60])
    about = head.parse(io.BytesIO(packed.read_bytes()).read, packed)
    (tmp_path / "made").write_bytes(head.spell(about._replace(cuda=True)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "made on a GPU and torch sees none here" in refused(tmp_path / "made", tmp_path / "back", model)


def test_a_source_that_changes_is_noticed(pack, tmp_path: Path, monkeypatch):
    for size, message in ((900, "became shorter"), (700, "became longer")):
        monkeypatch.setattr(archive_module, "_size_of", lambda source, size=size: size)
        with pytest.raises(UserError, match=f"{message} while it was read; compress it when nobody writes to it"):
            pack(TEXTS["text"], message)
        assert not (tmp_path / message).exists()
    assert not list(tmp_path.glob(".tritwise-*"))


def test_what_compress_refuses(pack, model: Path, tmp_path: Path):
    (tmp_path / "there").write_bytes(b"mine")
    for options, message in (
        ({"name": "there"}, "is already there; name another file with --out"),
        ({"lanes": -1}, "lanes is -1; choose"),
        ({"lanes": 1 << 17}, "lanes is 131072; choose"),
        ({"window": 17}, "window 17 does not fit the model"),
        ({"stride": 17}, "stride 17 would skip"),
        ({"model": tmp_path / "there"}, "is not a Tritwise artifact"),
        ({"name": "no/where"}, "does not exist"),
    ):
        name = options.pop("name", "new")
        with pytest.raises((UserError, FileNotFoundError), match=message if name != "no/where" else None):
            pack(b"abc", name, **options)
        assert not (tmp_path / "new").exists()
    assert (tmp_path / "there").read_bytes() == b"mine"
    with pytest.raises(UserError, match=r"the folder .* does not exist"):
        compress(tmp_path / "there", tmp_path / "no" / "where", model)


# The command line


def test_commands(cli, trained: Path, small_text: Path, tmp_path: Path):
    packed, back = tmp_path / "small.txt.twz", tmp_path / "small.txt"
    done = cli("compress", small_text, "--model", trained, "--out", packed, "--lanes", 32, "--device", "cpu", "--json")
    assert done.code == 0, done.err
    told = done.json
    assert told["file"] == packed.stat().st_size < 3_000 == told["text"] and told["lanes"] == 32
    assert 0 < told["over_claim"] < 0.02  # 24 bytes of 1.3 kB
    done = cli("decompress", packed, "--model", trained / "model.tritwise", "--json")
    assert done.code == 0 and done.json["path"] == str(back)
    assert back.read_bytes() == small_text.read_bytes()
    done = cli("decompress", packed, "--model", trained, "--out", tmp_path / "again")
    assert done.code == 0 and "3,000 bytes" in done.out and "bits per byte, whole file" in done.out


def test_embedded_by_command(cli, trained: Path, small_text: Path, tmp_path: Path):
    packed = tmp_path / "packed"
    done = cli("compress", small_text, "--model", trained, "--out", packed, "--embed", "--lanes", 99, "--device", "cpu")
    assert done.code == 0 and "embedded" in done.out and "file over claim, without the model" in done.out
    assert cli("decompress", packed, "--out", tmp_path / "back").code == 0
    assert (tmp_path / "back").read_bytes() == small_text.read_bytes()


def test_bad_input_is_one_line(cli, trained: Path, small_text: Path, tmp_path: Path):
    packed = tmp_path / "packed"
    cli("compress", small_text, "--model", trained, "--out", packed, "--lanes", 99, "--device", "cpu")
    (tmp_path / "run").mkdir()
    out = ["--out", tmp_path / "new"]
    cases = {
        "does not end in .twz": ["decompress", packed, "--model", trained],
        "was made with the model": ["decompress", packed, *out],
        "is not a compressed file": ["decompress", small_text, *out],
        "is already there": ["compress", small_text, "--model", trained, "--out", packed],
        "Missing option": ["compress", small_text],
        "holds no artifact; finish the run": ["compress", small_text, "--model", tmp_path / "run", *out],
        "there is no device 'tpu'": ["compress", small_text, "--model", trained, "--device", "tpu", *out],
        "does not exist; check the path": ["compress", tmp_path / "none", "--model", trained, *out],
    }
    for message, command in cases.items():
        done = cli(*command)
        assert done.code == 2 and message in done.err and len(done.err.splitlines()) == 1, (message, done.err)
    assert not (tmp_path / "new").exists()
