"""Members of a fleet that are stepped together: one pass of the base for all, everything trained apart."""

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
from plait.model.ends import Ends
from plait.model.rowbank import Pass, RowBank, StepPlan, causal_targets
from plait.model.stacked import StackedFactors, by_member, padded_factors, stacked_updates
from plait.training.constraints import Cell, Constraint, Enforcer
from plait.training.flat import FlatParameters, Slot, lay_out, tensors_of
from plait.training.losses import member_sums
from plait.training.settings import TrainingSettings

HEAD = "head."


@dataclass(frozen=True, slots=True)
class Trainee:
    """One member, ready: its adapter with its head, the view of the model it ends in, and its rows.

    Args:
        adapter: From `peft_model.for_task`.
        view: Which of the shared views its task uses; members of one view stand together.
        kind: The task's.
        settings: Its own.
        total: Its steps, the same for all of a cohort.
        constraint: What is done to its factors around each step.
    """

    adapter: Adapter
    view: int
    kind: str
    settings: TrainingSettings
    total: int
    constraint: Constraint = field(default_factory=Constraint)

    @property
    def head(self) -> Mapping[str, Tensor]:
        """Its head's tensors; empty for text."""
        return self.adapter.heads.get(self.adapter.name, {})


class Cohort:
    """Trainees stacked.

    Args:
        trainees: Sorted by view; equal kinds of output, equal steps, equal batch size.
        backbone: The shared base; in evaluation mode, no parameter of it trained.
        ends: View number -> the two ends of its model; empty where the whole model is run (`whole`).
        whole: The model, where it has no backbone apart from it (T5 for text).
        shapes: From `common_shapes`.
        autocast: Dtype of the forward pass, where it is not the base's own.
    """

    def __init__(
        self,
        trainees: Sequence[Trainee],
        backbone: nn.Module,
        ends: Mapping[int, Ends],
        whole: Any,
        shapes: Mapping[str, tuple[int, int, int]],
        autocast: torch.dtype | None,
    ) -> None:
        self.trainees, self.backbone, self.ends, self.whole = trainees, backbone, ends, whole
        self.shapes, self.autocast = shapes, autocast
        like = next(p for p in backbone.parameters() if p.is_floating_point())
        self.device = like.device
        self.groups = _groups(trainees)
        factor_slots, self.head_start = lay_out(self._factor_shapes())
        ends_at = [self.head_start]
        self.slots: list[Slot] = factor_slots
        for first, last in self.groups:
            named = [(HEAD + k, first, last, tuple(v.shape)) for k, v in sorted(trainees[first].head.items())]
            slots, end = lay_out(named, self.head_start)
            self.slots, ends_at = [*self.slots, *slots], [*ends_at, end]
        values = torch.zeros(len(trainees), max(ends_at), dtype=torch.float32)
        self._fill(values)
        self.parameters = FlatParameters(self.slots, values.to(self.device), autocast or like.dtype)
        self._bind()
        self.enforcer.after_step()  # a span holds from the start
        self.parameters.refresh()

    def _factor_shapes(self) -> list[tuple[str, int, int, tuple[int, ...]]]:
        n = len(self.trainees)
        both = [((f"{m}.A", (r, i)), (f"{m}.B", (o, r))) for m, (r, o, i) in self.shapes.items()]
        return [(name, 0, n, shape) for pair in both for name, shape in pair]

    def _fill(self, values: Tensor) -> None:
        for slot in self.slots:
            view = slot.view(values)
            for i, t in enumerate(self.trainees[slot.first : slot.last]):
                module, _, part = slot.name.rpartition(".")
                if slot.name.startswith(HEAD):
                    view[i] = t.head[slot.name.removeprefix(HEAD)]
                else:
                    A, B, _ = padded_factors(t.adapter, module, self.shapes[module])
                    view[i] = A if part == "A" else B

    def _bind(self) -> None:
        """Everything that refers to the trained numbers: hooks' factors, constraints, rates, masks."""
        leaves, n = self.parameters.leaves, len(self.trainees)
        self.updates = {}
        for m in self.shapes:
            scalings = [t.adapter.modules[m].scaling if m in t.adapter.modules else 1.0 for t in self.trainees]
            scaling = scalings[0] if len(set(scalings)) == 1 else self._column(scalings)[:, :, None]
            self.updates[m] = StackedFactors(leaves[f"{m}.A", 0], leaves[f"{m}.B", 0], scaling)
        settings = [t.settings for t in self.trainees]
        names = [s.tied for s in settings]
        self.tied = [[i for i, n in enumerate(names) if n == name] for name in dict.fromkeys(names) if name]
        self.clip = self._column([s.max_grad_norm or float("inf") for s in settings])
        total = self.trainees[0].total
        factors = [[s.factor(step, total) for s in settings] for step in range(total)]
        heads = [s.lr if s.head_lr is None else s.head_lr for s in settings]
        rates = np.stack([np.array([s.lr for s in settings]) * factors, np.array(heads) * factors], 1)
        self.rates = torch.from_numpy(rates).float()[..., None].to(self.device)
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
                mask[i, slot.start : slot.start + slot.size] = rule(slot, self.trainees[i])
        return None if bool((mask == neutral).all()) else mask

    def _cells(self, member: int) -> list[Cell]:
        """The constraint's places in the values and gradients of one member."""
        t, flat = self.trainees[member], self.parameters
        slots = {s.name: s for s in self.slots if not s.name.startswith(HEAD)}
        found = []
        for module, rule in t.constraint.rules.items():
            a, b = slots[f"{module}.A"], slots[f"{module}.B"]
            A, B, A_gradient, B_gradient = (s.view(m)[member] for m in (flat.values, flat.gradients) for s in (a, b))
            found.append(Cell(A, B, A_gradient, B_gradient, t.adapter.modules[module].scaling, rule))
        return found

    # --- one step -----------------------------------------------------------------------------------------------------

    def step(self, index: int, bank: RowBank, plan: StepPlan, items: Tensor) -> Tensor:
        """One optimiser step of every member.

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
        losses = torch.zeros(len(self.trainees), dtype=torch.float32, device=self.device)
        for part in plan.passes[index]:
            mean = self._sums(part, bank, plan.rows[index]) / items
            flat.add_gradients(mean.sum())
            losses += mean.detach()
        gradients = flat.gradients
        with torch.no_grad():
            if self.trained is not None:
                gradients.mul_(self.trained)
            norms = torch.linalg.vector_norm(gradients, dim=1, keepdim=True)
            gradients.mul_((self.clip / (norms + 1e-6)).clamp(max=1.0))
            self._tie(gradients)
            self.enforcer.before_step()
            flat.step(gradients, self.rates[index], self.head_start, index + 1, self.decay)
            self.enforcer.after_step()
            flat.refresh()
        return losses

    def _tie(self, gradients: Tensor) -> None:
        """Members that train one adapter together take the mean of their factors' gradients; heads stay their own."""
        for members in self.tied:
            shared = gradients[members, : self.head_start]
            gradients[members, : self.head_start] = shared.mean(0, keepdim=True).expand_as(shared)

    def _sums(self, part: Pass, bank: RowBank, rows: Tensor) -> Tensor:
        chosen = rows[:, part.first : part.last].reshape(-1)
        inputs, labels = bank.take(chosen, part.length, part.label_length)
        device = self.device.type
        context = torch.autocast(device, self.autocast) if self.autocast else contextlib.nullcontext()
        with context, fused_attention(self.backbone), stacked_updates(self.backbone, self.updates):
            if self.trainees[0].kind == "seq2seq":
                return self._whole_sums(inputs, labels)
            end = self.ends[self.trainees[0].view]
            arguments, options = end.backbone_call(inputs)
            output = end.backbone(*arguments, **options)
        with torch.autocast(device, self.autocast) if self.autocast else contextlib.nullcontext():
            return self._ends_sums(output, inputs, labels)

    def _whole_sums(self, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
        decoder = self.whole.prepare_decoder_input_ids_from_labels(labels=labels)
        logits = self.whole(**inputs, decoder_input_ids=decoder, use_cache=False).logits
        n = len(self.trainees)
        return member_sums("seq2seq", by_member(logits, n), by_member(labels, n))

    def _ends_sums(self, output: Any, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
        n = len(self.trainees)
        if self.trainees[0].kind == "causal":
            end = self.ends[self.trainees[0].view]
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
            end = self.ends[self.trainees[first].view]
            logits = end.stacked_logits(part, {k: v[block] for k, v in inputs.items()}, named)
            sums.append(member_sums(self.trainees[first].kind, logits, by_member(labels[block], last - first)))
        return torch.cat(sums)

    # --- results ------------------------------------------------------------------------------------------------------

    def adapter_of(self, member: int, row: Tensor) -> Adapter:
        """A member's adapter with the numbers of a row of values (on the CPU)."""
        t, found = self.trainees[member], tensors_of(self.slots, row, member)
        modules = {}
        for name, f in t.adapter.modules.items():
            A, B = found[f"{name}.A"][: f.rank], found[f"{name}.B"][:, : f.rank]
            modules[name] = LoraFactors(A.contiguous(), B.contiguous(), f.scaling, f.kind)
        head = {k.removeprefix(HEAD): v for k, v in found.items() if k.startswith(HEAD)}
        heads = {t.adapter.name: head} if head else {}
        return replace(t.adapter, modules=modules, heads=heads, source={"task": t.adapter.name})


def _is_a(slot: Slot) -> bool:
    return slot.name.endswith(".A") and not slot.name.startswith(HEAD)


def _groups(trainees: Sequence[Trainee]) -> list[tuple[int, int]]:
    """Runs of members of one view."""
    firsts = [i for i, t in enumerate(trainees) if i == 0 or t.view != trainees[i - 1].view]
    return list(zip(firsts, [*firsts[1:], len(trainees)], strict=True))


def step_items(bank: RowBank, rows: np.ndarray[Any, np.dtype[np.int64]], kind: str, device: torch.device) -> Tensor:
    """(steps, members) rows, or for text labelled tokens, that each member's loss is the mean of."""
    counts = bank.label_lengths[rows] if kind in ("causal", "seq2seq") else np.ones(rows.shape)
    return torch.from_numpy(counts.sum(-1)).float().clamp(min=1).to(device)
