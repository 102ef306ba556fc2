"""LoRA factors and the adapter that holds them: the hub type of every stage, with no I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from plait.adapters.config import CLASSIFICATION_TYPES
from plait.adapters.heads import HeadFacts
from plait.adapters.one_thread import alone, in_one_thread
from plait.border.counts import plural
from plait.errors import InputError

if TYPE_CHECKING:
    import torch
    from jaxtyping import Float
    from torch import Tensor

LINEAR, EMBEDDING, EXPERT = "linear", "embedding", "expert"
CONSTRAINT = "constraint"  # key of an adapter's `source`: what plait trained it with, where its folder says so


@dataclass(frozen=True, slots=True)
class LoraFactors:
    """One module's update: delta = scaling * B @ A.

    Args:
        A: (rank, in), any floating dtype.
        B: (out, rank), any floating dtype.
        scaling: alpha / rank, or alpha / sqrt(rank) for rsLoRA.
        kind: "linear" (Conv1D included: delta is always (out, in)), "embedding" (A is (rank, vocabulary)) or "expert" (one
            matrix of a fused weight, see `experts`).

    >>> import torch
    >>> factors = LoraFactors(A=torch.ones(2, 4), B=torch.ones(3, 2), scaling=0.5)
    >>> factors.rank, factors.shape, factors.norm_squared()
    (2, (3, 4), 12.0)
    >>> factors.delta()[0]
    tensor([1., 1., 1., 1.])
    >>> factors
    LoraFactors(rank=2, shape=(3, 4), scaling=0.5)
    """

    A: Float[Tensor, "r in"]
    B: Float[Tensor, "out r"]
    scaling: float = 1.0
    kind: str = LINEAR

    def __post_init__(self) -> None:
        if self.A.ndim != 2 or self.B.ndim != 2 or self.A.shape[0] != self.B.shape[1]:
            raise InputError(f"A {tuple(self.A.shape)} and B {tuple(self.B.shape)} are not (rank, in) and (out, rank)")

    def __repr__(self) -> str:
        """Its sizes, not its numbers."""
        kind = f", kind={self.kind!r}" if self.kind != LINEAR else ""
        return f"LoraFactors(rank={self.rank}, shape={self.shape}, scaling={self.scaling:g}{kind})"

    @property
    def rank(self) -> int:
        """Number of rows of A."""
        return self.A.shape[-2]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the delta."""
        return self.B.shape[-2], self.A.shape[-1]

    def folded(self, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> LoraFactors:
        """The same delta with scaling 1: the scaling is multiplied into B, in `dtype`, by default float32."""
        import torch

        dtype = dtype or torch.float32
        A, B = self.A.to(device, dtype), self.B.to(device, dtype)
        return LoraFactors(A, B if self.scaling == 1.0 else B * self.scaling, 1.0, self.kind)

    def delta(self, dtype: torch.dtype | None = None) -> Float[Tensor, "out in"]:
        """The dense update, by default in float32; for tests and for baking, merging never forms it."""
        f = self.folded(dtype)
        return f.B @ f.A

    def norm_squared(self) -> float:
        """Squared Frobenius norm of the delta, from two (rank, rank) Gram matrices in float64.

        In one thread: torch's others would wait for each other longer than these products take, and a processor spins meanwhile.
        """
        from plait.adapters.arrays import Array, product_norm_squared

        if isinstance(self.A, Array) and isinstance(self.B, Array):
            return self.scaling**2 * product_norm_squared(self.A, self.B)
        import torch

        with alone():
            f = self.folded(torch.float64)
            return float(((f.B.T @ f.B) * (f.A @ f.A.T)).sum())


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter of one base model, plain or merged.

    Args:
        name: Name of the adapter; its task's name where it has one head.
        base: `base_model_name_or_path`, as PEFT writes it.
        modules: Module name, relative to the backbone (see `prefix`) -> factors, in sorted order.
        task_type: PEFT's task type, such as "SEQ_CLS", or None.
        prefix: Dotted attribute of the backbone inside the task's model ("roberta", "model", "" where the adapter's
            model is the backbone itself). Names on disk are `prefix + "." + name`.
        heads: Task -> head tensors, named as in the task's model ("classifier.weight").
        extras: Weights that were trained whole, named as in the task's model (embeddings).
        modules_to_save: Names that declare those of them which PEFT keeps apart from the base's; the others take the place of
            the base's weights when PEFT loads them.
        copies: The base's own weights that PEFT saves below an adapted embedding or output layer: not trained.
        revision: Revision of the base, or None.
        target_modules: As PEFT's config had them; None where only the full list of `modules` describes them.
        target_parameters: As PEFT's config had them: weights that are adapted as parameters, not as their modules' layers.
        fan_in_fan_out: Whether the base stores these weights transposed (Conv1D).
        source: Where it came from: path, hashes, what the training base was. Provenance, not arithmetic.
        head_facts: Task -> what the outputs of its head mean, where that is known.
    """

    name: str
    base: str
    modules: Mapping[str, LoraFactors]
    task_type: str | None = None
    prefix: str = ""
    heads: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    modules_to_save: tuple[str, ...] = ()
    copies: Mapping[str, Tensor] = field(default_factory=dict)
    revision: str | None = None
    target_modules: tuple[str, ...] | str | None = None
    target_parameters: tuple[str, ...] = ()
    fan_in_fan_out: bool = False
    source: Mapping[str, Any] = field(default_factory=dict)
    head_facts: Mapping[str, HeadFacts] = field(default_factory=dict)

    def __repr__(self) -> str:
        """What it is called and how large it is, not its numbers."""
        heads = f", heads={[*self.heads]}" if self.heads else ""
        size = f"rank={self.rank}, {plural(len(self.modules), 'module')}"
        return f"Adapter({self.name!r}, base={self.base!r}, {size}{heads})"

    @property
    def rank(self) -> int:
        """The largest rank among its modules."""
        return max((f.rank for f in self.modules.values()), default=0)

    @property
    def nbytes(self) -> int:
        """Bytes that its factors, heads and whole weights take on a disk; a merge of several takes their sum at most."""
        heads = [t for head in self.heads.values() for t in head.values()]
        parts = [t for f in self.modules.values() for t in (f.A, f.B)]
        return sum(t.nbytes for t in (*parts, *heads, *self.extras.values()))

    def facts_of(self, head: str) -> HeadFacts:
        """What is known of a head: from its file, else from the folder's record."""
        labels, known = self.classes_of(head), self.head_facts.get(head, HeadFacts())
        own = self.task_type if self.task_type in CLASSIFICATION_TYPES else None
        return known.otherwise(HeadFacts(tuple(labels) if labels else None, None, own, self.prefix))

    def require_of_texts(self, head: str) -> None:
        """Check that a head's predictions can be repeated here: it answers once for a whole text, on the backbone as it is.

        In a model of another class its tensors may fit, and its answers mean nothing.

        Raises:
            InputError: It is of a model that answers for every token, or points at tokens; or layers of the backbone (a pooler) were
                trained whole beside it.
        """
        facts = self.facts_of(head)
        if facts.task_type not in (None, "SEQ_CLS"):
            raise InputError(
                f"its head {head!r} is of a {facts.task_type} model, which does not answer for a whole text; what such heads predict "
                "cannot be looked at here",
                where=self.name,
                hint="merged without --text it can be, and scored by your own evaluation",
            )
        if inside := next((k for k in self.heads[head] if of_backbone(facts.prefix, k)), None):
            raise InputError(
                f"beside its head {head!r} it trained {inside.rpartition('.')[0]} of the backbone whole, and predictions with that "
                "cannot be looked at here",
                where=self.name,
                hint="it can be merged without texts; plait.load_head puts that into a model of yours, with the head",
            )

    def classes_of(self, head: str) -> list[str] | None:
        """The names of a head's classes in the order of its outputs, as its file or record has them; None where none has.

        A trained adapter's record lists them for the one head it has, a merge's by head.
        """
        if (facts := self.head_facts.get(head)) and facts.labels:
            return list(facts.labels)
        recorded = self.source.get("labels")
        found = recorded.get(head) if isinstance(recorded, Mapping) else recorded if head == self.name else None
        return list(map(str, found)) if isinstance(found, list) else None

    @property
    def classes(self) -> dict[str, list[str]]:
        """Head -> the names of its classes, for those of its heads of which they are known."""
        found = {head: self.classes_of(head) for head in self.heads}
        return {head: names for head, names in found.items() if names}

    def full_name(self, module: str) -> str:
        """A module's name in the task's model, as on disk."""
        return f"{self.prefix}.{module}" if self.prefix else module


