"""Merging: many LoRA adapters of one base model in, one LoRA adapter out."""

from plait.merging import linear, ties  # noqa: F401  importing a method registers it
from plait.merging.driver import Merged, merge
from plait.merging.folders import merge_folders
from plait.merging.registry import MergeMethod, merge_method, merge_methods, parse_settings

__all__ = ["MergeMethod", "Merged", "merge", "merge_folders", "merge_method", "merge_methods", "parse_settings"]
