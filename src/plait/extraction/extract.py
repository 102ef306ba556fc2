"""`plait extract`: the LoRA in the difference of two checkpoints, matrix by matrix, written and read again."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from plait.adapters.experts import member_of
from plait.adapters.lora import EMBEDDING, LINEAR, Adapter
from plait.adapters.naming import checked_name
from plait.adapters.peft_format import read_adapter, write_adapter
from plait.border.counts import plural
from plait.border.module_names import named_by
from plait.border.records import to_json
from plait.disk import store
from plait.disk.hub import split_revision
from plait.disk.overwriting import require_apart
from plait.disk.space import require_space
from plait.disk.written import Written, standing
from plait.errors import InputError, RunError, UsageError
from plait.extraction.outcome import ExtractionRecord, Found, adapter_of_cuts, record_of
from plait.extraction.pairs import Matrix, Pair
from plait.extraction.spectrum import extracted, loss_of
from plait.model.base import BaseModel
from plait.model.files import base_place
from plait.seeds import seed_of
from plait.statistics.moments import Statistics

_NAMED = 5  # tensors that an error lists
# The factors are rounded to float32: what is read again may lose this share of the energy more or less than was stated.
_ROUNDING = 1e-6


@dataclass(frozen=True, slots=True)
class Extraction:
    """What is to be extracted.

    Args:
        finetuned: Folder of the fine-tuned model, or its name on the hub.
        base: Folder of the model it was trained from, or its name on the hub.
        rank: Of every module; None with an `energy`.
        energy: Share of each module's squared change to keep, in (0, 1]; None with a `rank`.
        target_modules: Endings of names, as PEFT takes them; None for every matrix but embeddings, output layer and head.
        drop: Leave out what changed and is not covered, and say so.
        statistics: A task's statistics of the base: the cut is then made in the metric of the inputs.
        seed: Of the power iterations, which only large matrices need.
    """

    finetuned: Path
    base: Path
    rank: int | None = None
    energy: float | None = None
    target_modules: tuple[str, ...] | None = None
    drop: bool = False
    statistics: Path | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.rank is None) == (self.energy is None):
            raise UsageError("either a rank or an energy says where to cut", hint="--rank R or --energy E")
        if self.rank is not None and self.rank < 1:
            raise UsageError(f"rank is {self.rank}, expected at least 1")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise UsageError(f"energy is {self.energy}, expected a share in (0, 1]")


def extract(ask: Extraction, out: Path, *, overwrite: bool = False) -> Written[ExtractionRecord]:
    """Write the LoRA nearest to a full fine-tune, one matrix in memory at a time.

    Args:
        ask: What from what.
        out: The PEFT folder to write.
        overwrite: Replace what stands there.

    Raises:
        InputError: Statistics of another base; nothing differs; shapes or tensors differ that no LoRA can hold; changes outside the
            LoRA, without `drop`.
        RunError: What was written, read again, does not keep what was stated.
    """
    named, revision = split_revision(str(ask.base))
    ask = replace(ask, finetuned=_place(ask.finetuned), base=_place(ask.base))
    require_apart(out, [ask.finetuned, ask.base, *([ask.statistics] if ask.statistics else [])])
    inputs = {"finetuned": _hash(ask.finetuned), "base": _hash(ask.base)}
    if ask.statistics:
        inputs["statistics"] = store.sha256_file(ask.statistics)
    options = {
        "rank": ask.rank,
        "energy": ask.energy,
        "target_modules": sorted(ask.target_modules) if ask.target_modules else None,
        "drop": ask.drop,
        "base": named,
    }
    wanted = store.identity("extract", options, inputs, ask.seed)
    if (before := standing(out, wanted, ExtractionRecord, overwrite=overwrite)) is not None:
        return before
    statistics = _statistics(ask, BaseModel(named, revision, device="cpu"))
    pair = Pair(ask.finetuned, ask.base)
    found = _changes(pair, ask, statistics)
    adapter = replace(adapter_of_cuts(pair, found, named, checked_name(out.name, "adapter")), revision=revision)
    record = record_of(found, adapter)
    result = to_json(record)

    def check(stage: Path) -> None:
        result["verification_error"] = _verified(pair, found, read_adapter(stage, name=adapter.name))

    require_space(out, adapter.nbytes)
    with store.staged_folder(out, wanted, overwrite=overwrite, result=result, check=check) as stage:
        write_adapter(stage, adapter)
    return Written(replace(record, verification_error=result["verification_error"]), str(out))


def _place(model: Path) -> Path:
    place = base_place(model)
    if not place.is_dir():
        raise InputError("no such folder", where=str(model), hint="a model's folder, or its name on the hub")
    return place


def _hash(folder: Path) -> str:
    files = sorted(p for p in folder.iterdir() if p.suffix == ".safetensors" or p.name == "config.json")
    return store.sha256_json({p.name: store.sha256_file(p) for p in files})


def _statistics(ask: Extraction, base: BaseModel) -> Statistics | None:
    """Read the statistics whose metric the cut is made in, of this base and no other."""
    if ask.statistics is None:
        return None
    from plait.model.identity import base_facts
    from plait.statistics.agreement import require_base
    from plait.statistics.files import read_statistics

    found = read_statistics(ask.statistics)
    require_base(found, base.name, base_facts(base))
    return found


# --- what changed -----------------------------------------------------------------------------------------------------


def _changes(pair: Pair, ask: Extraction, statistics: Statistics | None) -> Found:
    found = Found()
    matrices = pair.matrices()
    covered = {m.module for m in matrices if _covers(m, pair, ask.target_modules)}
    _require_used(ask.target_modules, matrices)
    done = {m.parameter for m in matrices if m.module in covered}
    for p in pair.parameters:
        if p not in done and p not in pair.heads and (change := _relative_change(pair, p, matrices)):
            found.dropped[p] = change
    if found.dropped and not ask.drop:
        names = sorted(found.dropped, key=lambda p: -found.dropped[p])
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        said = ", ".join(f"{p} ({found.dropped[p]:.2g} of its norm)" for p in names[:_NAMED])
        raise InputError(
            f"training changed {plural(len(names), 'tensor')} that the LoRA does not cover: {said}{more}",
            where=str(ask.finetuned),
            hint="--drop leaves them as the base has them; --target-modules covers embeddings and output layers by name",
        )
    for matrix in matrices:
        if matrix.module not in covered:
            continue
        D = pair.difference(matrix)
        if not bool(D.any()):
            found.unchanged += 1
            continue
        M = _metric(statistics, matrix, found)
        seed = seed_of(ask.seed, matrix.module)
        cut = extracted(D, rank=ask.rank, energy=ask.energy, moments=M, kind=matrix.kind, seed=seed)
        found.cuts[matrix.module], found.of[matrix.module] = cut, matrix
    if not found.cuts:
        raise InputError(
            "equals the base in every matrix that the LoRA would cover",
            where=str(ask.finetuned),
            hint="which base was it trained from?",
        )
    return found


def _covers(matrix: Matrix, pair: Pair, targets: tuple[str, ...] | None) -> bool:
    member = member_of(matrix.module)
    name = member[0] if member else matrix.module
    if targets is not None:
        return any(_targets(t, name) for t in targets)
    output = pair.model.get_output_embeddings() if hasattr(pair.model, "get_output_embeddings") else None
    is_output = output is not None and matrix.parameter == f"{pair.name_of(output)}.weight"
    return matrix.kind != EMBEDDING and not is_output


def _targets(target: str, module: str) -> bool:
    """Whether a target is the name of a module, or of its weight."""
    return named_by(module, target) or named_by(f"{module}.weight", target)


def _require_used(targets: tuple[str, ...] | None, matrices: list[Matrix]) -> None:
    names = {m.module.partition("[")[0] for m in matrices}
    for t in targets or ():
        if not any(_targets(t, n) for n in names):
            known = sorted({n.rpartition(".")[2] for n in names})
            raise UsageError(f"target module {t!r} matches nothing", hint=f"one of {', '.join(known[:12])}")


def _relative_change(pair: Pair, parameter: str, matrices: list[Matrix]) -> float:
    """|difference| / |base| of a parameter that is not covered, one matrix at a time; 0 where it is the same."""
    own = [m for m in matrices if m.parameter == parameter]
    change = size = 0.0
    for m in own:
        change += float(pair.difference(m).double().square().sum())
    if not own:
        tuned, base = (pair.whole(i, parameter).double() for i in (0, 1))
        change = float((tuned - base).square().sum())
        size = float(base.square().sum())
    else:
        for m in own:
            size += float(pair.base_matrix(m).double().square().sum())
    return (change / size) ** 0.5 if size > 0 else float(change > 0)


def _metric(statistics: Statistics | None, matrix: Matrix, found: Found) -> Tensor | None:
    """The inputs' second moment; embeddings and experts have none, and are cut plainly."""
    if statistics is None:
        return None
    moments = statistics.moments_for(matrix.module) if matrix.kind == LINEAR else None
    if moments is None:
        if matrix.kind == LINEAR:
            raise InputError(
                "the statistics hold no moments for this module",
                where=matrix.module,
                hint="collect them with the same --target-modules, or leave --stats out",
            )
        found.plain.append(matrix.module)
        return None
    dense: Tensor = moments.dense().double()
    return dense


def _verified(pair: Pair, found: Found, written: Adapter) -> float:
    """Both checkpoints and the written factors, read again: the largest departure of a lost share from what was stated."""
    largest = 0.0
    for module, matrix in found.of.items():
        stated = found.cuts[module]
        lost, _ = loss_of(pair.difference(matrix), written.modules[module])
        largest = max(largest, abs(lost - stated.lost) / stated.energy)
        if not largest <= _ROUNDING:
            raise RunError(
                f"the written factors lose {lost / stated.energy:.3g} of the change, not {stated.lost / stated.energy:.3g}",
                where=module,
                hint="nothing was kept; please report this",
            )
    return largest
