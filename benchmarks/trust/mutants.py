"""Mutants of the source, and whether the tests notice: ``PYTHONPATH=src:. python -P -m benchmarks.trust.mutants --to FOLDER``.

A sample of small faults is drawn over the rooms in `ROOMS`, the same number from each ("readers" are files of several rooms, which
their own room may draw as well), or over files that are named (``--only merging/light/exponents.py``). The tests run once under
coverage, which says which tests reach which line. Then each fault is put into a copy of the source, and the tests that reach
its statement run against it, quickest first, in a forked child, until one fails: killed. A fault that they let pass is given
to all tests of the files that touch the module: survived, if those pass too. A child that does not end in its time is counted
apart, neither killed nor survived. Needs the package coverage.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.trust import Row, source, write_part
from benchmarks.trust.mutations import Mutant, mutants

ROOT = Path(__file__).parents[2]
ROOMS = {
    "evaluation": ("evaluation/*.py",),
    "report": ("report/*.py",),
    "runs": ("runs/*.py",),
    "readers": (
        "adapters/config.py", "adapters/head_config.py", "adapters/head_files.py", "adapters/header.py",
        "adapters/key_names.py", "adapters/peft_config.py", "adapters/peft_format.py", "adapters/peft_tensors.py",
        "adapters/sealed.py", "adapters/file_bytes.py", "adapters/tensors.py", "adapters/weights.py", "border/checked.py", "disk/files.py",
        "disk/manifest.py", "formats/alpha.py", "formats/keys.py", "formats/mlx.py", "formats/reading.py",
        "formats/single_file.py", "formats/gguf_reading.py", "statistics/files.py", "statistics/records.py",
        "statistics/fisher.py", "merging/mergekit.py",
    ),
    "loading": ("loading/*.py",),
    "formats": ("formats/*.py",),
    "adapters": ("adapters/*.py",),
    "merging": ("merging/*.py", "merging/*/*.py"),
    "statistics": ("statistics/*.py",),
    "fidelity": ("fidelity/*.py", "learning/*.py", "choosing/*.py", "advice/*.py"),
    "tasks": ("tasks/*.py",),
    "single stages": ("runs/single/*.py",),
}  # fmt: skip
TESTS = (
    "adapters", "cases", "evaluation", "extraction", "fidelity", "formats", "laws", "loading", "merging", "reference", "report",
    "robustness", "runs", "statistics", "study", "fuzz", "test_arms.py", "test_checked.py", "test_damaged_runs.py", "test_manifest.py",
    "test_pipeline.py", "test_recipe.py", "test_single_stages.py", "test_store.py", "test_store_manifests.py",
    "test_trust_page.py", "test_train_folders.py",
)  # fmt: skip
_COPIED = ("src", "tests", "recipes", "benchmarks", "docs", "pyproject.toml", "README.md", "CHANGELOG.md", "CONTRIBUTING.md",
           "SECURITY.md", "Makefile", "constraints.txt")  # fmt: skip
_QUIET = ("-q", "-x", "--assert=plain", "-p", "no:cacheprovider", "-p", "no:randomly", "-p", "no:terminalreporter")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one mutant.

    Args:
        room: The room that its file belongs to.
        file: Its file, below src/plait.
        line: The line that was changed.
        mutant: The change.
        outcome: "killed", "survived", "not reached" (no test runs the line) or "timed out".
        tests: How many tests were to run against it.
        seconds: How long they ran.
    """

    room: str
    file: str
    line: int
    mutant: str
    outcome: str
    tests: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Reach:
    """Which tests reach which line, and how long each takes.

    Args:
        lines: File below src/plait -> line -> tests.
        seconds: Test -> seconds, of those that pass.
    """

    lines: Mapping[str, Mapping[int, Sequence[str]]]
    seconds: Mapping[str, float]

    def tests(self, file: str, lines: Sequence[int]) -> list[str]:
        """Tests that reach any of the lines, quickest first."""
        known = self.lines.get(file, {})
        reaching = {t for line in lines for t in known.get(line, ()) if t in self.seconds}
        return sorted(reaching, key=lambda t: (self.seconds[t], t))

    def beside(self, file: str) -> list[str]:
        """All tests of the test files that reach the file at all."""
        homes = {t.partition("::")[0] for tests in self.lines.get(file, {}).values() for t in tests if t}
        return sorted(t for t in self.seconds if t.partition("::")[0] in homes)


class Reaching:
    """A plugin of pytest that has coverage note for each test the lines that it reaches, and how long it takes."""

    def __init__(self, files: Sequence[Path]) -> None:
        import coverage

        self.files = files
        self.coverage = coverage.Coverage(data_file=None, include=[str(f) for f in files], config_file=False)
        self.seconds: dict[str, float] = {}

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Lines from here on are this test's."""
        self.coverage.switch_context(nodeid)

    def pytest_runtest_logreport(self, report) -> None:  # type: ignore[no-untyped-def]
        """Add up the phases of a test; one that does not pass is none that could kill a mutant."""
        if report.passed:
            self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration
        else:
            self.seconds[report.nodeid] = float("-inf")

    def reach(self, package: Path) -> Reach:
        """What was noted."""
        data = self.coverage.get_data()
        lines = {
            file.relative_to(package).as_posix(): {
                line: sorted(tests) for line, tests in data.contexts_by_lineno(str(file)).items()
            }
            for file in self.files
        }
        return Reach(lines, {t: round(s, 4) for t, s in self.seconds.items() if s >= 0})


