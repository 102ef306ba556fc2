"""Merging: many LoRA adapters of one base model in, one LoRA adapter out."""

from plait.merging.bake import BakeRecord, bake
from plait.merging.changes import Change
from plait.merging.editing import edit
from plait.merging.folders import merge_folders
from plait.merging.inputs import MergeInputs
from plait.merging.mergekit import read_mergekit_config
from plait.merging.methods.adamerging import adamerging
from plait.merging.methods.featcal import featcal
from plait.merging.methods.regmean_pp import regmean_pp
from plait.merging.per_task import TaskSwitch, load_task, merge_per_task
from plait.merging.plan import Plan
from plait.merging.planning import merge, plan_merge
from plait.merging.rank_curve import rank_curve
from plait.merging.record import Merged, MergedInput, MergeRecord
from plait.merging.registry import MergeMethod, merge_method, merge_methods
from plait.merging.request import MergeRequest, answer
from plait.merging.spec import MergeSpec

__all__ = [
    "BakeRecord",
    "Change",
    "MergeInputs",
    "MergeMethod",
    "MergeRecord",
    "MergeRequest",
    "MergeSpec",
    "Merged",
    "MergedInput",
    "Plan",
    "TaskSwitch",
    "adamerging",
    "answer",
    "bake",
    "edit",
    "featcal",
    "load_task",
    "merge",
    "merge_folders",
    "merge_method",
    "merge_methods",
    "merge_per_task",
    "plan_merge",
    "rank_curve",
    "read_mergekit_config",
    "regmean_pp",
]
