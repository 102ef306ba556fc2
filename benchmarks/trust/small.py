"""A small world of valid inputs, one command for each stage, and those commands run in forked children of this process."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

TOPIC = ("--task", "topic", "--train-file", "data/topic.train.csv", "--validation-file", "data/topic.validation.csv",
         "--text", "text")  # fmt: skip
GRADE = ("--task", "grade", "--train-file", "data/grade.train.parquet", "--validation-file",
         "data/grade.validation.parquet", "--text", "text", "--kind", "regression")  # fmt: skip
ROWS = ("data/topic.train.csv:text", "data/grade.train.parquet:text")
TEXTS = ("--text", f"topic={ROWS[0]}", "--text", f"grade={ROWS[1]}")
_COLLECT = ("--base", "base", "--target-modules", "query", "--target-modules", "value", "--samples", "16")
_TRAIN = ("--base", "base", "--device", "cpu", "--set", "training.steps=6", "--set", "training.batch_size=8",
          "--set", "training.checkpoint_every=2")  # fmt: skip
# Recorded times, and with how many others an adapter was trained, which is fewer where the others were there already.
_SECONDS = {"seconds", "wall_seconds", "started", "finished", "time", "timestamp", "created", "fleet"}
PLACE = "plait-trust-"  # how a folder of worlds begins, by which paths into it are known
_PLACES = re.compile(rb"/[\w./-]*/plait-trust-\w+(/(\d+|world)\b)?")
_LITTER = (".files", ".staging", ".lock", ".replaced", ".checkpoints", ".tmp", ".part")


@dataclass(frozen=True, slots=True)
class Command:
    """One command of the small world.

    Args:
        name: What it is called in the rows.
        args: Its arguments, in the world's folder.
        out: What it writes there.
        before: A command that has to have written the same place before; () for none.
    """

    name: str
    args: tuple[str, ...]
    out: str
    before: tuple[str, ...] = ()

    @property
    def is_text(self) -> bool:
        """Whether it writes a page, a recipe or a table, which no reader of plait's holds against anything."""
        return self.out.endswith((".html", ".yaml", ".jsonl"))

    @property
    def again(self) -> tuple[str, ...]:
        """Its arguments once more after it was disturbed; of what tells nothing of its inputs, the whole one is written over."""
        return (*self.args, "--overwrite") if self.is_text else self.args


COMMANDS = {
    c.name: c
    for c in (
        Command("stats", ("stats", *_COLLECT, *TOPIC, "--out", "out.stats.safetensors"), "out.stats.safetensors"),
        Command("init", ("init", "--own", "topic.stats.safetensors", "--others", "grade.stats.safetensors", "--rank", "2",
                         "--out", "out"), "out"),
        Command("train", ("train", "A0", *_TRAIN, *TOPIC, "--out", "out"), "out"),
        Command("merge", ("merge", "topic=A", "grade=B", "--out", "out"), "out"),
        Command("merge --overwrite", ("merge", "topic=A", "grade=B", "--out", "out", "--overwrite"), "out",
                ("merge", "topic=A", "grade=B", "--out", "out", "--method", "ties")),
        Command("convert", ("convert", "M", "--to", "peft", "--out", "out"), "out"),
        Command("bake", ("merge", "topic=A", "grade=B", "--bake", "base", "--out", "out"), "out"),
        Command("export", ("export", "M", "--for", "peft", "--task", "topic", "--out", "out"), "out"),
        Command("edit", ("edit", "M", "--weight", "topic=0.5", "--out", "out"), "out"),
        Command("merge auto", ("merge", "auto", "topic=A", "grade=B", "--out", "out"), "out"),
        Command("merge auto, texts", ("merge", "auto", "base", "topic=A", "grade=B", *TEXTS, "--out", "out"), "out"),
        Command("merge featcal", ("merge", "base", "topic=A", "grade=B", "--method", "featcal", *TEXTS, "--out", "out"), "out"),
        Command("extract", ("extract", "full", "--base", "base", "--rank", "2", "--out", "out"), "out"),
        Command("post", ("post", "A", "--own", "topic.stats.safetensors", "--others", "grade.stats.safetensors",
                         "--out", "out"), "out"),
        Command("stats fisher", ("stats", "fisher", "A", "--base", "base", *TOPIC[:4], *TOPIC[6:], "--samples", "8",
                                 "--out", "out.fisher.safetensors"), "out.fisher.safetensors"),
        Command("new", ("new", "out.yaml", "--base", "base", "--task", f"topic={ROWS[0]}:label", "--task", f"grade={ROWS[1]}:label"),
                "out.yaml"),
        Command("try", ("try", "M", "--prompt", "w1 w2", "--base", "base", "--device", "cpu", "--out", "out.html"), "out.html"),
        Command("eval", ("eval", "A", "--base", "base", *TOPIC, "--device", "cpu", "--out", "out.jsonl"), "out.jsonl"),
        Command("run", ("run", "recipe.yaml", "--out", "out"), "out"),
        Command("study run", ("study", "run", "study.yaml", "--out", "out"), "out"),
    )
}  # fmt: skip


