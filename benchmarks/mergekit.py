"""Recipes through mergekit itself and through plait, on tiny random Llama models: the largest relative difference per recipe.

    python benchmarks/mergekit.py --mergekit-python ENV/bin/python --results docs/results

mergekit runs in an environment of its own (`pip install torch==2.13.0 mergekit`). Both read the same YAML; mergekit writes a
whole model, plait bakes its merge into the base (a merge that is written as an adapter is cut to the sum of the ranks, and says
so), and the two models' differences to the base are compared over all weights together. Recipes that plait refuses are listed
with its reason. Random masks cannot be the same: there the fraction kept and the ratio of the norms are compared.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from plait.errors import PlaitError
from plait.merging import MergeRequest, answer

WIDTH, HEADS, LAYERS, VOCABULARY, RANK = 32, 4, 3, 64, 4
TARGETS = {"self_attn.q_proj": (32, 32), "self_attn.v_proj": (16, 32), "mlp.down_proj": (32, 48)}
ONE, TWO, THREE = "base+a", "base+b", "base+c"

# What mergekit runs in its own environment: the recipe, then nothing else.
_MERGEKIT = """
import sys, yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
for recipe, out in zip(sys.argv[1::2], sys.argv[2::2]):
    try:
        with open(recipe) as f:
            config = MergeConfiguration.model_validate(yaml.safe_load(f))
        run_merge(config, out, MergeOptions(copy_tokenizer=False, lora_merge_cache=out + ".cache", random_seed=1))
    except Exception as e:
        print("REFUSED", out, type(e).__name__, str(e).splitlines()[0][:200], flush=True)
