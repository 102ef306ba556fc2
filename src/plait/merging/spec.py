"""How adapters are to be merged: one value that travels from the command line, a recipe or a mergekit file to the plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from plait.errors import UsageError
from plait.options import did_you_mean

if TYPE_CHECKING:
    from plait.merging.module_weights import ModuleWeights


@dataclass(frozen=True, slots=True)
class MergeSpec:
    """Say how to merge; what is merged comes beside it.

    Args:
        method: A name in `merge_methods()`; None chooses (`plait.merging.scales`).
        options: Settings of the method, by name; None or a missing one is the method's default.
        weights: One per adapter in their order, any sign; None is 1 each.
        module_weights: Adapter -> module pattern -> weight, in place of `weights`; see `plait.merging.module_weights`.
        scale: Factor of the merged delta, whatever the method; None chooses one without labels (`plait.merging.scales`).
        scale_reason: Where a scale that is given here comes from, for the record; "" where the user gave it.
        rank: Largest rank of a merged module; None keeps exact results exact (rank R = sum of ranks) and cuts dense ones to R.
        calibrate: "pico" shrinks first what the B of adapters share, "svc" afterwards the directions that several adapters added to; None
            does neither.
        seed: Seed of random masks and of the randomised SVD.
        device: "cpu", "cuda", "cuda:N" or "auto", where it is computed; the result is on the CPU.
        base: Base id of the result where the adapters name one base by different names.
        disjoint: Whether adapters that have no module in common are meant side by side.
    """

    method: str | None = None
    options: Mapping[str, Any] | None = None
    weights: Sequence[float] | None = None
    module_weights: ModuleWeights | None = None
    scale: float | None = None
    scale_reason: str = ""
    rank: int | None = None
    calibrate: str | None = None
    seed: int = 0
    device: str = "cpu"
    base: str | None = None
    disjoint: bool = False

    @classmethod
    def of(cls, method: str | MergeSpec | None, settings: MergeSettings) -> MergeSpec:
        """Build a spec from a friendly signature: a method's name and settings, or a spec and what differs from it.

        >>> spec = MergeSpec.of(MergeSpec("ties", scale=0.7), {"rank": 8})
        >>> spec.method, spec.scale, spec.rank
        ('ties', 0.7, 8)

        Raises:
            UsageError: A keyword that is no setting of a merge, such as an option of the method.
        """
        if unknown := next((k for k in settings if k not in MergeSettings.__annotations__), None):
            hint = did_you_mean(unknown, MergeSettings.__annotations__)
            raise UsageError(
                f"a merge has no setting {unknown!r}",
                hint=f"options={{{unknown!r}: ...}} if it is the method's; {hint}",
            )
        return replace(method, **settings) if isinstance(method, MergeSpec) else cls(method, **settings)

    def for_files(self) -> MergeSpec:
        """Give what this means for LoRA files of image models: added up where no method is named, since nobody measured them."""
        if self.method is not None:
            return self
        return replace(self, method="task_arithmetic", scale=1.0 if self.scale is None else self.scale)

    @property
    def is_weighted(self) -> bool:
        """Whether weights were given, in either form."""
        return self.weights is not None or self.module_weights is not None


class MergeSettings(TypedDict, total=False):
    """The keywords of a `MergeSpec` beside the method, for functions that take them one by one."""

    options: Mapping[str, Any] | None
    weights: Sequence[float] | None
    module_weights: ModuleWeights | None
    scale: float | None
    rank: int | None
    calibrate: str | None
    seed: int
    device: str
    base: str | None
    disjoint: bool


Settings = Unpack[MergeSettings]
