"""What stands on the command line: the base, adapters by folder, file and name."""

from __future__ import annotations

import pytest

from plait.errors import InputError, UsageError
from plait.fidelity.arguments import split_base
from tests.panels import folders_of
from tests.tiny import save_model


def test_what_is_given_is_told_apart(tiny_base, make_panel, tmp_path):
    base = save_model(tmp_path / "base", "bert")
    one, two = folders_of(make_panel(), tmp_path)
    assert split_base([one, f"x={two}"]) == (None, [one, f"x={two}"])
    found, folders = split_base([str(base), one], "cpu")
    assert found is not None and found.name == str(base) and folders == [one]
    with pytest.raises(InputError, match=r"no adapter_config.json in it"):
        split_base([str(base), one, str(tmp_path)])
    with pytest.raises(InputError, match="neither a folder nor the base that the adapters name"):
        split_base([str(tmp_path / "none"), one])
    hub, _ = split_base(["somebody/bert", one])
    assert hub is not None and hub.name == "somebody/bert"
    with pytest.raises(InputError, match="no such adapter"):
        split_base([one, str(tmp_path / "none")])
    (tmp_path / "kohya.safetensors").touch()
    assert split_base([str(tmp_path / "kohya.safetensors"), one])[0] is None
    for wrong in ([], [str(base)]):
        with pytest.raises(UsageError, match="no adapters"):
            split_base(wrong)
