"""torch's default dtype belongs to the process: whatever a program, or a model that loads, sets it to, plait computes the same.

What is compared was all made before the default changed: inputs are drawn in float32, and models loaded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from plait.adapters.lora import Adapter, LoraFactors
from plait.adapters.peft_format import write_adapter
from plait.choosing.auto import AutoSettings, merge_auto
from plait.disk.store import identity
from plait.evaluation.evaluate import Evaluator
from plait.evaluation.fleet import Candidate, predict_many
from plait.merging import merge_folders, merge_methods, plan_merge
from plait.merging.bake.sites import merged_delta, shell
from plait.merging.methods.adamerging import adamerging
from plait.merging.methods.featcal import featcal
from plait.merging.methods.regmean_pp import regmean_pp
from plait.merging.per_task import merge_per_task
from plait.model.base import head_state, load_task_model
from plait.statistics import collect_statistics
from plait.statistics.fisher import collect_fisher
from plait.statistics.sketch import compress
from plait.subspaces import compute_subspaces, subspace_methods
from plait.subspaces.stream import stream_subspaces
from plait.training import Member, TrainingSettings, train_adapter, train_fleet
from tests.laws.test_merge_laws import LAWS, SPACIOUS, adapter, run, statistics
from tests.merging import test_fisher as fisher_net
from tests.merging import test_with_forward as net
from tests.statistics import models
from tests.subspaces.pools import base_weight, pool
from tests.tiny import make_adapter, make_examples, make_task

OTHERS = [torch.bfloat16, torch.float64]
# The first is above what a threshold is selected from in memory (see merging/entries/quantile.py), and is cut by its own draws.
MODULES = {"layers.0.q": (270, 260), "layers.0.v": (6, 7), "layers.1.q": (9, 7)}


@contextmanager
def by_default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def leaves(thing: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Everything in a result as something that compares by its bits, with where it stood."""
    if isinstance(thing, Tensor):
        found = thing.detach().cpu().contiguous()
        yield place, (found.dtype, tuple(found.shape), found.flatten().view(torch.uint8).numpy().tobytes())
    elif isinstance(thing, np.ndarray):
        yield place, (thing.dtype, thing.shape, thing.tobytes())
    elif isinstance(thing, Mapping):
        for key, value in thing.items():
            if not str(key).startswith("seconds"):
                yield from leaves(value, f"{place}.{key}")
    elif isinstance(thing, list | tuple):
        for i, value in enumerate(thing):
            yield from leaves(value, f"{place}[{i}]")
    elif dataclasses.is_dataclass(thing):
        for field in dataclasses.fields(thing):
            yield from leaves(getattr(thing, field.name), f"{place}.{field.name}")
    elif not callable(thing):
        yield place, repr(thing)


@pytest.fixture(params=OTHERS, ids=["bfloat16", "float64"])
def unchanged(request: pytest.FixtureRequest) -> Callable[[Callable[[], Any]], None]:
    """unchanged(compute): the same bits come out under this default as under float32."""

    def check(compute: Callable[[], Any]) -> None:
        wanted = dict(leaves(compute()))
        with by_default(request.param):
            found = dict(leaves(compute()))
            assert torch.get_default_dtype() == request.param
        assert wanted and [p for p in {**wanted, **found} if wanted.get(p) != found.get(p)] == []

    return check


# --- merging ----------------------------------------------------------------------------------------------------------


def adapters_for(method: str) -> list[Adapter]:
    given = [adapter(n, i, MODULES) for i, n in enumerate(["one", "two", "three"][: LAWS[method].tasks])]
    if LAWS[method].zero is None:  # a module that one of them does not have
        some = {m: f for m, f in given[0].modules.items() if m != "layers.1.q"}
        given[0] = dataclasses.replace(given[0], modules=some)
    return given