def main() -> None:
    """Draw, run, and write the part's file; kept up to date after every mutant."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--count", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="nothing is begun after so long")
    parser.add_argument("--only", nargs="*", default=list(ROOMS), help="rooms, or files below src/plait")
    parser.add_argument("--tests", nargs="*", default=list(TESTS), help="below tests/")
    parser.add_argument("--map", type=Path, help="file that keeps which tests reach which line, for further samples")
    parser.add_argument("--quick", action="store_true", help="tests that reach a statement alone, but where none does")
    parser.add_argument(
        "--limit", type=float, default=float("inf"), help="seconds that the tests of one mutant may take"
    )
    parser.add_argument("--reach", action="store_true", help="only make that file")
    chosen = parser.parse_args()
    stop = time.monotonic() + chosen.seconds
    with tempfile.TemporaryDirectory(prefix="plait-mutants-") as name:
        tree = Path(name)
        _copy(tree)
        _enter(tree)
        reach = _reach(tree, chosen.tests, chosen.map)
        if chosen.reach:
            return
        outcomes: list[Outcome] = []
        for room, file, mutant in drawn(tree / "src/plait", chosen.only, chosen.count, chosen.seed):
            if time.monotonic() > stop:
                break
            outcomes.append(_outcome(tree, room, file, mutant, reach, quick=chosen.quick, limit=chosen.limit))
            print(json.dumps(asdict(outcomes[-1])), file=sys.stderr, flush=True)
            command = " ".join(["python -P -m benchmarks.trust.mutants", *sys.argv[1:]])
            write_part(chosen.to, "mutants", rows(outcomes), command, {"mutants": [asdict(o) for o in outcomes]})


def drawn(package: Path, rooms: Sequence[str], count: int, seed: int) -> list[tuple[str, str, Mutant]]:
    """A sample: (room, file below the package, mutant), the rooms in turn, each with as many.

    A file in place of a room is a room of its own.
    """
    by_room = {}
    for room in rooms:
        files = sorted({f for pattern in ROOMS.get(room, (room,)) for f in package.glob(pattern)})
        every = [(room, f.relative_to(package).as_posix(), m) for f in files for m in mutants(f.read_text("utf-8"))]
        by_room[room] = random.Random(f"{seed} {room}").sample(every, min(len(every), -(-count // len(rooms))))
    turns = [one for turn in range(count) for found in by_room.values() for one in found[turn : turn + 1]]
    return turns[:count]


def rows(outcomes: Sequence[Outcome]) -> list[Row]:
    """One row a room: how many mutants were tried to an end, how many were killed and how many were not."""
    found = []
    for room in dict.fromkeys(o.room for o in outcomes):
        mine = [o for o in outcomes if o.room == room]
        kinds = Counter(o.outcome for o in mine)
        lived = [
            f"{o.outcome}: {o.file}:{o.line}: {o.mutant}" for o in mine if o.outcome in ("survived", "not reached")
        ]
        late = [
            f"timed out, counted neither way: {o.file}:{o.line}: {o.mutant}" for o in mine if o.outcome == "timed out"
        ]
        tried = len(mine) - kinds["timed out"]
        what = f"mutants of {room}: a small fault in the source, which a test notices"
        found.append(Row(what, tried, kinds["killed"], tried - kinds["killed"], (*lived, *late)))
    return found


def _copy(tree: Path) -> None:
    """A copy of what the tests need, in which the source may be changed."""
    skipped = ["--exclude=__pycache__", "--exclude=*.tar.xz"]
    pack = subprocess.Popen(["tar", "-C", str(ROOT), *skipped, "-c", *_COPIED], stdout=subprocess.PIPE)
    subprocess.run(["tar", "-C", str(tree), "-x"], stdin=pack.stdout, check=True)
    if pack.wait():
        raise RuntimeError("the tree could not be copied")


def _enter(tree: Path) -> None:
    """Children of this process run the copy; what is heavy and not plait's is imported here, once for all."""
    import peft  # noqa: F401
    import pytest  # noqa: F401
    import torch
    import transformers  # noqa: F401

    torch.set_num_threads(1)
    os.environ |= {"PYTHONPATH": f"{tree / 'src'}:{tree}", "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"}
    os.chdir(tree)
    for module in [m for m in sys.modules if m.partition(".")[0] in ("plait", "benchmarks", "tests")]:
        del sys.modules[module]
    sys.path[:] = [
        str(tree / "src"),
        str(tree),
        *(p for p in sys.path if Path(p).resolve() not in (ROOT, ROOT / "src")),
    ]
    sys.dont_write_bytecode = True


