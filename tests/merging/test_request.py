"""What the command line may ask of a merge, and what excludes each other."""

from __future__ import annotations

import gc

import pytest
import torch

from plait.adapters.lora import Adapter, LoraFactors
from plait.adapters.peft_format import write_adapter
from plait.cli import main
from plait.disk.store import identity, staged_folder
from plait.errors import UsageError
from plait.merging import MergeRequest, MergeSpec, answer


@pytest.fixture
def folders(tmp_path):
    made = []
    for seed, name in enumerate(("a", "b")):
        g = torch.Generator().manual_seed(seed)
        modules = {"layer.q": LoraFactors(torch.randn(2, 8, generator=g), torch.randn(6, 2, generator=g), 2.0)}
        with staged_folder(tmp_path / name, identity("test", {})) as folder:
            write_adapter(folder, Adapter(name, "base", modules, task_type="CAUSAL_LM"))
        made.append(str(tmp_path / name))
    return made


@pytest.mark.parametrize(
    "extra",
    [
        {"per_task": True, "curve": True},
        {"per_task": True, "method": "emr", "scale": 0.5},
        {"per_task": True, "method": "emr", "options": {"x": 1}},
        {"per_task": True, "method": "tsv"},
        {"curve": True, "rank": 2},
        {"method": "tsv", "scale": 0.5, "statistics": {"a": "a.stats.safetensors"}},
        {"method": "linear", "statistics": {"a": "a.stats.safetensors"}},
        {"statistics": {"a": "a.stats.safetensors"}, "scale": 1.0},
    ],
)
def test_contradictions_are_refused(folders, tmp_path, extra):
    with pytest.raises(UsageError):
        spec = {k: v for k, v in extra.items() if k in ("method", "scale", "options", "rank")}
        ways = {k: v for k, v in extra.items() if k not in spec}
        answer(MergeRequest(folders, tmp_path / "out", MergeSpec(**spec), **ways))
    assert not (tmp_path / "out").exists()


def test_without_a_place(folders):
    with pytest.raises(UsageError, match="where to"):
        answer(MergeRequest(folders))


def test_what_is_printed_says_method_scale_and_weights(folders, tmp_path, capsys):
    for more, wanted in (
        ([], "tsv at scale 0.7 of a, b ->"),
        (["--method", "task_arithmetic", "--scale", "1"], "task_arithmetic (the plain sum) at scale 1 of a, b ->"),
        (["--weights", "1,-0.5"], "task_arithmetic (the weighted sum) at scale 1, weights 1, -0.5, of a, b ->"),
        (
            ["--scale", "0.4", "--weights", "1,-0.5"],
            "task_arithmetic (the weighted sum) at scale 0.4, weights 1, -0.5, of a, b ->",
        ),
        (["--method", "tsv", "--scale", "0.7"], "tsv at scale 0.7 of a, b ->"),
        (["--method", "emr", "--per-task"], "emr at scale 1 of a, b ->"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["merge", *folders, *more, "--out", str(tmp_path / "out"), "--overwrite"])
        assert ended.value.code == 0 and capsys.readouterr().out.startswith(wanted)


def test_curve_of_a_sum(folders):
    rows = answer(MergeRequest(folders, curve=True)).curve
    assert [r.rank for r in rows] == [2, 4]
    assert rows[0].discarded_energy > 0.0
    assert rows[1].discarded_energy == pytest.approx(0.0, abs=1e-9)


def test_the_collector_goes_on_and_keeps_no_garbage_of_who_calls(folders, tmp_path):
    frozen = gc.get_freeze_count()
    answer(MergeRequest(folders, tmp_path / "out", MergeSpec(method="ties")))
    assert gc.isenabled() and gc.get_freeze_count() == frozen


def test_mergekit_recipe(folders, tmp_path):
    models = "".join(f"- model: base+{folder}\n" for folder in folders)
    text = f"merge_method: ties\nbase_model: base\nmodels:\n{models}parameters: {{density: 0.5, weight: 1.0}}\n"
    (tmp_path / "config.yaml").write_text(text)
    found = answer(MergeRequest([str(tmp_path / "config.yaml")], tmp_path / "out"))
    assert found.record.method == "sparse_arithmetic"
    assert found.record.options["density"] == 0.5
