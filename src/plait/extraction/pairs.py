"""Two checkpoints side by side: which matrices of one model differ, and what a LoRA of them is called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from plait.adapters.experts import member_name
from plait.adapters.lora import EMBEDDING, EXPERT, LINEAR
from plait.errors import InputError
from plait.model.layout import StoredParameter, layout_in, model_without_weights
from plait.model.stored import StoredTensor, base_tensors, require_unquantised

_TASKS = {
    "ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS", "ForQuestionAnswering": "QUESTION_ANS",
    "ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}  # fmt: skip
_HEADED = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")


@dataclass(frozen=True, slots=True)
class Matrix:
    """A matrix of the model, or one expert's of a fused weight, as LoRA sees it.

    Args:
        module: What its LoRA is called.
        parameter: Of the model.
        kind: "linear", "embedding" or "expert".
        expert: Number of the expert, or None.
        transposed: Whether the model holds it (in, out): Conv1D, embeddings, some experts.
    """

    module: str
    parameter: str
    kind: str
    expert: int | None = None
    transposed: bool = False


class Pair:
    """A fine-tuned model's folder and its base's.

    Args:
        finetuned, base: Local folders in safetensors, not quantised.

    Raises:
        InputError: A model that transformers does not know, tensors of other shapes, or such as one of the two lacks.
    """

    def __init__(self, finetuned: Path, base: Path) -> None:
        for folder in (finetuned, base):
            require_unquantised(folder)
        self.folders = (finetuned, base)
        self.model = model_without_weights(finetuned)
        if self.model is None:
            raise InputError(
                "names no model that transformers knows, so what its tensors are cannot be told",
                where=str(finetuned / "config.json"),
            )
        self.tensors = tuple(base_tensors(f) for f in self.folders)
        self.layouts = tuple(layout_in(self.model, list(t)) for t in self.tensors)
        name = type(self.model).__name__
        self.task_type = next((t for end, t in _TASKS.items() if name.endswith(end)), "FEATURE_EXTRACTION")
        self.prefix = str(self.model.base_model_prefix) if self.task_type in _HEADED else ""
        self.parameters = list(dict(self.model.named_parameters()))  # a tied one once
        self.heads = [p for p in self.parameters if self.prefix and not p.startswith(f"{self.prefix}.")]
        self.is_tied = self._tied()
        self._require_same()

    def _tied(self) -> bool:
        """Whether the output layer is the input embedding."""
        output = self.model.get_output_embeddings() if hasattr(self.model, "get_output_embeddings") else None
        tied = bool(getattr(self.model.config.get_text_config(), "tie_word_embeddings", False))
        return output is not None and tied

    def _require_same(self) -> None:
        tuned, base = self.layouts
        own = str(self.folders[0])
        output = f"{self.name_of(self.model.get_output_embeddings())}.weight" if self.is_tied else None
        for i in (0, 1) if output else ():
            self._require_tied(i, str(output))
        wanted = [p for p in self.parameters if p != output]
        self.parameters = wanted
        if gone := [p for p in wanted if p not in tuned]:
            raise InputError(f"holds no {gone[0]!r}" + _more(gone), where=own, hint="save the model whole")
        if new := [p for p in wanted if p not in base and p not in self.heads]:
            raise InputError(
                f"the base has no {new[0]!r}" + _more(new),
                where=str(self.folders[1]),
                hint="is it the base of this model?",
            )
        for p in wanted:
            for layout in (tuned, base):
                if p in layout and layout[p].unknown:
                    raise InputError(
                        f"{p!r} is kept in a way that is not known here ({layout[p].unknown})",
                        hint="save both models with save_original_format=False",
                    )
            if p in base and p not in self.heads:
                shapes = [self.shape(i, p) for i in (0, 1)]
                if shapes[0] != shapes[1]:
                    raise InputError(
                        f"{p!r} is {shapes[0]} and the base's {shapes[1]}",
                        where=own,
                        hint="no LoRA resizes a weight; a resized vocabulary has to be cut back, or the base resized alike",
                    )

    def _require_tied(self, which: int, output: str) -> None:
        """Refuse a checkpoint whose output layer has numbers of its own: transformers keeps both, whatever the config says."""
        layout, tensors = self.layouts[which], self.tensors[which]
        embedding = f"{self.name_of(self.model.get_input_embeddings())}.weight"
        if output not in layout or embedding not in layout:
            return
        if not torch.equal(*(read_matrix(layout[p], tensors, None) for p in (output, embedding))):
            raise InputError(
                f"{output!r} is other than {embedding!r}, and the config says that they are one",
                where=str(self.folders[which]),
                hint='"tie_word_embeddings": false in the config.json of both, and the output layer in both',
            )

    def name_of(self, module: Any) -> str:
        """A module's name in the model."""
        return next(str(n) for n, m in self.model.named_modules() if m is module)

    def shape(self, which: int, parameter: str) -> tuple[int, ...]:
        """A parameter's shape as a checkpoint's tensors say it: 0 the fine-tuned one's, 1 the base's."""
        stored = self.layouts[which][parameter]
        first = [self.tensors[which][part[0]].shape for part in stored.parts]
        if len(stored.parts) == 1 and not stored.by_expert:
            return first[0]
        rows = sum(s[0 if stored.by_expert or len(s) == 2 else 1] for s in first)
        count = (len(stored.parts[0]),) if stored.by_expert else first[0][:-2]
        return (*count, rows, first[0][-1])

    def matrices(self) -> list[Matrix]:
        """Every matrix that LoRA can adapt, heads left out, in the model's order."""
        modules = dict(self.model.named_modules())
        cut = len(self.prefix) + 1 if self.prefix else 0
        found: list[Matrix] = []
        for p in self.parameters:
            owner, _, last = p.rpartition(".")
            module, shape = modules[owner], self.layouts[0][p]
            if p in self.heads:
                continue
            if isinstance(module, nn.Embedding):
                found.append(Matrix(owner[cut:], p, EMBEDDING, transposed=True))
            elif last == "weight" and len(shape.shape) == 2:
                found.append(Matrix(owner[cut:], p, LINEAR, transposed=hasattr(module, "nf")))
            elif len(shape.shape) == 3 and not isinstance(module, nn.modules.conv._ConvNd):
                found += [
                    Matrix(member_name(p[cut:], e), p, EXPERT, e, shape.is_transposed) for e in range(shape.shape[0])
                ]
        return found

    def is_layer(self, matrix: Matrix) -> bool:
        """Whether PEFT adapts it as a layer, not as a parameter."""
        module = self.model.get_submodule(matrix.parameter.rpartition(".")[0])
        return isinstance(module, nn.Linear | nn.Embedding) or hasattr(module, "nf")

    def difference(self, matrix: Matrix) -> Tensor:
        """Fine-tuned minus base in float32, (out, in)."""
        tuned, base = (read_matrix(self.layouts[i][matrix.parameter], self.tensors[i], matrix.expert) for i in (0, 1))
        D = tuned.float() - base.float()
        if not bool(torch.isfinite(D).all()):
            raise InputError("holds NaN or infinity", where=f"{self.folders[0]}: {matrix.parameter}")
        return D.T if matrix.transposed else D

    def base_matrix(self, matrix: Matrix) -> Tensor:
        """The base's own, in float32, as the model has it."""
        return read_matrix(self.layouts[1][matrix.parameter], self.tensors[1], matrix.expert).float()

    def whole(self, which: int, parameter: str) -> Tensor:
        """A parameter that is no matrix, or a head's."""
        stored = self.layouts[which][parameter]
        tensor = self.tensors[which][stored.parts[0][0]]
        return tensor.read(0, tensor.shape[0]) if tensor.shape else tensor.read(0, 1).reshape(())


def read_matrix(stored: StoredParameter, tensors: Mapping[str, StoredTensor], expert: int | None) -> Tensor:
    """A 2-D parameter, or one expert of a fused one, as the model has it: parts put below each other."""
    if expert is None:
        parts = [tensors[part[0]] for part in stored.parts]
        return torch.cat([p.read(0, p.shape[0]) for p in parts])
    if stored.by_expert:
        return torch.cat([tensors[part[expert]].read(0, tensors[part[expert]].shape[0]) for part in stored.parts])
    found = torch.cat([tensors[part[0]].read(expert, expert + 1)[0] for part in stored.parts])
    return found if tuple(found.shape) == stored.shape[1:] else found.T


def _more(names: Sequence[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
