"""One fleet's run: the shared base, the rows on the device, the steps, and the checkpoints."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from plait.errors import UsageError
from plait.model.base import BaseModel, backbone_of, draw_head, load_task_model, load_tokenizer
from plait.model.devices import free_memory
from plait.model.ends import Ends
from plait.model.rowbank import Prices, RowBank, cheapest_cuts, row_bank, sorted_by_length, step_plan
from plait.model.stacked import common_shapes
from plait.model.views import task_view
from plait.tasks import require_positions
from plait.tasks.encoding import encode_counted
from plait.tasks.lengths import Cut
from plait.training.batched import BatchedAdapters, Prepared, step_items
from plait.training.constraints import stacked_bytes
from plait.training.fleet_state import restore_state, root_of, save_state, telling_what_is_kept
from plait.training.member import Member
from plait.training.outcome import Outcome
from plait.training.peft_model import for_task, named_for
from plait.training.prepare import prepare_constraint
from plait.training.settings import row_order

# Steps between looks at the losses: each makes the host wait for the device.
STEPS_BETWEEN_LOOKS = 25
TIMED_STEPS, PRICED_STEPS = 3, 8
# Seconds the host takes to launch what belongs to one linear layer, forward and backward, and parameter-tokens a second
# the device goes through once it has enough of them. Measured: docs/results/training.md.
_LAUNCH = {"cuda": (2.8e-4, 7e13), "cpu": (2e-4, 1e10)}
TOKENS_AT_FULL_SPEED = 256
USABLE_SHARE_OF_MEMORY = 0.8  # activations of unlike lengths leave gaps


class Shared:
    """What all members of a group use: one base, its views with other heads, and the rows on the device."""

    def __init__(self, members: Sequence[Member], base: BaseModel) -> None:
        if base.torch_dtype == torch.float16:
            raise UsageError("float16 cannot train: gradients underflow", where="base.dtype", hint="use bfloat16")
        self.members, self.base = list(members), base
        self.device, self.kind = base.torch_device, members[0].task.kind
        self.whole = load_task_model(base, members[0].task, seed=members[0].seed).requires_grad_(False).eval()
        self.backbone, self.prefix = backbone_of(self.whole)
        self._prepared = self._prepare()
        self.shapes = common_shapes([t.adapter for t in self._prepared], self.backbone)
        self.ends = {view: Ends(model) for view, model in self._views.values()} if self.prefix else {}
        self.autocast = None
        if members[0].settings.precision == "bf16" and base.torch_dtype == torch.float32:
            self.autocast = torch.bfloat16
            _hold_matrices_in(self.backbone, torch.bfloat16)
        self._encode()
        self.multiple = 8 if self.device.type == "cuda" else 1
        self.prices = Prices(pass_floor(self.backbone, self.device))
        cap = _token_cap(self)
        self.prices = Prices(max(self.prices.floor, _waiting_floor(self)), cap)

    def _prepare(self) -> list[Prepared]:
        """Views by shape of head, heads drawn from each member's seed, constraints shared where they are equal."""
        self._views: dict[tuple[Any, ...], tuple[int, nn.Module]] = {}
        constraints: dict[tuple[Any, ...], Any] = {}
        prepared = []
        for m in self.members:
            text = m.task.kind in ("causal", "seq2seq")
            key = (m.task.kind, 0 if text else m.task.num_labels)
            if key not in self._views:
                self._views[key] = (len(self._views), self.whole if text else task_view(self.whole, m.task))
            number, view = self._views[key]
            if not text:
                draw_head(view, m.seed, m.task.target_mean)
            adapter = for_task(named_for(m.initial, self.base), m.task, view)
            s = m.settings
            rule = (m.task.name, s.constraint, json.dumps(dict(s.constraint_options), sort_keys=True))
            full = (*rule, id(m.statistics), tuple(adapter.modules))
            if full not in constraints:
                constraints[full] = prepare_constraint(s, adapter, m.statistics, task=m.task.name, device=self.device)
            total = s.total_steps(len(m.examples))
            prepared.append(Prepared(adapter, number, m.task.kind, s, total, constraints[full], m.seed))
        return prepared

    def _encode(self) -> None:
        tokenizer = load_tokenizer(self.base)
        rows: list[dict[str, Any]] = []
        offsets: dict[tuple[int, str], int] = {}
        self.offsets = []
        self.cuts: list[Cut] = []  # of each member
        cuts: dict[tuple[int, str], Cut] = {}
        for m in self.members:
            key = (id(m.examples), m.task.name)
            if key not in offsets:
                offsets[key] = len(rows)
                own, cuts[key] = encode_counted(tokenizer, m.task, m.examples, m.settings.max_length)
                require_positions(self.whole, (len(r["input_ids"]) for r in own), f"task {m.task.name}")
                rows += own
            self.offsets.append(offsets[key])
            self.cuts.append(cuts[key])
        self.bank: RowBank = row_bank(rows, tokenizer.pad_token_id, self.kind, self.device)

    def rows_of(self, chosen: Sequence[int]) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Give (steps, members, batch) positions in the bank."""
        parts = []
        for i in chosen:
            m, t = self.members[i], self._prepared[i]
            order = row_order(len(m.examples), t.total * m.settings.batch_size, m.seed) + self.offsets[i]
            parts.append(order.reshape(t.total, m.settings.batch_size))
        return np.stack(parts, 1)

    def by_length(self) -> list[int]:
        """Members, those with the shortest rows first: neighbours share few pads."""
        typical = [
            float(self.bank.lengths[o : o + len(m.examples)].mean())
            for o, m in zip(self.offsets, self.members, strict=True)
        ]
        return sorted(range(len(self.members)), key=lambda i: (typical[i], self.offsets[i]))

    def in_order(self, chosen: Sequence[int]) -> list[int]:
        """Members in the order in which they stand in a batch: by view, so that heads of one shape stand together."""
        return sorted(chosen, key=lambda i: self._prepared[i].view)

    def batched(self, chosen: Sequence[int]) -> tuple[BatchedAdapters, list[int]]:
        """Batch some members, in their order (`in_order`)."""
        order = self.in_order(chosen)
        chosen_members = [self._prepared[i] for i in order]
        return BatchedAdapters(chosen_members, self.backbone, self.ends, self.whole, self.shapes, self.autocast), order

    def smaller_passes(self) -> bool:
        """Halve the tokens of a pass; False where a pass is a single row already."""
        least = int(self.bank.lengths.max())
        now = min(self.prices.cap, least * self.members[0].settings.batch_size)
        self.prices = Prices(self.prices.floor, max(least, now // 2))
        return now > least

    def release(self) -> None:
        """Let the device's memory go."""
        del self.whole, self.backbone, self.ends, self.bank
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _hold_matrices_in(backbone: nn.Module, dtype: torch.dtype) -> None:
    """Cast once what autocast would cast on every pass: the weights and biases of linear layers."""
    for module in _matrices(backbone):
        module.to(dtype)


