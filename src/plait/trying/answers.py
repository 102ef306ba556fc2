"""Asking a base, the adapters of a merge and the merge the same, whatever it is that they answer."""

from __future__ import annotations

from plait.trying.classified import classified
from plait.trying.inputs import Trial
from plait.trying.records import OnProgress, Prompts, Tried, TrySettings
from plait.trying.written import kind_of, written


def tried(trial: Trial, prompts: Prompts, settings: TrySettings, on_progress: OnProgress = lambda _: None) -> Tried:
    """Ask the base, each adapter and the merge the same.

    Args:
        trial: Who is asked.
        prompts: What they are asked.
        settings: How.
        on_progress: Called with what is being done.

    Raises:
        UsageError: No prompts, texts of a task that the merge does not have, or chat where nothing is written.
        InputError: Neither heads nor a text model; a base that does not fit.
    """
    kind = kind_of(trial.merge)
    if kind is None:
        return classified(trial, prompts, settings, on_progress)
    return written(trial, kind, prompts, settings, on_progress)
