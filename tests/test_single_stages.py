"""One adapter by hand, stage by stage at the prompt: stats, init, train, eval, post, merge."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from plait.adapters.peft_format import read_adapter
from plait.cli import main
from plait.statistics import read_statistics, write_statistics
from plait.statistics.fisher import read_fisher, write_fisher
from plait.training import TrainingSettings, prepare_constraint
from tests.command import done
from tests.conftest import tiny_rows, write_rows


def _a_place_that_is_taken(command, folder, monkeypatch, capsys):
    """What stands where scores go is met before anything is scored."""
    place, files = folder / "scores.jsonl", set(folder.iterdir())
    place.write_text("mine")
    with monkeypatch.context() as patched:
        patched.setattr("plait.runs.single.evaluate._evaluate", never)
        code, said = refused(capsys, *command)
        assert code == 2 and "scores.jsonl: exists" in said, said
        code, said = refused(capsys, *command, "--overwrite")
        assert code == 2 and "was not written by this command" in said, said
    assert place.read_text() == "mine"
    place.unlink()
    assert set(folder.iterdir()) == files


def test_by_hand_from_files(tiny_base, tmp_path, capsys, monkeypatch):
    base = tiny_base("bert")
    files, statistics = {}, {}
    for i, task in enumerate(("one", "two")):
        files[task] = write_rows(tmp_path / f"{task}.csv", tiny_rows(2, 40, seed=i))
        source = ["--base", base.name, "--task", task, "--train-file", files[task], "--text", "text"]
        targets = ["--target-modules", "query", "--target-modules", "value"]
        statistics[task] = tmp_path / f"{task}.stats.safetensors"
        found = done(capsys, "stats", *source, *targets, "--samples", "12", "--out", statistics[task])
        assert (found["task"], found["samples"], found["reused"]) == (task, 12, False)
    source = ["--base", base.name, "--task", "one", "--train-file", files["one"], "--text", "text"]

    start = tmp_path / "start"
    found = done(
        capsys, "init", "--own", statistics["one"], "--others", *statistics.values(), "--rank", 2, "--out", start
    )
    assert found["others"] == ["two"]
    adapter = read_adapter(start)
    assert all(not f.B.any() for f in adapter.modules.values())

    trained = tmp_path / "adapters" / "one"
    done(capsys, "train", start, *source, "--set", "training.steps=3", "--set", "training.lr=0.02", "--out", trained)
    learned = read_adapter(trained)
    assert all(f.B.any() for f in learned.modules.values())
    assert list(learned.heads) == ["one"]

    kept = ["--set", "training.constraint=projected", "--set", "training.constraint_options={m: 4}"]
    pairs = [x for path in statistics.values() for x in ("--statistics", path)]
    done(capsys, "train", start, *source, *kept, *pairs, "--set", "training.steps=3", "--out", tmp_path / "kept")
    settings = TrainingSettings(steps=1, constraint="projected", constraint_options={"m": 4})
    known = {task: read_statistics(path) for task, path in statistics.items()}
    rules = prepare_constraint(settings, learned, known, task="one").rules
    for name, f in read_adapter(tmp_path / "kept").modules.items():
        Q = rules[name].matrix
        assert (f.A - f.A @ Q.T @ Q).norm() < 1e-5 * f.A.norm() and f.B.any()
        free = learned.modules[name].A
        assert (free - free @ Q.T @ Q).norm() > 1e-3 * free.norm()

    scored = done(capsys, "eval", trained, *source, "--scales", "0.5,1,2")["adapters"][0]
    assert set(scored["tasks"]) == {"one"}
    assert scored["scale"] in (0.5, 1.0, 2.0)
    assert scored["tasks"]["one"]["n"] == 4  # the reported half of every fifth of 40 rows
    _a_place_that_is_taken(
        ["eval", trained, *source, "--out", tmp_path / "scores.jsonl"], tmp_path, monkeypatch, capsys
    )

    moved = done(
        capsys,
        "post",
        trained,
        "--own",
        statistics["one"],
        "--others",
        statistics["two"],
        "--rank",
        4,
        "--out",
        tmp_path / "m",
    )
    assert 0 < moved["energy_kept"] <= 1
    aside = ["post", trained, "--own", statistics["one"], "--rank", 4, "--background", statistics["two"]]
    mixed = done(capsys, *aside, "--others", statistics["two"], "--background-weight", 0, "--out", tmp_path / "m0")
    assert mixed["energy_kept"] == moved["energy_kept"]  # a background that weighs nothing
    alone = done(capsys, *aside, "--out", tmp_path / "m1")
    assert alone["energy_kept"] == pytest.approx(moved["energy_kept"], rel=1e-6)  # "two" in the others' place
    merged = done(
        capsys, "merge", f"a={trained}", f"b={tmp_path / 'm'}", "--method", "tsv", "--out", tmp_path / "merged"
    )
    assert merged["tasks"] == ["a", "b"]
    assert merged["verification_error"] < 1e-5


def test_41_too_long_rows_are_refused_by_every_stage_that_runs_the_base(tiny_base, tmp_path, capsys):
    short = write_rows(tmp_path / "short.csv", tiny_rows(2, 40))
    long = write_rows(tmp_path / "long.csv", [{**r, "text": " ".join([r["text"]] * 40)} for r in tiny_rows(2, 40)])
    source = ["--base", tiny_base("bert").name, "--task", "one", "--text", "text", "--device", "cpu"]
    steps = ["--set", "training.steps=2"]
    statistics, start, trained = (tmp_path / name for name in ("s.safetensors", "start", "one"))
    whole = [*source, "--train-file", short, "--target-modules", "query"]
    done(capsys, "stats", *whole, "--out", statistics)
    done(capsys, "init", "--own", statistics, "--method", "kaiming", "--rank", 2, "--out", start)
    done(capsys, "train", start, *source, "--train-file", short, *steps, "--out", trained)
    before = set(tmp_path.iterdir())
    given = [*source, "--train-file", long, "--set", "data.max_length=200"]
    for arguments in (
        ["stats", *given, "--target-modules", "query", "--out", tmp_path / "out"],
        ["stats", "fisher", trained, *given, "--out", tmp_path / "out"],
        ["train", start, *given, *steps, "--out", tmp_path / "out"],
        ["train", start, *given, *steps, "--fleet", "--out", tmp_path / "out"],
        ["eval", trained, *given],
    ):
        with pytest.raises(SystemExit) as ended:
            main([str(a) for a in arguments])
        said = capsys.readouterr().err
        assert ended.value.code == 3 and "tokens, and the base has 64 positions" in said and "Traceback" not in said
        assert "or --set data.max_length=64)" in said
        assert set(tmp_path.iterdir()) == before


def test_27_a_head_of_other_classes_is_neither_scored_nor_trained_on(tiny_base, tmp_path, capsys):
    def rows(*names):
        return write_rows(tmp_path / f"{names[0]}.csv", [{**r, "label": names[r["label"]]} for r in tiny_rows(2, 40)])

    source = ["--base", tiny_base("bert").name, "--task", "one", "--text", "text", "--device", "cpu"]
    own, start, trained = (tmp_path / name for name in ("s.safetensors", "start", "one"))
    steps, known = ["--set", "training.steps=2"], rows("no", "yes")
    done(capsys, "stats", *source, "--train-file", known, "--target-modules", "query", "--out", own)
    done(capsys, "init", "--own", own, "--method", "kaiming", "--rank", 2, "--out", start)
    done(capsys, "train", start, *source, "--train-file", known, *steps, "--out", trained)
    done(capsys, "eval", trained, *source, "--train-file", known)
    done(capsys, "merge", trained, "--out", tmp_path / "merged")  # whose name is no task's
    done(capsys, "eval", tmp_path / "merged", *source, "--train-file", known)
    other = [*source, "--train-file", rows("yes", "zero")]
    for arguments in (
        ["eval", trained, *other],
        ["eval", tmp_path / "merged", *other],
        ["train", trained, *other, *steps, "--out", tmp_path / "out"],
    ):
        with pytest.raises(SystemExit) as ended:
            main([str(a) for a in arguments])
        said = capsys.readouterr().err
        assert ended.value.code == 3 and "trained on the classes no, yes, task 'one' has yes, zero" in said
    assert not (tmp_path / "out").exists()


def test_init_prints_what_another_trainer_needs(tiny_base, tmp_path, capsys):
    base = tiny_base("bert")
    statistics = []
    for i, task in enumerate(("one", "two")):
        rows = write_rows(tmp_path / f"{task}.csv", tiny_rows(2, 20, seed=i))
        statistics.append(tmp_path / f"{task}.stats.safetensors")
        done(
            capsys, "stats", "--base", base.name, "--task", task, "--train-file", rows, "--text", "text",
            "--target-modules", "query", "--sketch", "4", "--out", statistics[-1],
        )  # fmt: skip
    own, other = statistics
    init = ["init", "--own", own, "--others", own, other, "--task-type", "CAUSAL_LM", "--rank", 2]
    found = done(capsys, *init, "--for", "axolotl", "--out", tmp_path / "start")
    assert "lora_model_dir" in found["snippet"] and "Training is free here" in found["snippet"]
    found = done(capsys, *init, "--for", "trl", "--out", tmp_path / "start")
    assert f"read_own_and_others({str(own)!r}, [{str(other)!r}])" in found["snippet"]
    assert "callbacks=[ConstraintCallback(" in found["snippet"]


def test_init_takes_the_task_type_from_the_statistics(tiny_base, tmp_path, capsys):
    """Of the model that was run: nobody has to say it again, and a trainer of text takes what is one."""
    rows = write_rows(tmp_path / "one.csv", [{"text": f"w{i} w1 w2", "label": f"w{i % 3}"} for i in range(20)])
    for architecture, kind, expected in (("llama", "causal", "CAUSAL_LM"), ("bert", "classification", "SEQ_CLS")):
        own = tmp_path / f"{kind}.stats.safetensors"
        targets = "q_proj" if kind == "causal" else "query"
        done(
            capsys, "stats", "--base", tiny_base(architecture).name, "--task", "one", "--train-file", rows, "--text", "text",
            "--kind", kind, "--target-modules", targets, "--sketch", "4", "--out", own,
        )  # fmt: skip
        start = ["init", "--own", own, "--method", "orthonormal", "--rank", 2]
        found = done(capsys, *start, "--out", tmp_path / kind)
        config = json.loads((tmp_path / kind / "adapter_config.json").read_text())
        assert found["task_type"] == expected and config["inference_mode"] is True
        assert config["task_type"] == (None if expected == "SEQ_CLS" else expected)  # its head is yet to come
        assert json.loads((tmp_path / kind / "plait.json").read_text())["options"]["task_type"] == expected
        trl = [*map(str, start), "--for", "trl", "--out", str(tmp_path / f"{kind}-trl"), "--json"]
        if expected == "CAUSAL_LM":
            assert "SFTTrainer" in done(capsys, *trl)["snippet"]
        else:
            with pytest.raises(SystemExit) as ended:
                main(trl)
            assert ended.value.code == 2 and "this is SEQ_CLS" in capsys.readouterr().err
            assert not (tmp_path / f"{kind}-trl").exists()


def test_a_regression_at_the_prompt(tiny_base, tmp_path, capsys):
    rows = write_rows(tmp_path / "grade.csv", tiny_rows(None, 40))
    source = ["--base", tiny_base("bert").name, "--task", "grade", "--train-file", rows, "--text", "text"]
    source += ["--kind", "regression"]
    own = tmp_path / "grade.stats.safetensors"
    done(capsys, "stats", *source, "--target-modules", "query", "--samples", "12", "--out", own)
    done(capsys, "init", "--own", own, "--method", "orthonormal", "--rank", 2, "--out", tmp_path / "start")
    found = done(capsys, "train", tmp_path / "start", *source, "--set", "training.steps=2", "--out", tmp_path / "a")
    assert found["kind"] == "regression"
    scored = done(capsys, "eval", f"grade={tmp_path / 'a'}", *source)["adapters"][0]["tasks"]["grade"]
    assert set(scored["metrics"]) == {"pearson", "spearman"}


def test_a_fleet_at_the_prompt_ends_where_single_trainings_do(tiny_base, tmp_path, capsys):
    rows = write_rows(tmp_path / "one.csv", tiny_rows(2, 40))
    source = ["--base", tiny_base("bert").name, "--task", "one", "--train-file", rows, "--text", "text"]
    own = tmp_path / "one.stats.safetensors"
    done(capsys, "stats", *source, "--target-modules", "query", "--samples", "12", "--out", own)
    starts = {name: tmp_path / name for name in ("kaiming", "orthonormal")}
    for name, folder in starts.items():
        done(capsys, "init", "--own", own, "--method", name, "--rank", 2, "--out", folder)
    steps = ["--set", "training.steps=3", "--set", "training.lr=[0.01,0.02]"]
    fleet = done(
        capsys,
        "train",
        starts["kaiming"],
        f"b={starts['orthonormal']}",
        *source,
        *steps,
        "--fleet",
        "--out",
        tmp_path / "f",
    )
    names = ["kaiming@lr0.01", "kaiming@lr0.02", "b@lr0.01", "b@lr0.02"]
    assert [a["name"] for a in fleet["adapters"]] == names and all(a["task"] == "one" for a in fleet["adapters"])
    steps[-1] = "training.lr=0.02"
    done(capsys, "train", starts["orthonormal"], *source, *steps, "--out", tmp_path / "solo")
    solo, member = read_adapter(tmp_path / "solo"), read_adapter(tmp_path / "f" / "b@lr0.02")
    for module, f in solo.modules.items():
        assert f.B.any() and (f.delta() - member.modules[module].delta()).norm() < 1e-4 * f.delta().norm()
    again = done(capsys, "train", starts["orthonormal"], *source, *steps, "--out", tmp_path / "f" / "b@lr0.02")
    assert again["seconds"] == fleet["adapters"][3]["seconds"]  # one identity: it is read, not trained again


def refused(capsys, *arguments) -> tuple[int, str]:
    """Exit code and words of a command that ends in an error."""
    with pytest.raises(SystemExit) as ended:
        main([str(a) for a in arguments])
    return ended.value.code, capsys.readouterr().err


def never(*_, **__):
    pytest.fail("it was computed again")


@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_output_gradients_at_the_prompt_and_a_penalty_that_reads_them(architecture, tiny_base, tmp_path, capsys):
    files, kind = [], [] if architecture == "bert" else ["--kind", "causal"]
    target = "query" if architecture == "bert" else "q_proj"
    for i, task in enumerate(("one", "two")):
        rows = write_rows(tmp_path / f"{task}.csv", tiny_rows(2, 40, seed=i))
        source = ["--base", tiny_base(architecture).name, "--task", task, "--train-file", rows, "--text", "text", *kind]
        files.append(tmp_path / f"{task}.stats.safetensors")
        given = ["stats", *source, "--target-modules", target, "--samples", "12"]
        plain = done(capsys, *given, "--out", tmp_path / "plain")
        found = done(capsys, *given, "--output-gradients", "--out", files[-1])
        assert (plain["output_gradients"], found["output_gradients"], found["reused"]) == (0, 2, False)
        assert done(capsys, *given, "--output-gradients", "--out", files[-1])["reused"]
        fewer = (*given, "--set", "statistics.batch_size=4")  # rows a draw of head and answers: other gradients
        assert done(capsys, *fewer, "--out", tmp_path / "plain")["reused"]
        with pytest.raises(SystemExit):
            main([str(a) for a in (*fewer, "--output-gradients", "--out", files[-1])])
        assert "batch_size: 16 -> 4" in capsys.readouterr().err
        (tmp_path / "plain").rename(tmp_path / f"plain-{task}")
    with pytest.raises(SystemExit) as ended:
        main([str(a) for a in (*given, "--output-gradients", "--memory", "1GB", "--out", tmp_path / "none")])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "--memory and --output-gradients exclude each other" in said, said
    with pytest.raises(SystemExit) as ended:
        main(
            [
                str(a)
                for a in (*given, "--output-gradients", "--set", "statistics.memory=1GB", "--out", tmp_path / "none")
            ]
        )
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "statistics: memory is for moments of inputs alone" in said, said
    assert "Value error" not in said and "found" not in said, said
    unlike = done(capsys, "stats", "diff", files[0], tmp_path / "plain-two")
    assert unlike["compatible"] and unlike["drops_output_gradients"]
    assert not done(capsys, "stats", "diff", *files)["drops_output_gradients"]
    with pytest.raises(SystemExit):
        main(["stats", "diff", str(files[0]), str(tmp_path / "plain-two")])
    assert "can be mixed, without output gradients: only one of them holds any" in capsys.readouterr().out
    mixed = done(capsys, "stats", "merge", files[0], tmp_path / "plain-two", "--out", tmp_path / "mixed")
    assert mixed["dropped_output_gradients"] and not read_statistics(tmp_path / "mixed").output_gradients
    small = done(capsys, "stats", "compress", files[0], "--rank", 2, "--out", tmp_path / "small")
    plain = [tmp_path / f"plain-{task}" for task in ("one", "two")]
    both, other = tmp_path / "both", tmp_path / "other"
    done(capsys, "stats", "merge", *plain, "--out", both)
    done(capsys, "stats", "merge", plain[0], files[1], "--out", other)
    twice = [(plain[0], plain[0]), (files[0], plain[0]), (plain[0], files[0]), (files[0], tmp_path / "small")]
    twice += [(both, plain[1]), (plain[0], both), (both, other), (files[0], both), (both, files[1])]
    third, deep, deeper, pressed = (tmp_path / n for n in ("third", "deep", "deeper", "pressed"))
    revised = read_statistics(plain[0])
    for place, part in ((third, 2), (tmp_path / "fourth", 3)):  # rows of others
        sites = {s: replace(m, total=m.total * part) for s, m in revised.sites.items()}
        write_statistics(place, replace(revised, sites=sites), overwrite=True)
    done(capsys, "stats", "merge", both, third, "--out", deep)
    done(capsys, "stats", "merge", deep, tmp_path / "fourth", "--out", deeper)
    done(capsys, "stats", "compress", deeper, "--rank", 2, "--out", pressed)
    assert done(capsys, "stats", "merge", deep, tmp_path / "fourth", "--out", deeper)["reused"]
    twice += [(s, f) for s in (deep, deeper, pressed) for f in (plain[0], files[1], both, third)]
    sketch = tmp_path / "sketch"
    done(capsys, *given, "--sketch", 2, "--out", sketch)
    twice += [(s, sketch) for s in (plain[1], files[1], both, deep, pressed)]
    # two-sided, compressed, a sum and a part, sums that share one, sums of sums at any depth, sketches
    for pair in twice:
        with pytest.raises(SystemExit):
            main([str(a) for a in ("stats", "merge", *pair, "--out", tmp_path / "twice")])
        assert f"the same rows as in {pair[0]}" in capsys.readouterr().err and not (tmp_path / "twice").exists()
    held = read_statistics(tmp_path / "small")
    errors = [m.error / m.trace for m in (*held.sites.values(), *held.output_gradients.values())]
    assert small["relative_error"] == max(errors) > max(m.error / m.trace for m in held.sites.values())
    assert sum("sketched" in w for w in done(capsys, "stats", "check", tmp_path / "small")["warnings"]) == len(errors)
    known = {p.name.split(".")[0]: read_statistics(p) for p in files}
    start = tmp_path / "start"
    done(capsys, "init", "--own", files[1], "--others", files[0], "--rank", 2, "--out", start)
    steps = ["--set", "training.steps=2", "--set", "training.constraint=penalised"]
    curved = [*steps, "--set", "training.constraint_options={curvature: true}"]
    pairs = [x for path in files for x in ("--statistics", path)]
    done(capsys, "train", start, *source, *curved, *pairs, "--out", tmp_path / "curved")
    done(capsys, "train", start, *source, *steps, *pairs, "--out", tmp_path / "even")
    one, other = (read_adapter(tmp_path / d) for d in ("curved", "even"))
    assert any(not torch.equal(f.A, other.modules[m].A) for m, f in one.modules.items())
    settings = TrainingSettings(steps=1, constraint="penalised", constraint_options={"curvature": True})
    for module, rule in prepare_constraint(settings, one, known, task="two").rules.items():
        G = known["one"].output_gradients_for(module).normalised()
        torch.testing.assert_close(rule.outputs, G * len(G))
    pairs = [x for task in known for x in ("--statistics", tmp_path / f"plain-{task}")]
    with pytest.raises(SystemExit) as ended:
        main([str(a) for a in ("train", start, *source, *curved, *pairs, "--out", tmp_path / "none")])
    assert ended.value.code == 2 and "plait stats --output-gradients" in capsys.readouterr().err


def test_fisher_merging_at_the_prompt(tiny_base, tmp_path, capsys, monkeypatch):
    adapters, files, commands = [], [], []
    for i, task in enumerate(("one", "two")):
        rows = write_rows(tmp_path / f"{task}.csv", tiny_rows(2, 40, seed=i))
        source = ["--base", tiny_base("bert").name, "--task", task, "--train-file", rows, "--text", "text"]
        own = tmp_path / f"{task}.stats.safetensors"
        done(capsys, "stats", *source, "--target-modules", "query", "--samples", "12", "--out", own)
        done(capsys, "init", "--own", own, "--method", "orthonormal", "--rank", 2, "--out", tmp_path / f"start-{task}")
        adapters.append(tmp_path / task)
        done(capsys, "train", tmp_path / f"start-{task}", *source, "--set", "training.steps=2", "--out", adapters[-1])
        files.append(tmp_path / f"{task}.fisher.safetensors")
        commands.append(["stats", "fisher", adapters[-1], *source, "--samples", "10", "--out", files[-1]])
        found = done(capsys, *commands[-1])
        assert (found["examples"], found["modules"], found["reused"]) == (10, 2, False)
        assert "cut" not in found
    short = ["--set", "data.max_length=4", "--out", tmp_path / "short.fisher.safetensors"]
    cut = done(capsys, *commands[0][:-2], *short)["cut"]
    assert cut["rows"] == 10 and cut["limit"] == 4 and 0 < cut["cut"] <= 10
    merged = done(capsys, "merge", *adapters, "--method", "fisher", "--stats", *files, "--out", tmp_path / "m")
    F = [read_fisher(p) for p in files]
    module = next(iter(F[0].modules))
    shape = F[0].modules[module].shape
    D, f = [read_adapter(a).modules[module].delta() for a in adapters], [x.modules[module].rows(0, shape[0]) for x in F]
    assert all(x.any() for x in f) and not torch.allclose(f[0], f[1])
    f = [x.clamp(min=merged["options"]["floor"]) for x in f]
    wanted = (f[0] * D[0] + f[1] * D[1]) / (f[0] + f[1])
    lost = (read_adapter(tmp_path / "m").modules[module].delta() - wanted).norm() / wanted.norm()
    assert lost**2 < merged["worst_module"]["discarded_energy"] + 1e-6
    code, said = refused(capsys, "stats", "fisher", tmp_path / "start-two", *source, "--out", tmp_path / "none")
    assert code == 3 and "no head" in said
    _the_same_fisher_file_again(commands[1], files[1], adapters, monkeypatch, capsys)


def _the_same_fisher_file_again(command, file, adapters, monkeypatch, capsys):
    """A finished file is known again; one of other settings, of another adapter or a damaged one is not taken for it."""
    whole = file.read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr("plait.runs.single.fisher.collect_fisher", never)
        again = done(capsys, *command)
        assert again["reused"] and (again["examples"], again["modules"], again["bytes"]) == (10, 2, len(whole))
        others = {
            "options.samples: 10 -> 11": [*command, "--samples", "11"],
            "options.batch_size: 16 -> 5": [*command, "--set", "statistics.batch_size=5"],  # draws go by batches
            "options.batch_size: 16 -> not asked for; options.labels: sampled -> given": [
                *command,
                "--labels",
                "given",
            ],
            "seed: 0 -> 1": [*command, "--seed", "1"],
            "inputs.adapter: ": [f"two={adapters[0]}" if a == adapters[1] else a for a in command],
        }
        for difference, other in others.items():
            code, said = refused(capsys, *other)
            assert code == 2 and f"exists with other settings: {difference}" in said, said
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        code, said = refused(capsys, *command)
        assert code == 3 and "not the file that was written" in said, said
        file.write_bytes(whole)
        write_fisher(file, read_fisher(file), overwrite=True)  # as earlier versions wrote it
        code, said = refused(capsys, *command)
        assert code == 2 and "it does not say what it was made from" in said, said
    assert not done(capsys, *command, "--overwrite")["reused"] and file.read_bytes() == whole
