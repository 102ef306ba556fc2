"""The base model: how it is named, and loaded for a task."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from plait.disk.hub import is_hub_name
from plait.disk.locks import require_readable
from plait.errors import EnvironmentFault, InputError, PlaitError, UsageError
from plait.model.devices import device_named as device_named
from plait.model.files import base_snapshot, read_base_config, require_vocabulary
from plait.model.four_bits import FOUR_BITS, hold_in_four_bits, is_in_four_bits, say_in_four_bits, unpacked_tensors
from plait.model.parts import backbone_of as backbone_of
from plait.model.parts import draw_head as draw_head
from plait.model.parts import draw_linear as draw_linear
from plait.model.parts import head_modules as head_modules
from plait.model.parts import head_state as head_state
from plait.model.parts import initial_std
from plait.model.parts import load_head as load_head
from plait.model.quiet import quiet_transformers as quiet_transformers
from plait.model.whole import LoadingReport, require_plausible, require_whole

if TYPE_CHECKING:
    from plait.tasks.task import Task

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class BaseModel:
    """Which base model, and how it is to be held.

    Args:
        name: Hub name or local folder, written into adapters as `base_model_name_or_path`.
        revision: Commit, tag or branch on the hub.
        dtype: "float32", "bfloat16" or "float16".
        device: "auto" (the GPU where there is one), "cpu", "cuda", "cuda:1".
        four_bits: How its linear layers went through four bits when it was loaded for training: "nf4" as QLoRA has it,
            "nf4-single" without double quantisation; None for as the files have them.
    """

    name: str
    revision: str | None = None
    dtype: str = "float32"
    device: str = "auto"
    four_bits: str | None = None

    @classmethod
    def of(cls, base: BaseModel | str | Path | None) -> BaseModel | None:
        """Take a base by its name or folder, or as it is; None stays None."""
        return cls(str(base)) if isinstance(base, str | Path) else base

    def __post_init__(self) -> None:
        if self.four_bits is not None and self.four_bits not in FOUR_BITS:
            raise UsageError(f"four bits of kind {self.four_bits!r}", hint=f"{' or '.join(FOUR_BITS)}")

    @property
    def written(self) -> str:
        """The base as it is named on the command line: with its revision, where it has one."""
        return f"{self.name}@{self.revision}" if self.revision else self.name

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch names it."""
        if self.dtype not in _DTYPES:
            raise UsageError(f"dtype {self.dtype!r}, expected one of {', '.join(_DTYPES)}", where="base.dtype")
        return _DTYPES[self.dtype]

    @property
    def torch_device(self) -> torch.device:
        """The device as torch names it."""
        return device_named(self.device)


def emulated(base: BaseModel) -> str | None:
    """Say what slows a CPU without instructions for the base's dtype; None where it has them, or on a GPU.

    Without AVX-512 torch has no kernel for bfloat16 products: the same fidelity of merges of a decoder of 135 M parameters
    took 84 s in bfloat16 and 16 s in float32 on two AVX2 cores.
    """
    level = torch.backends.cpu.get_cpu_capability()
    if base.dtype != "bfloat16" or base.torch_device.type != "cpu" or level not in ("AVX2", "NO AVX"):
        return None
    return f"this CPU has no bfloat16 instructions ({level}): --set base.dtype=float32 is several times faster here"


def load_tokenizer(base: BaseModel) -> Any:
    """Load the base's tokenizer, with a pad token (the end-of-text token where it has none of its own), padding on the right.

    Pads on the left would move the first token, which encoders classify by, and every absolute position.
    """
    from transformers import AutoTokenizer

    folder = base_folder(base)
    tokenizer = _from_pretrained(AutoTokenizer, base, folder)
    require_vocabulary(folder, tokenizer.vocab_files_names, base.name)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise InputError("the tokenizer has neither a pad nor an end-of-text token", where=base.name)
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def load_config(base: BaseModel) -> Any:
    """Load the base's configuration."""
    from transformers import AutoConfig

    folder = base_folder(base)
    read_base_config(folder)
    return _from_pretrained(AutoConfig, base, folder)


