"""The table of bad inputs: commands that publish, compare, ask, begin and check, and folders made to be carried along by them."""

# ruff: noqa: E501 (a row is a line)
from __future__ import annotations

import os
from pathlib import Path

from plait.adapters.config import CONFIG
from plait.adapters.weights import WEIGHTS
from plait.disk.manifest import CARD, MANIFEST
from tests.robustness.cases import STATS, manifest
from tests.robustness.world import Case, Change, config, edit, sparse, tensors

PUSH = ("push", "A", "--to", "me/x", "--dry-run")
ASK = ("try", "A", "--prompts")
BEGIN = ("new", "mine.yaml", "--base", "absent")
TASKS = ("--task", "a=a.csv:text", "--task", "b=b.csv:text")


def link(place: str, to: str = "secret.json") -> Change:
    """A file of a folder that is a link to one outside of it."""

    def change(world: Path) -> None:
        (world / "secret.json").write_text('{"key": "SECRET"}')
        (world / place).unlink(missing_ok=True)
        (world / place).symlink_to(world / to)

    return change


def written(place: str, data: bytes) -> Change:
    return lambda world: (world / place).write_bytes(data)


NEWER = [
    *[Case(f"push {what} that leads out of the folder", link(f"A/{place}", to), PUSH, 3, (f"A/{place}", "outside its folder", "remove it"))
      for what, place, to in (("a text", "notes.txt", "secret.json"), ("a config", "config.json", "secret.json"), ("a card", CARD, "secret.json"),
                              ("weights", WEIGHTS, f"B/{WEIGHTS}"))],
    Case("push the card of a result that leads out of the folder", link(f"M/{CARD}"), ("push", "M", "--to", "me/x", "--base", "a/b", "--dry-run"), 3,
         (f"M/{CARD}", "outside its folder")),
    Case("push a link inside the folder", lambda w: (w / "A/copy.json").symlink_to(CONFIG), PUSH, 0, ()),
    Case("push a folder that is a link", lambda w: (w / "L").symlink_to("A"), ("push", "L", "--to", "me/x", "--dry-run"), 0, ()),
    *[Case(f"push a config that is {what}", written("A/config.json", data), PUSH, 3, ("A/config.json", words))
      for what, data, words in (("no JSON", b"x", "not valid JSON"), ("a list", b"[1]", "not a JSON object"), ("deep", b"[" * 100_000, "not valid JSON"),
                                ("a key twice", b'{"a": 1, "a": 2}', "duplicate key"))],
    *[Case(f"push a card {what}", written(f"A/{CARD}", data), PUSH, 3, (f"A/{CARD}", words))
      for what, data, words in (("of half a list", b"---\na: [\n---\n", "correct the lines"), ("of a Python object", b"---\na: !!python/object:os.system x\n---\n", "correct the lines"),
                                ("of numbered keys", b"---\n1: 2\n---\n", "correct the lines"), ("with a date that is none", b"---\na: 2020-99-99\n---\n", "correct the lines"),
                                ("that is not UTF-8", b"---\na: \xff\n---\n", "save it as UTF-8"), ("of 2 MB", b"x" * (2 << 20), "over 1 MiB"))],
    *[Case(f"push a record of {value!r} adapters", manifest("M", adapters=value), ("push", "M", "--to", "me/x", "--base", "a/b", "--dry-run"), 3,
           (f"M/{MANIFEST}", "its record is none that plait writes")) for value in (5, [5])],
    *[Case(f"push to {name!r}", lambda w: None, ("push", "A", "--to", name, "--dry-run"), 2, ("--to USER/NAME",)) for name in ("../x", "x", "x\n/y")],
    Case("push for a base that is none", lambda w: None, (*PUSH, "--base", "$(x)"), 2, ("no name on the hub", "--base USER/NAME")),
    Case("push a file", lambda w: None, ("push", "kohya.safetensors", "--to", "me/x", "--dry-run"), 3, ("kohya.safetensors", "neither an adapter folder nor a model")),
    Case("push --offline", lambda w: None, ("push", "A", "--to", "me/x", "--offline"), 2, ("needs the network", "--dry-run")),
    Case("compare NaN", lambda w: tensors(w / "A", lambda t: [v.fill_(float("nan")) for v in t.values()]), ("compare", "A", "B"), 3, (f"A/{WEIGHTS}", "NaN")),
    Case("compare 2 GB declared in 4 kB", lambda w: sparse(w, {"0.query.lora_A": [1 << 28, 2], "0.query.lora_B": [4, 2]}), ("compare", "A", "B"), 3, ("A", "wider than any layer")),
    Case("extract with statistics that are not there", lambda w: (w / "base").mkdir() or (w / "base/config.json").write_text("{}"),
         ("extract", "base", "--base", "base", "--rank", "2", "--stats", "a=absent", "--out", "out"), 3, ("absent",)),
    Case("extract an adapter", lambda w: None, ("extract", "A", "--base", "B", "--rank", "2", "--out", "out"), 3, ("A", "an adapter, and a whole model is asked for")),
    Case("bake into an adapter", lambda w: None, ("merge", "A", "B", "--bake", "A", "--out", "out"), 3, ("A", "an adapter, and a whole model is asked for")),
    Case("merge a whole model", lambda w: (w / "A" / CONFIG).unlink() or (w / "A/config.json").write_text("{}"), ("merge", "A", "B", "--out", "out"), 3,
         ("A", "a whole model?", "plait extract")),
    Case("compare one", lambda w: None, ("compare", "A"), 2, ("two adapters or more",)),
    Case("compare statistics", lambda w: None, ("compare", "A", STATS), 3, (STATS, "no LoRA factors")),
    Case("compare updates of nothing", lambda w: tensors(w / "A", lambda t: [v.zero_() for v in t.values()]), ("compare", "A", "B"), 0, ()),
    Case("try without a base", lambda w: None, ("try", "A", "--prompt", "x"), 3, ("A", "some/base", "--base FOLDER or NAME")),
    Case("try a pipe of prompts", lambda w: os.mkfifo(w / "p.txt"), (*ASK, "p.txt"), 3, ("p.txt", "not a regular file")),
    *[Case(f"try prompts {what}", written(file, data), (*ASK, file), 3, (file, words))
      for what, file, data, words in (("that are not UTF-8", "p.txt", b"\xff\xfe\x00", "save it as UTF-8"), ("in half a csv", "p.csv", b'a,b\n"', "cannot be read"),
                                      ("in no parquet", "p.parquet", b"PAR1xxxxPAR1", "cannot be read"), ("of two shapes", "p.jsonl", b'{"text": 5}\n[]', "cannot be read"))],
    *[Case(f"try a record of {value!r} {key}", manifest("M", **{key: value}), ("try", "M", "--prompt", "x"), 3, ("M", words))
      for key, value, words in (("adapters", 5, "result.adapters is 5"), ("adapters", [5], "no MergedInput"), ("tasks", 5, "result.tasks is 5"))],
    Case("new of one task", lambda w: None, (*BEGIN, *TASKS[:2]), 2, ("two tasks or more", "--task again")),
    Case("new of a task without columns", lambda w: None, (*BEGIN, "--task", "x=y"), 2, ("x=y", "NAME=FILE:TEXT")),
    Case("new on a base that is not there", lambda w: None, (*BEGIN, *TASKS), 3, ("absent", "no such base")),
    Case("new with an escape in the base's name", lambda w: None, ("new", "mine.yaml", "--base", "a\x1bb", *TASKS), 3, ("a\\x1bb", "no such folder")),
    Case("new in no YAML file", lambda w: None, ("new", "A", "--base", "absent", *TASKS), 2, ("A", ".yaml")),
    *[Case(f"a recipe with {what} that is a number", edit("recipe.yaml", old, new), ("validate", "recipe.yaml"), 2, ("recipe.yaml", words))
      for what, old, new, words in (("a training key", "steps: 4", "1: 4", "training"),
                                    ("a constraint's method", "constraint: free", "constraint: penalised, constraint_options: {method: 5}", "5"))],
    Case("report of no run", lambda w: None, ("report", "A"), 3, ("A: no run", "recipe.json", "plait run --out")),
    Case("report of no run against no run", lambda w: None, ("report", "A", "B"), 3, ("A: no run", "recipe.json", "plait run --out")),
    Case("schema over a folder", lambda w: None, ("schema", "--out", "A", "--overwrite"), 2, ("A", "a folder stands there")),
    Case("completion of no shell", lambda w: None, ("completion", "x"), 2, ("'x'", "bash")),
    Case("a module's name that a shell would run", lambda w: tensors(w / "A", lambda t: t.update(
        {k.replace("base_model.model.", "base_model.model.$(x)."): t.pop(k) for k in list(t)})), ("merge", "A", "B", "--out", "out"), 3, ("plait convert A --rename '$(x)='",)),
    Case("a folder's name that a shell would run", lambda w: (w / "A").rename(w / "$(x)") and config(w / "$(x)", use_dora=True), ("merge", "a=$(x)", "B", "--out", "out"), 3,
         ("plait convert '$(x)'",)),
]  # fmt: skip