"""


def main() -> None:
    """Run every recipe both ways and write mergekit.json and mergekit.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mergekit-python", type=Path, required=True, help="Python of an environment with mergekit.")
    parser.add_argument("--results", type=Path, default=Path("docs/results"))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        found = compared(Path(place), given.mergekit_python)
    version = subprocess.run(
        [given.mergekit_python, "-c", "import importlib.metadata as m; print(m.version('mergekit'))"],
        check=True, capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip
    given.results.mkdir(parents=True, exist_ok=True)
    result = {"mergekit": version, "torch": torch.__version__, **found}
    (given.results / "mergekit.json").write_text(json.dumps(result, indent=1) + "\n")
    (given.results / "mergekit.md").write_text(page(result))
    print(page(result))


def recipes() -> list[tuple[str, dict[str, Any]]]:
    """(what it shows, recipe); the base and its adapters are called base, a, b and c."""
    found: list[tuple[str, dict[str, Any]]] = []

    def add(
        said: str, method: str, weights: Any = (0.7, -0.3), *, base: bool = True, models: Any = None, **parameters: Any
    ) -> None:
        names = (ONE, TWO, THREE)[: len(weights)] if weights else (ONE, TWO)
        listed = models or [
            {"model": n, **({"parameters": {"weight": w}} if weights else {})}
            for n, w in zip(names, weights or (None, None), strict=True)
        ]
        recipe = {"models": listed, "merge_method": method, "dtype": "float32"}
        recipe |= {"base_model": "base"} if base else {}
        recipe |= {"parameters": parameters} if parameters else {}
        found.append((said, recipe))

    own = {"weight": 1.0}
    add("weights 1 and 3", "linear", (1.0, 3.0), base=False)
    add(
        "the base listed, 0.5 for all",
        "linear",
        None,
        base=False,
        models=[{"model": "base"}, {"model": ONE}],
        weight=0.5,
    )
    add("base_model named only", "linear", (1.0, 2.0), weight=0.5)
    add("a negative weight", "linear", (2.0, -0.5), base=False)
    add("normalize: false, sum 1", "linear", (0.25, 0.75), base=False, normalize=False)
    add("normalize: false, sum 2", "linear", (1.0, 1.0), base=False, normalize=False)
    add("no weight", "linear", None, base=False)
    add("a negative weight", "task_arithmetic")
    add("lambda 0.4", "task_arithmetic", **{"lambda": 0.4})
    add("normalize: true", "task_arithmetic", (0.7, 0.2), normalize=True)
    add("normalize: true, int8_mask", "task_arithmetic", (2.0, -1.0), normalize=True, int8_mask=True)
    add(
        "base among the models",
        "task_arithmetic",
        None,
        models=[{"model": "base", "parameters": {"weight": 3.0}}, {"model": ONE, "parameters": own}],
    )
    add("a density, which it passes over", "task_arithmetic", density=0.3)
    add("no base_model", "task_arithmetic", base=False)
    for method in ("ties", "breadcrumbs", "breadcrumbs_ties"):
        add("defaults", method, (0.7, 0.5, 0.4))
        add("density 0.37", method, (0.7, 0.5, 0.4), density=0.37)
        add("density 0.61, a negative weight", method, (1.0, -0.6, 0.4), density=0.61)
        add(
            "normalize turned, lambda 0.5",
            method,
            (1.0, 0.6, 0.4),
            density=0.53,
            normalize=method != "ties",
            **{"lambda": 0.5},
        )
        add("rescale: true, int8_mask", method, (1.0, 0.6), density=0.29, rescale=True, int8_mask=True)
    add("gamma 0.1", "breadcrumbs", (1.0, 0.6), density=0.5, gamma=0.1)
    add("density 0.95, gamma 0.2", "breadcrumbs", (1.0, 0.6), density=0.95, gamma=0.2)
    add("gamma 0.05", "breadcrumbs_ties", (1.0, 0.6), density=0.7, gamma=0.05)
    for method in ("dare_linear", "dare_ties", "della", "della_linear"):
        add("density 1", method, (0.7, 0.5, 0.4))
        add("density 1, normalize: true, lambda 2", method, (0.7, -0.5, 0.4), normalize=True, **{"lambda": 2.0})
        add("density 0.6", method, (1.0, 1.0), density=0.6)
        add("density 0.6, rescale: false", method, (1.0, 1.0), density=0.6, rescale=False)
    add("epsilon 0.3, density 0.5", "della", (1.0, 1.0), density=0.5, epsilon=0.3)
    add(
        "densities that differ",
        "ties",
        None,
        models=[{"model": ONE, "parameters": {"weight": 1.0, "density": 0.2}}, {"model": TWO, "parameters": own}],
    )
    add(
        "a gradient of weights",
        "ties",
        None,
        models=[{"model": ONE, "parameters": {"weight": [0.0, 1.0]}}, {"model": TWO, "parameters": own}],
    )
    add(
        "a filter",
        "ties",
        None,
        models=[
            {"model": ONE, "parameters": {"weight": [{"filter": "mlp", "value": 0.5}, {"value": 1.0}]}},
            {"model": TWO, "parameters": own},
        ],
    )
    add("defaults", "sce", None)
    add("select_topk 0.4", "sce", None, select_topk=0.4)
    add(
        "three, select_topk 0.15",
        "sce",
        None,
        models=[{"model": n} for n in (ONE, TWO, THREE)],
        select_topk=0.15,
        int8_mask=True,
    )
    add("a weight, which it passes over", "sce", (1.0, 0.5))
    add("base_model", "nuslerp", (1.0, 3.0))
    add("weights of sum 0", "nuslerp", (1.0, -1.0))
    add("row by row", "nuslerp", (1.0, 3.0), nuslerp_flatten=False)
    add("whole weights", "nuslerp", (1.0, 3.0), base=False)
    add("base_model", "multislerp", (1.0, 3.0))
    add("three models", "multislerp", (1.0, 3.0, 0.5))
    add("base_model, equal weights", "multislerp", (0.5, 0.5))
    add("whole weights", "multislerp", (0.5, 0.5), base=False)
    add("normalize_weights: false, sum 1", "multislerp", (0.3, 0.7), normalize_weights=False)
    add("base_model is one of the two", "slerp", None, models=[{"model": "base"}, {"model": ONE}], t=0.5)
    add("whole weights", "karcher", None, base=False)
    add("", "model_stock", None, models=[{"model": n} for n in (ONE, TWO, THREE)])
    add("", "passthrough", None, base=False, models=[{"model": ONE}])
    add("", "nearswap", None, models=[{"model": "base"}, {"model": ONE}], t=0.1)
    add("", "arcee_fusion", None, models=[{"model": "base"}, {"model": ONE}])
    return found


def compared(place: Path, python: Path) -> dict[str, Any]:
    """Rows of every recipe."""
    made(place)
    jobs = []
    for i, (said, recipe) in enumerate(recipes()):
        file = place / f"{i}.yaml"
        named = json.dumps(recipe).replace('"base', f'"{place / "base"}').replace("+", f"+{place}/")
        named = named.replace(f'"{place / "base"}_model"', '"base_model"')
        file.write_text(named)
        jobs.append((said, recipe, file, place / f"mergekit-{i}", place / f"plait-{i}"))
    arguments = [str(part) for *_, file, out, _ in jobs for part in (file, out)]
    script = place / "run.py"
    script.write_text(_MERGEKIT)
    done = subprocess.run([python, script, *arguments], check=True, capture_output=True, text=True)
    refused = {
        line.split()[1]: " ".join(line.split()[2:]) for line in done.stdout.splitlines() if line.startswith("REFUSED")
    }
    return {"rows": [row(place / "base", *job, refused.get(str(job[3]))) for job in jobs]}


def row(
    base: Path, said: str, recipe: dict[str, Any], file: Path, theirs: Path, mine: Path, refused: str | None
) -> dict[str, Any]:
    """One recipe: how far plait's model lies from mergekit's, or who refuses it and why."""
    found: dict[str, Any] = {"method": recipe["merge_method"], "recipe": said, "yaml": recipe}
    if refused:
        found["mergekit_refuses"] = refused
    try:
        answer(MergeRequest([str(file)], mine, bake_into=base))
    except PlaitError as e:
        return found | {"refused": e.what.replace(f"{base.parent}/", "")}
    if refused:
        return found | {"max_relative_difference": None}
    a, b = differences(base, theirs), differences(base, mine)
    size = sum(float(d.square().sum()) for d in a.values()) ** 0.5
    gap = sum(float((a[k] - b[k]).square().sum()) for k in a) ** 0.5 / size
    density = (recipe.get("parameters") or {}).get("density", 1.0)
    if recipe["merge_method"].startswith(("dare", "della")) and density < 1:
        other = sum(float(d.square().sum()) for d in b.values()) ** 0.5
        kept = [
            sum(int((d[k].abs() > 1e-7).sum()) for k in a) / sum(d[k].numel() for k in a if a[k].any()) for d in (a, b)
        ]
        return found | {
            "random": True,
            "ratio_of_norms": other / size,
            "changed_by_mergekit": kept[0],
            "changed_by_plait": kept[1],
        }
    return found | {"max_relative_difference": gap}


def made(place: Path) -> None:
    """A tiny random Llama and three adapters whose updates are as large as its weights."""
    generator = torch.Generator().manual_seed(0)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": WIDTH, "intermediate_size": 48,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": 2, "vocab_size": VOCABULARY,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "torch_dtype": "float32", "max_position_embeddings": 64,
        "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    }  # fmt: skip
    shapes = {"model.embed_tokens": (VOCABULARY, WIDTH), "lm_head": (VOCABULARY, WIDTH)}
    layer = {
        **TARGETS,
        "self_attn.k_proj": (16, 32),
        "self_attn.o_proj": (32, 32),
        "mlp.gate_proj": (48, 32),
        "mlp.up_proj": (48, 32),
    }
    shapes |= {f"model.layers.{i}.{n}": s for i in range(LAYERS) for n, s in layer.items()}
    weights = {f"{n}.weight": torch.randn(s, generator=generator) * 0.1 for n, s in shapes.items()}
    norms = [f"model.layers.{i}.{n}" for i in range(LAYERS) for n in ("input_layernorm", "post_attention_layernorm")]
    weights |= {f"{n}.weight": torch.ones(WIDTH) for n in [*norms, "model.norm"]}
    (place / "base").mkdir()
    save_file(weights, place / "base" / "model.safetensors", metadata={"format": "pt"})
    (place / "base" / "config.json").write_text(json.dumps(config))
    for name in "abc":
        tensors = {}
        for i in range(LAYERS):
            for module, (out, width) in TARGETS.items():
                key = f"base_model.model.model.layers.{i}.{module}.lora_"
                tensors[f"{key}A.weight"] = torch.randn(RANK, width, generator=generator) * 0.2
                tensors[f"{key}B.weight"] = torch.randn(out, RANK, generator=generator) * 0.2
        (place / name).mkdir()
        save_file(tensors, place / name / "adapter_model.safetensors")
        about = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": str(place / "base"),
            "r": RANK,
            "lora_alpha": 6,
        }
        about |= {"target_modules": sorted({n.rpartition(".")[2] for n in TARGETS})}
        (place / name / "adapter_config.json").write_text(json.dumps(about))


