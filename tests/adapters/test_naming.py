"""Names that become folders, on any system."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.adapters.naming import checked_name, distinct_names
from plait.errors import UsageError

HOSTILE = [
    "", ".", "..", "../x", "/abs", "a/b", "a\\b", "x" * 300, "界" * 90, "a\nb", "a\x1b[31mb", "<script>", ".hidden", "_x", "-x",
    "a b", "a:b", "a*", "x.", "a\x00b", "con/", "\u202ex", "a\u200bb",
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_hostile_names_are_refused_in_printable_words(name):
    with pytest.raises(UsageError, match="cannot name a folder") as raised:
        checked_name(name, "task")
    assert str(raised.value).isprintable() and len(str(raised.value)) < 400


@pytest.mark.parametrize("name", ["sst2", "a", "Größe", "任务-1", "v1.2+x_y", "x" * 100])
def test_good_names_stay(name):
    assert checked_name(name) == unicodedata.normalize("NFC", name)


@pytest.mark.parametrize(
    "pair", [("a", "a"), ("RTE", "rte"), ("Größe", unicodedata.normalize("NFD", "GRÖSSE")), ("ﬁ", "fi")]
)
def test_names_that_collide_somewhere(pair):
    with pytest.raises(UsageError, match="collide"):
        distinct_names(pair, "arm")


@given(st.text(max_size=30))
def test_a_checked_name_is_one_path_component_and_stays_itself(text):
    try:
        name = checked_name(text)
    except UsageError:
        return
    assert checked_name(name) == name and "/" not in name and name not in (".", "..") and len(name.encode()) <= 200
