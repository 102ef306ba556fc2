"""Merging: many LoRA adapters of one base model in, one LoRA adapter out."""

from plait.merging import (  # noqa: F401  importing a method registers it
    breadcrumbs,
    core_space,
    dare,
    della,
    emr,
    fisher,
    iso,
    knots,
    least_squares,
    linear,
    regmean,
    sce,
    spherical,
    ties,
    tsv,
    wudi,
)
from plait.merging.driver import merge
from plait.merging.folders import merge_folders
from plait.merging.plan import Merged
from plait.merging.registry import MergeMethod, merge_method, merge_methods, parse_settings

__all__ = ["MergeMethod", "Merged", "merge", "merge_folders", "merge_method", "merge_methods", "parse_settings"]
