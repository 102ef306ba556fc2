"""plait: LoRA adapters that merge.

The public API, imported when first used, so that ``import plait`` stays light:

- statistics: `collect_statistics`, `merge_statistics`, `read_statistics`, `write_statistics`
- subspaces: `compute_subspaces`, `subspace_state_dict`, `initialize_lora_weights`
- adapters: `read_adapter`, `write_adapter`, `Adapter`, `LoraFactors`, `load_head`
- training: `train_adapter`, `TrainingSettings`
- merging: `merge`, `merge_folders`, `merge_methods`; without labels, on a `BaseModel`, `merge_auto`, `advise`
- whole runs: `read_recipe`, `run`
"""

from __future__ import annotations

from plait.border.lazy import lazily
from plait.version import __version__ as __version__

TYPE_CHECKING = False  # typing itself takes longer to import than all of this
if TYPE_CHECKING:
    from plait.adapters.lora import Adapter as Adapter
    from plait.adapters.lora import LoraFactors as LoraFactors
    from plait.adapters.peft_format import read_adapter as read_adapter
    from plait.adapters.peft_format import write_adapter as write_adapter
    from plait.advice.advise import AdviceSettings as AdviceSettings
    from plait.advice.advise import advise as advise
    from plait.choosing.auto import merge_auto as merge_auto
    from plait.choosing.auto_settings import AutoSettings as AutoSettings
    from plait.errors import PlaitError as PlaitError
    from plait.merging import merge as merge
    from plait.merging import merge_folders as merge_folders
    from plait.merging import merge_methods as merge_methods
    from plait.model.base import BaseModel as BaseModel
    from plait.model.heads import load_head as load_head
    from plait.recipes.recipe_file import read_recipe as read_recipe
    from plait.report.line import run as run
    from plait.statistics import Statistics as Statistics
    from plait.statistics import collect_statistics as collect_statistics
    from plait.statistics import merge_statistics as merge_statistics
    from plait.statistics import read_statistics as read_statistics
    from plait.statistics import write_statistics as write_statistics
    from plait.subspaces import compute_subspaces as compute_subspaces
    from plait.subspaces.live import initialize_lora_weights as initialize_lora_weights
    from plait.subspaces.live import subspace_state_dict as subspace_state_dict
    from plait.training import TrainingSettings as TrainingSettings
    from plait.training import train_adapter as train_adapter

_HOMES = {
    "Adapter": "adapters.lora",
    "AdviceSettings": "advice.advise",
    "AutoSettings": "choosing.auto",
    "BaseModel": "model.base",
    "LoraFactors": "adapters.lora",
    "PlaitError": "errors",
    "Statistics": "statistics",
    "TrainingSettings": "training",
    "advise": "advice.advise",
    "collect_statistics": "statistics",
    "compute_subspaces": "subspaces",
    "initialize_lora_weights": "subspaces.live",
    "load_head": "model.heads",
    "merge": "merging",
    "merge_auto": "choosing.auto",
    "merge_folders": "merging",
    "merge_methods": "merging",
    "merge_statistics": "statistics",
    "read_adapter": "adapters.peft_format",
    "read_recipe": "recipes.recipe_file",
    "read_statistics": "statistics",
    "run": "report.line",
    "subspace_state_dict": "subspaces.live",
    "train_adapter": "training",
    "write_adapter": "adapters.peft_format",
    "write_statistics": "statistics",
}
__all__ = [*_HOMES, "__version__"]  # noqa: PLE0604  (strings, all of them)

__getattr__ = lazily(__name__, _HOMES)
