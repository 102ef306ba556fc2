"""Adapters trained in one batch: one pass of the base for all of them, everything that is trained kept apart.

The rows of all members go through the frozen base together, each block of rows with its member's factors beside the base's
weights (`plait.model.stacked`), and end in the member's own head. All trained numbers lie in one matrix, a row a member, so
that clipping, AdamW and constraints are a few operations on whole rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from plait.adapters.lora import Adapter, LoraFactors
from plait.model.attention import fused_attention
from plait.model.decoders import decoder_inputs
from plait.model.ends import Ends
from plait.model.rowbank import Pass, RowBank, StepPlan, causal_targets
from plait.model.stacked import StackedFactors, by_member, padded_factors, stacked_updates
from plait.training.constraints import Cell, Constraint, Enforcer
from plait.training.flat import FlatParameters, Slot, lay_out, tensors_of
from plait.training.losses import member_sums
from plait.training.settings import TrainingSettings, scale_order

HEAD = "head."


@dataclass(frozen=True, slots=True)
class Prepared:
    """One member as it is trained: its adapter with its head, and the view of the model that it ends in.

    Args:
        adapter: From `peft_model.for_task`.
        view: Which of the shared views its task uses; members of one view stand together.
        kind: The task's.
        settings: Its own.
        total: Its steps, the same for all of a batch.
        constraint: What is done to its factors around each step.
        seed: Of its training; drawn scales follow it.
    """

    adapter: Adapter
    view: int
    kind: str
    settings: TrainingSettings
    total: int
    constraint: Constraint = field(default_factory=Constraint)
    seed: int = 0

    @property
    def head(self) -> Mapping[str, Tensor]:
        """Its head's tensors; empty for text."""
        return self.adapter.heads.get(self.adapter.name, {})


