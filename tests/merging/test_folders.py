"""Folders in, folder out: reading, writing, verification, PEFT's own merges, public adapters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from safetensors.torch import load_file, save_file

from plait.adapters.lora import Adapter, LoraFactors
from plait.adapters.peft_format import read_adapter, write_adapter
from plait.border.records import to_json
from plait.disk.store import read_manifest, sha256_file
from plait.errors import InputError, RunError, UsageError
from plait.merging import folders as folders_module
from plait.merging import merge_folders, merge_methods, plan_merge
from plait.merging.curve import rank_curve
from plait.merging.plan import Plan
from plait.merging.streamed import known_shapes
from plait.statistics.files import write_statistics
from plait.statistics.moments import ModuleInfo, Moments, Statistics

NAMES = ["first", "second", "third"]
PUBLIC = Path(__file__).parents[3] / "shared" / "adapters"


def saved(folder: Path, seed: int, *, rank=4, targets=("q", "v"), out=24, width=16, scaling=2.0, **kept) -> Path:
    g = torch.Generator().manual_seed(seed)
    modules = {
        f"layers.{i}.{t}": LoraFactors(
            torch.randn(rank, width, generator=g), torch.randn(out, rank, generator=g), scaling
        )
        for i in range(2)
        for t in targets
    }
    folder.mkdir(parents=True)
    write_adapter(folder, Adapter(folder.name, "base", modules, target_modules=targets, **kept))
    return folder


def test_result_is_whole_and_recorded(tmp_path):
    pair = [saved(tmp_path / "a", 0), f"other={saved(tmp_path / 'b', 1, rank=2)}"]
    done = merge_folders(pair, tmp_path / "out", weights=[0.5, 2.0], scale=0.3, method="task_arithmetic")
    json.dumps(to_json(done))
    assert done.record.tasks == ("a", "other") and done.seconds_merge > 0 and done.record.verification_error < 1e-6
    result = read_manifest(tmp_path / "out")["result"]
    assert {"method", "options", "weights", "scale", "backbone_prefix", "tasks"} <= set(result)
    read = read_adapter(tmp_path / "out")
    a, b = read_adapter(tmp_path / "a"), read_adapter(tmp_path / "b")
    for m, f in read.modules.items():
        torch.testing.assert_close(f.delta(), 0.3 * (0.5 * a.modules[m].delta() + 2 * b.modules[m].delta()))


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "linear"},
        {"method": "cat", "weights": [0.5, 0.0, -2.0]},
        {"method": "task_arithmetic", "weights": [0.0, 0.0, 0.0]},
        {"method": "task_arithmetic", "rank": 50, "scale": 0.3, "calibrate": "pico"},
        {"method": "ties", "weights": [1.0, 0.0, 2.0]},
        {"method": "dare_ties", "rank": 3, "scale": 0.5},
        {"method": "della", "rank": 500},
        {"method": "breadcrumbs", "calibrate": "pico"},
    ],
)
def test_written_while_computed_or_after_are_the_same_bytes(tmp_path, settings, monkeypatch):
    three = [saved(tmp_path / n, i, rank=i + 2, targets=("q", "v")[: i + 1]) for i, n in enumerate(NAMES)]
    assert (
        known_shapes(
            plan_merge([read_adapter(f) for f in three], **{"method": "task_arithmetic", "scale": 1.0} | settings), "x"
        )
        is not None
    )
    merge_folders(three, tmp_path / "streamed", **{"method": "task_arithmetic", "scale": 1.0} | settings)
    monkeypatch.setattr(folders_module, "known_shapes", lambda *_: None)
    merge_folders(three, tmp_path / "held", **{"method": "task_arithmetic", "scale": 1.0} | settings)
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "streamed" / file).read_bytes() == (tmp_path / "held" / file).read_bytes()
    one, other = (read_manifest(tmp_path / n)["result"] for n in ("streamed", "held"))
    assert one == other


def test_what_a_core_decides_or_a_sum_is_cut_to_is_not_known_shapes(tmp_path):
    pair = [read_adapter(saved(tmp_path / n, i)) for i, n in enumerate(NAMES[:2])]
    for method, rank, options in (
        ("svd", None, {}),
        ("tsv", None, {}),
        ("ties", None, {"space": "core"}),
        ("linear", 3, {}),
    ):
        assert known_shapes(plan_merge(pair, method, rank=rank, options=options, scale=1.0), "x") is None
    assert known_shapes(plan_merge(pair[:1], "linear", scale=1.0), "x") is None


def test_same_settings_are_kept_and_others_refused(tmp_path):
    pair = [saved(tmp_path / "a", 0), saved(tmp_path / "b", 1)]
    merge_folders(pair, tmp_path / "out", method="task_arithmetic", scale=1.0)
    assert merge_folders(pair, tmp_path / "out", method="task_arithmetic", scale=1.0).reused
    with pytest.raises(UsageError, match="scale"):
        merge_folders(pair, tmp_path / "out", scale=0.5, method="task_arithmetic")
    first = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    merge_folders(pair, tmp_path / "out", overwrite=True, method="task_arithmetic", scale=1.0)
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == first


def test_a_write_that_goes_wrong_leaves_nothing(tmp_path, monkeypatch):
    def damaging(folder: Path, *what, **more):
        digests = write_adapter(folder, *what, **more)
        file = folder / "adapter_model.safetensors"
        save_file({k: v * 1.01 if k.endswith("v.lora_B.weight") else v for k, v in load_file(file).items()}, file)
        return digests

    monkeypatch.setattr(folders_module, "write_adapter", damaging)
    for method in ("task_arithmetic", "tsv"):
        with pytest.raises(RunError, match="differs from the merge of its inputs"):
            merge_folders(
                [saved(tmp_path / f"a{method}", 0), saved(tmp_path / f"b{method}", 1)],
                tmp_path / "out",
                method=method,
                scale=1.0,
            )
        assert not (tmp_path / "out").exists()


def test_sharded_half_precision_and_patterns(tmp_path):
    a, b = saved(tmp_path / "a", 0), saved(tmp_path / "b", 1)
    tensors = {k: v.to(torch.bfloat16) for k, v in load_file(a / "adapter_model.safetensors").items()}
    (a / "adapter_model.safetensors").unlink()
    names = sorted(tensors)
    for i, part in enumerate((names[:3], names[3:])):
        save_file({k: tensors[k] for k in part}, a / f"s{i}.safetensors")
    index = {"weight_map": {k: f"s{int(k in names[3:])}.safetensors" for k in names}}
    (a / "adapter_model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((b / "adapter_config.json").read_text()) | {
        "use_rslora": True,
        "alpha_pattern": {"layers.0.q": 3},
    }
    (b / "adapter_config.json").write_text(json.dumps(config))
    done = merge_folders([a, b], tmp_path / "out", method="task_arithmetic", scale=1.0)
    b_read = read_adapter(b)
    assert b_read.modules["layers.0.q"].scaling == 1.5 and b_read.modules["layers.1.q"].scaling == 4.0
    merged = read_adapter(tmp_path / "out")
    wanted = read_adapter(a).modules["layers.0.q"].delta() + b_read.modules["layers.0.q"].delta()
    torch.testing.assert_close(merged.modules["layers.0.q"].delta(), wanted)
    assert done.record.rank == 8


def test_rank_curve_falls_to_zero_at_full_rank(tmp_path):
    three = [saved(tmp_path / n, i) for i, n in enumerate("abc")]
    rows = rank_curve(three, score=lambda a: float(a.rank), method="task_arithmetic", scale=1.0)
    assert [row.rank for row in rows] == [4, 8, 12] and [row.score for row in rows] == [4.0, 8.0, 12.0]
    lost = [row.discarded_energy for row in rows]
    assert lost[0] > lost[1] > lost[2] == 0
    assert rank_curve(three, "ties", scale=1.0)[-1].discarded_energy > 0
    for method in ("cat", "tsv", "ties"):
        assert all(row.verification_error < 1e-5 for row in rank_curve(three, method, scale=1.0))


def test_rank_curve_notices_a_merge_that_is_wrong(tmp_path, monkeypatch):
    three = [saved(tmp_path / n, i) for i, n in enumerate("abc")]
    right = Plan.merged

    def wrong(plan, module):
        f, lost = right(plan, module)
        return LoraFactors(f.A, f.B * 1.1), lost

    monkeypatch.setattr(Plan, "merged", wrong)
    assert all(row.verification_error > 0.05 for row in rank_curve(three, method="task_arithmetic", scale=1.0))


@pytest.fixture
def wrapped(tmp_path):
    """A PEFT model with three adapters of different ranks and scalings."""
    import peft
    from torch import nn

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.v = nn.Linear(16, 24), nn.Linear(16, 24)

    model = None
    for i, name in enumerate(NAMES):
        config = peft.LoraConfig(r=4, lora_alpha=4 + 4 * i, target_modules=["q", "v"])
        if model is None:
            model = peft.get_peft_model(Net(), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    for n, p in model.named_parameters():
        if "lora_" in n:
            nn.init.normal_(p)
    model.save_pretrained(tmp_path)
    return model


@pytest.mark.parametrize(("kind", "options"), [("cat", {}), ("svd", {"svd_rank": 4})])
def test_agrees_with_peft(wrapped, tmp_path, kind, options):
    import peft

    if kind == "svd" and Version(peft.__version__) < Version("0.21"):
        pytest.skip("the svd of this PEFT is not the cut of its own sum for these weights")
    weights = [0.5, 1.0, -0.25]
    extra = {"svd_rank": 4} if kind == "svd" else {}
    wrapped.add_weighted_adapter(NAMES, weights, "theirs", combination_type=kind, **extra)
    merge_folders(
        [tmp_path / n for n in NAMES], tmp_path / "out", method=kind, weights=weights, options=options, scale=1.0
    )
    ours = read_adapter(tmp_path / "out")
    for name in "qv":
        layer = getattr(wrapped.base_model.model, name)
        theirs = layer.get_delta_weight("theirs").detach()
        assert (ours.modules[name].delta() - theirs).abs().max() < 1e-5 * theirs.abs().max()


@pytest.mark.skipif(not PUBLIC.is_dir(), reason="no ../shared/adapters")
@pytest.mark.parametrize(
    "pair", [("distilbert_imdb", "distilbert_emotion"), ("gemma3_270m_svg", "gemma3_270m_svg_stage1")]
)
def test_public_adapters_merge_by_every_method_without_data(tmp_path, pair):
    for method, found in merge_methods().items():
        if found.needs or (method == "della" and "gemma" in pair[0]):
            continue
        done = merge_folders([PUBLIC / p for p in pair], tmp_path / method, method=method, scale=1.0)
        assert done.record.verification_error < 1e-5, method
        read = read_adapter(tmp_path / method)
        assert set(read.heads) == ({*pair} if "distilbert" in pair[0] else set())
        if "distilbert" in pair[0]:
            assert read.task_type == "FEATURE_EXTRACTION" and done.record.backbone_prefix == "distilbert"
            sizes = {
                t: next(v for k, v in h.items() if k.endswith("classifier.weight") and "pre" not in k)
                for t, h in read.heads.items()
            }
            assert {t: len(w) for t, w in sizes.items()} == {"distilbert_imdb": 2, "distilbert_emotion": 6}


def test_bases_of_other_names_can_be_declared_one(tmp_path):
    a, b = saved(tmp_path / "a", 0), saved(tmp_path / "b", 1)
    config = json.loads((b / "adapter_config.json").read_text()) | {"base_model_name_or_path": "org/base"}
    (b / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="'base' and 'b' on 'org/base'"):
        merge_folders([a, b], tmp_path / "out", method="task_arithmetic", scale=1.0)
    done = merge_folders([a, b], tmp_path / "out", base="org/base", method="task_arithmetic", scale=1.0)
    assert done.record.base == "org/base" and [p.base for p in done.record.adapters] == ["base", "org/base"]


@pytest.mark.filterwarnings("ignore:.*")
def test_merged_classifiers_run_in_peft_on_the_backbone(tmp_path):
    import peft
    import transformers as hf

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = hf.RobertaConfig(vocab_size=60, max_position_embeddings=40, initializer_range=0.2, **sizes)
    hf.RobertaModel(config).save_pretrained(tmp_path / "base")
    for name, labels in (("two", 2), ("three", 3)):
        model = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=labels)
        wrapped = peft.get_peft_model(
            model, peft.LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS")
        )
        for n, p in wrapped.named_parameters():
            if "lora_" in n:
                torch.nn.init.normal_(p, std=0.2)
        wrapped.save_pretrained(tmp_path / name)
    merge_folders([tmp_path / "two", tmp_path / "three"], tmp_path / "out", scale=0.5, method="task_arithmetic")
    ids = torch.randint(3, 60, (2, 7))
    whole = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base").eval()
    expected = hf.AutoModel.from_pretrained(tmp_path / "base").eval()
    for name in ("two", "three"):
        for module, f in read_adapter(tmp_path / name).modules.items():
            expected.get_submodule(module).weight.data += 0.5 * f.delta()
    with torch.no_grad():
        plain = whole.roberta(ids).last_hidden_state
        peft.PeftModel.from_pretrained(whole, tmp_path / "out")
        found = whole.eval().roberta(ids).last_hidden_state
        torch.testing.assert_close(found, expected(ids).last_hidden_state, atol=1e-5, rtol=1e-4)
    assert (found - plain).abs().max() > 0.05


def test_statistics_are_read_once(tmp_path, monkeypatch):
    folders = [saved(tmp_path / n, i, targets=("q",)) for i, n in enumerate(("a", "b"))]
    files = {n: tmp_path / f"{n}.stats.safetensors" for n in ("a", "b")}
    modules = {f"layers.{i}.q": ModuleInfo("layers.0.q", (24, 16), 1.0) for i in range(2)}
    for seed, file in enumerate(files.values()):
        h = torch.randn(40, 16, generator=torch.Generator().manual_seed(seed))
        write_statistics(file, Statistics({"layers.0.q": Moments(40, h.sum(0), h.T @ h)}, modules, {"base": "base"}))
    wanted = {f"statistics:{n}": sha256_file(file) for n, file in files.items()}
    hashed: list[Path] = []
    monkeypatch.setattr("plait.disk.store.sha256_file", lambda path: hashed.append(path) or sha256_file(path))
    merge_folders(folders, tmp_path / "out", method="regmean", statistics=files, scale=1.0)
    recorded = read_manifest(tmp_path / "out")["inputs"]
    assert {k: v for k, v in recorded.items() if k.startswith("statistics:")} == wanted
    assert hashed and not set(hashed) & set(files.values())
    merge_folders(
        folders, tmp_path / "sum", statistics=files, method="task_arithmetic", scale=1.0
    )  # which needs none, and so says what it was given
    assert {k: v for k, v in read_manifest(tmp_path / "sum")["inputs"].items() if k in wanted} == wanted
