"""merge(): alignment, weights, scale, rank, record."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from plait.adapters.lora import Adapter, LoraFactors
from plait.adapters.peft_format import read_adapter, write_adapter
from plait.border.records import to_json
from plait.errors import InputError, RunError, UsageError
from plait.merging import merge, merge_folders, merge_methods, plan_merge


def adapter(
    name: str, seed: int, *, modules=("l.0.q", "l.0.v"), rank=3, out=12, width=10, scaling=2.0, **kept
) -> Adapter:
    g = torch.Generator().manual_seed(seed)
    made = {
        m: LoraFactors(torch.randn(rank, width, generator=g), torch.randn(out, rank, generator=g), scaling)
        for m in modules
    }
    return Adapter(name, kept.pop("base", "base"), made, **kept)


def test_task_arithmetic_is_the_weighted_sum():
    a, b = adapter("a", 0), adapter("b", 1, rank=5, scaling=0.5)
    done = merge([a, b], weights=[2.0, -1.0], scale=0.3, method="task_arithmetic")
    for module, f in done.adapter.modules.items():
        torch.testing.assert_close(f.delta(), 0.3 * (2 * a.modules[module].delta() - b.modules[module].delta()))
    assert done.record.rank == 8 and done.record.verification_error < 1e-6
    json.dumps(to_json(done.record))


SUMS = [name for name, method in merge_methods().items() if method.concatenates]


@pytest.mark.parametrize("method", SUMS)
@pytest.mark.parametrize("rank", [None, 4])
def test_a_sum_straight_from_the_factors_is_what_its_method_computes(method, rank):
    inputs = [adapter("a", 0, scaling=1.7), adapter("b", 1, rank=5, scaling=0.3), adapter("c", 2, modules=("l.0.v",))]
    half = {m: LoraFactors(f.A.half(), f.B.half(), f.scaling) for m, f in adapter("d", 3).modules.items()}
    before = [f.B.clone() for a in inputs for f in a.modules.values()]
    weights = [0.6, -1.1, 0.0, 3.0]
    plan = plan_merge([*inputs, Adapter("d", "base", half)], method, weights=weights, scale=0.7, rank=rank)
    for module in plan.common.modules:
        x = plan.view(module)
        (straight, lost), (wanted, gone) = plan.merged(module), plan.adjusted(plan.method.function(x), x)
        assert straight.rank == wanted.rank == (rank or 11) and lost == pytest.approx(gone, abs=1e-6)
        torch.testing.assert_close(straight.delta(), wanted.delta())
        if rank is None:
            assert torch.equal(straight.A, wanted.A)
    assert all(
        torch.equal(f.B, b) for f, b in zip((f for a in inputs for f in a.modules.values()), before, strict=True)
    )


@pytest.mark.parametrize(("rank", "expected"), [(None, 3), (2, 2), (7, 7), (40, 9)])
def test_svd_is_cut_to_the_rank_that_is_asked_for(rank, expected):
    inputs = [adapter(n, i) for i, n in enumerate("abc")]
    done = merge(inputs, "svd", scale=1.0, rank=rank)
    assert done.record.rank == expected and done.record.verification_error < 1e-5
    for module, f in done.adapter.modules.items():
        U, S, Vt = torch.linalg.svd(sum(a.modules[module].delta(torch.float64) for a in inputs))
        best = (U[:, :expected] * S[:expected]) @ Vt[:expected]
        torch.testing.assert_close(f.delta(torch.float64), best, atol=1e-4, rtol=1e-4)


def test_a_sum_of_nothing_is_zero():
    done = merge([adapter("a", 0), adapter("b", 1)], weights=[0.0, 0.0], method="task_arithmetic", scale=1.0)
    assert all(f.rank == 1 and not f.delta().any() for f in done.adapter.modules.values())


def test_missing_modules_are_zero_and_recorded():
    a, b = adapter("a", 0, modules=("q",)), adapter("b", 1, modules=("v",))
    with pytest.raises(InputError, match=r"'a' and 'b' have no module in common.*--disjoint"):
        merge([a, b], method="task_arithmetic", scale=1.0)
    done = merge([a, b], disjoint=True, method="task_arithmetic", scale=1.0)
    torch.testing.assert_close(done.adapter.modules["q"].delta(), a.modules["q"].delta())
    assert done.record.missing == {"a": ["v"], "b": ["q"]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_one_adapter_comes_back_unchanged(dtype):
    a = adapter("a", 0)
    a = Adapter("a", "base", {m: LoraFactors(f.A.to(dtype), f.B.to(dtype), f.scaling) for m, f in a.modules.items()})
    for method in ("linear", "task_arithmetic", "cat", "svd"):
        for module, f in merge([a], method, scale=1.0).adapter.modules.items():
            assert f is a.modules[module] or torch.equal(f.delta(), a.modules[module].delta())


def test_other_base_and_shape_are_refused_by_name():
    with pytest.raises(InputError, match=r"'a' was trained on 'base' and 'b' on 'other'"):
        merge([adapter("a", 0), adapter("b", 1, base="other")], method="task_arithmetic", scale=1.0)
    assert (
        merge(
            [adapter("a", 0), adapter("b", 1, base="other")], base="base", method="task_arithmetic", scale=1.0
        ).adapter.base
        == "base"
    )
    with pytest.raises(InputError, match="not adapters of the same base model"):
        merge([adapter("a", 0), adapter("b", 1, width=11)], method="task_arithmetic", scale=1.0)


def test_names_that_lead_to_one_folder_are_one_base(tmp_path, monkeypatch):
    (tmp_path / "base").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "link").symlink_to("base")
    monkeypatch.chdir(tmp_path)
    names = ("base", "./base/", str(tmp_path / "base"), "other/../base", "link")
    adapters = [adapter(f"t{i}", i, base=name) for i, name in enumerate(names)]
    assert merge(adapters, "task_arithmetic").adapter.base == "base"
    for name in ("other", "/absent/base", "org/base", ""):
        with pytest.raises(InputError, match="'t0' was trained on 'base'"):
            merge([adapters[0], adapter("x", 1, base=name)], "task_arithmetic")


def test_an_adapter_that_changes_nothing_is_named():
    still = adapter("still", 1)
    still = replace(still, modules={m: replace(f, B=torch.zeros_like(f.B)) for m, f in still.modules.items()})
    said = ("still changes nothing: its update is zero (not trained yet?)",)
    for method in ("tsv", "task_arithmetic"):
        assert merge([adapter("a", 0), still], method).record.beside == said
    assert merge([adapter("a", 0), adapter("b", 1)]).record.beside == ()


UNLIKE = {
    "'a' was trained on 'base' at revision 'v1' and 'b' on 'base' at revision 'v2'": (
        {"revision": "v1"},
        {"revision": "v2"},
    ),
    "the base weights of 'a' and 'b' differ": (
        {"source": {"base_sha256": "1" * 64}},
        {"source": {"base_sha256": "2" * 64}},
    ),
    "module names start at different roots": (
        {"modules": ("layers.0.q",)},
        {"modules": ("model.layers.0.q",)},
    ),
    r"'backbone.layers.0.q' that .* seems to call 'layers.0.q'|'layers.0.q' that .* seems to call 'backbone.layers.0.q'": (
        {"modules": ("layers.0.q", "layers.1.q")},  # no wrapper that is known: told where nothing is shared
        {"modules": ("backbone.layers.0.q", "backbone.layers.1.q")},
    ),
    "no module in common, and neither names its base": (
        {"modules": ("down.0.q",), "base": ""},
        {"modules": ("layers.0.q",), "base": ""},
    ),
    "'a' was trained on 'one' and 'b' on 'two'": (  # whatever else follows from it
        {"task_type": "SEQ_CLS", "base": "one", "modules": ("layers.0.q",)},
        {"task_type": "CAUSAL_LM", "base": "two", "modules": ("down.0.q",)},
    ),
    "task types CAUSAL_LM, SEQ_CLS are models of different shapes": (
        {"task_type": "SEQ_CLS"},
        {"task_type": "CAUSAL_LM"},
    ),
    "task types CAUSAL_LM, SEQ_CLS are models": (
        {"task_type": "SEQ_CLS", "modules": ("layers.0.q",), "prefix": "model"},  # one module, seen from its backbone
        {"task_type": "CAUSAL_LM", "modules": ("model.layers.0.q",)},
    ),
    "'a' and 'b' both trained 'norm.weight' whole and it differs": (
        {"extras": {"norm.weight": torch.ones(2)}, "modules_to_save": ("norm",)},
        {"extras": {"norm.weight": torch.zeros(2)}, "modules_to_save": ("norm",)},
    ),
}


@pytest.mark.parametrize("message", UNLIKE)
def test_what_was_trained_apart_is_refused_in_either_order(message):
    one, other = UNLIKE[message]
    a, b = adapter("a", 0, **one), adapter("b", 1, **other)
    with pytest.raises(InputError, match=message) as raised:
        merge([a, b], method="task_arithmetic", scale=1.0)
    assert "b" in str(raised.value.where)
    with pytest.raises(InputError):
        merge([b, a], method="task_arithmetic", scale=1.0)


def test_classifiers_become_one_backbone_adapter_with_every_head():
    a = adapter("a", 0, task_type="SEQ_CLS", prefix="roberta", heads={"a": {"classifier.weight": torch.ones(2, 12)}})
    b = adapter("b", 1, task_type="SEQ_CLS", prefix="roberta", heads={"b": {"classifier.weight": torch.ones(6, 12)}})
    done = merge([a, b], method="task_arithmetic", scale=1.0)
    assert done.adapter.task_type == "FEATURE_EXTRACTION" and done.adapter.prefix == "roberta"
    assert set(done.adapter.heads) == {"a", "b"} and done.record.backbone_prefix == "roberta"


def test_options_are_checked():
    with pytest.raises(UsageError, match="did you mean 'density'"):
        merge([adapter("a", 0)], "ties", options={"densty": 0.1}, scale=1.0)
    for density in (0.0, 1.5, 50, float("nan"), "0.2", True):
        with pytest.raises(UsageError, match="density"):
            merge([adapter("a", 0)], "ties", options={"density": density}, scale=1.0)
    with pytest.raises(UsageError, match="did you mean 'ties'"):
        merge([adapter("a", 0)], "tyes", scale=1.0)
    with pytest.raises(UsageError, match="sum to zero"):
        merge([adapter("a", 0), adapter("b", 1)], "linear", weights=[1, -1], scale=1.0)


def test_rank_cuts_and_records_what_it_lost():
    ads = [adapter(n, i) for i, n in enumerate("abc")]
    whole, cut = (
        merge(ads, method="task_arithmetic", scale=1.0).adapter,
        merge(ads, rank=4, method="task_arithmetic", scale=1.0),
    )
    assert cut.record.rank == 4
    lost = sum(float((whole.modules[m].delta() - f.delta()).square().sum()) for m, f in cut.adapter.modules.items())
    total = sum(f.norm_squared() for f in whole.modules.values())
    assert cut.record.loss.discarded_energy == pytest.approx(lost / total, rel=1e-4)
    assert cut.record.verification_error < 1e-5


def test_adapters_without_modules_and_two_of_one_name_are_refused():
    with pytest.raises(InputError, match="none of the adapters"):
        merge([Adapter("a", "base", {})], "ties", scale=1.0)
    with pytest.raises(UsageError, match="collide"):
        merge([adapter("a", 0), adapter("A", 1)], method="task_arithmetic", scale=1.0)
    with pytest.raises(UsageError, match="nothing to merge"):
        merge([], method="task_arithmetic", scale=1.0)


def test_two_heads_of_one_task_must_be_one_head():
    a = adapter("m1", 0, heads={"x": {"classifier.weight": torch.ones(2, 12)}})
    b = adapter("m2", 1, heads={"x": {"classifier.weight": torch.zeros(2, 12)}})
    with pytest.raises(InputError, match="different heads for task 'x'"):
        merge([a, b], method="task_arithmetic", scale=1.0)
    assert set(merge([a, adapter("m2", 1, heads=a.heads)], method="task_arithmetic", scale=1.0).adapter.heads) == {"x"}


def test_products_that_overflow_are_an_error_and_no_endless_search():
    huge = {f"l.{i}": LoraFactors(torch.full((2, 200), 1e25), torch.full((400, 2), 1e25)) for i in range(2)}
    for method in ("ties", "dare_linear", "sce", "emr"):  # spectral methods hold such deltas as factors
        with pytest.raises(RunError, match="infinity"):
            merge([Adapter("a", "base", huge), Adapter("b", "base", huge)], method, scale=1.0)


def test_places_may_be_text_and_a_path_in_an_adapters_stead_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, seed in (("a", 0), ("b", 1)):
        Path(name).mkdir()
        write_adapter(name, adapter(name, seed))
    assert merge_folders(["a", "b"], "out", "tsv").output == "out" and read_adapter("out").modules
    assert merge_folders(["a", "b"], "out", "tsv").reused
    with pytest.raises(UsageError, match=r"merge takes adapters, not str \(plait\.read_adapter\(PATH\)"):
        merge(["a", "b"])


def test_an_option_that_is_given_as_a_setting_is_told_where_it_goes():
    with pytest.raises(UsageError, match=r"no setting 'density' \(options=\{'density': ...\} if it is the method's"):
        merge([adapter("a", 0), adapter("b", 1)], "ties", density=0.2)
    with pytest.raises(UsageError, match=r"no setting 'weight' .*did you mean 'weights'"):
        merge([adapter("a", 0), adapter("b", 1)], weight=[1, 2])