def _matrices(backbone: nn.Module) -> list[nn.Module]:
    return [m for m in backbone.modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"]


def run_batched(shared: Shared, chosen: Sequence[int], meter: Callable[[int, float | None], None]) -> Outcome:
    """Step some members of a group to their end, going on from a whole checkpoint of the same members."""
    batched, order = shared.batched(chosen)
    members = [shared.members[i] for i in order]
    rows = shared.rows_of(order)
    plan = step_plan(shared.bank, rows, shared.device, shared.prices, multiple=shared.multiple)
    items = step_items(shared.bank, rows, shared.kind, shared.device)
    total = len(rows)
    losses = torch.zeros(total, len(order), dtype=torch.float32, device=shared.device)
    root, every = root_of(members), min((m.settings.checkpoint_every or total for m in members), default=total)
    snapshots: dict[int, Tensor] = {}
    start = restore_state(root, batched, losses, snapshots) if root else 0
    meter(start * len(order), None)
    with telling_what_is_kept(root):
        for step in range(start, total):
            losses[step] = batched.step(step, shared.bank, plan, items[step])
            done = step + 1
            if any(done in m.settings.snapshots for m in members):
                snapshots[done] = batched.parameters.values.to("cpu", copy=True)
            if root and (done % every == 0 or done == total):
                save_state(root, done, batched, losses, snapshots)
            if done % STEPS_BETWEEN_LOOKS == 0 or done == total:
                since = (step // STEPS_BETWEEN_LOOKS) * STEPS_BETWEEN_LOOKS
                meter((done - max(since, start)) * len(order), float(losses[since:done].mean()))
    values, curve = batched.parameters.values.cpu(), losses.cpu().numpy()
    failed = [not np.isfinite(curve[:, p]).all() or not bool(values[p].isfinite().all()) for p in range(len(order))]
    adapters = [batched.adapter_of(p, values[p]) for p in range(len(order))]
    kept = {
        place: {step: batched.adapter_of(place, snapshots[step][place]) for step in m.settings.snapshots}
        for place, m in enumerate(members)
    }
    return Outcome(order, adapters, curve, failed, kept, root)


def members_at_once(shared: Shared) -> int:
    """Choose how many members of a group to step together so that a sample of steps costs least.

    More members share the launching of kernels; fewer, of like length, share fewer pads.
    """
    n = len(shared.members)
    sizes = sorted({max(1, -(-n // (1 << halvings))) for halvings in range(n.bit_length())}, reverse=True)
    rows = shared.rows_of(shared.by_length())[:PRICED_STEPS]
    return min(sizes, key=lambda size: (_price(shared, rows, size), -size))


def _price(shared: Shared, rows: np.ndarray[Any, np.dtype[np.int64]], size: int) -> float:
    price = 0.0
    for start in range(0, rows.shape[1], size):
        part = rows[:, start : start + size]
        _, lengths = sorted_by_length(shared.bank, part, shared.multiple)
        price += float(cheapest_cuts(lengths, part.shape[1], shared.prices)[1][:, -1].sum())
    return price


def pass_floor(backbone: nn.Module, device: torch.device) -> int:
    """Tokens below which a pass of this base only waits for its kernels to be launched, on this device."""
    matrices = _matrices(backbone)
    numbers = sum(p.numel() for m in matrices for p in m.parameters())
    seconds, rate = _LAUNCH.get(device.type, _LAUNCH["cuda"])
    return max(TOKENS_AT_FULL_SPEED, round(len(matrices) * seconds * rate / max(1, numbers)))


def _token_cap(shared: Shared) -> int:
    """Tokens whose activations fit the free memory, from one pass of a single member over its longest rows."""
    if shared.device.type != "cuda":
        return Prices().cap
    step, rows, plan = _single_step(shared, int(shared.bank.lengths.argmax()))
    torch.cuda.reset_peak_memory_stats(shared.device)
    before = torch.cuda.memory_allocated(shared.device)
    step()
    used = torch.cuda.max_memory_allocated(shared.device) - before
    tokens = rows.size * int(plan.passes[0][-1].length)
    room = free_memory(shared.device) - stacked_bytes(t.constraint for t in shared._prepared)
    return max(1, int(USABLE_SHARE_OF_MEMORY * room * tokens / max(used, 1)))


def _waiting_floor(shared: Shared) -> int:
    """Tokens the device could have gone through while this host launches one pass, from the shortest step of one member.

    Hosts differ by a factor of four in this, and it decides how many members are stepped together.
    """
    if shared.device.type != "cuda":
        return 0
    step, _, _ = _single_step(shared, int(shared.bank.lengths.argmin()))
    step()
    torch.cuda.synchronize(shared.device)
    started = time.monotonic()
    for _ in range(TIMED_STEPS):
        step()
    torch.cuda.synchronize(shared.device)
    numbers = sum(p.numel() for m in _matrices(shared.backbone) for p in m.parameters())
    return round((time.monotonic() - started) / TIMED_STEPS * _LAUNCH["cuda"][1] / max(1, numbers))


def _single_step(shared: Shared, row: int) -> tuple[Callable[[], Tensor], np.ndarray[Any, np.dtype[np.int64]], Any]:
    """A step in which every row is the same one, of a member whose row it is (its head knows the label), apart from the rest."""
    spans = [(o, o + len(m.examples)) for o, m in zip(shared.offsets, shared.members, strict=True)]
    batched, order = shared.batched([next(i for i, (first, end) in enumerate(spans) if first <= row < end)])
    rows = shared.rows_of(order)[:1]
    rows[0, 0, :] = row
    plan = step_plan(shared.bank, rows, shared.device, multiple=shared.multiple)
    items = step_items(shared.bank, rows, shared.kind, shared.device)[0]
    return lambda: batched.step(0, shared.bank, plan, items), rows, plan
