"""What is recorded of a choice: the merge that was chosen, the evidence for it, what was done to it; and what is advised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from plait.border.records import inline, nested, optional
from plait.fidelity.head_records import HeadRefit as HeadRefit
from plait.fidelity.head_records import HeadsLearnt as HeadsLearnt
from plait.fidelity.limit import Limit
from plait.fidelity.measured_record import FidelityRecord as FidelityRecord
from plait.fidelity.measured_record import KeptOfTask as KeptOfTask
from plait.merging.record import Loss, MergedInput


@dataclass(frozen=True, slots=True)
class Evidence:
    """One candidate at one scale, and how close it is to the adapters.

    Args:
        candidate: What tables call it.
        method, calibrate, moments: Its recipe.
        scale: Factor of its delta.
        texts: Texts of each adapter that it was scored on, at most.
        score, general_kl, tasks: Its fidelity there, where texts were read.
        assumed_error: Mean error on assumed inputs, where none were.
        modules: Modules that it was looked at in, where none were: all, or a sample of them.
    """

    candidate: str
    method: str
    calibrate: str | None
    scale: float
    moments: str | None = optional()
    texts: int | None = optional()
    score: float | None = optional()
    general_kl: float | None = None
    assumed_error: float | None = optional()
    modules: int | None = optional()
    tasks: tuple[KeptOfTask, ...] = nested(KeptOfTask, ())


@dataclass(frozen=True, slots=True)
class Chosen:
    """The candidate that was chosen.

    Args:
        candidate: What tables call it.
        scale: Factor of its delta.
        method, calibrate, moments: Its recipe.
        weights: Module -> what its parts were multiplied by; {} where weights were not learnt, or learnt in vain.
        why: The reason, where nothing was measured.
        fit: "pull", "reach" and "scale" of `featcal`, where the candidate was fitted front to back.
    """

    candidate: str
    scale: float
    method: str | None = optional()
    calibrate: str | None = None
    moments: str | None = optional()
    weights: Mapping[str, Sequence[float]] | None = optional()
    why: str | None = optional()
    fit: Mapping[str, float] | None = optional()


@dataclass(frozen=True, slots=True)
class Look:
    """What texts held out said of a merge while it was repaired.

    Args:
        step: Steps taken by then.
        kept: Mean over adapters of 1 - KL(adapter || merge) / KL(adapter || base) (`Fidelity.kept`).
    """

    step: int
    kept: float


@dataclass(frozen=True, slots=True)
class Repair:
    """A short distillation of all adapters into a merge's factors, without labels.

    Args:
        steps: After how many the merge is what it is.
        held_out: "merge" and "repaired" -> 1 - KL / KL of the bare base on the texts held out (`Fidelity.kept`); {} where none were.
            Where heads follow and the repair was closer, "merge, heads" and "repaired, heads" too, the same with such heads, and
            "merge, heads: agreement" and "repaired, heads: agreement", how often both answer alike beyond chance
            (`Fidelity.beyond_chance`).
        kept: Whether the repaired merge was taken: closer by all of that, and within the limit on general text.
        first_loss, last_loss: Mean over the first and last tenth of the steps.
        method: What it is called elsewhere.
        most: Steps that it was allowed.
        on_policy: Whether the merge wrote and the adapters judged.
        looks: What the texts held out said on the way, the merge itself first.
    """

    steps: int
    held_out: Mapping[str, float]
    kept: bool
    first_loss: float
    last_loss: float
    method: str = "label-free multi-teacher distillation"
    most: int = 0
    on_policy: bool = False
    looks: tuple[Look, ...] = nested(Look, ())

    @property
    def closer(self) -> bool:
        """Whether the repaired merge is closer on the texts held out, by all that was measured; also where nothing was."""
        pairs = [
            (f"merge{with_heads}", f"repaired{with_heads}") for with_heads in ("", ", heads", ", heads: agreement")
        ]
        return all(self.held_out[after] > self.held_out[before] for before, after in pairs if before in self.held_out)


@dataclass(frozen=True, slots=True)
class ChatRecord:
    """How prompts were asked.

    Args:
        template: SHA-256 of the tokenizer's chat template; "" where prompts stand as they are.
        new_tokens: Tokens of an adapter's own answer, at most.
        detected: Whether nobody asked for it: the files held prompts.
        cut: Task -> prompts that were longer than `max_length`, and cut from the left.
    """

    template: str
    new_tokens: int
    detected: bool
    cut: Mapping[str, int] | None = optional()


@dataclass(frozen=True, slots=True)
class AutoRecord:
    """How a merge was chosen.

    Args:
        tasks: Names of the adapters.
        base, backbone_prefix: Base of the result, and the backbone's attribute in a task's model.
        adapters: Where each came from.
        labels: Head -> names of its classes, where any are known.
        notes: What a person should know about these adapters.
        chosen: The candidate.
        held_out: "chosen", "refined", "cut" (the better of both, cut to the rank asked for) and "fitted" -> score on the texts held
            out; {} where nothing was learnt.
        texts: Task -> texts that were read.
        assumed: "own_share" -> what the assumed inputs assume.
        evidence: Everything that was tried, best first.
        fidelity: Fidelity of the result on all texts; None without texts.
        repair: What a repair did, where one was asked for.
        heads: What fitting the heads did; () where none were fitted.
        chat: How prompts were asked, where they went through the tokenizer's chat template.
        learnt_heads: What learning heads together with weights did; None where nothing was learnt.
        rank: The largest rank of a merged module.
        verification_error: Largest relative difference of the written adapter from the chosen one.
        loss, cut: What a cut to a rank took, and how it was made, as `MergeRecord` has them.
        dtype, rounding_error: Of the written factors, as `MergeRecord` has them.
        limit: What a limit on general text left out; None without one.
    """

    tasks: tuple[str, ...]
    base: str
    backbone_prefix: str = ""
    adapters: tuple[MergedInput, ...] = nested(MergedInput, ())
    labels: Mapping[str, Sequence[str]] | None = optional()
    notes: tuple[str, ...] = ()
    chosen: Chosen = nested(Chosen, Chosen("", 1.0))
    held_out: Mapping[str, float] | None = optional()
    texts: Mapping[str, int] | None = optional()
    assumed: Mapping[str, float] | None = optional()
    evidence: tuple[Evidence, ...] = nested(Evidence, ())
    fidelity: FidelityRecord | None = nested(FidelityRecord, None)
    repair: Repair | None = optional(kind=Repair)
    heads: tuple[HeadRefit, ...] = optional((), kind=HeadRefit)
    learnt_heads: HeadsLearnt | None = optional(kind=HeadsLearnt)
    chat: ChatRecord | None = optional(kind=ChatRecord)
    rank: int = 0
    verification_error: float | None = optional()
    loss: Loss = inline(Loss)
    cut: str | None = optional()
    dtype: str | None = optional()
    rounding_error: float | None = optional()
    limit: Limit | None = optional(kind=Limit)

    @property
    def discarded_energy(self) -> float:
        """Fraction that a cut to a rank took; see `loss`."""
        return self.loss.discarded_energy


@dataclass(frozen=True, slots=True)
class Option:
    """One way to serve.

    Args:
        option: What it is.
        memory: Memory of the weights, as a person reads it.
        bytes: Bytes of what is held beside the base (of the base too where its size is known).
        added_flops: What it adds to the base's work a token, as a person reads it.
        kept: Mean over adapters of what is kept of their agreement with themselves; None where nobody measured it.
        worst, worst_task: The least kept, and of which adapter.
    """

    option: str
    memory: str
    bytes: int
    added_flops: str
    kept: float | None = None
    worst: float | None = None
    worst_task: str | None = None


@dataclass(frozen=True, slots=True)
class Advice:
    """Whether to merge, and how to serve.

    Args:
        tasks, base: Names of the adapters, and the base that they name.
        options: Ways to serve, what each costs and keeps.
        notes: What a person should know about these adapters.
        unknown: What nobody can say, with the reason.
        advice: The recommendation in words.
        recommended: The option that is recommended.
        chosen, evidence, repair: The merge that was looked at.
        next: The command that makes the recommended merge, but for the texts; None where no command is needed.
        then: The command that bakes it; None where it is not to be baked.
    """

    tasks: tuple[str, ...]
    base: str
    options: tuple[Option, ...]
    notes: tuple[str, ...]
    unknown: tuple[str, ...]
    advice: str
    recommended: str
    chosen: Chosen | None = optional(kind=Chosen)
    evidence: tuple[Evidence, ...] = optional((), kind=Evidence)
    repair: Repair | None = optional(kind=Repair)
    next: str | None = None
    then: str | None = None
