"""What is asked of merges in a tournament, call by call and adapter by adapter, each of which is kept once it is answered."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from plait.border.records import from_json, to_json
from plait.choosing.candidates import Tried
from plait.fidelity.measure import Fidelity, TaskFidelity
from plait.fidelity.panel import Panel
from plait.fidelity.score import fidelities
from plait.learning.checkpoint_files import Piece
from plait.learning.checkpoint_reach import SCORES
from plait.learning.checkpoints import Checkpoints
from plait.progress import OnProgress

_CALLS, _BEGUN = "calls", "begun"


@dataclass(frozen=True, slots=True)
class Call:
    """Merges at scales that are scored together.

    Args:
        asked: Place of each merge among all of them, and its scale.
        texts: Texts of each adapter that they read, at most.
        scores: Their fidelity; () while not all adapters' texts are read.
        by_part: Part whose texts are read -> the fidelity of each to its adapter.
    """

    asked: Sequence[Sequence[float]]
    texts: int
    scores: Sequence[Fidelity] = ()
    by_part: MutableMapping[str, list[TaskFidelity]] = field(default_factory=dict)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Call:
        """Read it from a checkpoint."""
        scores = [Fidelity(tuple(map(_task, f["tasks"])), f["general_kl"]) for f in values["scores"]]
        by_part = {name: list(map(_task, tasks)) for name, tasks in values["by_part"].items()}
        return cls(values["asked"], values["texts"], scores, by_part)


@dataclass(slots=True)
class Asking:
    """The calls of one tournament.

    Args:
        tried: All merges; a checkpoint names each by its place.
        checkpoints: Where the answers are kept.
        on_progress: Called with what is being done.
        before: Calls of an earlier run, which asked the same in the same order; the last may have ended half-way.
        calls: Calls so far.
    """

    tried: Sequence[Tried]
    checkpoints: Checkpoints
    on_progress: OnProgress
    before: list[Call] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)

    @classmethod
    def of(cls, tried: Sequence[Tried], checkpoints: Checkpoints, on_progress: OnProgress) -> Asking:
        """Begin with the calls that are kept."""
        checkpoints.watch_merges([t.adapter for t in tried])
        piece = checkpoints.piece(SCORES)
        calls = [*piece.values[_CALLS], *piece.values[_BEGUN]] if piece else []
        return cls(tried, checkpoints, on_progress, list(map(Call.of, calls)))

    def scores(self, panel: Panel, entries: Sequence[tuple[Tried, float]], n: int, said: str) -> Sequence[Fidelity]:
        """Score merges at scales on a panel's texts.

        Args:
            panel: The texts.
            entries: Merges, each with a scale.
            n: Texts of each adapter, at most.
            said: What a person is told that this is.
        """
        place = {id(t): i for i, t in enumerate(self.tried)}
        asked = [[place[id(t)], scale] for t, scale in entries]
        known = self.before.pop(0) if self.before else None
        if known is None or known.asked != asked:
            self.before, known = [], Call(asked, n)
        if not known.scores:
            self.on_progress(said)
            merges = [(t.adapter, scale) for t, scale in entries]
            by_part = known.by_part
            known = Call(asked, n, fidelities(panel, merges, self._reporter(known), keep=True, by_part=by_part))
            self._keep([*self.calls, known])
        self.calls.append(known)
        return known.scores

    def _reporter(self, begun: Call) -> OnProgress:
        """Report an adapter's texts as read, and keep what they said."""
        parts = [len(begun.by_part)]

        def report(line: str) -> None:
            self.on_progress(line)
            if len(begun.by_part) > parts[-1]:
                parts.append(len(begun.by_part))
                self._keep(self.calls, begun)

        return report

    def _keep(self, calls: Sequence[Call], *begun: Call) -> None:
        def piece() -> Piece:
            return Piece({_CALLS: [to_json(c) for c in calls], _BEGUN: [to_json(c) for c in begun]})

        self.checkpoints.keep(SCORES, piece, later=bool(begun))


def _task(values: Mapping[str, Any]) -> TaskFidelity:
    return from_json(TaskFidelity, values)
