"""A recipe means here what it means in mergekit: each against formulas on whole weights, written from what mergekit computes."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from plait.errors import UsageError
from plait.merging import MergeRequest, MergeSpec, answer, merge_folders
from plait.merging.mergekit import from_mergekit

MODULES = {"model.layers.0.self_attn.q_proj": (12, 16), "model.layers.1.self_attn.v_proj": (7, 16)}
NAMES = ("a", "b", "c")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base and three adapters of it, whose updates are as large as its weights."""
    root = tmp_path_factory.mktemp("mergekit")
    g = torch.Generator().manual_seed(3)
    (root / "base").mkdir()
    save_file({f"{m}.weight": torch.randn(s, generator=g) for m, s in MODULES.items()}, root / "base/model.safetensors")
    (root / "base" / "config.json").write_text('{"model_type": "llama"}')
    for name in NAMES:
        tensors = {}
        for m, (out, width) in MODULES.items():
            tensors[f"base_model.model.{m}.lora_A.weight"] = torch.randn(3, width, generator=g)
            tensors[f"base_model.model.{m}.lora_B.weight"] = torch.randn(out, 3, generator=g)
        (root / name).mkdir()
        save_file(tensors, root / name / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(root / "base"), "r": 3}
        config |= {"lora_alpha": 2, "target_modules": ["q_proj", "v_proj"]}
        (root / name / "adapter_config.json").write_text(json.dumps(config))
    return root


def whole(place, name, module):
    tensors = load_file(place / name / "adapter_model.safetensors")
    A, B = (tensors[f"base_model.model.{module}.lora_{h}.weight"].double() for h in "AB")
    return base_weight(place, module) + 2 / 3 * B @ A


def base_weight(place, module):
    return load_file(place / "base" / "model.safetensors")[f"{module}.weight"].double()


def elected(parts, weights, divide):
    scaled = [w * p for w, p in zip(weights, parts, strict=True)]
    sign = torch.where(sum(scaled) >= 0, 1.0, -1.0)
    agree = [(s.sign() == sign).double() for s in scaled]
    divisor = sum(w * a for w, a in zip(weights, agree, strict=True))
    mixed = sum(s * a for s, a in zip(scaled, agree, strict=True))
    return mixed / torch.where(divisor == 0, 1.0, divisor) if divide else mixed


def largest(d, density):
    flat = torch.zeros(d.numel(), dtype=torch.float64)
    order = d.abs().flatten().argsort(descending=True)[: max(1, int(density * d.numel()))]
    flat[order] = d.flatten()[order]
    return flat.reshape(d.shape)


def middle(d, density, gamma):
    n = d.numel()
    left = int(density * n)
    bottom = max(0, n - left - int(gamma * n))
    order = d.abs().flatten().argsort()[bottom : bottom + left]
    flat = torch.zeros(n, dtype=torch.float64)
    flat[order] = d.flatten()[order]
    return flat.reshape(d.shape)


def same_norm(part, d):
    return part * d.abs().sum() / part.abs().sum()


def multislerp(parts, weights):
    weights = [w / sum(weights) for w in weights]
    units = [p / p.norm() for p in parts]
    mean = sum(w * u for w, u in zip(weights, units, strict=True))
    mean = mean / mean.norm()
    tangent = sum(w * (u - (u * mean).sum() * mean) for w, u in zip(weights, units, strict=True))
    length = tangent.norm()
    size = sum(w * p.norm() for w, p in zip(weights, parts, strict=True))
    return size * (mean * length.cos() + tangent * length.sin() / length)


def slerp(t, a, b):
    angle = torch.acos((a * b).sum() / a.norm() / b.norm())
    return (((1 - t) * angle).sin() * a + (t * angle).sin() * b) / angle.sin()


def sce(parts, topk):
    variance = torch.stack(parts).var(0, unbiased=False)
    chosen = largest(variance, int((variance != 0).sum() * topk) / variance.numel()) > 0 if topk < 1 else variance >= 0
    parts = [p * chosen for p in parts]
    energy = torch.tensor([float(p.square().mean()) for p in parts])
    shares = energy / energy.sum() if energy.sum() >= 1e-6 else torch.ones(len(parts)) / len(parts)
    sign = torch.where(sum(parts) >= 0, 1.0, -1.0)
    agree = [(p.sign() == sign).double() for p in parts]
    mass = sum(float(s) * a for s, a in zip(shares, agree, strict=True))
    return sum(float(s) * a * p for s, a, p in zip(shares, agree, parts, strict=True)) / mass.clamp(min=1e-6)


