"""From statistics to adapters that start in their subspaces: B = 0, so the base's outputs are untouched."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from plait.adapters.lora import Adapter, LoraFactors
from plait.border.counts import plural
from plait.border.multipliers import LARGEST, SMALLEST, is_multiplier
from plait.errors import InputError, UsageError
from plait.options import did_you_mean
from plait.statistics.moments import ModuleInfo, Statistics
from plait.subspaces.compute import Subspace, completed, compute_subspaces
from plait.subspaces.registry import checked_row_norm

_UNRECORDED = "SEQ_CLS"
PEFT_TASKS = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")


@dataclass(frozen=True, slots=True)
class InitialSettings:
    """How every adapter starts.

    Args:
        method: A subspace method.
        rank: Rows of A.
        alpha: LoRA's alpha; scaling is alpha / rank.
        row_norm: Norm of each row of A; None for the method's own.
        options: Options of the method.
        background_weight: Share of the background pool among the others, where there is one, in [0, 1].
        task_type: PEFT's task type; None for the one of the statistics (SEQ_CLS in files of old, which do not say).
        target_modules: PEFT's `target_modules`; None lists every module the statistics hold.
    """

    method: str = "contrastive"
    rank: int = 8
    alpha: float = 16.0
    row_norm: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    background_weight: float = 0.5
    task_type: str | None = None
    target_modules: tuple[str, ...] | str | None = None

    def __post_init__(self) -> None:
        """Raises UsageError, before anything is read, for what no adapter can be."""
        _require_alpha(self.alpha)
        checked_row_norm(self.row_norm)
        if self.task_type is not None and self.task_type not in PEFT_TASKS:
            raise UsageError(
                f"task type {self.task_type!r} is not one of PEFT's", hint=did_you_mean(self.task_type, PEFT_TASKS)
            )


def initial_adapters(
    statistics: Mapping[str, Statistics],
    settings: InitialSettings,
    *,
    base: str,
    revision: str | None = None,
    tasks: Sequence[str] | None = None,
    seed: int = 0,
    background: Sequence[Statistics] = (),
    device: torch.device | str = "cpu",
    on_site: Callable[[int, int], None] = lambda done, sites: None,
    weights: Callable[[str], Tensor] | None = None,
) -> dict[str, tuple[Adapter, dict[str, Any]]]:
    """Adapters with B = 0 whose A lies in each task's subspace, and what to remember of how it was chosen.

    That is the task, method, row norm and rank; and `completed` (see `plait.subspaces.completed`), where there is any.

    Args:
        statistics: Task -> its statistics; "the others" of a task are all the other entries.
        settings: Method, rank, alpha, norm.
        base: Name of the base model, written into the adapter.
        revision: Its revision.
        tasks: Which of them get an adapter; all by default.
        seed: Seed of methods that draw at random.
        background: Statistics of public text that stand for tasks nobody knows yet.
        device: Where to solve.
        on_site: Called after each site with how many are done, and how many there are.
        weights: Module -> its weight in the base, for a method that needs it.
    """
    spaces = compute_subspaces(
        settings.method,
        statistics,
        tasks=tasks,
        rank=settings.rank,
        row_norm=settings.row_norm,
        options=settings.options,
        seed=seed,
        background=list(background) or None,
        background_weight=settings.background_weight,
        device=device,
        on_site=on_site,
        weights=weights,
    )
    made = {}
    for task, subspaces in spaces.items():
        adapter = initial_adapter(
            task,
            base,
            subspaces,
            statistics[task].modules,
            alpha=settings.alpha,
            task_type=settings.task_type or task_type_of(statistics[task]),
            prefix=statistics[task].provenance.get("backbone_prefix", ""),
            target_modules=settings.target_modules,
            source={"completed": lacking} if (lacking := completed(subspaces)) else None,
        )
        first = next(iter(subspaces.values()))
        record = {"task": task, "subspace": first.method, "row_norm": first.row_norm, "rank": settings.rank}
        made[task] = (replace(adapter, revision=revision), {**record, **adapter.source})
    return made


def initial_adapter(
    name: str,
    base: str,
    subspaces: Mapping[str, Subspace],
    modules: Mapping[str, ModuleInfo],
    *,
    alpha: float,
    task_type: str | None = None,
    prefix: str = "",
    target_modules: Sequence[str] | str | None = None,
    revision: str | None = None,
    rslora: bool = False,
    source: Mapping[str, Any] | None = None,
) -> Adapter:
    """Make an adapter that changes nothing yet: A is the subspace to the bit, B is zero.

    >>> space = Subspace(torch.eye(2, 4), torch.ones(2), None, "osrm")
    >>> adapter = initial_adapter(
    ...     "mine", "base", {"query": space}, {"query": ModuleInfo("query", (3, 4), 1.0)}, alpha=4
    ... )
    >>> factors = adapter.modules["query"]
    >>> factors.shape, factors.scaling, bool(factors.B.any())
    ((3, 4), 2.0, False)

    Args:
        name: Name of the task.
        base: `base_model_name_or_path`.
        subspaces: Module -> subspace, as `compute_subspaces` gives them for one task.
        modules: Module -> its shape, from `Statistics.modules`.
        alpha: LoRA's alpha, above 0; scaling is alpha / r (alpha / sqrt(r) for rsLoRA).
        task_type: PEFT's, such as "SEQ_CLS".
        prefix: The backbone's attribute inside the task's model.
        target_modules: PEFT's `target_modules`, for its config.
        revision: Revision of the base.
        rslora: Rank-stabilised scaling.
        source: Provenance.

    Raises:
        UsageError: alpha is out of range, or not above 0.
        InputError: A subspace of a module that `modules` lacks, or of another width.
    """
    _require_alpha(alpha)
    if not subspaces:
        raise InputError("no subspaces to start from")
    factors: dict[str, LoraFactors] = {}
    for module in sorted(subspaces):
        A = subspaces[module].A
        if module not in modules or modules[module].shape[1] != A.shape[1]:
            raise InputError(f"the subspace has width {A.shape[1]}, the module does not", where=module)
        rank = A.shape[0]
        scaling = alpha / rank**0.5 if rslora else alpha / rank
        factors[module] = LoraFactors(A, A.new_zeros(modules[module].shape[0], rank), scaling)
    fans = {modules[m].fan_in_fan_out for m in factors}
    return Adapter(
        name=name,
        base=base,
        modules=factors,
        task_type=task_type,
        prefix=prefix,
        target_modules=target_modules
        if isinstance(target_modules, str) or target_modules is None
        else tuple(target_modules),
        target_parameters=tuple(f"{m}.weight" for m in factors if modules[m].is_router),
        revision=revision,
        fan_in_fan_out=fans == {True},
        source=dict(source or {}),
    )


def task_type_of(statistics: Statistics) -> str:
    """PEFT's task type of the model that statistics were collected on.

    Raises:
        InputError: The file records one that PEFT does not know.
    """
    task_type = statistics.provenance.get("task_type") or _UNRECORDED
    if task_type not in PEFT_TASKS:
        raise InputError(f"its task_type is {task_type!r:.80}, none of PEFT's", hint="--task-type names another")
    return str(task_type)


def completion_note(task: str, rows: Mapping[str, int]) -> str:
    """Write a sentence about rows of A that were completed; `rows` is module -> how many."""
    most = max(rows.values())
    return (
        f"{task}: in {plural(len(rows), 'module')} the others leave too few tied directions that the task's inputs reach; up to"
        f" {plural(most, 'row', 'is', 'are')} the others' next smallest (more samples may help)"
    )


def _require_alpha(alpha: float) -> None:
    if not (is_multiplier(alpha) and alpha > 0):
        raise UsageError(f"alpha is {alpha!r}, expected a finite number above 0, from {SMALLEST:g} to {LARGEST:g}")
