"""Tasks: rows, labels, tokens and metrics."""

from plait.tasks.encoding import batches, collate, encode, length_order, require_positions, to_device
from plait.tasks.glue import GLUE_TASKS, glue_task
from plait.tasks.metrics import METRICS, primary, score, scores
from plait.tasks.rows import load_examples, load_task
from plait.tasks.task import KINDS, Examples, Source, Task

__all__ = [
    "GLUE_TASKS",
    "KINDS",
    "METRICS",
    "Examples",
    "Source",
    "Task",
    "batches",
    "collate",
    "encode",
    "glue_task",
    "length_order",
    "load_examples",
    "load_task",
    "primary",
    "require_positions",
    "score",
    "scores",
    "to_device",
]
