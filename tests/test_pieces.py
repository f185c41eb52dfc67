"""A small text out of a large one: every piece is where it is told, and none that is scored is learned."""

import numpy as np
import pytest

from tritwise.errors import UserError

LENGTHS = [(90_000_000, 850_000, 200_000), (1000, 400, 100), (997, 300, 70)]


@pytest.mark.parametrize(("length", "train", "score"), LENGTHS)
def test_pieces_lie_apart(benchmark_script, length, train, score):
    pieces, piece = benchmark_script("pieces"), 5000 if length > 1000 else 10
    learned, held = pieces.places(length, train, score, piece)
    owners = np.zeros(length, int)
    for at in (*learned, *held):
        owners[at : at + piece] += 1
    assert owners.max() == 1  # no byte twice
    assert owners.sum() == train + score  # and none lost at the end
    assert max(np.diff(learned)) - min(np.diff(learned)) <= 1  # from all over the text


def test_pieces_that_meet_are_refused(benchmark_script):
    pieces = benchmark_script("pieces")
    with pytest.raises(UserError, match="would meet"):
        pieces.places(1000, 600, 100, 10)  # spans of 16: a piece of 10 and half of one more
    with pytest.raises(UserError, match="multiples"):
        pieces.places(1000, 405, 100, 10)
    for begins in ([0, 9], [50, 20, 55], [0, 95]):
        with pytest.raises(UserError, match="would meet"):
            pieces.check_apart(begins, 10, 100)
    pieces.check_apart([90, 0, 10], 10, 100)  # side by side is apart


def test_the_text_and_its_split(benchmark_script, tmp_path, capsys):
    text, out = tmp_path / "text.bin", tmp_path / "pieces.bin"
    text.write_bytes(bytes(range(200)) * 5)
    asked = [str(text), str(out), "--train", "200", "--score", "50", "--piece", "10"]
    assert benchmark_script("pieces").main([*asked, "--of", "900"]) == 0
    assert f"--data {out} --split first:200,last:50" in capsys.readouterr().out
    learned, held = benchmark_script("pieces").places(900, 200, 50, 10)
    whole = text.read_bytes()
    assert out.read_bytes() == b"".join(whole[at : at + 10] for at in (*learned, *held))
    assert benchmark_script("pieces").main([*asked, "--of", "300"]) == 2  # no room between them
    assert "would meet" in capsys.readouterr().err