@pytest.mark.parametrize("given", [{}, {"rank": 2}, {"calibrate": "pico"}], ids=["plain", "rank", "pico"])
@pytest.mark.parametrize("method", sorted(merge_methods()))
def test_merges(unchanged, method, given):
    adapters = adapters_for(method)
    weights = [0.5, 1.0, 2.0][: len(adapters)]
    held = statistics(adapters)
    plan = plan_merge(
        adapters, method, options=LAWS[method].options, statistics=held, weights=weights, **{"scale": 1.0} | given
    )
    unchanged(lambda: {m: plan.merged(m) for m in MODULES})


@pytest.mark.parametrize("space", ["core", "knots"])
@pytest.mark.parametrize("method", SPACIOUS)
def test_merges_in_another_space(unchanged, method, space):
    adapters = adapters_for(method)
    unchanged(lambda: run(method, adapters, options=LAWS[method].options | {"space": space}))


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "tsv"])
def test_merges_to_bake_and_to_a_folder(unchanged, method, tmp_path):
    adapters = [adapter(n, i, MODULES) for i, n in enumerate(["one", "two"])]
    plan = plan_merge(adapters, method, scale=1.0)
    unchanged(lambda: [shell(plan), *(merged_delta(plan, m).dense() for m in MODULES)])
    folders = [tmp_path / a.name for a in adapters]
    for folder, a in zip(folders, adapters, strict=True):
        folder.mkdir()
        write_adapter(folder, a)
    written = []

    def to_folder() -> bytes:
        out = tmp_path / f"out{len(written)}"
        written.append(merge_folders(folders, out, method=method, scale=1.0))
        return (out / "adapter_model.safetensors").read_bytes()

    unchanged(to_folder)
    rescalers = []

    def per_task() -> Any:
        rescalers.append(merge_per_task(folders, tmp_path / f"tasks{len(rescalers)}").record.rescalers)
        return rescalers[-1]

    unchanged(per_task)


def test_merges_that_run_the_base(unchanged):
    model, given, adapters = net.Net(), net.batches(), net.adapters()
    unchanged(lambda: adamerging(adapters, model, lambda t, b: model.heads[t](model(b["x"])), given, steps=5))
    unchanged(lambda: featcal(adapters, model, lambda t, b: model(b["x"]), given))
    unchanged(lambda: regmean_pp(adapters, model, lambda t, b: model(b["x"]), given))


# --- statistics and subspaces -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", subspace_methods())
def test_subspaces(unchanged, method):
    given = pool()
    unchanged(lambda: compute_subspaces(method, given, rank=4, seed=3, weights=base_weight))


@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_statistics_sketches_and_streamed_subspaces(unchanged, architecture):
    model, given = models.build(architecture), {t: models.batches(architecture, i) for i, t in enumerate("ab")}
    targets = models.ATTENTION[architecture]
    unchanged(lambda: collect_statistics(model, given["a"], targets))
    unchanged(lambda: [compress(m, 4) for m in collect_statistics(model, given["a"], targets).sites.values()])
    unchanged(lambda: collect_statistics(model, given["a"], targets, sketch=4))
    unchanged(lambda: stream_subspaces("contrastive", model, given, targets, rank=2))


def test_fisher(unchanged):
    model = fisher_net.Classifier()

    def diagonal() -> Tensor:
        found = collect_fisher(model, fisher_net.batches(), ["q"], generator=torch.Generator().manual_seed(0))
        return found.diagonal_for("q").rows(0, 5)

    unchanged(diagonal)


# --- training, scores, fidelity ---------------------------------------------------------------------------------------

SETTINGS = TrainingSettings(steps=6, lr=5e-3, batch_size=8, max_length=24)


