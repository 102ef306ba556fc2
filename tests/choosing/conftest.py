"""A choice that was begun and did not end."""

from __future__ import annotations

import pytest

from plait.choosing.auto_settings import AutoSettings
from plait.learning import checkpoints
from tests.choosing.ended import Begun, Killed, killed_after
from tests.panels import folders_of


@pytest.fixture
def begun(make_panel, tmp_path, monkeypatch, untimed):
    """A run that was ended when its weights were learnt: called, it goes on with other settings, if any, and says what it does."""
    panel = make_panel(texts=18)
    few = AutoSettings(methods=("tsv",), scales=(0.4,), refine=2, fit=False, max_length=24)
    run = Begun(panel, folders_of(panel, tmp_path), tmp_path, few)
    with monkeypatch.context() as once:
        once.setattr(checkpoints, "SHARE", 1e-9)  # the first adapter's texts, both rounds, the weights
        killed_after(once, 4)
        with pytest.raises(Killed):
            run()
    return run