def of_backbone(prefix: str, key: str) -> bool:
    """Whether a tensor that lies beside the factors belongs to a layer of the backbone, whose attribute is the prefix."""
    return bool(prefix) and key.startswith(f"{prefix}.")


def zero_factors(shape: tuple[int, int], rank: int, kind: str = LINEAR) -> LoraFactors:
    """Make the factors of a zero delta, float32."""
    import torch

    out, width = shape
    A, B = torch.zeros(rank, width, dtype=torch.float32), torch.zeros(out, rank, dtype=torch.float32)
    return LoraFactors(A, B, 1.0, kind)


def concatenated(
    factors: Sequence[LoraFactors],
    weights: Sequence[float],
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> LoraFactors:
    """Add deltas up exactly, sum_t w_t D_t, as one pair of factors of rank sum_t r_t.

    Weights and scalings together are multiplied into the whole B at once: a copy, and one pass while it is in the cache.

    Args:
        factors: At least one; all of one (out, in).
        weights: One finite number each, any sign; multiplied into B.
        dtype: Type of the result, by default float32.
        device: Place of the result.

    >>> import torch
    >>> one = LoraFactors(torch.ones(1, 2), torch.ones(2, 1))
    >>> both = concatenated([one, one], [1.0, -0.5])
    >>> both.rank, both.delta()
    (2, tensor([[0.5000, 0.5000],
            [0.5000, 0.5000]]))
    """
    import torch

    dtype = dtype or torch.float32
    A = torch.cat([f.A.to(device, dtype) for f in factors])
    B = torch.cat([f.B.to(device, dtype) for f in factors], dim=1)
    columns = [w * f.scaling for f, w in zip(factors, weights, strict=True) for _ in range(f.rank)]
    if any(c != 1.0 for c in columns):
        B *= torch.tensor(columns, dtype=dtype, device=device)
    return LoraFactors(A, B, 1.0, factors[0].kind)


def truncated(factors: LoraFactors, rank: int) -> tuple[LoraFactors, float]:
    """Approximate the delta best at a lower rank, and say which fraction of its energy is lost.

    Thin QR of both factors, then an SVD of the (r, r) core: exact, and no out x in matrix is formed.

    Args:
        factors: Factors of any rank.
        rank: Wanted rank, at least 1; a rank not below the present one changes nothing.

    Returns:
        Factors with scaling 1, and discarded / total squared singular values, in [0, 1].

    >>> import torch
    >>> shorter, lost = truncated(LoraFactors(torch.diag(torch.tensor([3.0, 1.0])), torch.eye(2)), 1)
    >>> shorter.rank, round(lost, 6)
    (1, 0.1)
    """
    import torch

    if rank >= factors.rank:
        return factors, 0.0
    f = factors.folded(torch.float32 if factors.A.dtype != torch.float64 else torch.float64)
    Qb, Rb = in_one_thread(torch.linalg.qr, f.B)
    Qa, Ra = in_one_thread(torch.linalg.qr, f.A.T)
    U, S, Vt = in_one_thread(torch.linalg.svd, Rb @ Ra.T, full_matrices=False)
    total = float(S.double().square().sum())
    lost = float(S[rank:].double().square().sum()) / total if total > 0 else 0.0
    root = S[:rank].sqrt()
    return LoraFactors(root[:, None] * (Vt[:rank] @ Qa.T), Qb @ (U[:, :rank] * root), 1.0, f.kind), lost