def build(world: Path) -> None:
    """Write the inputs: a tiny base, rows of two tasks, statistics, adapters, a merge, that merge in the base, a recipe, a study."""
    from tests.conftest import write_tasks
    from tests.tiny import TARGETS, save_model

    save_model(world / "base", "bert")
    tasks = [t for t in write_tasks(world / "data") if t["name"] in ("topic", "grade")]
    recipe = {
        "name": "tiny",
        "base": {"model": "base", "device": "cpu"},
        "data": {"root": "data", "max_length": 24},
        "tasks": tasks,
        "lora": {"rank": 2, "alpha": 4, "target_modules": list(TARGETS["bert"])},
        "statistics": {"samples": 16},
        "arms": ["kaiming"],
        "training": {"steps": 4, "batch_size": 8, "lr": 0.02, "checkpoint_every": 2},
        "merges": ["task_arithmetic"],
        "evaluation": {"scales": [1.0], "batch_size": 16, "resamples": 0},
    }
    (world / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    study = {
        **recipe,
        "name": "small",
        "tuning_seed": 9,
        "tuning_rows": 6,
        "grid_rows": 6,
        "rates": [0.02],
        "seeds": [0],
    }
    study["evaluation"] = {"scales": [1.0], "batch_size": 16}
    (world / "study.yaml").write_text(yaml.safe_dump(study), encoding="utf-8")
    for task, rows, initial, trained in (("topic", TOPIC, "A0", "A"), ("grade", GRADE, "B0", "B")):
        stats = f"{task}.stats.safetensors"
        for args in (
            ("stats", *_COLLECT, *rows, "--out", stats),
            ("init", "--own", stats, "--method", "kaiming", "--rank", "2", "--out", initial),
            ("train", initial, *_TRAIN, *rows, "--out", trained),
        ):
            require_done(args, world)
    require_done(("merge", "topic=A", "grade=B", "--out", "M"), world)
    require_done(("merge", "topic=A", "grade=B", "--bake", "base", "--out", "full"), world)


def require_done(args: Sequence[str], world: Path) -> None:
    """Run a command that must succeed."""
    code, said = ended(args, world)
    if code:
        raise RuntimeError(f"plait {' '.join(args)}: exit code {code}: {said}")


def start(args: Sequence[str], world: Path, said: Path, first: Callable[[], None] | None = None) -> int:
    """Start a command in a forked child, in a process group of its own; returns its process id.

    Everything heavy is imported before by the caller's `warm`, so a start costs milliseconds and a kill meets the work.
    """
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        os.setpgid(0, 0)
        os.chdir(world)
        file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(file, 1)
        os.dup2(file, 2)
        from plait.cli import main

        if first:
            first()
        try:
            main(list(args))
            code = 0
        except SystemExit as e:
            code = int(e.code or 0)
    except BaseException as e:
        with contextlib.suppress(OSError):
            os.write(2, f"Traceback: {e!r}".encode())
    finally:
        os._exit(code)


def ended(args: Sequence[str], world: Path, first: Callable[[], None] | None = None) -> tuple[int, str]:
    """Run a command to its end in a forked child: its exit code, and what it printed."""
    with tempfile.NamedTemporaryFile() as file:
        pid = start(args, world, Path(file.name), first)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        return code, Path(file.name).read_text(encoding="utf-8", errors="replace")[-400:]


def warm() -> None:
    """Import what the commands need, once, before the forks."""
    import peft  # noqa: F401
    import torch
    import transformers  # noqa: F401

    import plait.cli
    import plait.merging.folders
    import plait.report.line
    import plait.training.trainer  # noqa: F401

    torch.set_num_threads(1)
    gc.freeze()  # what is imported stays shared with the children


RESUMED = ("run", "study run")  # which go on from their units
TELL_TIME = ("report/", "runs.jsonl")  # of these, files that tell how long it took, and in how many runs


@contextlib.contextmanager
def worlds() -> Iterator[Callable[[], Path]]:
    """Yield a function that gives a fresh copy of the small world each time."""
    with tempfile.TemporaryDirectory(prefix=PLACE) as name:
        whole = Path(name) / "whole"
        whole.mkdir()
        build(whole)
        count = 0

        def fresh() -> Path:
            nonlocal count
            shutil.rmtree(Path(name) / str(count), ignore_errors=True)
            count += 1
            return Path(shutil.copytree(whole, Path(name) / str(count)))

        yield fresh


# --- what is there ----------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder (or the file itself, as "") and what it holds."""
    if folder.is_file():
        return {"": folder.read_bytes()}
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def litter(folder: Path) -> list[str]:
    """Hidden files and folders that a finished command must not leave."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob(".*") if p.name.endswith(_LITTER))


def comparable(files: Mapping[str, bytes], volatile: frozenset[str] = frozenset()) -> dict[str, str]:
    """Hashes of files: in JSON without recorded times, in a recipe without places; without what two runs write differently.

    A manifest lists the hashes of such files and a digest of itself; where any differs, those go too.
    """
    return {
        n: hashlib.sha256(_timeless(n, data, volatile)).hexdigest() for n, data in files.items() if n not in volatile
    }


def differing(a: Mapping[str, bytes], b: Mapping[str, bytes]) -> frozenset[str]:
    """Files that two undisturbed runs write differently even without recorded times, such as a page that tells them."""
    one, other = comparable(a), comparable(b)
    return frozenset(n for n in one if n in other and one[n] != other[n])


def _timeless(name: str, data: bytes, volatile: frozenset[str]) -> bytes:
    if data.startswith(b"# Written by `plait new`"):  # which names folders absolutely
        return _PLACES.sub(b"WORLD", data)
    if not name.endswith((".json", ".jsonl")):
        return data
    lines = [data] if name.endswith(".json") else data.splitlines()
    try:
        return b"\n".join(json.dumps(_without(json.loads(line), volatile), sort_keys=True).encode() for line in lines)
    except ValueError:
        return data


def _without(value: object, volatile: frozenset[str]) -> object:
    if isinstance(value, dict):
        gone = {k for k in value if k in _SECONDS or "seconds" in k or k == "manifest_sha256"}
        gone |= {k for k in value if any(v == k or v.endswith(f"/{k}") for v in volatile)}
        return {k: _without(v, volatile) for k, v in value.items() if k not in gone}
    return [_without(v, volatile) for v in value] if isinstance(value, list) else value
