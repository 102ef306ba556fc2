"""From its first second on a choice says what it is at: reading, loading and timing take as long as some choices do."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from plait.advice import advise
from plait.choosing import auto, auto_folders
from plait.choosing.auto import AutoSettings
from plait.choosing.auto_folders import merge_auto_folders
from plait.fidelity import arguments, texts
from tests.command import call
from tests.test_hub import write


@pytest.fixture
def lines_before(monkeypatch) -> Callable[..., list[int]]:
    """lines_before(said, module, "name", ...) -> how many lines were there when each was called first; it is called as it was."""

    def watch(said: list[str], *places) -> dict[str, int]:
        seen: dict[str, int] = {}
        for module, name in places:
            real = getattr(module, name)

            def called(*args, _real=real, _name=name, **options):
                seen.setdefault(_name, len(said))
                return _real(*args, **options)

            monkeypatch.setattr(module, name, called)
        return seen

    return watch


def test_each_of_the_first_steps_has_its_line(make_panel, tmp_path, lines_before):
    panel, said = make_panel(texts=4), []
    folders = [str(write(tmp_path / p.name, p.adapter)) for p in panel.parts]
    seen = lines_before(said, (auto_folders, "held_fingerprint"), (auto, "ready_panel"), (auto, "told"))
    settings = AutoSettings(methods=("task_arithmetic",), scales=(0.5,), refine=0, fit=False)
    merge_auto_folders(
        folders, tmp_path / "out", base=panel.base, texts=panel.texts, settings=settings, on_progress=said.append
    )
    steps = [seen[name] for name in ("held_fingerprint", "ready_panel", "told")]
    assert 0 < steps[0] < steps[1] < steps[2], said
    assert said[steps[2]].startswith("about ")


@pytest.mark.parametrize("command", [["merge", "auto"], ["advise"]])
def test_the_command_line_speaks_before_it_reads(command, make_panel, tmp_path, monkeypatch, capsys):
    """Before anything is imported that takes a while, too; the time is counted from there."""
    panel = make_panel(texts=4)
    folders = [str(write(tmp_path / p.name, p.adapter)) for p in panel.parts]
    (tmp_path / "one.txt").write_text("one\ntwo\n")
    last = ["--out", str(tmp_path / "out")] * (command[0] == "merge")
    written: list[str] = []

    class Stop(Exception):
        pass

    def reading(*_, **__):
        written.append(capsys.readouterr().err)
        raise Stop

    monkeypatch.setattr(texts, "parse_files", reading)
    monkeypatch.setattr(arguments, "split_base", reading)
    asked = [*command, panel.base.name, *folders, "--text", f"one={tmp_path / 'one.txt'}", *last]
    call(capsys, *asked)
    call(capsys, *asked, "--quiet")
    assert written == ["[0 s] reading adapters and texts\n", ""]


def test_advice_says_that_it_loads_and_times(make_panel, monkeypatch):
    panel, said = make_panel(texts=4), []

    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    monkeypatch.setattr(advise, "told", stop)
    with pytest.raises(Stop):
        advise.advise([p.adapter for p in panel.parts], panel.base, panel.texts, on_progress=said.append)
    assert [line.partition(" ")[0] for line in said] == ["loading", "timing"]