# what -> (method, weights, shared parameters, base_model, the base listed with this weight,
#          (deltas, weights, W0, whole weights) -> the whole merged weight)
CASES = {
    "linear": ("linear", (1, 3), {}, False, None, lambda D, w, W0, W: (W[0] + 3 * W[1]) / 4),
    "linear, base listed": ("linear", (1, 3), {}, False, 2, lambda D, w, W0, W: (W[0] + 3 * W[1] + 2 * W0) / 6),
    "linear, base named": ("linear", (1, 3), {"weight": 0.5}, True, None, lambda D, w, W0, W: (W[0] + 3 * W[1] + W0 / 2) / 4.5),
    "linear, minus": ("linear", (2, -0.5), {}, False, None, lambda D, w, W0, W: (2 * W[0] - W[1] / 2) / 1.5),
    "linear, minus the base": ("linear", (0.5, 0.5), {}, False, -0.5, lambda D, w, W0, W: W[0] + W[1] - W0),
    "task": ("task_arithmetic", (0.7, -0.3), {"lambda": 0.5}, True, None, lambda D, w, W0, W: W0 + 0.35 * D[0] - 0.15 * D[1]),
    "task, base listed": ("task_arithmetic", (1, 1), {}, True, 5, lambda D, w, W0, W: W0 + D[0] + D[1]),
    "task, mean": ("task_arithmetic", (2, 1), {"normalize": True}, True, None, lambda D, w, W0, W: W0 + (2 * D[0] + D[1]) / 3),
    "ties": ("ties", (0.7, 0.5, 0.4), {"density": 0.37}, True, None,
             lambda D, w, W0, W: W0 + elected([largest(d, 0.37) for d in D], w, True)),
    "ties, minus": ("ties", (1, -0.6, 0.4), {"density": 0.61}, True, None,
                    lambda D, w, W0, W: W0 + elected([largest(d, 0.61) for d in D], w, True)),
    "ties, sum, rescaled": ("ties", (1, 0.5), {"density": 0.3, "normalize": False, "rescale": True, "int8_mask": True}, True, None,
                            lambda D, w, W0, W: W0 + elected([same_norm(largest(d, 0.3), d) for d in D], w, False)),
    "breadcrumbs": ("breadcrumbs", (1, 0.6), {"density": 0.53, "gamma": 0.1}, True, None,
                    lambda D, w, W0, W: W0 + sum(c * middle(d, 0.53, 0.1) for c, d in zip(w, D, strict=True))),
    "breadcrumbs, no room": ("breadcrumbs", (1, 0.6), {"density": 0.95, "gamma": 0.3}, True, None,
                             lambda D, w, W0, W: W0 + sum(c * middle(d, 0.95, 0.3) for c, d in zip(w, D, strict=True))),
    "breadcrumbs, default": ("breadcrumbs", (1, 0.6), {}, True, None, lambda D, w, W0, W: W0 + D[0] + 0.6 * D[1]),
    "breadcrumbs_ties": ("breadcrumbs_ties", (1, 0.6, 0.5), {"density": 0.7, "gamma": 0.05}, True, None,
                         lambda D, w, W0, W: W0 + elected([middle(d, 0.7, 0.05) for d in D], w, False)),
    "dare_ties at 1": ("dare_ties", (1, 0.6, 0.5), {}, True, None, lambda D, w, W0, W: W0 + elected(D, w, False)),
    "dare_linear at 1": ("dare_linear", (1, 0.6), {"lambda": 2}, True, None, lambda D, w, W0, W: W0 + 2 * D[0] + 1.2 * D[1]),
    "della at 1": ("della", (1, 0.6, 0.5), {}, True, None, lambda D, w, W0, W: W0 + elected(D, w, True)),
    "della_linear at 1": ("della_linear", (1, -0.6), {}, True, None, lambda D, w, W0, W: W0 + D[0] - 0.6 * D[1]),
    "sce": ("sce", None, {"select_topk": 0.4}, True, None, lambda D, w, W0, W: W0 + sce(D, 0.4)),
    "sce, default": ("sce", None, {}, True, None, lambda D, w, W0, W: W0 + sce(D, 1.0)),
    "nuslerp": ("nuslerp", (1, 3), {}, True, None, lambda D, w, W0, W: W0 + slerp(0.75, *D)),
    "multislerp": ("multislerp", (1, 3), {}, True, None, lambda D, w, W0, W: W0 + multislerp(D, w)),
}  # fmt: skip


