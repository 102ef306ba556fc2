"""Merging: many LoRA adapters of one base model in, one LoRA adapter out.

Imported when first used: weighted sums at the prompt do without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from plait.border.lazy import lazily

if TYPE_CHECKING:
    from plait.merging.bake.baking import bake as bake
    from plait.merging.changes import Change as Change
    from plait.merging.curve import rank_curve as rank_curve
    from plait.merging.dispatch import answer as answer
    from plait.merging.editing import edit as edit
    from plait.merging.folders import merge_folders as merge_folders
    from plait.merging.inputs import MergeInputs as MergeInputs
    from plait.merging.mergekit import read_mergekit_config as read_mergekit_config
    from plait.merging.methods.adamerging import adamerging as adamerging
    from plait.merging.methods.featcal import featcal as featcal
    from plait.merging.methods.regmean_pp import regmean_pp as regmean_pp
    from plait.merging.outcomes import BakeRecord as BakeRecord
    from plait.merging.per_task import TaskSwitch as TaskSwitch
    from plait.merging.per_task import load_task as load_task
    from plait.merging.per_task import merge_per_task as merge_per_task
    from plait.merging.plan import Plan as Plan
    from plait.merging.planning import merge as merge
    from plait.merging.planning import plan_merge as plan_merge
    from plait.merging.record import Merged as Merged
    from plait.merging.record import MergedInput as MergedInput
    from plait.merging.record import MergeRecord as MergeRecord
    from plait.merging.registry import MergeMethod as MergeMethod
    from plait.merging.registry import merge_method as merge_method
    from plait.merging.registry import merge_methods as merge_methods
    from plait.merging.request import MergeRequest as MergeRequest
    from plait.merging.spec import MergeSpec as MergeSpec

_HOMES = {
    "featcal": "methods.featcal",
    "BakeRecord": "outcomes",
    "Change": "changes",
    "MergeInputs": "inputs",
    "MergeMethod": "registry",
    "MergeRecord": "record",
    "MergeRequest": "request",
    "MergeSpec": "spec",
    "Merged": "record",
    "MergedInput": "record",
    "Plan": "plan",
    "TaskSwitch": "per_task",
    "adamerging": "methods.adamerging",
    "answer": "dispatch",
    "bake": "bake.baking",
    "edit": "editing",
    "load_task": "per_task",
    "merge": "planning",
    "merge_folders": "folders",
    "merge_method": "registry",
    "merge_methods": "registry",
    "merge_per_task": "per_task",
    "plan_merge": "planning",
    "rank_curve": "curve",
    "read_mergekit_config": "mergekit",
    "regmean_pp": "methods.regmean_pp",
}
__all__ = [*_HOMES]  # noqa: PLE0604  (strings, all of them)

__getattr__ = lazily(__name__, _HOMES)
