"""Manifests and JSON from anywhere: strict, bounded, and compared key by key."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from plait.disk import store
from plait.disk.manifest import require_wanted
from plait.disk.store import MANIFEST, identity, is_done, read_json, read_manifest
from plait.errors import InputError, UsageError
from tests.conftest import resealed
from tests.test_store import OLD, make

# --- manifests and JSON -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schema", [0, 2, "1", None])
def test_manifests_of_other_versions_are_refused(tmp_path, schema):
    out = make(tmp_path / "out")
    resealed(out, schema=schema)
    with pytest.raises(InputError, match="this plait reads 1") as raised:
        is_done(out, OLD)
    assert MANIFEST in str(raised.value) and raised.value.exit_code == 3


@pytest.mark.parametrize(
    "text",
    ["[]", "{}", "null", '{"schema": 1, "result": []}', '{"schema": 1, "files": 3}', '{"schema": 1, "options": "x"}'],
)
def test_what_is_no_manifest(tmp_path, text):
    out = make(tmp_path / "out")
    (out / MANIFEST).write_text(text)
    with pytest.raises(InputError, match="not a plait manifest"):
        read_manifest(out)


BAD_JSON = {
    "not UTF-8": b'{"a": "\xe9"}',
    "not valid JSON": b'{"a": 1',
    "duplicate key": b'{"a": 1, "a": 2}',
    "not valid JSON: ": b"[" * 200_000,
    "bytes": b" " * 101,
    "Exceeds the limit": b'{"a": ' + b"9" * 5000 + b"}",
}


@pytest.mark.parametrize("message", BAD_JSON)
def test_bad_json_is_named(tmp_path, message):
    path = tmp_path / "x.json"
    path.write_bytes(BAD_JSON[message])
    with pytest.raises(InputError, match=message) as raised:
        read_json(path, limit=100 if message == "bytes" else 1 << 20)
    assert str(path) in str(raised.value)


def test_json_from_odd_files(tmp_path):
    (tmp_path / "bom.json").write_bytes(b'\xef\xbb\xbf{"a": "\xc3\xa9"}')
    assert read_json(tmp_path / "bom.json") == {"a": "é"}
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("pipe", "loop", "absent", "."):
        with pytest.raises(InputError, match=r"no such file|not a regular file"):
            read_json(tmp_path / name)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(VALUES)
def test_equal_values_have_one_hash_and_one_text(value):
    assert json.loads(store.canonical_json(value)) == value
    shuffled = dict(reversed(value.items())) if isinstance(value, dict) else value
    assert store.sha256_json(shuffled) == store.sha256_json(value)


@example({"a": None}, {})
@example({"a.b": 1}, {"a": {"b": 1}})
@given(
    st.dictionaries(st.text(max_size=5), VALUES, max_size=5), st.dictionaries(st.text(max_size=5), VALUES, max_size=5)
)
def test_differences_are_none_exactly_between_equals(a, b):
    one, two = identity("s", a), identity("s", b)
    assert store.differences(one, one) == []
    assert bool(store.differences(one, two)) == (one != two)


def test_settings_beyond_the_sixth_are_counted():
    for count, end in ((6, "f: not recorded -> 0 (choose"), (8, "f: not recorded -> 0; and 2 more (choose")):
        with pytest.raises(UsageError) as raised:
            require_wanted(Path("out"), {"z": 0}, {"z": 0, **dict.fromkeys("abcdefgh"[:count], 0)})
        assert "exists with other settings: " + "; ".join(
            f"{k}: not recorded -> 0" for k in "abcde"
        ) + f"; {end}" in str(raised.value)
