"""The diagonal Fisher information of dense weights: collecting it, and its file. Fisher merging's own statistic."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor, nn

from plait.adapters.sealed import read_sealed, sealed_texts, write_sealed
from plait.adapters.tensors import read_metadata
from plait.border.checked import Record, parsed_json
from plait.border.counts import plural
from plait.disk.manifest import require_wanted
from plait.disk.store import canonical_json, require_regular, staged_file
from plait.errors import InputError, RunError, UsageError
from plait.model.hooks import differentiable_outputs, modules_named
from plait.statistics.records import LARGEST_RECORD

KIND, SCHEMA = "plait.fisher", 1
_HINT = "expected a file written by plait stats fisher"


@dataclass(frozen=True, slots=True)
class Diagonal:
    """One module's diagonal, read in row blocks.

    Args:
        shape: (out, in).
        rows: (start, stop) -> (stop - start, in) float32, not negative.
    """

    shape: tuple[int, int]
    rows: Callable[[int, int], Float[Tensor, "n in"]]


@dataclass(frozen=True, slots=True)
class FisherDiagonal:
    """A task's diagonal Fisher information, by module relative to the backbone.

    Args:
        modules: Name -> its diagonal.
        examples: How many examples it is the mean over.
        provenance: What it was computed on.
        sha256: Hash of the file it was read from, "" where there is none.
    """

    modules: Mapping[str, Diagonal]
    examples: int
    provenance: Mapping[str, Any] = field(default_factory=dict)
    sha256: str = ""

    @classmethod
    def held(cls, tensors: Mapping[str, Tensor], examples: int, **provenance: Any) -> FisherDiagonal:
        """From tensors (out, in) in memory."""
        return cls({name: _held(t) for name, t in tensors.items()}, examples, provenance)

    def diagonal_for(self, module: str) -> Diagonal | None:
        """Find the diagonal of a module, None where unknown."""
        return self.modules.get(module)


def _held(tensor: Float[Tensor, "out in"]) -> Diagonal:
    return Diagonal((tensor.shape[0], tensor.shape[1]), lambda start, stop: tensor[start:stop])


def write_fisher(
    path: Path, fisher: FisherDiagonal, *, identity: Mapping[str, Any] | None = None, overwrite: bool = False
) -> None:
    """Write a ``*.fisher.safetensors``: one (out, in) float32 tensor per module, the record in the metadata.

    Args:
        path: The file.
        fisher: What to write.
        identity: What the file was made from (`plait.disk.store.identity`); `is_wanted_fisher` compares it.
        overwrite: Replace a Fisher file that is there.
    """
    tensors = {name: d.rows(0, d.shape[0]).float() for name, d in fisher.modules.items()}
    record = {"schema": SCHEMA, "examples": fisher.examples, "provenance": dict(fisher.provenance)}
    metadata = {"kind": KIND, "fisher": json.dumps(record, allow_nan=False)}
    if identity is not None:
        metadata["identity"] = canonical_json(dict(identity))
    with staged_file(path, overwrite=overwrite, ours=is_fisher) as stage:
        write_sealed(stage, tensors, metadata)


def is_fisher(path: Path) -> bool:
    """Whether a safetensors file's metadata says that it holds a Fisher diagonal.

    Raises:
        InputError: No such file, or not a whole safetensors file.
    """
    return read_metadata(path).get("kind") == KIND


def is_wanted_fisher(path: Path, wanted: Mapping[str, Any]) -> bool:
    """Whether a Fisher file is there, every byte as it was written, and was made from the same inputs and settings.

    Raises:
        UsageError: Something else stands there, or a Fisher file that was made otherwise.
        Damaged: It was changed since.
    """
    if not (path.exists() or path.is_symlink()):
        return False
    require_regular(path)
    texts = sealed_texts(path)
    if texts.get("kind") != KIND:
        raise UsageError("exists and holds no Fisher diagonal", where=str(path), hint="choose another --out")
    text = texts.get("identity")  # absent from files of earlier versions
    found = None if text is None else parsed_json(text, str(path), "its identity", LARGEST_RECORD, hint=_HINT)
    require_wanted(path, found if isinstance(found, dict) else None, wanted)
    return True


def read_fisher(path: Path) -> FisherDiagonal:
    """Open a Fisher file; rows are read when they are asked for.

    Raises:
        InputError: Another kind of file, damaged, of another schema, or holding NaN or negative entries.
        Damaged: Not the file that was written.
    """
    tensors, metadata, digest = read_sealed(path)
    if metadata.get("kind") != KIND:
        raise InputError("holds no Fisher diagonal", where=str(path), hint=_HINT)
    raw = parsed_json(metadata.get("fisher", ""), str(path), "its record", LARGEST_RECORD, hint=_HINT)
    record = Record.of(raw, str(path), inside="its record", hint=_HINT)
    if (schema := record.integer("schema")) != SCHEMA:
        raise InputError(f"Fisher schema {schema}, this plait reads {SCHEMA}", where=str(path), hint=_HINT)
    examples = record.integer("examples", 1)
    modules = {}
    for name, tensor in tensors.items():
        whole = tensor.ndim == 2 and tensor.is_floating_point() and tensor.itemsize > 1
        if not whole or not bool(torch.isfinite(tensor).all()) or bool((tensor < 0).any()):
            raise InputError(f"{name} is not a finite, nonnegative matrix", where=str(path), hint=_HINT)
        modules[name] = _on_disk(path, name, (tensor.shape[0], tensor.shape[1]))
    provenance = record.record("provenance", optional=True)
    return FisherDiagonal(modules, examples, dict(provenance.values), digest)


def _on_disk(path: Path, name: str, shape: tuple[int, int]) -> Diagonal:
    def rows(start: int, stop: int) -> Tensor:
        with safe_open(path, framework="pt") as opened:
            part: Tensor = opened.get_slice(name)[start:stop]
        return part

    return Diagonal(shape, rows)


def collect_fisher(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    modules: Sequence[str],
    *,
    labels: Literal["sampled", "given"] = "sampled",
    generator: torch.Generator | None = None,
) -> FisherDiagonal:
    """Take the mean over examples of the squared gradient of log p(label | example), per entry of each module's weight.

    For a linear layer the gradient of one example is sum over tokens of g h^T, g the gradient at its output and h its
    input; so nothing but hooks is needed, and a layer that PEFT wraps gives the gradient at W0 + D.

    Args:
        model: With the task's adapter active and its head; called as ``model(**batch).logits``. Left in its mode, no
            gradients kept. Logits (n, classes), or (n, tokens, vocabulary) of a language model.
        batches: ``input_ids``, ``attention_mask``, and ``labels`` where they are used. Examples are told apart by the
            first dimension, so batch norm would be wrong.
        modules: Names relative to the backbone, as an adapter's.
        labels: "sampled" draws them from the model, which makes this the Fisher information; "given" uses the data's
            (the empirical Fisher, which is not the Fisher far from convergence).
        generator: Draws labels, on the CPU.

    Raises:
        UsageError: A module that is not in the model, labels that are not in the batches, or logits of one number a row, which are no
            distribution over classes.
        RunError: A gradient that is not finite, or a module that reads something else than one row of inputs for each example.

    Cost:
        One forward and one backward pass, and out * in multiplications per token and module.
    """
    layers = modules_named(model, modules)
    sums: dict[str, Tensor] = {}
    examples = 0
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            seen: dict[str, tuple[Tensor, Tensor]] = {}
            with differentiable_outputs(layers, functools.partial(_once, seen)), torch.enable_grad():
                logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
                log_likelihood = _log_likelihood(logits, batch, labels, generator)
                if uncalled := layers.keys() - seen.keys():
                    raise RunError("never called", where=min(uncalled), hint="an adapter without this module")
                outputs = [seen[name][1] for name in layers]
                gradients = torch.autograd.grad(log_likelihood.sum(), outputs, materialize_grads=True)
            examples += len(log_likelihood)
            for name, gradient in zip(layers, gradients, strict=True):
                g, h = (_by_example(t, batch, len(log_likelihood), name) for t in (gradient, seen[name][0]))
                squares = _squared_per_example(g, h)
                if not bool(torch.isfinite(squares).all()):
                    raise RunError("a gradient is not finite", where=name, hint="float32 instead of float16?")
                sums[name] = sums[name] + squares if name in sums else squares
    finally:
        model.train(was_training)
    if examples == 0:
        raise UsageError("no examples to collect a Fisher diagonal from")
    return FisherDiagonal.held({n: s / examples for n, s in sums.items()}, examples, labels=labels)


def _once(seen: dict[str, tuple[Tensor, Tensor]], name: str, h: Tensor, output: Tensor) -> None:
    """Keep what a module reads and puts out, in the one call that it may have."""
    if name in seen:
        raise RunError("called twice in one forward pass", where=name)
    seen[name] = (h.detach(), output)


def _log_likelihood(
    logits: Tensor, batch: Mapping[str, Tensor], labels: str, generator: torch.Generator | None
) -> Float[Tensor, " n"]:
    """Per example, log p of its labels; of a language model, summed over the tokens that are predicted."""
    if labels == "given" and "labels" not in batch:
        raise UsageError("the batches hold no labels", hint='labels="sampled" needs none')
    if logits.shape[-1] == 1:  # its log-softmax is 0 whatever the weights are
        raise UsageError("logits of one number: Fisher information is of classes or of a decoder's tokens")
    scores = logits.float().log_softmax(-1)
    if scores.ndim == 2:
        chosen = batch["labels"] if labels == "given" else draw(scores, generator)
        return scores.gather(1, chosen[:, None])[:, 0]
    scores = scores[:, :-1]
    real = batch["attention_mask"][:, 1:].bool() & batch["attention_mask"][:, :-1].bool()
    if labels == "given":
        chosen = batch["labels"][:, 1:]
        real = real & (chosen >= 0)
    else:
        chosen = draw(scores.flatten(0, 1), generator).view(scores.shape[:2])
    return (scores.gather(2, chosen.clamp(min=0)[..., None])[..., 0] * real).sum(1)


def draw(scores: Float[Tensor, "n c"], generator: torch.Generator | None) -> Tensor:
    """Draw one class a row from log-probabilities; (n,), on their device.

    Raises:
        RunError: What the model predicts is not finite.
    """
    chances = scores.detach().exp().cpu()
    if not bool(torch.isfinite(chances).all()):
        raise RunError("what the model predicts is not finite", hint="float32 instead of float16?")
    return torch.multinomial(chances, 1, generator=generator)[:, 0].to(scores.device)


def _by_example(rows: Tensor, batch: Mapping[str, Tensor], examples: int, name: str) -> Tensor:
    """Give what a layer reads or returns with the examples first, also where it has all tokens beneath each other (as OPT's)."""
    mask = batch.get("attention_mask")
    if mask is not None and rows.ndim == 2 and len(rows) == mask.numel():
        return rows.view(*mask.shape, -1)
    if len(rows) != examples:
        what = f"{tuple(rows.shape)} for {plural(examples, 'example')}, which it does not tell apart"
        raise RunError(f"reads or returns {what}", where=name, hint="an adapter without this module")
    return rows


def _squared_per_example(gradient: Tensor, inputs: Tensor) -> Float[Tensor, "out in"]:
    total = gradient.new_zeros(gradient.shape[-1], inputs.shape[-1], dtype=torch.float32)
    for g, h in zip(gradient.float(), inputs.float(), strict=True):
        total += (g.reshape(-1, g.shape[-1]).T @ h.reshape(-1, h.shape[-1])).square_()
    return total
