"""The whole line: six architectures, a killed run, other settings, what is reused, and the numbers of the report."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from sklearn.metrics import accuracy_score

from plait.adapters.peft_format import read_adapter
from plait.adapters.tensors import read_tensors
from plait.disk.store import MANIFEST, read_manifest, sha256_file
from plait.errors import EnvironmentFault, InputError, RunError, UsageError
from plait.recipes.recipe_file import parse_recipe
from plait.report.line import report_again, run
from plait.runs.folder import keep
from plait.runs.forecast import StageCount, describe
from plait.runs.inputs import INPUTS_FILE
from plait.runs.layout import Layout
from plait.runs.stages import ANSWERS_FILE
from plait.trying.answers import tried
from plait.trying.inputs import trial_of
from plait.trying.records import Prompts, TrySettings
from tests.tiny import ARCHITECTURES

FAST = {"arms": ["osrm"], "merges": ["task_arithmetic"]}
SCALED = {"arms": ["kaiming"], "merges": ["task_arithmetic"], "evaluation": {"scales": [1.0], "resamples": 0}}


def snapshot(out: Path) -> dict[str, tuple[int, str]]:
    """Every file below a folder: modification time and hash."""
    return {
        str(p.relative_to(out)): (p.stat().st_mtime_ns, sha256_file(p))
        for p in sorted(out.rglob("*"))
        if p.is_file() and not p.name.endswith(".lock")
    }


def scores_of(out: Path) -> dict[str, bytes]:
    """Every answer of a run, and every score of a merge."""
    answers = {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob(ANSWERS_FILE))}
    merged = {str(p.relative_to(out)): read_manifest(p)["result"] for p in sorted(out.glob("merged/*/*/*"))}
    return answers | {k: repr([r["grid"], r["halves"]]).encode() for k, r in merged.items()}


# --- six architectures ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "architecture",
    [a if a in ("bert", "gpt2") else pytest.param(a, marks=pytest.mark.slow) for a in ARCHITECTURES],
)
def test_every_architecture_walks_the_line(architecture, tiny_recipe, tmp_path):
    out = tmp_path / "out"
    found = run(tiny_recipe(architecture), out, quiet=True)
    assert set(found["merged"]) == {"kaiming", "osrm", "contrastive"}
    assert all(set(m) == {"task_arithmetic", "ties"} for m in found["merged"].values())
    assert Path(found["report"]).is_file() and found["reused"] == 0
    answers = [t for p in out.rglob(ANSWERS_FILE) for t in read_tensors(p)[0].values()]
    assert answers and all(t.isfinite().all() for t in answers)
    best = read_adapter(Path(found["best"]))
    assert set(best.heads) == {"topic", "pairs", "grade"} and best.modules
    card = (out / "best/README.md").read_text()
    assert "| `grade` |" in card and "this merge | its adapter alone" in card and str(tmp_path) not in card
    asked = tried(trial_of(str(out / "best"), None, [], "cpu"), Prompts((("w1 w2", "w3"),)), TrySettings())
    assert [r.task for r in asked.rows] == ["grade", "pairs", "topic"] and asked.missing == ()
    assert str(tmp_path) not in (out / "best/plait.json").read_text()
    again = run(tiny_recipe(architecture), out, quiet=True)
    assert again["units"] == 0 and again["merged"] == found["merged"]


# --- killed, and started again ----------------------------------------------------------------------------------------


def start(recipe_file: Path, out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "plait", "run", str(recipe_file), "--out", str(out)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ})


def wait_for(path: Path, process: subprocess.Popen[bytes], seconds: float = 200.0) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, f"the run ended before {path.name} was there"
        assert time.monotonic() < end, f"no {path} after {seconds} s"
        time.sleep(0.005)


@pytest.mark.slow
@pytest.mark.ci_sample
def test_killed_and_started_again_gives_the_same_bits(tiny_recipe, tmp_path):
    recipe = tiny_recipe(arms=["osrm"], seeds=[1])
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe.model_dump(mode="json")), encoding="utf-8")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = start(file, killed)
    wait_for(killed / "adapters/osrm/seed-1/pairs" / MANIFEST, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = [p.parent for p in killed.rglob(MANIFEST) if ".staging" not in str(p)]
    assert finished and not (killed / "report").exists()
    before = {f: snapshot(f) for f in finished}
    found = run(recipe, killed, quiet=True)
    assert {f: snapshot(f) for f in finished} == before
    assert found["reused"] >= 1
    straight = run(recipe, whole, quiet=True)
    assert scores_of(killed) == scores_of(whole) != {}
    assert found["merged"] == straight["merged"] and found["recovered"] == straight["recovered"]
    weights = [p.relative_to(whole) for p in whole.rglob("*.safetensors")]
    assert all((whole / p).read_bytes() == (killed / p).read_bytes() for p in weights)
    assert not list(killed.rglob("*.staging")) and not list(killed.rglob(".*.checkpoints"))


def test_killed_in_the_middle_of_training_goes_on_from_a_checkpoint(tiny_recipe, tmp_path, monkeypatch):
    recipe = tiny_recipe(tasks=["topic"], **SCALED)
    seen = []

    def interrupted(self, fraction, said=""):
        seen.append(fraction)
        if 0.7 < fraction < 1:
            raise KeyboardInterrupt

    monkeypatch.setattr("plait.progress.Progress.within", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "a", quiet=True)
    assert list((tmp_path / "a").rglob("checkpoint-*")) and not list((tmp_path / "a/adapters").rglob(MANIFEST))
    monkeypatch.setattr("plait.progress.Progress.within", lambda self, fraction, said="": seen.append(fraction))
    seen.clear()
    run(recipe, tmp_path / "a", quiet=True)
    assert min(seen) > 0.5  # the first half was not trained again
    run(recipe, tmp_path / "b", quiet=True)
    assert scores_of(tmp_path / "a") == scores_of(tmp_path / "b") != {}


# --- other settings on the same output --------------------------------------------------------------------------------


def test_changed_settings_raise_and_change_nothing_then_overwrite_redoes_what_differs(tiny_recipe, tmp_path):
    out, two = tmp_path / "out", ["task_arithmetic", {"name": "ties", "options": {"density": 0.5}}]
    settings = {"tasks": ["topic", "grade"], "arms": ["osrm"]}
    run(tiny_recipe(**settings, merges=two), out, quiet=True)
    before = snapshot(out)
    two[1] = {"name": "ties", "options": {"density": 0.9}}
    other = tiny_recipe(**settings, merges=two)
    with pytest.raises(UsageError, match=r"density: 0\.5 -> 0\.9") as raised:
        run(other, out, quiet=True)
    assert "ties" in str(raised.value.where) and "--overwrite" in str(raised.value.hint)
    assert snapshot(out) == before
    assert describe(other, out).stages["merge"] == StageCount(2, reused=1)
    assert snapshot(out) == before
    found = run(other, out, overwrite=True, quiet=True)
    assert found["units"] == 1
    changed = {k for k, v in snapshot(out).items() if before.get(k) != v}
    assert {k.split("/")[0] for k in changed} == {"merged", "report", "recipe.json", "runs.jsonl"} | {
        k.split("/")[0]
        for k in changed
        if k.startswith("best")  # as the other merge may be the better one
    }
    assert all("ties" in k for k in changed if k.startswith("merged"))


def test_changed_data_is_other_settings(tiny_recipe, tmp_path):
    recipe = tiny_recipe(tasks=["topic"], **SCALED)
    run(recipe, tmp_path / "out", quiet=True)
    before = snapshot(tmp_path / "out")
    with (tmp_path / "data/topic.train.csv").open("a") as f:
        f.write('"w1 w1 w2",1\n')
    with pytest.raises(UsageError, match="other settings"):
        run(recipe, tmp_path / "out", quiet=True)
    assert snapshot(tmp_path / "out") == before


def test_plan_changes_nothing_and_report_needs_a_finished_run(tiny_recipe, tmp_path):
    recipe, out = tiny_recipe(), tmp_path / "out"
    found = describe(recipe, out)
    assert not out.exists() and found.adapters == 9 and found.stages["train"] == StageCount(3, reused=0)
    with pytest.raises(InputError, match="no such file"):
        report_again(out)
    keep(Layout(recipe, out))
    with pytest.raises(RunError, match="not finished"):
        report_again(out)
    (out / INPUTS_FILE).unlink()
    with pytest.raises(InputError, match="of an earlier version"):
        report_again(out)
    with pytest.raises(UsageError, match=r"of an earlier version.*--overwrite"):
        run(recipe, out, quiet=True)


# --- two processes ----------------------------------------------------------------------------------------------------


def test_two_processes_on_one_output(tiny_recipe, tmp_path):
    recipe, out = tiny_recipe(tasks=["topic"], **SCALED), tmp_path / "out"
    keep(Layout(recipe, out))
    before = snapshot(out)
    code = "import sys, time; from plait.disk.store import locked; from pathlib import Path\n"
    code += "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code, str(out)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(EnvironmentFault, match="another process") as raised:
            run(recipe, out, quiet=True)
        assert raised.value.exit_code == 4 and str(out) in str(raised.value)
        assert snapshot(out) == before
    finally:
        holder.kill()
        holder.communicate()
    assert run(recipe, out, quiet=True)["reused"] == 0  # a killed holder holds nothing


# --- the numbers ------------------------------------------------------------------------------------------------------


def test_reported_numbers_follow_from_the_answers(tiny_recipe, tmp_path):
    tasks = ["topic", "pairs"]
    training = {"steps": 40, "batch_size": 8, "lr": 0.03, "head_lr": 0.05}
    recipe = tiny_recipe(tasks=tasks, arms=["kaiming"], merges=["task_arithmetic"], training=training)
    found = run(recipe, tmp_path / "out", quiet=True)
    alone, merged = (
        read_tensors(tmp_path / "out" / f / ANSWERS_FILE)[0]
        for f in ("scores/kaiming/seed-0/alone", "merged/kaiming/seed-0/task_arithmetic")
    )

    def mean(tensors, prefix):
        values = []
        for name, suffix in (("topic", "csv"), ("pairs", "jsonl")):
            text = (tmp_path / f"data/{name}.validation.{suffix}").read_text().splitlines()
            labels = np.array([int(t.rpartition(",")[2]) for t in text[1:]]) if suffix == "csv" else None
            labels = np.array([json.loads(t)["label"] for t in text]) if labels is None else labels
            order = np.random.default_rng([0, len(labels)]).permutation(len(labels))
            for half, part in zip("AB", np.array_split(order, 2), strict=True):
                values.append(accuracy_score(labels[np.sort(part)], tensors[f"{prefix}{name}.{half}"].numpy()))
        return 100 * float(np.mean(values))

    a, m, f = mean(alone, "alone."), mean(merged, ""), mean(alone, "floor.")
    assert found["individual"]["kaiming"] == pytest.approx(a) and found["floor"] == pytest.approx(f)
    assert found["merged"]["kaiming"]["task_arithmetic"] == pytest.approx(m)
    assert a - f >= 1.0, "the tiny adapters did not learn, so there is no ratio to check"
    assert found["recovered"]["kaiming"]["task_arithmetic"] == pytest.approx((m - f) / (a - f))


def test_the_scale_is_chosen_on_the_other_half_alone(tiny_recipe, tmp_path):
    run(tiny_recipe(tasks=["topic", "grade"], **FAST), tmp_path / "out", quiet=True)
    scored = read_manifest(tmp_path / "out/merged/osrm/seed-0/task_arithmetic")["result"]
    seen = {(r["scale"], r["part"]): np.mean(list(r["tasks"].values())) for r in scored["grid"]}
    assert set(seen) == {(s, half) for s in (0.5, 1.0) for half in "AB"}
    for reported, other in (("A", "B"), ("B", "A")):
        half = scored["halves"][reported]
        assert half["scale"] == max((0.5, 1.0), key=lambda s: seen[s, other])
        assert half["selected"] == seen[half["scale"], other]
    both = max((0.5, 1.0), key=lambda s: seen[s, "A"] + seen[s, "B"])
    assert read_manifest(tmp_path / "out/best")["result"]["scale"] == both


def test_text_tasks_beside_classes_are_refused_before_anything_is_computed(tiny_recipe, tmp_path):
    raw = tiny_recipe().model_dump(mode="json")
    raw["tasks"][1] |= {"kind": "causal"}
    with pytest.raises(UsageError, match="tasks of one form"):
        run(parse_recipe(raw, "tiny"), tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small disk")
def test_a_disk_that_fills_up_is_told_and_the_run_goes_on_when_there_is_room(tiny_recipe, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", str(disk)], capture_output=True, check=False
    ).returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        file = tmp_path / "recipe.yaml"
        recipe = tiny_recipe(tasks=["topic"], **SCALED)
        file.write_text(yaml.safe_dump(recipe.model_dump(mode="json")), encoding="utf-8")
        command = [sys.executable, "-m", "plait", "run", str(file), "--out", str(disk / "out"), "--quiet", "--json"]
        codes = []
        for size in ("40k", "120k", "4m"):
            subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)
            ended = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
            codes.append(ended.returncode)
            assert "Traceback" not in ended.stderr and json.loads(ended.stdout)["schema"] == 1
        assert codes[0] == 4 and codes[-1] == 0 and set(codes) <= {0, 4}
        run(recipe, tmp_path / "roomy", quiet=True)
        assert scores_of(disk / "out") == scores_of(tmp_path / "roomy") != {}
    finally:
        subprocess.run(["umount", str(disk)], check=False)
