"""What a choice has done so far, kept beside its output until that is written: the same command goes on from there."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from plait.adapters.lora import Adapter
from plait.disk import store
from plait.disk.locks import locked, system_errors
from plait.disk.space import require_space
from plait.errors import EnvironmentFault, InputError
from plait.fidelity.panel import Panel, parts_of
from plait.fidelity.texts import Texts
from plait.learning.checkpoint_files import Answered, Piece, State, read_identity, read_state, write_state
from plait.learning.checkpoint_reach import ANSWERS, MERGE, SCORES, Change, are_there, begun_otherwise, described
from plait.model.base import BaseModel
from plait.progress import OnProgress
from plait.training.checkpoints import (
    checkpoint_root,
    latest_whole,
    mark_root,
    recorded_identity,
    require_ours,
    said_kept,
    seal,
)

# Version of what a checkpoint holds; raised with every change of it, or of the order in which a choice does what it does.
FORMAT = 2
# What may be computed again keeps at most this share of the time busy with writing.
SHARE = 0.05
# Bytes left free for what is written beside tensors: the JSON of a checkpoint, and the record of the result.
BESIDE = 1 << 20

_BASE = "base"


def state_of(wanted: Mapping[str, Any], base: BaseModel | None, settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Say what a state belongs to: the result's identity, and what else decides its last bits.

    Args:
        wanted: Identity of the result (`plait.disk.store.identity`).
        base: The base as it is held.
        settings: Settings that are no part of that identity.
    """
    held = {"device": base.torch_device.type, "dtype": base.dtype} if base else {}
    return {**wanted, "state": {**settings, **held, **store.versions(), "format": FORMAT}}


def remove_beside(out: Path, wanted: Mapping[str, Any]) -> None:
    """Remove what is left of a run that was ended after its result was written.

    Args:
        out: The result.
        wanted: Its identity; what lies there of another result stays.
    """
    root = checkpoint_root(out)
    recorded = {k: v for k, v in recorded_identity(root).items() if k != "state"} if root.exists() else {}
    if recorded and not store.differences(recorded, wanted):
        with contextlib.suppress(EnvironmentFault), locked(root, output=out):  # somebody may be making it again
            shutil.rmtree(root, ignore_errors=True)


@contextlib.contextmanager
def checkpoints_beside(
    out: Path,
    identity: Mapping[str, Any],
    room: int,
    on_progress: OnProgress = lambda _: None,
    *,
    overwrite: bool = False,
) -> Iterator[Checkpoints]:
    """Go on from what lies beside an output, and keep a second run of it out meanwhile.

    Whatever ends it before the result is there, refusals apart, has a note added that says where what is done is kept.

    Args:
        out: The output.
        identity: What the state belongs to (`state_of`).
        room: Bytes that the result will take, which are left free.
        on_progress: Told what a person should know.
        overwrite: Whether what was done with other settings, and does not hold with these, may be lost.

    Raises:
        EnvironmentFault: Another process is at it.
        UsageError: It would be lost and may not; what stands there is none of plait's.
    """
    checkpoints = Checkpoints(checkpoint_root(out), identity, room, on_progress)
    with locked(
        checkpoint_root(out), output=out, doing="plait merge auto"
    ):  # before anything there is looked at, or let go
        checkpoints.go_on(out, overwrite=overwrite)
        try:
            yield checkpoints
        except BaseException as e:
            if checkpoints.root is not None and (kept := said_kept(checkpoints.root)):
                e.add_note(kept)
            raise