def members_of(base: Any, architecture: str, kinds: list[str], folder: Any, **changes: Any) -> list[Member]:
    made = []
    for i, kind in enumerate(kinds):
        task, settings = make_task(f"t{i}", kind, 2 + i), dataclasses.replace(SETTINGS, **changes)
        start = make_adapter(base, task, architecture, 2 + i, i)
        wanted = identity("train", {"s": dataclasses.asdict(settings)}, seed=i)
        made.append(Member(start, task, make_examples(task, seed=i), settings, i, folder / f"{i}", wanted))
    return made


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("architecture", "kinds"), [("bert", ["classification", "classification", "regression"]), ("llama", ["causal"] * 2)]
)
def test_fleets(unchanged, tiny_base, tmp_path, architecture, kinds, dtype):
    base, done = tiny_base(architecture, dtype=dtype), []
    start = members_of(base, architecture, kinds, tmp_path, weight_decay=0.1)

    def train() -> list[Adapter]:
        done.append(None)
        found = train_fleet([dataclasses.replace(m, out=tmp_path / f"{len(done)}" / m.out.name) for m in start], base)
        return [dataclasses.replace(a, source={}) for a in found]

    unchanged(train)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("architecture", "kind"), [("bert", "classification"), ("bert", "regression"), ("llama", "causal")]
)
def test_training_alone(unchanged, tiny_base, tmp_path, architecture, kind, dtype):
    base, done = tiny_base(architecture, dtype=dtype), []
    (m,) = members_of(base, architecture, [kind], tmp_path)

    def train() -> Adapter:
        done.append(None)
        out = tmp_path / f"{len(done)}"
        found = train_adapter(m.initial, m.task, m.examples, base, m.settings, seed=0, out=out, identity=m.identity)
        return dataclasses.replace(found, source={})

    unchanged(train)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("architecture", "kinds"), [("bert", ["classification", "regression"]), ("llama", ["causal"])])
def test_predictions(unchanged, tiny_base, tmp_path, architecture, kinds, dtype):
    base = tiny_base(architecture, dtype=dtype)
    members = members_of(base, architecture, kinds, tmp_path)
    tasks = {m.task.name: m.task for m in members}
    if architecture == "llama":
        tasks = {n: dataclasses.replace(t, labels=("w1", "w2 w5"), metrics=("accuracy",)) for n, t in tasks.items()}
    examples = {m.task.name: m.examples for m in members}
    examples = {
        n: e if tasks[n].kind != "causal" else dataclasses.replace(e, labels=("w1",) * len(e))
        for n, e in examples.items()
    }
    g = torch.Generator().manual_seed(5)
    grown = [
        {n: LoraFactors(f.A, torch.randn(f.B.shape, generator=g), f.scaling) for n, f in m.initial.modules.items()}
        for m in members
    ]
    worn = [dataclasses.replace(m.initial, modules=found) for m, found in zip(members, grown, strict=True)]

    def predict() -> Any:
        evaluator = Evaluator(base, tasks, examples, max_length=24)
        found = []
        for name, a in zip(tasks, worn, strict=True):
            head = heads.get(name, {})
            candidates = [Candidate(head, a, 0.3), Candidate(head, a, 1.0), Candidate(head)]
            found.append(predict_many(evaluator, name, candidates))
            found.append([evaluator.predict(name, head, a, 0.3)])
        return found

    heads = {n: head_state(load_task_model(base, t, seed=0)) if t.kind != "causal" else {} for n, t in tasks.items()}
    unchanged(predict)
    unchanged(lambda: [head_state(load_task_model(base, t, seed=1)) for t in tasks.values()])


@pytest.mark.parametrize(("architecture", "kind"), [("bert", "classification"), ("llama", "causal")])
def test_automatic_merges(unchanged, make_panel, architecture, kind):
    panel = make_panel(architecture, kind, texts=6)
    adapters = [p.adapter for p in panel.parts]
    unchanged(lambda: merge_auto(adapters))
    settings = AutoSettings(scales=(0.3, 0.7), refine=3, repair=2, max_length=24, methods=("tsv", "ties", "regmean"))
    unchanged(lambda: merge_auto(adapters, panel.base, panel.texts, settings=settings))
