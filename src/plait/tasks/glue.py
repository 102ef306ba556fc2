"""The eight GLUE tasks: columns, labels and metrics as the Hugging Face `glue` data set and the GLUE paper have them.

Source: Wang et al., GLUE, arXiv 1804.07461. WNLI is left out, as in OSRM.
"""

from __future__ import annotations

from pathlib import Path

from plait.tasks.task import Source, Task

_NLI = ("entailment", "not_entailment")
_TABLE: dict[str, tuple[tuple[str, ...], tuple[str, ...] | None, tuple[str, ...]]] = {
    "cola": (("sentence",), ("unacceptable", "acceptable"), ("matthews",)),
    "sst2": (("sentence",), ("negative", "positive"), ("accuracy",)),
    "mrpc": (("sentence1", "sentence2"), ("not_equivalent", "equivalent"), ("accuracy", "f1")),
    "stsb": (("sentence1", "sentence2"), None, ("pearson", "spearman")),
    "qqp": (("question1", "question2"), ("not_duplicate", "duplicate"), ("accuracy", "f1")),
    "mnli": (("premise", "hypothesis"), ("entailment", "neutral", "contradiction"), ("accuracy",)),
    "qnli": (("question", "sentence"), _NLI, ("accuracy",)),
    "rte": (("sentence1", "sentence2"), _NLI, ("accuracy",)),
}
GLUE_TASKS = tuple(_TABLE)
_HUB = "hub:nyu-mll/glue"


def glue_task(name: str, root: Path | None = None) -> Task:
    """Describe one GLUE task.

    Args:
        name: One of `GLUE_TASKS`.
        root: A folder with ``<task>/train.parquet`` and ``<task>/validation.parquet`` (MNLI: ``validation_matched``);
            None reads the hub's data set.

    Returns:
        The task; its score is the mean of its GLUE metrics (accuracy and F1 for MRPC and QQP, Pearson and Spearman for
        STS-B, Matthews for CoLA).
    """
    columns, labels, metrics = _TABLE[name]
    split = "validation_matched" if name == "mnli" else "validation"
    if root is None:
        source = Source(f"{_HUB}:{name}:train", f"{_HUB}:{name}:{split}")
    else:
        source = Source(str(root / name / "train.parquet"), str(root / name / f"{split}.parquet"))
    return Task(name, "regression" if labels is None else "classification", source, columns, "label", labels, metrics)