def load_task_model(base: BaseModel, task: Task, *, seed: int) -> Any:
    """Load the base with a fresh head for one task, on its device, in evaluation mode.

    Args:
        base: Which base.
        task: Its kind chooses the class, its labels the size of the head.
        seed: The head's linear layers are drawn from it after loading (loading consumes random numbers), normal with
            the config's `initializer_range`, biases zero: the same head on every machine.

    Raises:
        InputError: No such model, one that is not whole (see `plait.model.whole`), or its kind of config has no class for
            the task.
    """
    import transformers

    folder = base_folder(base, weights=True)
    require_plausible(folder, base.name)
    classes = {"causal": "AutoModelForCausalLM", "seq2seq": "AutoModelForSeq2SeqLM"}
    cls = getattr(transformers, classes.get(task.kind, "AutoModelForSequenceClassification"))
    options: dict[str, Any] = {"dtype": base.torch_dtype}
    if task.kind not in classes:
        kind = "regression" if task.kind == "regression" else "single_label_classification"
        options |= {"num_labels": task.num_labels, "problem_type": kind}
    new_head = task.kind not in classes
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": new_head, "use_safetensors": True}
    packed = is_in_four_bits(folder)
    model, info = (_unpacked if packed else _from_pretrained)(cls, base, folder, **options)
    heads = set(head_modules(model)) if new_head else set()
    for name in require_whole(model, LoadingReport.of(info), heads, base.name, poolers=new_head):
        draw_linear(model.get_submodule(name), 0, name, initial_std(model))
    if base.four_bits and not packed:
        hold_in_four_bits(model, backbone_of(model)[0], folder, double=base.four_bits == FOUR_BITS[0])
    if base.four_bits or packed:
        say_in_four_bits(model, backbone_of(model)[0])
    if new_head:
        model.config.pad_token_id = load_tokenizer(base).pad_token_id
        draw_head(model, seed, task.target_mean)
    return model.to(base.torch_device).eval()


def base_folder(base: BaseModel, *, weights: bool = False) -> Path:
    """Find the folder that a base is loaded from: the one it names, or the hub's cache, filled where the hub may be asked.

    Args:
        base: The base.
        weights: Whether its weights are wanted too; else config and tokenizer.

    Raises:
        InputError: No such folder, and nothing of that name on the hub or in its cache.
    """
    folder = Path(base.name).expanduser()
    if folder.is_dir():
        require_readable(folder)
        return folder
    if not is_hub_name(base.name):
        raise InputError(
            "cannot load the base model: no such folder", where=base.name, hint="a local folder or a hub name"
        )
    return base_snapshot(base.name, base.revision, weights=weights).folder


def _from_pretrained(cls: Any, base: BaseModel, folder: Path, **options: Any) -> Any:
    """What a class of transformers makes of a base's folder: the one way in, from files on this machine alone."""
    with _loading(base):
        return cls.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False, **options)


def _unpacked(cls: Any, base: BaseModel, folder: Path, **options: Any) -> Any:
    """The same of a base whose files hold four bits, as the numbers that they stand for."""
    names = {k: options.pop(k) for k in ("num_labels", "problem_type") if k in options}
    config = _from_pretrained(importlib.import_module("transformers").AutoConfig, base, folder, **names)
    del config.quantization_config
    tensors = unpacked_tensors(folder)
    with _loading(base):
        with torch.device("meta"):  # which class it is; nothing is allocated
            kind = type(cls.from_config(config))
        return kind.from_pretrained(None, config=config, state_dict=tensors, **options)


@contextlib.contextmanager
def _loading(base: BaseModel) -> Iterator[None]:
    """Quietly; whatever goes wrong is the base's."""
    try:
        with quiet_transformers():
            yield
    except ImportError as e:  # such as bitsandbytes, for a base in 8 bits
        raise EnvironmentFault(
            f"this base model needs a package: {str(e).strip().splitlines()[0]}", where=base.name
        ) from e
    except (MemoryError, torch.OutOfMemoryError, PlaitError):
        raise
    except Exception as e:  # what configs, weights and tokenizers of strangers bring about is of any kind
        first = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        hint = "is it whole, and of a kind that this version of transformers knows?"
        raise InputError(f"cannot load the base model: {first}", where=base.name, hint=hint) from e
