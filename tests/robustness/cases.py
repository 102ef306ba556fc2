"""The table of bad inputs: files, adapters, names and recipes. One row each; rows about the system are in system.py."""

# ruff: noqa: E501 (a row is a line)
from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import struct
import zipfile
from pathlib import Path

import torch

from plait.adapters.config import CONFIG
from plait.adapters.weights import WEIGHTS
from plait.disk.files import sha256_file
from plait.disk.manifest import MANIFEST
from tests.robustness.world import ROOT, Case, config, edit, header, record, sparse, tensors, weights

MERGE = ("merge", "A", "B", "--out", "out")
QUERY = f"{ROOT}0.query.lora_A.weight"
STATS = "a.stats.safetensors"


def zipped() -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("data.pkl", pickle.dumps({"a": 1}))
    return data.getvalue()


def overlapping(found: dict) -> None:
    names = [k for k in found if k != "__metadata__"]
    found[names[1]]["data_offsets"] = found[names[0]]["data_offsets"]


def many_names(raw: bytes) -> bytes:
    entry = b'{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    body = b"{" + b",".join(b'"t%d":%b' % (i, entry) for i in range(20_000)) + b',"t9":' + entry + b"}"
    return struct.pack("<Q", len(body)) + body


def brackets(raw: bytes) -> bytes:
    body = b"[" + b'{"":0},' * (2 << 20) + b"0]"
    return struct.pack("<Q", len(body)) + body


def replaced(path: str, make):
    """A file replaced by something that is none."""

    def change(world: Path) -> None:
        (world / path).unlink()
        make(world / path)

    return change


def refused_weights(name: str, data, *words: str) -> Case:
    return Case(name, weights(data), MERGE, 3, (f"A/{WEIGHTS}", *words))


def refused_config(name: str, *words: str, **changed: object) -> Case:
    return Case(name, lambda w: config(w / "A", **changed), MERGE, 3, (f"A/{CONFIG}", *words))


