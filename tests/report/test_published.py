"""The published numbers: the archives give the tables, and the tables give what the README quotes."""

from __future__ import annotations

import json
import re
import tarfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from plait.cli import main

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"
ARCHIVES = sorted(RESULTS.glob("*.tar.xz"))


@pytest.mark.slow
@pytest.mark.parametrize("archive", ARCHIVES, ids=lambda p: p.name.removesuffix(".tar.xz"))
def test_a_published_archive_gives_the_published_numbers(archive, tmp_path, capsys):
    with tarfile.open(archive) as packed:
        packed.extractall(tmp_path, filter="data")
    name = archive.name.removesuffix(".tar.xz")
    with pytest.raises(SystemExit) as ended:
        main(["study", "table", str(tmp_path / name), "--to", str(tmp_path)])
    assert ended.value.code == 0, capsys.readouterr().err
    again, published = (json.loads((f / f"{name}.json").read_text("utf-8")) for f in (tmp_path, RESULTS))
    assert list(again) == list(published)
    for key in set(published) - {"about"}:
        assert again[key] == published[key], key
    for figure in ("recovered", "scales", "sweep"):
        assert (tmp_path / f"{name}-{figure}.svg").read_bytes() == (RESULTS / f"{name}-{figure}.svg").read_bytes()


@cache
def tables(name):
    return json.loads((RESULTS / f"{name}.json").read_text("utf-8"))


def best(name, arm):
    """Recovered of an arm under its best merge, percent, as it is quoted."""
    (row,) = [b for b in tables(name)["best"] if b["arm"] == arm]
    return f"{100 * np.mean(row['recovered']):.0f}"


def under(name, arm, merge="task_arithmetic"):
    """Recovered of an arm under one merge."""
    rows = [r for r in tables(name)["rows"] if (r["arm"], r["method"], r["variant"]) == (arm, merge, "")]
    return f"{100 * np.mean([r['recovered'] for r in rows]):.0f}"


def joint(name):
    """Recovered of one adapter trained on all tasks, at the rank of the others."""
    rows = [r for r in tables(name)["references"] if (r["reference"], r["arm"]) == ("joint training", "joint_r8")]
    return f"{100 * np.mean([r['recovered'] for r in rows]):.0f}"


def chance(name, arm, other):
    """Holm-corrected p of two arms under their best merges."""
    (row,) = [c for c in tables(name)["comparisons"] if (c["arm"], c["other"], c["merge"]) == (arm, other, "best")]
    return f"{row['p_holm']:.2f}"


def existing(key):
    return f"{100 * tables('existing')['recovered'][key]:.0f}"


def best_single_method():
    return (
        f"{100 * max(v for k, v in tables('existing')['recovered'].items() if k.endswith('best scale by labels')):.0f}"
    )


START, BOTH, PENALTY = "contrastive", "contrastive_penalised", "kaiming_penalised"
TEN, MPNET, ELEVEN, MINILM = "text3-smollm2-finalists", "glue8-mpnet-finalists", "tasks11-mpnet", "glue8-minilm"
ONE, R32 = "text3-smollm2-one-template", "text3-smollm2-rank32"
QUOTED = [
    ("the merged model keeps {} % of what plain adapters gain alone", lambda: [best(TEN, BOTH)]),
    (
        "the start by itself {}, PEFT's default start {}, the paper's `osrm` {}.",
        lambda: [best(TEN, START), best(TEN, "kaiming"), best(TEN, "osrm_mean")],
    ),
    (
        "Under task arithmetic {}, {}, {} and {}.",
        lambda: [under(TEN, a) for a in (BOTH, START, "kaiming", "osrm_mean")],
    ),
    (
        "({} against {}: p {}).",
        lambda: [best(TEN, BOTH), best(TEN, START), chance(TEN, START, BOTH)],
    ),
    (
        "With the same last words in all prompts {}, {}, {} and {};",
        lambda: [best(ONE, a) for a in (BOTH, START, "kaiming", "osrm_mean")],
    ),
    ("at rank 32 {}, {} and {} (PEFT's default)", lambda: [best(R32, a) for a in (BOTH, START, "kaiming")]),
    (
        "one random A shared by all tasks {} % ({} under task arithmetic)",
        lambda: [best(MPNET, "orthonormal_shared"), under(MPNET, "orthonormal_shared")],
    ),
    ("the penalty from `contrastive` or PEFT's default {}, `contrastive` {}, `osrm` {}, PEFT's default {}.",
     lambda: [best(MPNET, a) for a in (BOTH, START, "osrm", "kaiming")]),
    ("the penalty from `contrastive` or PEFT's default {},", lambda: [best(MPNET, PENALTY)]),
    ("One adapter trained on all tasks at once has {}.", lambda: [joint("glue8-mpnet")]),
    (
        "start and penalty {}, `contrastive` {}, one shared A {}, PEFT's default {} (",
        lambda: [best(ELEVEN, a) for a in (BOTH, START, "orthonormal_shared", "kaiming")],
    ),
    (
        "the penalty from PEFT's start {} %, from `contrastive` {}, `contrastive` {}, `osrm` {}, PEFT's default {} (",
        lambda: [best(MINILM, a) for a in (PENALTY, BOTH, START, "osrm", "kaiming")],
    ),
    (
        "At rank 32 the penalty has {} and {}, `contrastive` {}, PEFT's default {}.",
        lambda: [best("glue8-minilm-rank32", a) for a in (PENALTY, BOTH, START, "kaiming")],
    ),
    (
        "recovers {} %, with a short repair (a distillation) {} %, the best single method at a scale chosen by labels {} %,"
        " weights learnt from labels {} %, without any text {} %",
        lambda: [
            existing("100 texts"), existing("100 texts, repaired"), best_single_method(), existing("chosen by labels"),
            existing("no text"),
        ],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("sentence", "figures"), QUOTED, ids=[s[:40] for s, _ in QUOTED])
def test_the_readme_quotes_the_published_tables(sentence, figures):
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", (ROOT / "README.md").read_text("utf-8"))
    assert sentence.format(*figures()) in re.sub(r"\s+", " ", text)
