"""The same set of adapters and the same seed give the same files: any number of threads, any order, any run."""

from __future__ import annotations

import ast
import contextlib
import itertools
from pathlib import Path

import pytest
import torch

import plait
from plait.adapters.lora import Adapter, LoraFactors
from plait.adapters.peft_format import write_adapter
from plait.disk.store import read_manifest
from plait.merging import merge_folders, merge_methods
from plait.merging.record import IN_THE_METRIC
from plait.statistics.files import write_statistics
from plait.statistics.fisher import FisherDiagonal, write_fisher
from plait.statistics.moments import ModuleInfo, Moments, Statistics

NAMES = ("zebra", "ant", "mole")
METHODS = tuple(sorted(merge_methods()))
PAIRS = {"slerp"}


def saved(folder: Path, seed: int, *, width: int, modules: int) -> Path:
    g = torch.Generator().manual_seed(seed)
    factors = {
        f"layers.{i}.q": LoraFactors(torch.randn(4, width, generator=g), torch.randn(width, 4, generator=g), 0.5)
        for i in range(modules)
    }
    head = {
        folder.name: {
            "classifier.weight": torch.randn(3, width, generator=g),
            "classifier.bias": torch.randn(3, generator=g),
        }
    }
    folder.mkdir(parents=True)
    adapter = Adapter(folder.name, "base", factors, task_type="SEQ_CLS", prefix="bert", heads=head)
    write_adapter(folder, adapter)
    return folder


def measured(folder: Path, method: str, seed: int, *, width: int, modules: int) -> Path | None:
    """The statistics that a method needs of the adapter in a folder, beside it; None where it needs none."""
    needs = merge_methods()[method].needs
    kinds = {"fisher": "fisher" in needs, "two_sided": "output_gradients" in needs}
    return written_statistics(folder, seed, **kinds, width=width, modules=modules) if needs else None


def written_statistics(
    folder: Path, seed: int, *, fisher: bool = False, two_sided: bool = False, width: int, modules: int
) -> Path:
    """Moments, with those of output gradients or without, or a Fisher diagonal, of all modules of what `saved` makes."""
    g = torch.Generator().manual_seed(50 + seed)
    path, names = folder.with_suffix(".stats.safetensors"), [f"layers.{i}.q" for i in range(modules)]
    if fisher:
        write_fisher(path, FisherDiagonal.held({m: torch.rand(width, width, generator=g) for m in names}, 8))
        return path

    def moments() -> Moments:
        H = torch.randn(2 * width, width, generator=g)
        return Moments(len(H), H.sum(0), H.T @ H)

    sites, gradients = ({m: moments() for m in names} if wanted else {} for wanted in (True, two_sided))
    modules_read = {m: ModuleInfo(m, (width, width), 1.0) for m in names}
    write_statistics(path, Statistics(sites, modules_read, output_gradients=gradients))
    return path


