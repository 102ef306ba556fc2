"""What a person should know about adapters before merging them: kin, tensors beside the factors, bases, ways to serve."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from plait.adapters.beside import no_matrix
from plait.adapters.lineage import same_name
from plait.adapters.lora import Adapter
from plait.border.counts import plural
from plait.choosing import costs
from plait.choosing.proxy import cosines
from plait.fidelity.chat import Chat
from plait.fidelity.measure import Fidelity
from plait.fidelity.panel import Panel
from plait.formats.recognised import of_images
from plait.learning.fitting import can_fit
from plait.learning.repair import TEXTS_TO_REPAIR
from plait.loading.vllm import VERSION
from plait.merging.kinship import KIN, kin_sentence
from plait.model.base import BaseModel

# Where one text is more than five percent of what is kept of an adapter, that is said.
ENOUGH = 20


def kin(adapters: Sequence[Adapter]) -> list[tuple[str, str, float]]:
    """Pairs that point the same way, which adapters trained apart hardly do, with the cosine of their task vectors."""
    try:
        similar = cosines(adapters)
    except RuntimeError:  # other shapes: they were not comparable in the first place
        return []
    return [(a, b, c) for (a, b), c in similar.items() if c > KIN]


def kinship(akin: Sequence[tuple[str, str, float]]) -> list[str]:
    """Say which adapters point the same way, of what `kin` gave."""
    return [kin_sentence(a, b, c) for a, b, c in akin]


def beside(adapters: Sequence[Adapter]) -> list[str]:
    """Tensors that were trained whole: a sum in which they count once takes them over as they are; no other merge does."""
    return [
        f"{a.name} also trained {', '.join(sorted(a.extras)[:3])} whole: only a sum at weight 1 takes that over, as it is and for "
        f"every task{_low_rank(a)}"
        for a in adapters
        if a.extras
    ]


def _low_rank(adapter: Adapter) -> str:
    if no_matrix(adapter.extras):
        return ""
    return f" (plait convert {place(adapter)} --base DIR makes it low rank, which every method merges)"


def serving(adapters: Sequence[Adapter]) -> list[str]:
    """Say what serving these adapters side by side asks for."""
    if of_images(adapters):
        return [
            "diffusers keeps several of them on one pipeline: load_lora_weights for each, then set_adapters with weights"
        ]
    notes = costs.vllm_notes(adapters)
    if any(a.extras for a in adapters):
        notes.append(
            f"vLLM {VERSION} refuses modules_to_save other than classifier and score: plait convert --base first"
        )
    return notes


def other_base(adapters: Sequence[Adapter], base: BaseModel | None) -> list[str]:
    """Note a base that the adapters do not name; what it is called is all that can be seen."""
    named = sorted({a.base for a in adapters if a.base})
    if base is None or any(same_name(base.name, n) for n in named) or not named:
        return []
    return [
        f"the adapters name {', '.join(named)} as their base, and {base.name} was given: what is measured holds where "
        "both are the same weights"
    ]


def alike(fidelities: Sequence[Fidelity]) -> list[str]:
    """Adapters that choose on every text what the base chooses: nothing can be told about them there."""
    names = sorted({t.task for f in fidelities for t in f.tasks if t.agreement_base == 1.0})
    return [
        f"how well {n} is kept: on these texts it chooses everywhere what the bare base chooses, so that they cannot tell a merge "
        "that keeps it from one that does not; give texts on which it matters"
        for n in names
    ]


def coarse(fidelity: Fidelity, classifiers: Sequence[str]) -> list[str]:
    """Say how much one text is worth, where what is kept of an adapter is told by few.

    The share that is kept is of the texts on which an adapter chooses otherwise than the bare base, and one of k such texts is 100 / k
    percent of it.

    Args:
        fidelity: Of any merge on the texts that it was judged on.
        classifiers: Names of the tasks that answer with a class.
    """
    others = {t.task: (round((1.0 - t.agreement_base) * t.n), t.n) for t in fidelity.tasks if t.task in classifiers}
    told = {task: pair for task, pair in others.items() if 0 < pair[0] < ENOUGH}
    if not told:
        return []
    name, (apart, n) = min(told.items(), key=lambda pair: pair[1])
    return [
        f"how exact the shares are: {name} chooses otherwise than the bare base on {apart} of the {plural(n, 'text')} that they are of, "
        f"so that one text is {100 / apart:.0f} % of what is kept of it"
    ]


def few(panel: Panel, fewest: int, *, refine: bool = True, fit: bool = True, heads: bool = True) -> list[str]:
    """Say what is left out because some adapter has too few texts to hold any out.

    Args:
        panel: Base, adapters and texts.
        fewest: With fewer texts than this of an adapter none are held out.
        refine: Whether weights are to be learnt.
        fit: Whether a fit is asked for.
        heads: Whether heads are to follow.
    """
    name, texts = min(panel.texts.items(), key=lambda pair: len(pair[1]))
    asked = {
        "no weights are learnt": refine,
        "nothing is fitted": fit and can_fit(panel),
        "heads stay as they are": heads and not panel.is_text,
    }
    left_out = [what for what, wanted in asked.items() if wanted]
    if len(texts) >= fewest or not left_out:
        return []
    first = f"{', '.join(left_out[:-1])} and " if left_out[1:] else ""
    return [
        f"{len(texts)} text{'s' * (len(texts) != 1)} of {name} to choose by: with fewer than {fewest} of every adapter none can be "
        f"held out, so {first}{left_out[-1]}"
    ]


def too_few_to_repair(panel: Panel, least: int) -> str | None:
    """Say of classifiers that they have too few texts for a repair, naming the fewest; None where they have `least`, and of text models."""
    name, texts = min(panel.texts.items(), key=lambda pair: len(pair[1]))
    if panel.is_text or len(texts) >= least:
        return None
    count = plural(len(texts), "text")
    return (
        f"{count} of {name}; with 100 of each classifier a repair took more than it gave, with 400 and 500 it gave more"
    )


def worth_a_repair(panel: Panel) -> list[str]:
    """Say of classifiers that their texts are enough for a repair, which nobody asked for."""
    if panel.is_text or too_few_to_repair(panel, TEXTS_TO_REPAIR):
        return []
    fewest = min(map(len, panel.texts.values()))
    return [
        f"not tried: a repair, for which {fewest} texts of each adapter are enough (--repair auto); it has mostly kept more"
    ]


def next_step(adapters: Sequence[Adapter], base: BaseModel | None) -> str:
    """Write the command that measures, ready to be pasted but for the texts."""
    given = [place(a) for a in adapters]
    texts = [f"--text {a.name}=FILE" for a in adapters]
    known = base.written if base else next((a.base for a in adapters if Path(a.base).is_dir()), "")
    return " ".join(["plait advise", shlex.quote(known) if known else "BASE", *given, *texts])


def that_merge(
    adapters: Sequence[Adapter], base: BaseModel, option: str, repair: int, *, chat: Chat | None = None
) -> str | None:
    """Write the command that makes a merge which `advise` recommends, but for the texts, which have to be given again."""
    if not option.startswith("merged"):
        return None
    words = ["plait merge auto", shlex.quote(base.written), *(place(a) for a in adapters), "--out merged"]
    if "repaired" in option:
        words.append(f"--repair {repair}")
    if chat and chat.answered:
        words.append("--chat" if chat.used else "--answers")
    rank = option.rpartition("rank ")[2]
    return " ".join([*words, *([f"--rank {rank}"] if rank.isdigit() else [])])


def that_model(base: BaseModel, option: str) -> str | None:
    """Write the command that bakes what `that_merge` wrote, where baking is what `advise` recommends."""
    return f"plait merge merged --bake {shlex.quote(base.written)} --out full-model" if "baked" in option else None


def place(adapter: Adapter) -> str:
    """Write an adapter as it is given on the command line."""
    path = str(adapter.source.get("hub") or adapter.source.get("path", adapter.name))
    own = path.partition("@")[0].rpartition("/")[2] if "hub" in adapter.source else Path(path).resolve().name
    return shlex.quote(path if own == adapter.name else f"{adapter.name}={path}")
