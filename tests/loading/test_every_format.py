"""What commands write of other people's formats, mixtures of experts, the hub's adapters and chosen merges passes plait check."""

from __future__ import annotations

import json

import pytest

from plait.cli import app
from tests.command import done
from tests.hub_cache import cached, use_cache
from tests.loading.planted import causal, change, configure, save_adapter
from tests.loading.test_every_command import LLM, llm, passes  # noqa: F401 (llm is a fixture)
from tests.mixtures import FUSED, adapter, mixture

EXPERTS = {"target_modules": ["q_proj"], "target_parameters": [*FUSED, "mlp.gate.weight"]}


def own(results: list[dict]) -> dict:
    """The one account that counts."""
    (result,) = results
    (account,) = [a for a in result["accounts"] if a["counts"]]
    return account


def test_gguf(capsys, llm, tmp_path):  # noqa: F811
    pytest.importorskip("gguf")
    done(capsys, "merge", llm / "one", llm / "two", "--out", tmp_path / "m")
    for name, source in (("one", llm / "one"), ("m", tmp_path / "m")):
        file = tmp_path / f"{name}.gguf"
        done(capsys, "export", source, "--for", "gguf", "--base", llm / "base", "--out", file)
        account = own(passes(capsys, file))
        assert account["loader"] == "llama.cpp" and account["effects"] == {"loaded": len(account["placements"])}
        done(capsys, "convert", file, "--base", llm / "base", "--out", tmp_path / f"{name}-back")
        assert own(passes(capsys, tmp_path / f"{name}-back"))["loader"] == "peft"
    done(capsys, "merge", tmp_path / "one-back", tmp_path / "m-back", "--out", tmp_path / "again")
    passes(capsys, tmp_path / "again")


def test_mlx(capsys, llm, tmp_path):  # noqa: F811
    for name in ("a", "b"):
        folder = save_adapter(tmp_path / name, causal(), seed=ord(name), **LLM)
        change(folder, configure(base_model_name_or_path=str(llm / "base")))
        done(capsys, "convert", folder, "--to", "mlx", "--out", tmp_path / f"{name}-mlx")
    mlx = [tmp_path / "a-mlx", tmp_path / "b-mlx"]
    done(capsys, "merge", *mlx, "--out", tmp_path / "m")
    done(capsys, "merge", tmp_path / "a", tmp_path / "b", "--format", "mlx", "--out", tmp_path / "from-peft")
    done(capsys, "convert", tmp_path / "m", "--to", "peft", "--out", tmp_path / "back")
    for name, loader in (("a-mlx", "mlx-lm"), ("m", "mlx-lm"), ("from-peft", "mlx-lm"), ("back", "peft")):
        assert own(passes(capsys, tmp_path / name))["loader"] == loader


def test_chosen_merges(capsys, llm, tmp_path):  # noqa: F811
    done(capsys, "merge", "auto", llm / "one", llm / "two", "--out", tmp_path / "auto")
    done(capsys, "merge", "auto", llm / "one", llm / "two", "--rank", 2, "--out", tmp_path / "cut")
    weights = tmp_path / "weights.yaml"
    weights.write_text("one: {q_proj: 0.5, default: 1.0}\ntwo: {default: 0.3}\n")
    done(capsys, "merge", llm / "one", llm / "two", "--weights", weights, "--out", tmp_path / "weighted")
    for name in ("auto", "cut", "weighted"):
        assert own(passes(capsys, tmp_path / name))["loader"] == "peft"


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_mixtures_of_experts(capsys, tmp_path, name):
    mixture(name).save_pretrained(tmp_path / "base")
    for seed, folder in enumerate(("a", "b")):
        change(
            adapter(mixture(name), tmp_path / folder, seed, **EXPERTS),
            configure(base_model_name_or_path=str(tmp_path / "base")),
        )
    two = [tmp_path / "a", tmp_path / "b"]
    done(capsys, "merge", *two, "--out", tmp_path / "m")
    done(capsys, "merge", *two, "--rank", 1, "--out", tmp_path / "cut")
    done(capsys, "merge", "auto", *two, "--out", tmp_path / "auto")
    done(capsys, "merge", *two, "--bake", tmp_path / "base", "--out", tmp_path / "baked")
    done(capsys, "edit", tmp_path / "m", "--remove", "b", "--out", tmp_path / "edited")
    done(capsys, "extract", tmp_path / "baked", "--base", tmp_path / "base", "--rank", 2, "--out", tmp_path / "extract")
    for folder in ("m", "cut", "auto", "edited", "extract"):
        account = own(passes(capsys, tmp_path / folder))
        experts = [p for p in account["placements"] if "experts" in p["tensor"]]
        assert account["loader"] == "peft" and experts and {p["effect"] for p in experts} == {"loaded"}
    assert own(passes(capsys, tmp_path / "baked"))["loader"] == "transformers"


def test_adapters_of_the_hub(capsys, llm, tmp_path, monkeypatch):  # noqa: F811
    cache = tmp_path / "cache"
    for name in ("one", "two", "base"):
        cached(cache, f"alice/{name}", llm / name)
    use_cache(monkeypatch, cache)
    monkeypatch.chdir(tmp_path)
    done(capsys, "merge", "alice/one", "alice/two@main", "--out", tmp_path / "m")
    done(capsys, "merge", "alice/one", "alice/two", "--bake", "alice/base", "--out", tmp_path / "baked")
    done(capsys, "convert", "alice/one", "--out", tmp_path / "converted")
    done(capsys, "export", "alice/two", "--for", "vllm", "--out", tmp_path / "vllm")
    done(capsys, "extract", tmp_path / "baked", "--base", "alice/base@main", "--rank", 4, "--out", tmp_path / "extract")
    written = json.loads((tmp_path / "extract/adapter_config.json").read_text())
    assert (written["base_model_name_or_path"], written["revision"]) == ("alice/base", "main")
    done(capsys, "export", "alice/one", "--for", "gguf", "--base", "alice/base", "--out", tmp_path / "one.gguf")
    passes(capsys, tmp_path / "one.gguf")
    for folder in ("m", "baked", "converted", "vllm", "extract", "alice/one", "alice/two@main"):
        passes(capsys, tmp_path / folder if (tmp_path / folder).exists() else folder)


# What a command writes, where it writes anything that a loader opens, is walked here or in test_every_command.
WALKED = {"merge", "convert", "edit", "post", "train", "extract", "export", "init", "run"}
WITHOUT_ADAPTERS = {
    *("plan", "validate", "cp", "ls", "report", "eval", "advise", "inspect", "check"),  # words, tables, recipes
    *(
        "new",
        "schema",
        "completion",
        "doctor",
        "compare",
        "try",
        "push",
        "measure",
    ),  # push sends what is there: test_push
    *("stats", "stats show", "stats merge", "stats diff", "stats compress", "stats check", "stats fisher"),
    *("study table", "study archive"),
}
OF_THE_SAME_STAGES = {"demo", "study run", "job"}  # the stages of run: adapters by init and train, merges by merge


def test_no_command_is_left_out():
    import typer.main

    def names(group, before=""):
        for name, command in group.commands.items():
            inside = getattr(command, "commands", None)
            if not inside or command.invoke_without_command:
                yield before + name
            if inside:
                yield from names(command, f"{before}{name} ")

    commands = set(names(typer.main.get_command(app)))
    commands -= {c for c in commands if c.startswith("job ")}
    assert commands == WALKED | WITHOUT_ADAPTERS | OF_THE_SAME_STAGES - (OF_THE_SAME_STAGES - commands)
