"""Tasks: rows, labels, tokens and metrics.

Imported when first used: a recipe is checked without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from plait.border.lazy import lazily

if TYPE_CHECKING:
    from plait.tasks.encoding import batches as batches
    from plait.tasks.encoding import collate as collate
    from plait.tasks.encoding import encode as encode
    from plait.tasks.encoding import length_order as length_order
    from plait.tasks.encoding import require_positions as require_positions
    from plait.tasks.encoding import to_device as to_device
    from plait.tasks.glue import GLUE_TASKS as GLUE_TASKS
    from plait.tasks.glue import glue_task as glue_task
    from plait.tasks.metrics import METRICS as METRICS
    from plait.tasks.metrics import primary as primary
    from plait.tasks.metrics import score as score
    from plait.tasks.metrics import scores as scores
    from plait.tasks.rows import load_examples as load_examples
    from plait.tasks.rows import load_task as load_task
    from plait.tasks.task import KINDS as KINDS
    from plait.tasks.task import Examples as Examples
    from plait.tasks.task import Source as Source
    from plait.tasks.task import Task as Task

_HOMES = {
    "Examples": "task",
    "GLUE_TASKS": "glue",
    "KINDS": "task",
    "METRICS": "metrics",
    "Source": "task",
    "Task": "task",
    "batches": "encoding",
    "collate": "encoding",
    "encode": "encoding",
    "glue_task": "glue",
    "length_order": "encoding",
    "load_examples": "rows",
    "load_task": "rows",
    "primary": "metrics",
    "require_positions": "encoding",
    "score": "metrics",
    "scores": "metrics",
    "to_device": "encoding",
}
__all__ = [*_HOMES]  # noqa: PLE0604  (strings, all of them)

__getattr__ = lazily(__name__, _HOMES)