class BatchedAdapters:
    """Members that are stepped together.

    Args:
        prepared: Sorted by view; equal kinds of output, equal steps, equal batch size.
        backbone: The shared base; in evaluation mode, no parameter of it trained.
        ends: View number -> the two ends of its model; empty where the whole model is run (`whole`).
        whole: The model, where it has no backbone apart from it (T5 for text).
        shapes: From `common_shapes`.
        autocast: Dtype of the forward pass, where it is not the base's own.
    """

    def __init__(
        self,
        prepared: Sequence[Prepared],
        backbone: nn.Module,
        ends: Mapping[int, Ends],
        whole: Any,
        shapes: Mapping[str, tuple[int, int, int]],
        autocast: torch.dtype | None,
    ) -> None:
        self.prepared, self.backbone, self.ends, self.whole = prepared, backbone, ends, whole
        self.shapes, self.autocast = shapes, autocast
        like = next(p for p in backbone.parameters() if p.is_floating_point())
        self.device = like.device
        self.groups = _groups(prepared)
        # Columns of the matrix of trained numbers: factors first, then heads. Members with heads of one shape share
        # columns; different shapes start at the same column, so no row is longer than its own member needs.
        factor_slots, self.head_start = lay_out(self._factor_shapes())
        ends_at = [self.head_start]
        self.slots: list[Slot] = factor_slots
        for first, last in self.groups:
            named = [(HEAD + k, first, last, tuple(v.shape)) for k, v in sorted(prepared[first].head.items())]
            slots, end = lay_out(named, self.head_start)
            self.slots, ends_at = [*self.slots, *slots], [*ends_at, end]
        # The numbers are filled in on the CPU and go to the device once; hooks, constraints and rates then refer to them.
        values = torch.zeros(len(prepared), max(ends_at), dtype=torch.float32)
        self._fill(values)
        self.parameters = FlatParameters(self.slots, values.to(self.device), autocast or like.dtype)
        self._bind()
        self.enforcer.after_step()  # a span holds from the start
        self.parameters.refresh()

    def _factor_shapes(self) -> list[tuple[str, int, int, tuple[int, ...]]]:
        n = len(self.prepared)
        both = [((f"{m}.A", (r, i)), (f"{m}.B", (o, r))) for m, (r, o, i) in self.shapes.items()]
        return [(name, 0, n, shape) for pair in both for name, shape in pair]

    def _fill(self, values: Tensor) -> None:
        for slot in self.slots:
            view = slot.view(values)
            for i, t in enumerate(self.prepared[slot.first : slot.last]):
                module, _, part = slot.name.rpartition(".")
                if slot.name.startswith(HEAD):
                    view[i] = t.head[slot.name.removeprefix(HEAD)]
                else:
                    A, B, _ = padded_factors(t.adapter, module, self.shapes[module])
                    view[i] = A if part == "A" else B

    def _bind(self) -> None:
        """Make everything that refers to the trained numbers: hooks' factors, constraints, rates, masks."""
        leaves, n = self.parameters.leaves, len(self.prepared)
        # What the hooks multiply by: the factors' leaves, in the dtype of the pass.
        settings = [t.settings for t in self.prepared]
        draws = any(s.scale_from < 1 for s in settings)
        self.updates = {}
        for m in self.shapes:
            scalings = [t.adapter.modules[m].scaling if m in t.adapter.modules else 1.0 for t in self.prepared]
            one = len(set(scalings)) == 1 and not draws
            scaling = scalings[0] if one else self._column(scalings)[:, :, None]
            self.updates[m] = StackedFactors(leaves[f"{m}.A", 0], leaves[f"{m}.B", 0], scaling)
        # Drawn scales: (steps, members); and every module's own scalings beside the ones in use, which are their multiples.
        drawn = [scale_order(t.settings, t.total, t.seed) for t in self.prepared] if draws else []
        self.drawn = torch.from_numpy(np.stack(drawn, 1)).float().to(self.device) if draws else None
        used = [u.scaling for u in self.updates.values() if isinstance(u.scaling, Tensor)]
        self.scalings = [(own.clone(), own) for own in used]
        # Members that train one adapter together, by the name that ties them.
        names = [s.tied for s in settings]
        self.tied = [[i for i, n in enumerate(names) if n == name] for name in dict.fromkeys(names) if name]
        self.clip = self._column([s.max_grad_norm or float("inf") for s in settings])
        # Learning rates of every step, factors and heads apart: (steps, 2, members, 1).
        total = self.prepared[0].total
        factors = [[s.factor(step, total) for s in settings] for step in range(total)]
        heads = [s.lr if s.head_lr is None else s.head_lr for s in settings]
        rates = np.stack([np.array([s.lr for s in settings]) * factors, np.array(heads) * factors], 1)
        self.rates = torch.from_numpy(rates).float()[..., None].to(self.device)
        # Decay of matrices alone, and no gradient for frozen rows of A.
        self.decay = self._mask(lambda slot, t: t.settings.weight_decay if len(slot.shape) >= 2 else 0.0, 0.0)
        self.trained = self._mask(lambda slot, t: float(not (t.constraint.kind == "frozen" and _is_a(slot))), 1.0)
        self.enforcer = Enforcer([c for i in range(n) for c in self._cells(i)])

    def _column(self, numbers: Sequence[float]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.float32, device=self.device)[:, None]

    def _mask(self, rule: Any, neutral: float) -> Tensor | None:
        """(members, columns) of a number per slot and trainee, or None where every number is the neutral one."""
        mask = torch.full_like(self.parameters.values, neutral)
        for slot in self.slots:
            for i in range(slot.first, slot.last):
                mask[i, slot.start : slot.start + slot.size] = rule(slot, self.prepared[i])
        return None if bool((mask == neutral).all()) else mask

    def _cells(self, member: int) -> list[Cell]:
        """Place one member's constraint in the values and gradients."""
        t, flat = self.prepared[member], self.parameters
        slots = {s.name: s for s in self.slots if not s.name.startswith(HEAD)}
        cells = []
        for module, rule in t.constraint.rules.items():
            a, b = slots[f"{module}.A"], slots[f"{module}.B"]
            A, B, A_gradient, B_gradient = (s.view(m)[member] for m in (flat.values, flat.gradients) for s in (a, b))
            cells.append(Cell(A, B, A_gradient, B_gradient, t.adapter.modules[module].scaling, rule))
        return cells

    def step(self, index: int, bank: RowBank, plan: StepPlan, items: Tensor) -> Tensor:
        """Take one optimiser step for every member.

        Args:
            index: From 0.
            bank: The rows.
            plan: Which of them.
            items: (members,) rows, or labelled tokens, of each member's step.

        Returns:
            (members,) losses, on the device.
        """
        flat = self.parameters
        flat.clear_gradients()
        if self.drawn is not None:
            for own, scaling in self.scalings:
                torch.mul(own, self.drawn[index][:, None, None], out=scaling)
        # Forward and backward: a member's loss is the mean over its own items, whatever passes its rows are cut into.
        # The sum over members keeps their gradients apart, since no number belongs to two of them.
        losses = torch.zeros(len(self.prepared), dtype=torch.float32, device=self.device)
        for part in plan.passes[index]:
            mean = self._sums(part, bank, plan.rows[index]) / items
            flat.add_gradients(mean.sum())
            losses += mean.detach()
        gradients = flat.gradients
        with torch.no_grad():
            # Each member is clipped by its own norm, as the Trainer would clip it alone.
            if self.trained is not None:
                gradients.mul_(self.trained)
            norms = torch.linalg.vector_norm(gradients, dim=1, keepdim=True)
            gradients.mul_((self.clip / (norms + 1e-6)).clamp(max=1.0))
            self._tie(gradients)
            # Penalties join after clipping, as weight decay does; projections follow the step.
            self.enforcer.before_step()
            flat.step(gradients, self.rates[index], self.head_start, index + 1, self.decay)
            self.enforcer.after_step()
            flat.refresh()
        return losses

    def _tie(self, gradients: Tensor) -> None:
        """Give members that train one adapter together the mean of their factors' gradients; heads stay their own."""
        for members in self.tied:
            shared = gradients[members, : self.head_start]
            gradients[members, : self.head_start] = shared.mean(0, keepdim=True).expand_as(shared)

    def _sums(self, part: Pass, bank: RowBank, rows: Tensor) -> Tensor:
        chosen = rows[:, part.first : part.last].reshape(-1)
        inputs, labels = bank.take(chosen, part.length, part.label_length)
        # The base and the updates run together; what is before and after the backbone, once a view.
        with self._casting(), fused_attention(self.backbone), stacked_updates(self.backbone, self.updates):
            if self.prepared[0].kind == "seq2seq":
                return self._whole_sums(inputs, labels)
            end = self.ends[self.prepared[0].view]
            arguments, options = end.backbone_call(inputs)
            output = end.backbone(*arguments, **options)
        with self._casting():
            return self._ends_sums(output, inputs, labels)

    def _casting(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.device.type, self.autocast) if self.autocast else contextlib.nullcontext()

    def _whole_sums(self, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
        decoder = decoder_inputs(self.whole, labels)
        logits = self.whole(**inputs, decoder_input_ids=decoder, use_cache=False).logits
        n = len(self.prepared)
        return member_sums("seq2seq", by_member(logits, n), by_member(labels, n))

    def _ends_sums(self, output: Any, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
        n = len(self.prepared)
        if self.prepared[0].kind == "causal":
            end = self.ends[self.prepared[0].view]
            positions, targets = causal_targets(labels)
            hidden = output.last_hidden_state
            picked = hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[-1]))
            logits = end.logits(type(output)(last_hidden_state=picked), inputs)
            return member_sums("causal", by_member(logits, n), by_member(targets, n))
        per = len(labels) // n
        sums = []
        for first, last in self.groups:
            block = slice(first * per, last * per)
            part = type(output)(**{k: v[block] for k, v in output.items() if isinstance(v, Tensor)})
            heads = {s.name: self.parameters.leaves[s.name, first] for s in self.slots if s.first == first}
            named = {k.removeprefix(HEAD): v for k, v in heads.items() if k.startswith(HEAD)}
            end = self.ends[self.prepared[first].view]
            logits = end.stacked_logits(part, {k: v[block] for k, v in inputs.items()}, named)
            sums.append(member_sums(self.prepared[first].kind, logits, by_member(labels[block], last - first)))
        return torch.cat(sums)

    def adapter_of(self, member: int, row: Tensor) -> Adapter:
        """Make a member's adapter from a row of values on the CPU."""
        t, tensors = self.prepared[member], tensors_of(self.slots, row, member)
        modules = {}
        for name, f in t.adapter.modules.items():
            A, B = tensors[f"{name}.A"][: f.rank], tensors[f"{name}.B"][:, : f.rank]
            modules[name] = LoraFactors(A.contiguous(), B.contiguous(), f.scaling, f.kind)
        head = {k.removeprefix(HEAD): v for k, v in tensors.items() if k.startswith(HEAD)}
        heads = {t.adapter.name: head} if head else {}
        return replace(t.adapter, modules=modules, heads=heads, source={"task": t.adapter.name})


def _is_a(slot: Slot) -> bool:
    return slot.name.endswith(".A") and not slot.name.startswith(HEAD)


def _groups(prepared: Sequence[Prepared]) -> list[tuple[int, int]]:
    """Find the runs of members of one view."""
    firsts = [i for i, t in enumerate(prepared) if i == 0 or t.view != prepared[i - 1].view]
    return list(zip(firsts, [*firsts[1:], len(prepared)], strict=True))


def step_items(bank: RowBank, rows: np.ndarray[Any, np.dtype[np.int64]], kind: str, device: torch.device) -> Tensor:
    """Count what each member's loss is the mean of: (steps, members) rows, or for text labelled tokens."""
    counts = bank.label_lengths[rows] if kind in ("causal", "seq2seq") else np.ones(rows.shape)
    return torch.from_numpy(counts.sum(-1)).float().clamp(min=1).to(device)
