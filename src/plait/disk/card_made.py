"""How a result was made, in sentences for its card: read off the record that goes into the manifest, without anybody's paths."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from plait.border.counts import plural
from plait.border.own_paths import without_paths
from plait.errors import printable

_TEXT = 200
Table = tuple[Sequence[str], Sequence[Sequence[str]]]  # header, rows


def made(stage: str, manifest: Mapping[str, Any]) -> list[str]:
    """Tell how a result was made, a Markdown paragraph or table each.

    Args:
        stage: Name of the stage.
        manifest: Its options, inputs, seed and result.
    """
    result: Mapping[str, Any] = manifest.get("result", {})
    sentences = {
        "merge": _merged,
        "merge-difference": _merged,
        "merge-per-task": _merged,
        "merge-auto": _chosen,
        "bake": _baked,
        "best": _best,
        "export": _exported,
        "extract": _extracted,
        "convert": _converted,
        "post": _moved,
        "initial": _started,
    }
    if maker := sentences.get(stage):
        return maker(result, manifest)
    return _trained(result) if "steps" in result and "task" in result else []


def scores(result: Mapping[str, Any]) -> list[str]:
    """Tell the scores that a record holds, a Markdown paragraph or table each; [] where it holds none."""
    if isinstance(rows := result.get("scores"), Mapping) and rows:
        metrics, alone = result.get("metrics", {}), result.get("scores_alone", {})
        cells = [[_code(t), _text(metrics.get(t, "")), f"{v:.1f}", f"{alone[t]:.1f}"] for t, v in rows.items()]
        return [
            _table(["task", "metric", "this merge", "its adapter alone"], cells),
            _text(result.get("scored_on", "")),
        ]
    tasks = (result.get("fidelity") or {}).get("tasks") or ()
    rows_kept = [_followed(t) for t in tasks]
    if not rows_kept:
        return []
    header = ["adapter", "agreement with it", "the bare base's", "KL to it", "the bare base's", "texts"]
    return [
        "Measured without labels, on the texts that chose the merge: how often it predicts what each adapter predicts, and how far "
        "its probabilities are from the adapter's.",
        _table(header, rows_kept),
    ]


def is_merge(manifest: Mapping[str, Any]) -> bool:
    """Whether a result combines several adapters."""
    result = manifest.get("result", {})
    baked = [k for k in manifest.get("inputs", {}) if k.startswith("adapter:")]
    return len(result.get("tasks") or result.get("merged_from") or baked) > 1


def _merged(result: Mapping[str, Any], manifest: Mapping[str, Any]) -> list[str]:
    adapters = result.get("adapters") or ()
    weighted = any(a.get("weight", 1) != 1 for a in adapters)
    scale, reason = result.get("scale", 1.0), _text(result.get("scale_reason", ""))
    sentence = f"Merged from {len(adapters)} adapter{'s' * (len(adapters) != 1)} by `{_text(result.get('method'))}` at scale {scale:g}"
    sentence += f" ({reason})" if reason else ""
    sentence += _settings(result.get("options", {}))
    if result.get("module_weights"):
        sentence += ", with weights by module"
    if stack := result.get("stack"):
        sentence += "; composed in the order in which they were trained: " + ", ".join(_code(s["name"]) for s in stack)
    return [f"{sentence}.", _inputs(adapters, weighted), *_checks(result)]


def _chosen(result: Mapping[str, Any], manifest: Mapping[str, Any]) -> list[str]:
    choice, texts = result.get("chosen", {}), result.get("texts") or {}
    tried = len(result.get("evidence", ()))
    how = (
        f"by how closely {plural(tried, 'candidate', 'follows', 'follow')} every adapter on "
        + ", ".join(f"{_several(n, 'text')} of {_code(t)}" for t, n in sorted(texts.items()))
        if texts
        else "from the adapters' factors alone, nothing was run"
    )
    sentence = (
        f"`plait merge auto` chose {_text(choice.get('candidate'))} at scale {choice.get('scale', 1.0):g}, {how}."
    )
    repair = result.get("repair") or {}
    repaired = (
        [f"Then {_several(repair['steps'], 'step')} of distilling the adapters into it."] if repair.get("kept") else []
    )
    return [sentence, *repaired, _inputs(result.get("adapters") or (), False), *_checks(result)]


def _baked(result: Mapping[str, Any], manifest: Mapping[str, Any]) -> list[str]:
    options: Mapping[str, Any] = manifest.get("options", {})
    tasks = sorted(k.partition(":")[2] for k in manifest.get("inputs", {}) if k.startswith("adapter:"))
    scale = f" at scale {options['scale']:g}" if _is_number(options.get("scale")) else ""
    of = f"The merge of {_listed(tasks)} by `{_text(options.get('method'))}`{scale}" if tasks else "A LoRA"
    rounding = result.get("rounding_error") or 0.0
    loss = (
        f" Rounding to {_listed(result.get('dtype', ()))} took {100 * rounding:.3g} % of the update."
        if rounding
        else ""
    )
    return [
        f"{of}, added to the base's weights: {_several(result.get('modules'), 'module')} changed.{loss}",
        *_checks(result),
    ]


def _best(result: Mapping[str, Any], manifest: Mapping[str, Any]) -> list[str]:
    options: Mapping[str, Any] = manifest.get("options", {})
    sentence = (
        f"The best merge of the run {_code(options.get('name'))}: arm {_code(result.get('arm'))}, merge {_code(result.get('merge'))} of "
        f"{_listed(result.get('tasks') or ())}, scale {result.get('scale', 1.0):g}, seed {result.get('seed')}. Merge and scale are those "
        "that scored best on labelled validation rows."
    )
    return [sentence]


def _exported(result: Mapping[str, Any], manifest: Mapping[str, Any]) -> list[str]:
    merged = result.get("merged_from")
    head = f" with the head of {_code(result['task'])}" if result.get("task") else ""
    of = f" of the merge of {_listed(merged)}" if merged else ""
    return [f"The update{of}{head}, written for {_text(result.get('for'))}."]


def _extracted(result: Mapping[str, Any], manifest: Mapping[str, Any]) -> list[str]:
    sentence = (
        "Cut out of a full fine-tune: the LoRA nearest to its difference from the base in "
        f"{_several(result.get('modules'), 'module')}, rank {result.get('rank')}, keeps "
        f"{100 * result.get('energy_kept', 0.0):.2f} % of the difference's energy."
    )
    dropped = result.get("dropped") or {}
    return [sentence, *([f"Changes left out: {_listed(sorted(dropped))}."] if dropped else []), *_checks(result)]


def _converted(result: Mapping[str, Any], manifest: Mapping[str, Any]) -> list[str]:
    steps = [_text(line) for line in result.get("conversions") or ()]
    return [
        f"Converted from {_text(result.get('from', 'another format'))} to {_text(result.get('to'))}.",
        *([f"Made plain LoRA: {'; '.join(steps)}."] if steps else []),
        *_checks(result),
    ]


def _trained(result: Mapping[str, Any]) -> list[str]:
    losses = result.get("losses") or result
    sentence = f"Trained on {_code(result['task'])} ({_text(result.get('kind', ''))}) for {_several(result['steps'], 'step')} by plait."
    last = losses.get("last") if isinstance(losses, Mapping) else None
    return [sentence + (f" The loss ended at {last:.4g}." if _is_number(last) else "")]


def _moved(result: Mapping[str, Any], manifest: Mapping[str, Any]) -> list[str]:
    return [
        f"A trained adapter of {_code(result.get('task'))}, moved into the subspace `{_text(result.get('subspace'))}` at rank "
        f"{result.get('rank')}; it keeps {100 * result.get('energy_kept', 0.0):.1f} % of its update's energy."
    ]


def _started(result: Mapping[str, Any], manifest: Mapping[str, Any]) -> list[str]:
    options: Mapping[str, Any] = manifest.get("options", {})
    return [
        f"Not trained yet: B is zero, and the rows of A are where `{_text(options.get('method'))}` has {_code(options.get('task'))} start."
    ]


def _checks(result: Mapping[str, Any]) -> list[str]:
    """What a cut to rank lost, and what reading the result again showed."""
    lines = []
    share = (result.get("loss") or result).get("discarded_energy") or 0.0
    if share:
        how = str(result.get("cut") or "")
        of = "the update's energy" if not how or how.startswith("by weights") else "what the update puts out"
        lines.append(
            f"The cut to rank {result.get('rank')} lost {100 * share:.2f} % of {of}"
            + (f" (cut {how})." if how else ".")
        )
    if _is_number(error := result.get("verification_error")):
        lines.append(f"Read again after it was written and compared; the largest relative error is {error:.1e}.")
    return lines


def _inputs(adapters: Sequence[Mapping[str, Any]], weighted: bool) -> str:
    """A table of the adapters by name: an order of the command line is no property of a merge."""
    rows = []
    for a in sorted(adapters, key=lambda a: str(a.get("name"))):
        origin = (
            _code(a["hub"])
            if a.get("hub")
            else f"files of SHA-256 `{str(a.get('sha256', ''))[:12]}`"
            if a.get("sha256")
            else ""
        )
        rows.append(
            [_code(a.get("name")), *([f"{a.get('weight', 1):g}"] if weighted else []), str(a.get("rank") or ""), origin]
        )
    return _table(["adapter", *(["weight"] if weighted else []), "rank", "where it is from"], rows)


def _followed(task: Mapping[str, Any]) -> list[str]:
    numbers = [
        f"{task[k]:.3f}" if _is_number(task.get(k)) else "" for k in ("agreement", "agreement_base", "kl", "kl_base")
    ]
    return [_code(task.get("task")), *numbers, str(task.get("n", ""))]


def _settings(options: Mapping[str, Any]) -> str:
    settings = [
        f"{k} {v:g}" if _is_number(v) else f"{k} {_text(v)}" for k, v in sorted(options.items()) if _is_plain(v)
    ]
    return f" with {', '.join(settings)}" if settings else ""


def _is_plain(value: object) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(_code, names))


def _code(name: object) -> str:
    return f"`{_text(name)}`"


def _text(value: object) -> str:
    """A foreign text in one line of Markdown: paths by their last part, nothing that opens a tag, a cell or a code span."""
    return (
        printable(without_paths(str(value)), _TEXT)
        .replace("`", "'")
        .replace("|", "/")
        .replace("<", "(")
        .replace(">", ")")
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _several(count: Any, noun: str) -> str:
    """A count out of somebody's record, with its noun."""
    return plural(count, noun) if isinstance(count, int) else f"{_text(count)} {noun}s"
