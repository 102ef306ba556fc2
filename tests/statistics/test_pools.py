"""Files alone: a pool of published statistics, a background, and a task that comes later; the data is gone by then."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from plait.adapters.peft_format import read_adapter
from plait.cli import main
from plait.errors import InputError, UsageError
from plait.runs.single.start import StatisticsFiles, initialise_from_files
from plait.statistics import collect_statistics, merge_statistics, read_statistics, write_statistics
from plait.subspaces import compute_subspaces
from plait.subspaces.start import InitialSettings
from plait.tasks import Source, Task, load_task
from tests.conftest import tiny_rows, write_rows
from tests.statistics.models import batches, build

TASKS = ("mine", "one", "two", "public", "web")


@pytest.fixture
def pool(tiny_base, tmp_path, capsys):
    """Task -> its file, collected at the prompt from rows that are deleted afterwards, like the base."""
    base = tmp_path / "base"
    shutil.copytree(tiny_base("bert").name, base)
    files = {}
    for i, task in enumerate(TASKS):
        rows = write_rows(tmp_path / "data" / f"{task}.csv", tiny_rows(2, 40, seed=i))
        files[task] = tmp_path / f"{task}.stats.safetensors"
        command = ["stats", "--base", base, "--task", task, "--train-file", rows, "--text", "text", "--samples", "30"]
        with pytest.raises(SystemExit) as ended:
            main([*map(str, command), "--target-modules", "query", "--device", "cpu", "--out", str(files[task])])
        assert ended.value.code == 0
    shutil.rmtree(tmp_path / "data")
    shutil.rmtree(base)
    capsys.readouterr()
    return files


def init(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        main(["init", *map(str, arguments), "--rank", "2", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert ended.value.code == 0, found
    return found


def test_from_files_only_with_and_without_background(pool, tmp_path, capsys):
    statistics = {t: read_statistics(p) for t, p in pool.items()}
    known = {t: statistics[t] for t in ("mine", "one", "two")}
    public = merge_statistics(statistics["public"], statistics["web"])
    cases = {
        "plain": (["--others", pool["one"], pool["two"]], known, None, 0.5),
        "mixed": (
            ["--others", pool["one"], pool["two"], "--background", pool["public"], "--background", pool["web"]],
            known,
            public,
            0.5,
        ),
        "little": (
            ["--others", pool["one"], pool["two"], "--background", pool["public"], "--background-weight", 0.1],
            known,
            statistics["public"],
            0.1,
        ),
        "alone": (
            ["--background", pool["public"]],  # nobody else: its share is all, whatever the weight
            {"mine": statistics["mine"]},
            statistics["public"],
            1.0,
        ),
    }
    made = {}
    for name, (arguments, mapping, background, weight) in cases.items():
        found = init(capsys, "--own", pool["mine"], *arguments, "--out", tmp_path / name)
        made[name] = read_adapter(tmp_path / name)
        wanted = compute_subspaces(
            "contrastive", mapping, tasks=["mine"], rank=2, background=background, background_weight=weight
        )["mine"]
        for module, subspace in wanted.items():
            factors = next(f for n, f in made[name].modules.items() if n.endswith(module))
            assert torch.equal(factors.A, subspace.A) and not factors.B.any()
        assert ("background" in found) == (background is not None)
    first = next(iter(made["plain"].modules))
    starts = [a.modules[first].A for a in made.values()]
    for i, x in enumerate(starts):
        assert not any(torch.allclose(x, y, atol=1e-4) for y in starts[i + 1 :])


@pytest.mark.parametrize(
    ("architecture", "kind"), [("bert", "classification"), ("bert", "regression"), ("llama", "causal")]
)
def test_text_alone_has_statistics_too(architecture, kind, tiny_base, tmp_path, capsys):
    base, target = tiny_base(architecture).name, "query" if architecture == "bert" else "q_proj"
    rows = tiny_rows(2, 40, seed=3)
    bare = write_rows(tmp_path / "bare.csv", [{"text": r["text"]} for r in rows])
    labelled = write_rows(tmp_path / "labelled.csv", rows)
    command = ["--base", base, "--task", "public", "--text", "text", "--samples", "30"]
    command += ["--kind", kind, "--target-modules", target]
    command += ["--train-file", bare, "--out", tmp_path / "bare"]
    code, made = stats(capsys, *command)
    assert (code, made["samples"]) == (0, 30), made
    code, again = stats(capsys, *command)
    assert (code, again["reused"]) == (0, True)
    with pytest.raises(SystemExit):
        main(["stats", *map(str, command), "--overwrite"])
    assert "no column 'label': its texts are read alone" in capsys.readouterr().err
    code, refused = stats(capsys, *command, "--label", "label", "--overwrite")
    assert code == 3 and "no column 'label'" in str(refused["error"])
    code, of_heads = stats(capsys, *command, "--output-gradients", "--overwrite")
    if kind == "classification":
        assert code == 2 and "how many classes" in str(of_heads["error"])
    else:
        assert code == 0 and of_heads["output_gradients"] == 2
    if kind == "classification":  # whose layers never see a label: the same moments with and without
        assert stats(capsys, *command[:-4], "--train-file", labelled, "--out", tmp_path / "labelled")[0] == 0
        one, other = (read_statistics(tmp_path / n).sites for n in ("bare", "labelled"))
        assert all(torch.equal(one[s].second, other[s].second) for s in one)


def test_text_alone_is_no_task_to_train(tiny_base, tmp_path, capsys):
    bare = tmp_path / "bare.csv"
    bare.write_text("text\n" + "".join(f"w{i} w{i + 1}\n" for i in range(20)))
    told = [
        "--base",
        tiny_base("llama").name,
        "--task",
        "public",
        "--train-file",
        bare,
        "--text",
        "text",
        "--kind",
        "causal",
    ]
    with pytest.raises(SystemExit) as ended:
        main(["train", "none", *map(str, told), "--label", "", "--out", str(tmp_path / "none")])
    assert ended.value.code in (2, 3) and not (tmp_path / "none").exists()
    with pytest.raises(InputError, match="no column 'label'"):
        load_task(Task("public", "causal", Source(str(bare)), ("text",)))


def stats(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        main(["stats", *map(str, arguments), "--json"])
    return ended.value.code, json.loads(capsys.readouterr().out)


def test_files_made_of_files_are_known_again(pool, tmp_path, capsys, monkeypatch):
    merge = ("merge", pool["one"], pool["two"], "--out", tmp_path / "pool.stats.safetensors")
    compress = ("compress", pool["one"], "--rank", 4, "--out", tmp_path / "small.stats.safetensors")
    first = [stats(capsys, *command) for command in (merge, compress)]
    assert [(code, found["reused"]) for code, found in first] == [(0, False)] * 2
    for command, (_, before), computing, other in (
        (merge, first[0], "merge_statistics", ("merge", pool["two"], pool["one"], *merge[3:])),
        (compress, first[1], "compress_statistics", (*compress[:3], 5, *compress[4:])),
    ):
        written = command[-1].read_bytes()
        with monkeypatch.context() as patched:
            patched.setattr(f"plait.runs.single.pooled.{computing}", lambda *_: pytest.fail("computed again"))
            assert stats(capsys, *command) == (0, before | {"reused": True})
            code, found = stats(capsys, *other)  # another order adds up to other bits
            assert code == 2 and "exists with other settings" in str(found["error"]), found
            command[-1].write_bytes(written[:-1] + bytes([written[-1] ^ 1]))
            code, found = stats(capsys, *command)
            assert code == 3 and "--overwrite" in str(found["error"])
        assert stats(capsys, *command, "--overwrite") == (0, before) and command[-1].read_bytes() == written
        command[-1].write_text("mine")
        assert stats(capsys, *command, "--overwrite")[0] == 2 and command[-1].read_text() == "mine"


def test_a_pool_in_one_file(pool, tmp_path, capsys):
    merged = tmp_path / "pool.stats.safetensors"
    assert stats(capsys, "merge", pool["one"], pool["two"], "--out", merged)[1]["reused"] is False
    with pytest.raises(SystemExit):
        main(["stats", "merge", str(pool["one"]), str(pool["one"]), "--out", str(tmp_path / "twice")])
    assert "the same rows as in" in capsys.readouterr().err and not (tmp_path / "twice").exists()
    assert init(capsys, "--own", pool["mine"], "--others", merged, "--out", tmp_path / "a")["others"] == ["pool"]
    with pytest.raises(UsageError, match="merged from files of 'one' too"):
        initialise_from_files(StatisticsFiles(pool["one"], [merged]), InitialSettings(rank=2), tmp_path / "b")
    for background, why in ((merged, "merged from files of 'one' too"), (pool["one"], "statistics of 'one' itself")):
        with pytest.raises(UsageError, match=why):
            initialise_from_files(
                StatisticsFiles(pool["one"], (), [background]), InitialSettings(rank=2), tmp_path / "b"
            )
    with pytest.raises(InputError, match="no such file"):
        initialise_from_files(StatisticsFiles(pool["one"], (), [tmp_path / "none"]), InitialSettings(), tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_the_same_base_under_another_path_mixes(tmp_path):
    model = build("roberta")
    parts = [
        collect_statistics(
            model, batches("roberta", i), ["query"], provenance={"base": name, "base_sha256": sha, "task": name}
        )
        for i, (name, sha) in enumerate((("/home/ann/base", "a"), ("/srv/base", "a"), ("/srv/base", "b")))
    ]
    merged = merge_statistics(*parts[:2])
    assert merged.provenance["base"] == "/home/ann/base" and merged.provenance["tasks"] == [
        "/home/ann/base",
        "/srv/base",
    ]
    with pytest.raises(InputError, match="differ in base"):
        merge_statistics(*parts[1:])
    write_statistics(tmp_path / "a", merged)
    assert read_statistics(tmp_path / "a").provenance == merged.provenance