def differences(base: Path, model: Path) -> dict[str, torch.Tensor]:
    """What a whole model adds to the base's weights, in float64."""
    before = load_file(base / "model.safetensors")
    after = {k: v for file in sorted(model.glob("*.safetensors")) for k, v in load_file(file).items()}
    return {k: after[k].double() - v.double() for k, v in before.items()}


def page(result: dict[str, Any]) -> str:
    """The table as Markdown."""
    lines = [
        "# mergekit's recipes in plait",
        "",
        f"mergekit {result['mergekit']} and plait on a tiny random Llama and three adapters of rank {RANK}, whose updates are as",
        "large as its weights, float32, CPU. Both read the same YAML; the table holds |plait - mergekit| / |mergekit| over all",
        "weights, of what the merged model adds to the base. plait's merge is baked (as an adapter it is cut to the sum of the",
        "ranks, and says what that loses). Masks that are drawn at random cannot be the same: there the ratio of the norms and",
        "the fractions of changed entries are compared. Made by `benchmarks/mergekit.py`.",
        "",
        "| method | recipe | difference | or why not |",
        "|---|---|---|---|",
    ]
    for r in [*result["rows"], *result["random_masks"]]:
        shown, why = "", r.get("refused", "")
        if r.get("random"):
            shown = f"norms {r['ratio_of_norms']:.3f} : 1"
            mine, theirs = (f"{100 * r[f'changed_by_{who}']:.1f} %" for who in ("plait", "mergekit"))
            why = f"random masks: {mine} of entries changed, {theirs} by mergekit"
        elif "max_relative_difference" in r:
            shown = (
                f"{r['max_relative_difference']:.1e}"
                if r["max_relative_difference"] is not None
                else "mergekit refuses it"
            )
        if why and r.get("mergekit_refuses"):
            why += f" (mergekit refuses it as well: {r['mergekit_refuses']})"
        lines.append(f"| {r['method']} | {r['recipe']} | {shown} | {why.replace('|', '/')} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
