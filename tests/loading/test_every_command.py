"""Whatever a command of plait's writes passes plait check: every file as listed, every tensor loaded as it is meant."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml

from plait.merging.registry import merge_methods
from tests.command import call, done
from tests.conftest import tiny_rows, write_rows
from tests.formats.conftest import factors_of, kohya_tensors
from tests.loading.planted import causal, change, configure, save_adapter

LLM = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"]}
STEPS = ("--set", "training.steps=2", "--set", "training.lr=0.02")


def passes(capsys, path) -> list[dict]:
    """Check a path; the results in it."""
    code, out, err = call(capsys, "check", path, "--json")
    found = json.loads(out)
    assert code == 0 and not err, (path, err)
    results = found.get("results", [found])
    assert all(r["ok"] for r in results)
    return results


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    """Two adapters of a tiny Llama, of different ranks and scalings, and their base."""
    root = tmp_path_factory.mktemp("llm")
    causal().save_pretrained(root / "base")
    more = {"one": {}, "two": {"rank_pattern": {"v_proj": 3}, "alpha_pattern": {"q_proj": 1}}}
    for seed, (name, options) in enumerate(more.items()):
        folder = save_adapter(root / name, causal(), seed=seed, **LLM, **options)
        change(folder, configure(base_model_name_or_path=str(root / "base")))
    return root


def plain_methods():
    """Methods that need nothing but adapters."""
    return sorted(n for n, m in merge_methods().items() if not m.needs)


@pytest.mark.parametrize("method", plain_methods())
def test_merges_of_language_models(capsys, llm, tmp_path, method):
    per_task = ["--per-task"] if method == "emr" else []
    done(capsys, "merge", llm / "one", llm / "two", "--method", method, *per_task, "--out", tmp_path / "m")
    (result,) = passes(capsys, tmp_path / "m")
    assert {a["loader"] for a in result["accounts"]} >= {"peft", "vllm", "llama.cpp"}


@pytest.mark.parametrize("options", [("--rank", 2), ("--weights", "0.5,-1"), ("--scale", 0.3), ("--calibrate", "pico")])
def test_merges_with_options(capsys, llm, tmp_path, options):
    done(capsys, "merge", llm / "one", llm / "two", *options, "--out", tmp_path / "m")
    passes(capsys, tmp_path / "m")


def test_what_is_made_of_a_merge(capsys, llm, tmp_path):
    done(capsys, "merge", llm / "one", llm / "two", "--out", tmp_path / "m")
    done(capsys, "edit", tmp_path / "m", "--remove", "two", "--out", tmp_path / "edited")
    done(capsys, "convert", tmp_path / "m", "--out", tmp_path / "converted")
    done(capsys, "merge", llm / "one", llm / "two", "--bake", llm / "base", "--out", tmp_path / "baked")
    for name in ("edited", "converted", "baked"):
        (result,) = passes(capsys, tmp_path / name)
        assert result["listed"]
    own = next(a for a in result["accounts"] if a["counts"])
    assert own["loader"] == "transformers" and own["effects"] == {"loaded": len(own["placements"])}


def test_exports_and_extracts(capsys, llm, tmp_path):
    done(capsys, "merge", llm / "one", llm / "two", "--out", tmp_path / "m")
    done(capsys, "merge", llm / "one", "--bake", llm / "base", "--out", tmp_path / "tuned")
    done(capsys, "export", tmp_path / "m", "--for", "vllm", "--out", tmp_path / "vllm")
    done(capsys, "export", tmp_path / "m", "--for", "peft", "--out", tmp_path / "peft")
    done(capsys, "extract", tmp_path / "tuned", "--base", llm / "base", "--rank", 2, "--out", tmp_path / "extract")
    for name in ("vllm", "peft", "extract"):
        passes(capsys, tmp_path / name)
    for loader in ("peft", "vllm", "llama.cpp"):
        assert call(capsys, "check", tmp_path / "vllm", "--for", loader)[0] == 0


def test_stacks(capsys, llm, tmp_path):
    upper = shutil.copytree(llm / "two", tmp_path / "upper")
    change(upper, configure(base_model_name_or_path=str(llm / "one")))
    done(capsys, "merge", llm / "one", upper, "--stack", "--out", tmp_path / "stack")
    passes(capsys, tmp_path / "stack")


@pytest.mark.parametrize(
    "config", [{"use_dora": True}, {"trainable_token_indices": [3, 4]}, {"modules_to_save": ["embed_tokens"]}]
)
def test_conversions_of_variants(capsys, llm, tmp_path, config):
    folder = save_adapter(tmp_path / "a", causal(), **{**LLM, **config})
    change(folder, configure(base_model_name_or_path=str(llm / "base")))
    done(capsys, "convert", folder, "--base", llm / "base", "--rank", 16, "--out", tmp_path / "plain")
    passes(capsys, tmp_path / "plain")


def test_files_of_image_models(capsys, tmp_path):
    from safetensors.torch import save_file

    for seed in (1, 2):
        save_file(kohya_tensors(factors_of(seed)), tmp_path / f"{seed}.safetensors")
    two = [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]
    done(capsys, "merge", *two, "--out", tmp_path / "m.safetensors")
    done(capsys, "convert", two[0], "--to", "diffusers", "--out", tmp_path / "d.safetensors")
    done(capsys, "convert", two[0], "--to", "peft", "--out", tmp_path / "pipeline")
    done(capsys, "convert", tmp_path / "pipeline", "--to", "kohya", "--out", tmp_path / "k.safetensors")
    for name, loader in (
        ("m.safetensors", "diffusers"),
        ("d.safetensors", "diffusers"),
        ("k.safetensors", "diffusers"),
        ("pipeline", "peft"),
    ):
        (result,) = passes(capsys, tmp_path / name)
        own = [a for a in result["accounts"] if a["counts"]]
        assert {a["loader"] for a in own} == {loader} and {a["inside"] for a in own} == (
            {"unet", "text_encoder"} if name == "pipeline" else {""}
        )


def test_stage_by_stage(capsys, tiny_base, tmp_path):
    base = tiny_base("bert").name
    statistics = {t: tmp_path / f"{t}.stats.safetensors" for t in ("one", "two")}
    for seed, (task, file) in enumerate(statistics.items()):
        rows = write_rows(tmp_path / f"{task}.csv", tiny_rows(2, 40, seed=seed))
        source = ["--base", base, "--task", task, "--train-file", rows, "--text", "text", "--device", "cpu"]
        done(
            capsys,
            "stats",
            *source,
            "--target-modules",
            "query",
            "--target-modules",
            "value",
            "--samples",
            12,
            "--out",
            file,
        )
    for task, file in statistics.items():
        source = [
            "--base",
            base,
            "--task",
            task,
            "--train-file",
            tmp_path / f"{task}.csv",
            "--text",
            "text",
            "--device",
            "cpu",
        ]
        start = tmp_path / f"start-{task}"
        done(capsys, "init", "--own", file, "--others", *statistics.values(), "--rank", 2, "--out", start)
        done(capsys, "train", start, *source, *STEPS, "--out", tmp_path / task)
    post = ["post", tmp_path / "one", "--own", statistics["one"], "--others", statistics["two"], "--rank", 2]
    done(capsys, *post, "--out", tmp_path / "moved")
    done(capsys, "merge", tmp_path / "one", tmp_path / "two", "--out", tmp_path / "merged")
    given = [x for t, f in statistics.items() for x in ("--stats", f"{t}={f}")]
    done(
        capsys,
        "merge",
        tmp_path / "one",
        tmp_path / "two",
        "--method",
        "regmean",
        *given,
        "--out",
        tmp_path / "regmean",
    )
    for name in ("start-one", "one", "moved", "merged", "regmean"):
        passes(capsys, tmp_path / name)
    for name in ("merged", "regmean"):
        (result,) = passes(capsys, tmp_path / name)
        peft = next(a for a in result["accounts"] if a["counts"])
        heads = {p["tensor"].partition(":")[0] for p in peft["placements"] if p["kind"] == "head"}
        assert heads == {"heads/one.safetensors", "heads/two.safetensors"}
    assert call(capsys, "check", tmp_path / "one", "--base", base)[0] == 0
    assert call(capsys, "check", tmp_path / "merged", "--base", base)[0] == 0


def test_a_whole_run(capsys, recipe_file, tmp_path):
    recipe = {**yaml.safe_load(recipe_file.read_text()), "merges": ["task_arithmetic", "ties"]}
    recipe_file.write_text(yaml.safe_dump(recipe))
    done(capsys, "run", recipe_file, "--out", tmp_path / "out", "--quiet")
    results = passes(capsys, tmp_path / "out")
    checked = {r["path"].removeprefix(f"{tmp_path}/out/").partition("/")[0] for r in results}
    assert {"adapters", "merged", "best"} <= checked
    assert sum(any(a["counts"] for a in r["accounts"]) for r in results) >= 5