@contextlib.contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file but the record, which keeps the order given."""
    found = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert "adapter_model.safetensors" in found
    del found["plait.json"]
    return found


def merged(trio, out, method, count, **given):
    with threads(count):
        merge_folders(trio, out, method=method, seed=3, overwrite=True, **given)
    return files_of(out)


def differing(trio, tmp_path, method, runs, statistics=None, **given):
    """Names of files that are not the same in every run: (threads, order) each."""
    weights = dict(zip(trio, (1.0, 0.5, 2.0), strict=False))
    given["statistics"] = {folder.name: file for folder, file in (statistics or {}).items() if file} or None
    first, *others = [
        merged(order, tmp_path / "out", method, count, weights=[weights[f] for f in order], **given)
        for count, order in runs
    ]
    assert sum(name.startswith("heads/") for name in first) == len(trio)
    return {n for other in others for n in {*first, *other} if first.get(n) != other.get(n)}


@pytest.mark.parametrize("method", METHODS)
def test_every_order_gives_the_same_files(tmp_path, method):
    names = NAMES[: 2 if method in PAIRS else 3]
    trio = [saved(tmp_path / n, i, width=12, modules=2) for i, n in enumerate(names)]
    statistics = {f: measured(f, method, i, width=12, modules=2) for i, f in enumerate(trio)}
    runs = [(1, list(order)) for order in itertools.permutations(trio)]
    assert not differing(trio, tmp_path, method, runs, statistics)


@pytest.mark.parametrize("method", ["tsv", "ties"])
def test_every_order_gives_the_same_cut_by_statistics(tmp_path, method):
    trio = [saved(tmp_path / n, i, width=12, modules=2) for i, n in enumerate(NAMES)]
    statistics = {f: written_statistics(f, i, width=12, modules=2) for i, f in enumerate(trio)}
    runs = [(1 + i % 2, list(order)) for i, order in enumerate(itertools.permutations(trio))]
    assert not differing(trio, tmp_path, method, runs, statistics, rank=3)
    record = read_manifest(tmp_path / "out")["result"]
    assert record["cut"] == IN_THE_METRIC and 0 < record["discarded_energy"] < 1


@pytest.mark.slow
@pytest.mark.parametrize("modules", [1, 8], ids=["torch's threads", "a thread a module"])
@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "tsv", "della"])
def test_threads_runs_and_orders_give_the_same_files(tmp_path, method, modules):
    """Modules wide enough that torch splits them; eight of them, so that they are merged side by side."""
    trio = [saved(tmp_path / n, i, width=768, modules=modules) for i, n in enumerate(NAMES)]
    runs = [(1, trio), (2, trio), (2, trio[::-1]), (1, [trio[1], trio[2], trio[0]]), (2, trio)]
    assert not differing(trio, tmp_path, method, runs)


def test_the_same_set_in_another_order_is_the_same_result(tmp_path):
    """It is found as done; weights follow their adapters, and other weights are another result."""
    trio = [saved(tmp_path / n, i, width=12, modules=1) for i, n in enumerate(NAMES)]
    first = merge_folders(trio, tmp_path / "out", weights=[1.0, 2.0, 3.0])
    again = merge_folders(trio[::-1], tmp_path / "out", weights=[3.0, 2.0, 1.0])
    assert not first.reused and again.reused
    recorded = read_manifest(tmp_path / "out")["result"]
    assert recorded["tasks"] == list(NAMES) and recorded["weights"] == [1.0, 2.0, 3.0]
    assert [(a["name"], a["weight"]) for a in recorded["adapters"]] == list(zip(NAMES, (1.0, 2.0, 3.0), strict=True))
    turned = merge_folders(trio[::-1], tmp_path / "other", weights=[1.0, 2.0, 3.0])
    assert turned.record.tasks == NAMES[::-1] and turned.record.weights == (1.0, 2.0, 3.0)
    assert files_of(tmp_path / "other") != files_of(tmp_path / "out")


_DECOMPOSED = {
    "svd", "svdvals", "qr", "eigh", "eigvalsh", "cholesky", "cholesky_ex", "solve", "inv", "pinv", "lstsq", "cholesky_inverse",
}  # fmt: skip


def test_decompositions_outside_of_merging_are_made_in_one_thread():
    """Modules are merged in threads of which each computes alone; everywhere else a call has to say so."""
    package, bare = Path(plait.__file__).parent, []
    for path in sorted(package.rglob("*.py")):
        where = path.relative_to(package).as_posix()
        if (
            where.startswith("merging/") or where == "subspaces/stream.py"
        ):  # the latter starts the library up, for no result
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        handed = {
            ast.unparse(n.args[0])
            for n in ast.walk(tree)
            if isinstance(n, ast.Call) and ast.unparse(n.func) == "in_one_thread"
        }
        whole = [
            f for f in tree.body if isinstance(f, ast.FunctionDef) and f.name in handed
        ]  # in one thread as they are
        inside = {id(n) for f in whole for n in ast.walk(f)}
        calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and id(n) not in inside]
        named = [c.func for c in calls if isinstance(c.func, ast.Attribute) and c.func.attr in _DECOMPOSED]
        bare += [f"{where}:{f.lineno}" for f in named if ast.unparse(f.value) in ("torch", "torch.linalg")]
    assert not bare
