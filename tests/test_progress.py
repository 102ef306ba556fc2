"""Progress that tells the truth: the pace of the last minute, counted steps and adapters, minutes beforehand."""

from __future__ import annotations

import io
import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from plait import progress as module
from plait.progress import Progress
from plait.runs import forecast
from plait.runs.forecast import describe
from plait.runs.reporting import Shown
from plait.tasks import to_device
from tests.command import call, one_object


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test turns."""
    hands = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: hands[0])
    return hands


def left(stream: io.StringIO) -> str:
    return stream.getvalue().splitlines()[-1].partition("about ")[2].removesuffix(" left")


def test_the_time_left_follows_the_pace_of_the_last_minute(clock):
    """A machine that becomes ten times slower: the mean would go on promising what it was."""
    stream = io.StringIO()
    progress = Progress(1000.0, 1, stream=stream)
    progress.start("train", 1000.0)
    for second in range(1, 101):  # 5 a second
        clock[0] += 1
        progress.within(5 * second / 1000)
    assert left(stream) in (
        "1 min 40 s",
        "1 min 42 s",
        "1 min 44 s",
        "1 min 46 s",
        "1 min 48 s",
        "1 min 50 s",
        "1 min 52 s",
    )
    for second in range(1, 121):  # now 0.5 a second: of 500 there are 440 left after two minutes
        clock[0] += 1
        progress.within((500 + 0.5 * second) / 1000)
    shown = left(stream)
    assert shown.startswith(("14 min", "15 min")), shown  # 880 s; by the mean of all it is 172 s


def test_a_job_that_stalls_is_told_by_all_that_was_done(clock):
    stream = io.StringIO()
    progress = Progress(100.0, 1, stream=stream, _started=clock[0])
    progress.start("train", 100.0)
    clock[0] += 10
    progress.within(0.5)
    for _ in range(20):
        clock[0] += 15
        progress.within(0.5)
    assert left(stream) == "5 min 10 s"  # 50 took 310 s


def test_little_work_tells_nothing(clock):
    stream = io.StringIO()
    progress = Progress(1000.0, 1, stream=stream)
    progress.start("train", 1000.0)
    clock[0] += 30
    progress.within(0.001)
    assert "left" not in stream.getvalue()


def test_a_job_that_is_ended_twice_counts_once(clock):
    """The end of a wave and the start of the next job both end what ran before."""
    stream = io.StringIO()
    report = Shown(Progress(100.0, 2, stream=stream, _started=clock[0]))
    report.begin("first", 50.0)
    clock[0] += 10
    report.progress.finish()
    report.begin("second", 50.0)
    assert left(stream) == "10 s"


def test_jobs_done_together_and_steps_are_counted(clock):
    stream = io.StringIO()
    report = Shown(Progress(58.0, 58, stream=stream))
    report.begin("statistics", 20.0, 20)
    report.begin("training 16 adapters together", 16.0, 16)
    clock[0] += 20
    report.within(40, 200)
    report.begin("scores", 1.0)
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("[1-20/58] statistics") and lines[1].startswith(
        "[21-36/58] training 16 adapters together"
    )
    assert "step 40 of 200, about" in lines[2] and lines[3].startswith("[37/58] scores")


def test_a_plan_tells_minutes_and_measures_only_what_is_to_be_done(capsys, recipe_file, tiny_recipe, tmp_path):
    code, out, _ = call(capsys, "plan", recipe_file, "--out", tmp_path / "run")
    assert code == 0 and "on this machine (" in out and "ms a row, as it was just timed" in out
    code, out, _ = call(capsys, "plan", recipe_file, "--out", tmp_path / "run", "--json", "--no-measure")
    found = one_object(out)
    assert code == 0 and found["seconds"] is None and found["out"] == str(tmp_path / "run")
    measured = describe(tiny_recipe("bert"), tmp_path / "run", measure=True)
    assert measured.seconds == pytest.approx(measured.seconds_per_row * measured.forward_rows, rel=0.01)
    for architecture in ("llama", "t5"):
        assert describe(tiny_recipe(architecture), tmp_path / architecture, measure=True).seconds > 0


def test_a_slow_machine_is_timed_on_a_few_rows(tiny_recipe, tmp_path, monkeypatch):
    """Where four rows take half a minute (bfloat16 on a CPU that has none), a batch is not waited for."""
    seen, clock = [], itertools.count(0, 30)
    monkeypatch.setattr(forecast, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr(
        forecast, "to_device", lambda batch, device: seen.append(len(batch["input_ids"])) or to_device(batch, device)
    )
    found = describe(tiny_recipe("bert"), tmp_path / "run", measure=True)
    assert seen and max(seen) == 4 and found.seconds_per_row == 30 / 4


def test_eval_and_init_show_what_they_do_and_can_be_quiet(capsys, recipe_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for task in ("topic", "grade"):
        assert (
            call(capsys, "stats", "--recipe", recipe_file, "--task", task, "--out", f"{task}.stats.safetensors")[0] == 0
        )
    start = ["init", "--own", "topic.stats.safetensors", "--others", "grade.stats.safetensors", "--rank", "2"]
    code, _, err = call(capsys, *start, "--out", "start")
    assert code == 0 and "[1/1] contrastive of topic" in err and "solved" in err
    assert call(capsys, *start, "--out", "start2", "--quiet")[2] == ""
    code, _, _ = call(capsys, "train", "start", "--recipe", recipe_file, "--task", "topic", "--out", "topic", "--quiet")
    assert code == 0
    code, out, err = call(capsys, "eval", "topic", "--recipe", recipe_file, "--task", "topic")
    assert code == 0 and "[1/1] topic" in err and "1 adapter scored" in err and "accuracy" in out
    assert call(capsys, "eval", "topic", "--recipe", recipe_file, "--task", "topic", "--quiet")[2] == ""


def test_a_choice_tells_how_long_these_texts_take(monkeypatch, clock):
    from plait.fidelity import score

    said: list[str] = []
    monkeypatch.setattr(score.time, "monotonic", lambda: clock[0])
    for _ in score._reported([type("P", (), {"name": n})() for n in "abc"], 3, said.append):
        clock[0] += 30
    assert said == [
        "  texts of a (1 of 3), about 1 min 0 s left of these",
        "  texts of b (2 of 3), about 30 s left of these",
        "  texts of c (3 of 3)",
    ]


def test_json_of_a_plan_is_one_object(capsys, recipe_file, tmp_path):
    _, out, _ = call(capsys, "plan", recipe_file, "--out", tmp_path / "run", "--json")
    assert {"seconds", "seconds_per_row", "forward_rows"} <= json.loads(out).keys() and not Path(
        tmp_path / "run"
    ).exists()