def _reach(tree: Path, tests: Sequence[str], kept: Path | None) -> Reach:
    """Run the tests once and note what each reaches; those that ran before, over the same source, are not run again."""
    held = json.loads(kept.read_text()) if kept is not None and kept.is_file() else {}
    if held.get("source") != source():
        held = {"source": source(), "tests": {}}
    for test in tests:
        if test not in held["tests"]:
            held["tests"][test] = _noted(tree, test)
            if kept is not None:
                kept.parent.mkdir(parents=True, exist_ok=True)
                kept.write_text(json.dumps(held))
    lines: dict[str, dict[int, list[str]]] = {}
    seconds: dict[str, float] = {}
    for test in tests:
        seconds |= held["tests"][test]["seconds"]
        for file, by_line in held["tests"][test]["lines"].items():
            for line, reaching in by_line.items():
                lines.setdefault(file, {}).setdefault(int(line), []).extend(reaching)
    return Reach(lines, seconds)


def _noted(tree: Path, test: str) -> dict[str, Any]:
    """What the tests of one file or folder reach, each in a child of its own."""
    package, place, said = tree / "src/plait", tree / "reach.json", tree / "reach.log"
    files = sorted({f for patterns in ROOMS.values() for pattern in patterns for f in package.glob(pattern)})
    place.unlink(missing_ok=True)

    def noted() -> int:
        import pytest

        plugin = Reaching(files)
        plugin.coverage.start()
        code = pytest.main(["-q", "--assert=plain", "-p", "no:cacheprovider", f"tests/{test}"], plugins=[plugin])
        plugin.coverage.stop()
        place.write_text(json.dumps(asdict(plugin.reach(package))))
        return int(code)

    begun = time.monotonic()
    code, _ = _child(noted, said, None)
    if not place.is_file() or code not in (0, 1):  # 1: tests that fail are none that could kill; else none ran
        raise RuntimeError(f"{test} did not run: {code}: {said.read_text()[-2000:]}")
    last = (said.read_text().strip() or "nothing").splitlines()[-1]
    print(f"{test}: {last} ({time.monotonic() - begun:.0f} s)", file=sys.stderr, flush=True)
    found: dict[str, Any] = json.loads(place.read_text())
    return found


def _outcome(
    tree: Path, room: str, file: str, mutant: Mutant, reach: Reach, *, quick: bool, limit: float = float("inf")
) -> Outcome:
    """Put a mutant into the copy, run what may notice it, and take it out again.

    Quick, a mutant that the tests which reach its statement let pass is not given to the others of their files: of what runs in
    a function in this process, coverage has seen all that do.
    """
    path = tree / "src/plait" / file
    whole, begun = path.read_text("utf-8"), time.monotonic()
    near, count, found = reach.tests(file, mutant.lines), 0, "not reached"
    inside = bool(near) and _in_function(whole, mutant.line)
    path.write_text(mutant.applied(whole), "utf-8")
    try:
        for tests in (near, [t for t in reach.beside(file) if t not in set(near)]):
            if not tests or (quick and inside and tests is not near):
                continue
            count += len(tests)
            found = _judged(tree, tests, min(limit, 20 + 4 * sum(reach.seconds[t] for t in tests)))
            if found != "survived":
                break
    finally:
        path.write_text(whole, "utf-8")
    if found == "survived" and not near and not reach.tests(file, range(1, 10**5)):
        found = "not reached"
    return Outcome(room, file, mutant.line, mutant.text, found, count, round(time.monotonic() - begun, 1))


def _in_function(text: str, line: int) -> bool:
    """Whether a line runs when a function is called; what runs at import, defaults among it, no test is seen to reach."""
    functions = (n for n in ast.walk(ast.parse(text)) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef)))
    return any(f.body[0].lineno <= line <= (f.end_lineno or f.lineno) for f in functions)


def _judged(tree: Path, tests: Sequence[str], seconds: float) -> str:
    def run() -> int:
        import pytest

        return int(pytest.main([*_QUIET, *tests]))

    code, in_time = _child(run, tree / "tests.log", seconds)
    return "timed out" if not in_time else "survived" if code == 0 else "killed"


def _child(work, said: Path, seconds: float | None) -> tuple[int, bool]:  # type: ignore[no-untyped-def]
    """Do something in a forked child, in a process group of its own: its exit code, and whether it ended in its time."""
    pid = os.fork()
    if not pid:
        code = 70
        try:
            os.setpgid(0, 0)
            file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            os.dup2(file, 1)
            os.dup2(file, 2)
            code = work()
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(code)
    stop, status, done = time.monotonic() + (seconds or 10**6), 0, 0
    while not done and time.monotonic() < stop:
        time.sleep(0.02)
        done, status = os.waitpid(pid, os.WNOHANG)
    if not done:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)  # whatever it started
    return (os.waitstatus_to_exitcode(status), True) if done else (-1, False)


if __name__ == "__main__":
    main()