@dataclass(slots=True)
class Checkpoints:
    """What is done already, and where it is kept.

    Args:
        root: Folder of the checkpoints; None where nothing is kept.
        identity, room, on_progress: As `checkpoints_beside` has them.
    """

    root: Path | None = None
    identity: Mapping[str, Any] = field(default_factory=dict)
    room: int = 0
    on_progress: OnProgress = lambda _: None
    _state: State = field(default_factory=State)
    _pieces: dict[str, Piece] = field(default_factory=dict)
    _panel: Panel | None = None
    _merges: Sequence[Adapter] = ()
    _number: int = 0
    _kept_at: float = 0.0
    _seconds: float = 0.0
    _lacks_room: bool = False

    def go_on(self, out: Path, *, overwrite: bool = False) -> None:
        """Take over what is there and holds for this identity.

        What does not is on the disk until something is written in its place: a mistake in the command loses nothing.

        Args:
            out: What the output is called.
            overwrite: Whether what does not hold may be lost.

        Raises:
            UsageError: It may not, and there is some; or the folder is none of plait's.
        """
        root = self.root
        if root is None:
            return
        require_ours(root)
        numbers = (p.name.rpartition("-")[2] for p in root.glob("checkpoint-*"))
        # Damaged ones count: whatever is written from here on has to be the newest.
        self._number = max((int(n) for n in numbers if n.isdigit()), default=0)
        if not root.exists() or (checkpoint := latest_whole(root)) is None:
            return
        change = Change.of(read_identity(checkpoint) or recorded_identity(root), self.identity)
        otherwise = f", begun otherwise ({'; '.join(change.said)})" if change.said else ""
        try:
            state = read_state(checkpoint)
        except InputError as e:
            if otherwise and not overwrite:
                raise begun_otherwise(out, checkpoint, change, "", "") from None
            self.on_progress(f"{e}: begun anew")
            return
        holds = {n: p for n, p in state.pieces.items() if change.holds(n, p.values)}
        done, lost, stays = (
            described({n: p.values for n, p in some.items()})
            for some in (state.pieces, {n: p for n, p in state.pieces.items() if n not in holds}, holds)
        )
        if len(holds) < len(state.pieces) and not overwrite:
            raise begun_otherwise(out, checkpoint, change, done, lost if holds else "")
        self._pieces = holds
        self._state = replace(state, pieces={}) if ANSWERS not in change.reached else State()
        if SCORES not in holds:  # what they answered belongs to the scores
            self._state = replace(self._state, answered=tuple(a for a in self._state.answered if not a.of_merge))
        if stays:
            self.on_progress(f"going on from {root}{otherwise}: {are_there(stays)}")
        elif done:
            self.on_progress(f"{root} was{otherwise[1:]}: begun anew")

    def remove(self) -> None:
        """Let all of it go: the result is there."""
        if self.root is not None:
            shutil.rmtree(self.root, ignore_errors=True)

    def refused(self) -> None:
        """Let what was done go, since it would be refused again; not what was begun otherwise and is still there."""
        if self.root is not None and recorded_identity(self.root) == self.identity:
            shutil.rmtree(self.root, ignore_errors=True)
        self.root = None

    def piece(self, name: str) -> Piece | None:
        """Give what was computed under a name; None where it was not."""
        return self._pieces.get(name)

    def known(self, base: BaseModel, adapters: Sequence[Adapter], texts: Mapping[str, Texts]) -> Panel | None:
        """Make a panel that knows what adapters have answered and written; None where nothing is known."""
        if not (self._state.answered or self._state.written):
            return None
        panel = Panel(base, parts_of(adapters), texts)
        for task, rows in self._state.written.items():
            panel.answers.update({(task, texts[task][i]): ids for i, ids in rows.items() if i < len(texts[task])})
        self._answer(panel, {_BASE: None, **_named("adapter", _own(panel))})
        return panel

    def watch(self, panel: Panel) -> None:
        """Keep, from now on, what is answered and written on a panel, with every checkpoint."""
        self._panel = panel

    def watch_writing(self, panel: Panel) -> None:
        """Keep what adapters have written after their prompts so far."""
        if MERGE not in self._pieces:
            self.watch(panel)
            self.keep(ANSWERS, Piece, later=True)

    def watch_merges(self, merges: Sequence[Adapter]) -> None:
        """Keep what these merges answer too, and have them know what they did."""
        self._merges = merges
        if self._panel is not None:
            self._answer(self._panel, _named("merge", merges))

    def keep(
        self, name: str, piece: Callable[[], Piece], *, instead_of: Sequence[str] = (), later: bool = False
    ) -> None:
        """Write a checkpoint with one piece more.

        Args:
            name: Name of the piece.
            piece: Gives it.
            instead_of: Names of pieces that nobody needs any more.
            later: Whether this may be left out while the last checkpoint is young: what is lost is little.
        """
        if self.root is None:
            return
        begun = time.monotonic()
        if later and self._kept_at and begun - self._kept_at < self._seconds / SHARE:
            return
        self._pieces = {n: p for n, p in self._pieces.items() if n not in instead_of} | {name: piece()}
        self._write(self.root)
        self._kept_at = time.monotonic()
        self._seconds = self._kept_at - begun

    def _write(self, root: Path) -> None:
        state = self._now()
        try:
            require_space(root, state.nbytes + self.room + BESIDE)
            with system_errors(root):
                mark_root(root, self.identity)
                stage = root / "staging"
                shutil.rmtree(stage, ignore_errors=True)
                stage.mkdir()
                write_state(stage, state, self.identity)
                self._number += 1
                seal(stage, root / f"checkpoint-{self._number}")
            self._lacks_room = False
        except EnvironmentFault as e:  # the result may have room all the same
            shutil.rmtree(root / "staging", ignore_errors=True)
            if not self._lacks_room:  # once: a long repair would say it every few steps
                self.on_progress(f"what is done from here on is not kept: {e}")
            self._lacks_room = True

    def _now(self) -> State:
        panel = self._panel
        if panel is None:
            return State(self._pieces)
        places = {task: {text: i for i, text in enumerate(rows)} for task, rows in panel.texts.items()}
        names = {id(None): _BASE}
        for kind, some in (("adapter", _own(panel)), ("merge", self._merges)):
            names |= {id(a): name for name, a in _named(kind, some).items()}
        answered = [
            Answered.of(task, names[id(adapter)], scale, rows, places[task])
            for task, adapter, scale, rows in panel.known.entries()
            if rows and id(adapter) in names
        ]
        written: dict[str, dict[int, tuple[int, ...]]] = {}
        for (task, text), ids in panel.answers.items():
            if text in places[task]:
                written.setdefault(task, {})[places[task][text]] = ids
        return State(self._pieces, tuple(answered), written)

    def _answer(self, panel: Panel, names: Mapping[str, Adapter | None]) -> None:
        """Have adapters or merges know what they answered."""
        for a in self._state.answered:
            if a.who in names:
                texts, logits = panel.texts[a.task], a.logits.numpy()
                rows = panel.known.of(a.task, names[a.who], a.scale)
                rows.update((texts[i], row) for i, row in zip(a.places, logits, strict=True) if i < len(texts))


NOTHING_KEPT = Checkpoints()


def _own(panel: Panel) -> list[Adapter]:
    """The panel's adapters, each once."""
    return list({id(p.adapter): p.adapter for p in panel.parts}.values())


def _named(kind: str, adapters: Sequence[Adapter]) -> dict[str, Adapter | None]:
    return {f"{kind} {i}": a for i, a in enumerate(adapters)}