def written(place, method, weights, shared, base, listed):
    names = NAMES[: len(weights)] if weights else NAMES
    models = [{"model": f"{place / 'base'}+{place / n}"} for n in names]
    for model, w in zip(models, weights or (), strict=False):
        model["parameters"] = {"weight": w}
    models += [{"model": str(place / "base"), "parameters": {"weight": listed}}] if listed else []
    recipe = {"models": models, "merge_method": method, "parameters": shared, "dtype": "float32"}
    return names, recipe | ({"base_model": str(place / "base")} if base else {})


@pytest.mark.parametrize("case", CASES)
def test_a_recipe_is_what_mergekit_makes_of_it(place, tmp_path, case):
    method, weights, shared, base, listed, formula = CASES[case]
    names, recipe = written(place, method, weights, shared, base, listed)
    (tmp_path / "m.yaml").write_text(json.dumps(recipe))
    answer(MergeRequest([str(tmp_path / "m.yaml")], tmp_path / "out", bake_into=place / "base"))
    found = load_file(tmp_path / "out" / "model.safetensors")
    for module in MODULES:
        W0, W = base_weight(place, module), [whole(place, n, module) for n in names]
        wanted = formula([w - W0 for w in W], weights, W0, W)
        gap = (found[f"{module}.weight"].double() - wanted).norm() / (wanted - W0).norm()
        assert gap < 1e-5, (module, float(gap))


@pytest.mark.parametrize("method", ["dare_linear", "della_linear"])
def test_random_masks_keep_what_they_should(place, tmp_path, method):
    """One adapter: what is left is its entries times one factor, which restores the L1 norm; so many are left."""
    _, recipe = written(place, method, (1,), {"density": 0.6}, True, None)
    kept = []
    for seed in range(6):
        (tmp_path / "m.yaml").write_text(json.dumps(recipe))
        out = tmp_path / str(seed)
        answer(MergeRequest([str(tmp_path / "m.yaml")], out, MergeSpec(seed=seed), bake_into=place / "base"))
        found = load_file(out / "model.safetensors")
        for module in MODULES:
            W0 = base_weight(place, module)
            d, left = whole(place, "a", module) - W0, found[f"{module}.weight"].double() - W0
            on = left.abs() > 1e-6
            ratios = left[on] / d[on]
            assert (ratios - ratios.median()).abs().max() < 1e-3
            torch.testing.assert_close(left.abs().sum(), d.abs().sum(), rtol=1e-4, atol=0)
            kept += [float(on.double().mean())] * d.numel()
    assert abs(sum(kept) / len(kept) - 0.6) < 0.04


def test_an_epsilon_that_leaves_the_window_is_refused(place, tmp_path):
    _, recipe = written(place, "della", (1, 1), {"density": 0.1}, True, None)
    (tmp_path / "m.yaml").write_text(json.dumps(recipe))
    with pytest.raises(UsageError, match="outside"):
        answer(MergeRequest([str(tmp_path / "m.yaml")], tmp_path / "out", bake_into=place / "base"))


@pytest.mark.parametrize("hint", ["slerp", "karcher"])
def test_the_way_that_a_refusal_names_exists(place, tmp_path, hint):
    _, recipe = written(place, hint, None, {}, False, None)
    with pytest.raises(UsageError, match="whole weights") as refused:
        from_mergekit(recipe)
    method = str(refused.value.hint).split("--method ")[1].split(",")[0]
    found = merge_folders([str(place / "a"), str(place / "b")], tmp_path / "m", method, scale=1.0)
    assert found.record.method == method
