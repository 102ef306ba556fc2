"""A run whose fleet was ended while it wrote its adapters writes the rest of them; it trains none of them again."""

from __future__ import annotations

import threading

import pytest

from plait.adapters.peft_format import read_adapter
from plait.runs.run import run
from plait.training import fleet
from plait.training.batched import BatchedAdapters


class Stop(Exception):
    pass


def test_what_is_trained_and_not_written_is_written_by_the_next_call(tiny_recipe, tmp_path, monkeypatch):
    recipe = tiny_recipe(tasks=["topic", "pairs"], arms=["kaiming", "gaussian"], merges=["ties"], fleet="always")
    out, real, written, both = tmp_path / "out", fleet._write, [], threading.Event()

    def breaking(member, *rest):
        if "gaussian" in member.out.parts:
            assert both.wait(60)
            raise Stop
        real(member, *rest)
        if written.append(member.out) or len(written) == 2:
            both.set()

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(fleet, "_write", breaking)
        run(recipe, out, quiet=True)
    done = sorted(p.name for p in (out / "adapters" / "kaiming" / "seed-0").iterdir() if not p.name.startswith("."))
    assert done == ["pairs", "topic"] and list((out / "adapters").glob("*/*/.fleet-*"))
    with monkeypatch.context() as patch:
        patch.setattr(BatchedAdapters, "step", lambda *_: pytest.fail("trained again"))
        assert run(recipe, out, quiet=True).finished
    assert not list((out / "adapters").glob("*/*/.fleet-*"))
    run(recipe, tmp_path / "straight", quiet=True)
    for task in done:
        one, two = (
            read_adapter(place / "adapters" / "gaussian" / "seed-0" / task) for place in (out, tmp_path / "straight")
        )
        assert all(f.B.equal(two.modules[m].B) and f.A.equal(two.modules[m].A) for m, f in one.modules.items())
