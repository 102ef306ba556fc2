"""Merging: many LoRA adapters of one base model in, one LoRA adapter out."""

from plait.merging.bake import bake
from plait.merging.driver import merge, plan_merge
from plait.merging.folders import merge_folders
from plait.merging.mergekit import read_mergekit_config
from plait.merging.methods.adamerging import adamerging
from plait.merging.methods.regmean_pp import regmean_pp
from plait.merging.per_task import TaskSwitch, load_task, merge_per_task
from plait.merging.plan import Merged, Plan
from plait.merging.rank_curve import rank_curve
from plait.merging.registry import MergeMethod, merge_method, merge_methods

__all__ = [
    "MergeMethod",
    "Merged",
    "Plan",
    "TaskSwitch",
    "adamerging",
    "bake",
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
