"""What a study file may say: a recipe whose arms differ in more, and how choices are made."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from plait.adapters.naming import distinct_names
from plait.errors import InputError, UsageError
from plait.runs.recipe import ArmSpec, Count, Name, Positive, Recipe, Seed, TaskSpec, _Strict
from plait.runs.recipe_file import apply_overrides, check_names, load_yaml, put, text_of

Share = Annotated[float, Field(ge=0, le=1)]
Seeds = Annotated[list[Seed], Field(min_length=1)]


class StudyArm(ArmSpec):
    """One way of starting A and of training, with what it may differ in from the study's own settings."""

    pool: Literal["token", "mean"] | None = Field(None, description="of its statistics")
    samples: Count | None = Field(None, description="rows its statistics are taken from")
    known: Count | None = Field(None, description="how many of the other tasks it knows: the next ones in the list")
    background: Share = Field(0.0, description="share of the background tasks among the others")
    rank: Count | None = None
    rates: list[Positive] | None = Field(None, description="learning rates to choose from; the study's by default")
    like: Name | None = Field(None, description="takes its learning rate from this arm")
    snapshot: Count | None = Field(None, description="the moment after so many steps of arm `like`")
    joint: bool = Field(False, description="one adapter of all tasks, each task with its own head: a reference")
    seeds: Seeds | None = None

    @model_validator(mode="after")
    def _alike(self) -> StudyArm:
        if self.snapshot is not None and self.like is None:
            raise ValueError("snapshot needs `like`: whose moment?")
        return self


class Variant(_Strict):
    """An ablation: the study with some settings changed, for some arms, at their own learning rates."""

    name: Name
    set: dict[str, Any] = Field(min_length=1, description="dotted key -> value")
    arms: list[Name] = Field(min_length=1)
    merges: list[Name] | None = None
    seeds: Seeds | None = None


class Repair(_Strict):
    """A reference: a merge trained further on all tasks together."""

    arms: list[Name] = Field(min_length=1)
    merge: Name
    steps: Count = 100


class Study(Recipe):
    """A study: a recipe, the sweep, the splits, the ablations and the references."""

    arms: list[str | StudyArm] = Field(min_length=1)  # type: ignore[assignment]
    rates: list[Positive] = Field(min_length=1, description="learning rates every arm chooses from")
    moments: list[Count] = Field(default_factory=list, description="steps before the end that the sweep may choose too")
    tuning_seed: Seed = Field(1000, description="seed of the sweep; never reported")
    tuning_merges: list[Name] | None = Field(None, description="merges by whose best an arm's rate is chosen")
    tuning_rows: Count = Field(250, description="validation rows a task that only the sweep sees, a fifth at most")
    grid_rows: Count = Field(400, description="rows a half from which scales are chosen")
    background: list[TaskSpec] = Field(default_factory=list, description="tasks that only lend their statistics")
    repair: Repair | None = None
    variants: list[Variant] = Field(default_factory=list)

    @model_validator(mode="after")
    def _references(self) -> Study:
        arms = {a.name: a for a in self.study_arms}
        merges = [m.name for m in self.merge_specs]
        distinct_names([v.name for v in self.variants], "variant")
        for arm in arms.values():
            if arm.like is not None and (arm.like not in arms or arms[arm.like].like):
                raise ValueError(f"arm {arm.name!r} is like {arm.like!r}, which is no arm with a rate of its own")
            if arm.background and not self.background:
                raise ValueError(f"arm {arm.name!r} wants background, and there are no background tasks")
        wanted = [(n, "repair") for n in (self.repair.arms if self.repair else [])]
        wanted += [(n, f"variant {v.name}") for v in self.variants for n in v.arms]
        for name, who in wanted:
            if name not in arms:
                raise ValueError(f"{who}: no arm {name!r}")
        named = [*(self.tuning_merges or []), *([self.repair.merge] if self.repair else [])]
        for name in [*named, *(m for v in self.variants for m in v.merges or [])]:
            if name not in merges:
                raise ValueError(f"no merge {name!r}")
        if self.tuning_seed in self.seeds:
            raise ValueError("the tuning seed is among the reported seeds")
        return self

    @property
    def study_arms(self) -> list[StudyArm]:
        """The arms, each as a mapping."""
        return [StudyArm(name=a) if isinstance(a, str) else a for a in self.arms]

    @property
    def arm_specs(self) -> list[ArmSpec]:
        """The arms, as a recipe has them."""
        return list(self.study_arms)

    def arm(self, name: str) -> StudyArm:
        """The arm of a name."""
        return next(a for a in self.study_arms if a.name == name)

    def variant(self, name: str) -> Study:
        """The study that a variant is: its settings changed, its arms, no variants or references of its own."""
        found = next(v for v in self.variants if v.name == name)
        raw = self.model_dump(mode="json", exclude={"variants", "repair"})
        for key, value in found.set.items():
            put(raw, key, value, f"variant {name}: {key}")
        for arm in raw["arms"]:
            if isinstance(arm, dict):
                arm["rates"] = None
        changed = Study.model_validate(raw)
        keep = set(found.arms) | {a.like for a in self.study_arms if a.name in found.arms and a.like}
        arms = [a for a in changed.arms if (a if isinstance(a, str) else a.name) in keep]
        merges = [
            m for m in changed.merges if found.merges is None or (m if isinstance(m, str) else m.name) in found.merges
        ]
        return changed.model_copy(update={"arms": arms, "merges": merges, "seeds": found.seeds or self.seeds[:1]})


def published(place: str | None) -> str | None:
    """What a base or a folder is called in public: whose folders they lie in is nobody's business, their names may stay."""
    return f"./{Path(place).name}" if place and place.startswith((".", "/", "~")) else place


def read_study(path: Path, overrides: list[str] | None = None) -> Study:
    """Read, override and check a study file.

    Raises:
        InputError: No such file, or not UTF-8.
        UsageError: Wrong keys, methods or references, named.
    """
    if not path.is_file():
        raise InputError("no such study", where=str(path), hint="plait ls studies")
    raw = load_yaml(text_of(path), str(path))
    if not isinstance(raw, dict):
        raise UsageError("a study is a mapping of keys", where=str(path))
    apply_overrides(raw, overrides or [])
    return parse_study(raw, str(path))


def parse_study(raw: Mapping[str, Any], where: str) -> Study:
    """Check a study that is already parsed."""
    from plait.runs.recipe_file import problems_of

    try:
        study = Study.model_validate(raw)
        whole = [study, *(study.variant(v.name) for v in study.variants)]
    except ValidationError as e:
        raise UsageError(problems_of(e, Study), where=where) from None
    for one in whole:
        check_names(one, where)
    for arm in study.study_arms:
        if arm.known is not None and arm.known >= len(study.tasks):
            raise UsageError(f"known {arm.known}, there are {len(study.tasks) - 1} others", where=f"arm {arm.name}")
    return study