FILES = [
    refused_weights("1 truncated", lambda raw: raw[:-9], "not a whole safetensors file", "download or save it again"),
    refused_weights("2 zero bytes", b"", "0 bytes", "download or save it again"),
    refused_weights("3 header length 10^12", struct.pack("<Q", 10**12) + b"{}", "do not hold a safetensors header"),
    refused_weights("4 overlapping", header(overlapping), "not a whole", "save it again"),
    refused_weights("4 a hole", lambda raw: raw + b"\0" * 16, "not a whole", "save it again"),
    refused_weights("5 a key twice", struct.pack("<Q", 20) + b'{"a": {}, "a": {}}  ', "names 'a' twice"),
    refused_weights("6 a renamed .bin", pickle.dumps({"a": 1}, 2), "a pickle", "pickle formats are not read"),
    refused_weights("6 an HTML page", b"<!DOCTYPE html><html>", "an HTML page"),
    refused_weights("6 a Git LFS pointer", b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    refused_weights("7 a pickle", b"\x80\x04\x95" + b"x" * 50, "a pickle"),
    refused_weights("8 pickle in a zip", zipped(), "a zip archive"),
    Case("9 no config", lambda w: (w / "A" / CONFIG).unlink(), MERGE, 3, ("A", f"no {CONFIG}", "expected a PEFT adapter folder")),
    Case("10 not UTF-8", weights(b'{"r": "\xff"}', f"A/{CONFIG}"), MERGE, 3, (f"A/{CONFIG}", "not UTF-8 at byte", "save it as UTF-8")),
    Case("11 deep JSON", weights(b"[" * 100_000, f"A/{CONFIG}"), MERGE, 3, (f"A/{CONFIG}", "not valid JSON")),
    Case("11 huge JSON", weights(b" " * (5 << 20), f"A/{CONFIG}"), MERGE, 3, (f"A/{CONFIG}", "at most 4194304")),
    *[refused_config(f"12 alpha {a!r}", "lora_alpha is", "expected a finite number above 0", "correct it", lora_alpha=a)
      for a in (float("nan"), float("inf"), -1, 0, "16", True)],
    *[refused_config(f"13 r {r!r}", "r is", "expected an integer from 1", "correct it", r=r) for r in (0, -1, 10**9, 2.0)],
    Case("14 a flipped bit", weights(lambda raw: raw[:-3] + bytes([raw[-3] ^ 1]) + raw[-2:], f"M/{WEIGHTS}"), ("merge", "M", "A", "--out", "out"),
         3, (f"M/{WEIGHTS}", "not what was written", MANIFEST)),
    Case("15 a FIFO", replaced(f"A/{WEIGHTS}", os.mkfifo), MERGE, 3, (f"A/{WEIGHTS}", "not a regular file")),
    Case("15 a link that points to itself", replaced(f"A/{CONFIG}", lambda p: p.symlink_to(p)), MERGE, 3, ("A", CONFIG)),
]  # fmt: skip


def with_tensor(name: str, value: torch.Tensor):
    return lambda w: tensors(w / "A", lambda t: t.update({name: value}))


def without(name: str):
    return lambda w: tensors(w / "A", lambda t: t.pop(name))


def renamed(start: str):
    return lambda w: tensors(
        w / "A", lambda t: t.update({k.replace("base_model.model.", start): t.pop(k) for k in list(t)})
    )


ADAPTERS = [
    Case("16 NaN", lambda w: tensors(w / "A", lambda t: t[QUERY].__setitem__((0, 0), float("nan"))), MERGE, 3, (f"A/{WEIGHTS}", QUERY, "NaN")),
    Case("17 a missing tensor", without(QUERY), MERGE, 3, ("A", "layer.0.query", "no lora_A")),
    Case("18 A without B", with_tensor(f"{ROOT}0.key.lora_A.weight", torch.ones(2, 6)), MERGE, 3, ("A", "layer.0.key", "no lora_B")),
    Case("19 r unlike the tensor", lambda w: config(w / "A", r=3), MERGE, 3, ("A", "says 3", CONFIG)),
    Case("20 another base", lambda w: config(w / "A", base_model_name_or_path="other/base"), MERGE, 3, ("other/base", "some/base", "--base")),
    Case("21 another revision", lambda w: config(w / "A", revision="v2"), MERGE, 3, ("v2", "--base")),
    Case("22 different r", lambda w: (config(w / "A", r=3), tensors(w / "A", lambda t: t.update({k: wider(k, v) for k, v in t.items()}))),
         MERGE, 0, (), new=("out",)),
    Case("23 different targets", lambda w: tensors(w / "A", lambda t: [t.pop(k) for k in list(t) if "0.query" in k]), MERGE, 0, (), new=("out",)),
    Case("24 different alpha, rsLoRA, patterns", lambda w: config(w / "A", lora_alpha=5, use_rslora=True, alpha_pattern={"query": 3}),
         MERGE, 0, (), new=("out",)),
    *[refused_config(f"25 {key}", key, **{key: value}) for key, value in
      (("use_dora", True), ("kasa_config", {"a": 1}), ("use_bdlora", True), ("lora_bias", True), ("alora_invocation_tokens", [1]))],
    refused_config("26 unconverted PiSSA", "pissa", "convert", init_lora_weights="pissa"),
    Case("27 heads with other label counts", lambda w: tensors(w / "A", lambda t: t.update(
        {"base_model.model.classifier.weight": torch.ones(5, 4)})), MERGE, 0, (), new=("out",)),
    refused_config("28 quantised: QALoRA", "use_qalora", use_qalora=True),
    Case("30 an adapter on an adapter", lambda w: config(w / "A", base_model_name_or_path="B"), MERGE, 3, ("B", "--stack")),
    Case("31 the same one twice", lambda w: None, ("merge", "A", "A", "--out", "out"), 2, ("'A' is given twice", "--weights")),
    Case("31 only one", lambda w: None, ("merge", "A", "--out", "out"), 0, (), new=("out",)),
    Case("31 B all zero", lambda w: tensors(w / "A", lambda t: [v.zero_() for k, v in t.items() if "lora_B" in k]), MERGE, 0, (), new=("out",)),
    *[Case(f"32 {prefix}", renamed(prefix), MERGE, 3, ("A", prefix.split(".")[-2], "unwrap"))
      for prefix in ("base_model.model._orig_mod.", "base_model.model._fsdp_wrapped_module.")],
    Case("32 not PEFT's prefix", renamed("transformer."), MERGE, 3, ("A", "does not start with", "PEFT")),
]  # fmt: skip


def wider(key: str, value: torch.Tensor) -> torch.Tensor:
    if "lora_A" in key:
        return torch.cat([value, value[:1]])
    return torch.cat([value, value[:, :1]], 1) if "lora_B" in key else value


def recipe(name: str, old: str, new: str, *words: str, waits: str = "") -> Case:
    return Case(
        name, edit("recipe.yaml", old, new), ("validate", "recipe.yaml"), 2, ("recipe.yaml", *words), waits=waits
    )


NAMES = [
    Case("33 duplicate names by case", lambda w: shutil.copytree(w / "B", w / "a"), ("merge", "A", "a", "--out", "out"), 2, ("collide", "NAME=DIR")),
    *[Case(f"34 a path like {path!r:.20}", lambda w: None, ("merge", f"{path}=A", "B", "--out", "out"), 3, ("no such",))
      for path in ("../x", "/abs", "a/b", "x" * 300)],
    *[Case(f"34 a name like {name!r:.20}", lambda w: None, ("merge", f"{name}=A", "B", "--out", "out"), 2, ("cannot name a folder", "letters"))
      for name in ("x" * 101, "a\nb", "\x1b[31m", "<script>")],
    recipe("35 an unknown key", "seeds:", "sedes:", "sedes", "seeds"),
    recipe("35 a key twice", "seeds:", "name: again\nseeds:", "name", "twice"),
    recipe("35 tabs", "name: tiny", "\tname: tiny", "not a recipe"),
    recipe("35 an anchors bomb", "name: tiny", "name: &a [x, x]\ndescription: [*a, *a]", "aliases"),
    recipe("35 a Python object", "name: tiny", "name: !!python/object:os.system x", "python/object"),
    refused_config("36 a bad regex", "rank_pattern[que(ry]", "not a regex", "name the modules plainly", rank_pattern={"que(ry": 2}),
    refused_config("U5 flags inside a regex", "rank_pattern[(?i)QUERY]", "not a regex", rank_pattern={"(?i)QUERY": 2}),
    Case("36 H1 a regex that never ends elsewhere", lambda w: config(w / "A", rank_pattern={".*.*.*.*zz": 4}), MERGE, 0, (), new=("out",)),
    *[recipe(f"37 scales {s}", "scales: [0.5, 1.0], resamples", f"scales: {s}, resamples", "evaluation.scales") for s in ("[]", "[.nan]", "[-1.0]", "[.inf]")],
    *[recipe(f"37 U3 density {d}", "density: 0.5", f"density: {d}", "density", "(0, 1]") for d in ("0", "50", ".nan", "1.5", "'x'")],
    recipe("U3 an option of a subspace method", "options: {}", "options: {cake: 1}", "cake", "osrm"),
    recipe("U3 a device that is none", "device: cpu", "device: tpu", "base.device", "tpu"),
    recipe("U3 labels twice", "labels: [a, b]", "labels: [a, a]", "labels", "stands twice"),
    recipe("U3 a calibration that is none", "method: dare_ties", "calibrate: cake, method: dare_ties", "cake", "pico"),
    recipe("U3 an option of a constraint", "constraint: free", "constraint: penalised, constraint_options: {beta: .nan}", "beta"),
    recipe("U10 epochs that are a mapping", "steps: 4", "epochs: {}", "epochs"),
    recipe("U10 a batch that is null", "batch_size: 8", "batch_size: null", "batch_size is None"),
    recipe("U10 a text column twice", "text: [text]", "text: [text, text]", "text", "stands twice"),
    recipe("a number as text", "rank: 2", "rank: '2'", "lora.rank", "integer"),
    recipe("U9 a timestamp that is none", "name: tiny", "name: !!timestamp x", "not a recipe"),
    recipe("U9 a truth value that is none", "name: tiny", "name: !!bool x", "not a recipe"),
    recipe("a learning rate beyond all numbers", "lr: 0.02", f"lr: {10**400}", "lr"),
]  # fmt: skip


def mergekit(name: str, old: str, new: str, code: int, *words: str) -> Case:
    return Case(
        name,
        edit("mergekit.yaml", old, new),
        ("merge", "mergekit.yaml", "--out", "out"),
        code,
        ("mergekit.yaml", *words),
    )


def statistics(name: str, change, *words: str, command=("stats", "check", STATS)) -> Case:
    return Case(name, record(STATS, "statistics", change), command, 3, (STATS, *words))


def site(**changed: object):
    return lambda r: r["sites"]["layer.0.query"].update(changed)


def manifest(folder: str, **result: object):
    """A manifest of an earlier version, without a digest of its own, whose result says something odd."""

    def change(world: Path) -> None:
        found = (
            json.loads((world / folder / MANIFEST).read_text())
            if (world / folder / MANIFEST).exists()
            else {"schema": 1}
        )
        for key in ("sizes", "manifest_sha256"):
            found.pop(key, None)
        listed = [p for p in sorted((world / folder).rglob("*")) if p.is_file() and p.name != MANIFEST]
        found["files"] = {str(p.relative_to(world / folder)): sha256_file(p) for p in listed}
        found["result"] = {**found.get("result", {}), **result}
        (world / folder / MANIFEST).write_text(json.dumps(found))

    return change


FOUND = [
    *[refused_config(f"S8 {key} as text", key, "expected true or false", "correct it", **{key: "false"})
      for key in ("use_rslora", "fan_in_fan_out", "use_dora")],
    *[statistics(f"S9 U8 {key} {value!r:.20}", site(**{key: value}), f"sites[layer.0.query].{key}", "expected", "collect the statistics anew")
      for key, value in (("count", -5), ("count", 1e999), ("count", "20"), ("count", 10**40), ("error", float("nan")), ("error", -1.0),
                         ("padded_count", float("inf")), ("form", "cake"), ("dim", 0), ("step", -1))],
    *[statistics(f"S9 U8 shape {shape}", lambda r, s=shape: r["modules"]["layer.0.query"].update(shape=s), "modules[layer.0.query].shape", "list of 2 integers")
      for shape in ([-32, 32], [0, 32], [10**9, 32], [1e999, 1], [1], "x")],
    statistics("U8 a NaN energy", lambda r: r["modules"]["layer.0.query"].update(output_energy=float("nan")), "output_energy",
               command=("stats", "merge", STATS, "b.stats.safetensors", "--out", "out")),
    statistics("U8 tasks that are a number", lambda r: r["provenance"].update(tasks=5), "provenance.tasks is 5", command=("stats", "show", STATS)),
    statistics("U8 a task that is a list", lambda r: r["provenance"].update(task=["a"]), "provenance.task", command=("stats", "show", STATS)),
    Case("S9 a tensor beside those of the sites", weights(header(lambda h: h.update({"cake": {"dtype": "F32", "shape": [0], "data_offsets": [
        max(e["data_offsets"][1] for k, e in h.items() if k != "__metadata__")] * 2}})), STATS), ("stats", "check", STATS), 3,
         (STATS, "'cake' belongs to no site", "collect")),
    Case("S9 a tensor under another name", weights(header(lambda h: h.update({"cake": h.pop("layer.1.query|second")})), STATS), ("stats", "check", STATS), 3,
         (STATS, "second", "collect")),
    refused_weights("H2 a name twice among 20,000", many_names, "names 't9' twice"),
    refused_weights("H3 a header of brackets", brackets, "header", "save it again"),
    refused_weights("H3 a header of 20 MB", struct.pack("<Q", 20 << 20) + b" " * (20 << 20), "at most 16777216"),
    Case("H3 a manifest of 9 MB", lambda w: (w / "A" / MANIFEST).write_text('{"schema": 1, "x": "' + "y" * (9 << 20) + '"}'), MERGE, 3,
         (f"A/{MANIFEST}", "at most 8388608")),
    *[Case(f"H4 {size} declared in 4 kB, {command[0]}", lambda w, s=shapes: sparse(w, s), command, code, ("A", words))
      for size, shapes, code, words in (
          ("2 GB", {"0.query.lora_A": [1 << 28, 2], "0.query.lora_B": [4, 2]}, 3, "wider than any layer"),
          ("1 TB", {f"{i}.query.lora_{h}": [2, 1 << 23] if h == "A" else [1 << 23, 2] for i in range(8192) for h in "AB"}, 4, "free some memory"))
      for command in (MERGE, ("convert", "A", "--to", "kohya", "--out", "out.safetensors"))],
    *[Case(f"U6 a base of {what}", lambda w, b=base: config(w / "A", base_model_name_or_path=b), MERGE, 3, (f"A/{CONFIG}", "base_model_name_or_path"))
      for what, base in (("NUL", "a\0b"), ("half a surrogate pair", "\ud800"), ("5000 characters", "x" * 5000))],
    Case("U6 a base of 300 characters", lambda w: config(w / "A", base_model_name_or_path="x" * 300), ("inspect", "A"), 0, ()),
    Case("U7 tasks that are no list", manifest("M", tasks=5), ("inspect", "M"), 3, ("M", "result.tasks is 5", "expected a list")),
    Case("U7 tasks that are no list, in a file", record("kohya.safetensors", "plait", lambda r: r["result"].update(tasks=5)),
         ("inspect", "kohya.safetensors"), 3, ("kohya.safetensors", "result.tasks is 5")),
    mergekit("U9 a method that is a list", "merge_method: ties", "merge_method: [ties]", 2, "merge_method"),
    mergekit("U9 a method that is a mapping", "merge_method: ties", "merge_method: {a: 1}", 2, "merge_method"),
    mergekit("U9 a parameter called 1", "{density: 0.5,", "{1: 0.5,", 2, "parameters", "1"),
    mergekit("U9 a weight beyond all numbers", "weight: 0.5", f"weight: {10**400}", 2, "weight", "expected a finite number"),
    mergekit("U9 a NaN lambda", "lambda: 0.7", "lambda: .nan", 2, "lambda", "expected a finite number"),
    mergekit("U9 a date that is none", "dtype: float32", "dtype: 2026-99-99", 3, "not YAML", "correct the file"),
    mergekit("U9 a float that is none", "dtype: float32", "dtype: !!float x", 3, "not YAML", "correct the file"),
    mergekit("U9 an integer of 5000 digits", "dtype: float32", f"dtype: {'9' * 5000}", 3, "not YAML"),
    Case("U15 a task's name that names no folder", manifest("A", task="../x"), MERGE, 3, (f"A/{MANIFEST}", "result.task", "../x", "NAME=")),
    Case("U15 a head's file that names no task", lambda w: (w / "M/heads/a.safetensors").rename(w / "M/heads/.a b.safetensors") and (w / "M" / MANIFEST).unlink(),
         ("merge", "M", "A", "--out", "out"), 3, ("M/heads", "a b", "task's name")),
    *[Case(f"a LoRA file of plait's with another bit, {args[0]}", weights(lambda raw: raw[:-5] + bytes([raw[-5] ^ 4]) + raw[-4:], "sealed.safetensors"),
           args, 3, ("sealed.safetensors", "not the file that was written"))
      for args in (("inspect", "sealed.safetensors"), ("merge", "sealed.safetensors", "kohya.safetensors", "--out", "out.safetensors"),
                   ("convert", "sealed.safetensors", "--to", "diffusers", "--out", "out.safetensors"))],
    Case("a LoRA file of plait's whose digest lost its name", weights(lambda raw: raw.replace(b"plait_sha256", b"plait_sha257"), "sealed.safetensors"),
         ("inspect", "sealed.safetensors"), 3, ("sealed.safetensors", "not the file that was written", "copy it again")),
    Case("U2 a Fisher file of other things", record("a.fisher.safetensors", "fisher", lambda r: r.update(examples=-1)),
         ("merge", "A", "B", "--method", "fisher", "--stats", "A=a.fisher.safetensors", "--stats", "B=a.fisher.safetensors", "--out", "out"), 3,
         ("a.fisher.safetensors", "examples is -1")),
    Case("D1 --overwrite of a folder of others", lambda w: (w / "home").mkdir() or (w / "home" / "thesis").write_text("x"),
         ("merge", "A", "B", "--out", "home", "--overwrite"), 2, ("home",)),
    Case("D1 --overwrite of an input", lambda w: None, ("merge", "A", "B", "--out", "A", "--overwrite"), 2, ("A",)),
    Case("D1 --overwrite of the working directory", lambda w: None, ("merge", "A", "B", "--out", ".", "--overwrite"), 2, ()),
    *[Case(f"U1 a job file that is {what}", lambda w, t=text: (w / "job.json").write_text(t), ("job", "run", "job.json"), 3, ("job.json",))
      for what, text in (("no JSON", "{"), ("a list", "[]"), ("empty", "{}"), ("of no units", '{"units": 5, "study": {}, "out": "x"}'))],
    Case("U1 no job file", lambda w: None, ("job", "run", "job.json"), 3, ("job.json", "no such file")),
    Case("U13 a device that is none of ours", lambda w: None, (*MERGE, "--device", "meta"), 2, ("meta", "cpu, cuda")),
    Case("weights that are no numbers", lambda w: None, (*MERGE, "--weights", "1,x"), 2, ("--weights", "1,x")),
    Case("an option of no method", lambda w: None, (*MERGE, "--method", "ties", "--set", "density=50"), 2, ("density", "(0, 1]")),
    Case("a rank that is text", lambda w: None, (*MERGE, "--rank", "x"), 2, ("--rank", "integer")),
    Case("a method that is none", lambda w: None, (*MERGE, "--method", "tise"), 2, ("tise", "ties")),
]  # fmt: skip
