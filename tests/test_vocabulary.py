"""The vocabulary of 288: any bytes come back unchanged, specials have fixed ids and are never mistaken for bytes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tritwise.data import VOCABULARY, Special
from tritwise.data.vocabulary import BYTES, decode, encode, text_of
from tritwise.errors import UserError

SPECIALS = st.sampled_from(Special)


def test_bytes_and_specials_fill_288_ids():
    assert VOCABULARY == 288 and BYTES == 256
    assert sorted(Special) == list(range(256, 288))
    assert len(Special.__members__) == 32  # no two names for one id


def test_ids_never_change():
    """Shipped models hold them: a name may replace a RESERVED one, nothing else."""
    fixed = {"PAD": 256, "BOS": 257, "EOS": 258, "USER": 260, "ASSISTANT": 261, "TOOL": 262, "CODE_BEGIN": 268}
    fixed |= {"IMAGE_BEGIN": 272, "IMAGE_END": 273, "IMAGE_SLOT": 274, "AUDIO_BEGIN": 275, "AUDIO_SLOT": 277}
    assert {name: int(Special[name]) for name in fixed} == fixed
    assert {name for name in Special.__members__ if name.endswith("_BEGIN")} == {
        name.replace("_END", "_BEGIN") for name in Special.__members__ if name.endswith("_END") and name != "TURN_END"
    }


@given(st.binary(max_size=300))
def test_any_bytes_come_back(data):
    ids = encode(data)
    assert ids.dtype == np.int64 and ids.tolist() == list(data)
    assert decode(ids) == ([data] if data else [])
    assert text_of(ids) == data


@given(st.lists(st.one_of(st.binary(min_size=1, max_size=5), st.text(min_size=1, max_size=5), SPECIALS), max_size=9))
def test_any_mixture_comes_back(parts):
    ids = encode(*parts)
    assert np.array_equal(encode(*decode(ids)), ids)
    assert all(type(part) in (bytes, Special) for part in decode(ids))
    plain = [part.encode() if isinstance(part, str) else part for part in parts if not isinstance(part, Special)]
    assert text_of(ids, stop=()) == b"".join(plain)


def test_runs_and_specials_in_order():
    ids = encode(Special.BOS, Special.USER, "né", b"\x00\xff", Special.TURN_END, "x")
    assert ids.tolist() == [257, 260, 110, 195, 169, 0, 255, 263, 120]
    assert decode(ids) == [Special.BOS, Special.USER, b"n\xc3\xa9\x00\xff", Special.TURN_END, b"x"]


def test_text_ends_where_asked():
    ids = encode(Special.BOS, "one", Special.EOS, "two", Special.PAD, Special.PAD)
    assert text_of(ids) == b"one"
    assert text_of(ids, stop=(Special.PAD,)) == b"onetwo"
    assert encode().shape == (0,) and text_of(encode()) == b""


@pytest.mark.parametrize("wrong", [-1, 288, 10**6])
def test_an_id_outside_is_refused(wrong):
    with pytest.raises(UserError, match=f"no symbol {wrong}; ids go from 0 to 287"):
        decode([65, wrong])
