"""A choice that is ended at a checkpoint, and what lies on the disk then."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from plait.choosing.auto_folders import merge_auto_folders
from plait.choosing.auto_settings import AutoSettings
from plait.fidelity.panel import Panel
from plait.learning.checkpoints import Checkpoints
from plait.training.checkpoints import checkpoint_root


class Killed(BaseException):
    """As if the process had ended here."""


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def killed_after(monkeypatch, writes: int, by: type[BaseException] = Killed) -> None:
    """End the run once so many checkpoints more are written."""
    write, left = Checkpoints._write, [writes]

    def ending(self, root):
        write(self, root)
        left[0] -= 1
        if left[0] == 0:
            raise by

    monkeypatch.setattr(Checkpoints, "_write", ending)


@dataclass
class Begun:
    """Called, it makes a choice, with other settings than the first time, if any, and gives what was said."""

    panel: Panel
    folders: list[str]
    root_of_all: Path
    settings: AutoSettings

    @property
    def root(self) -> Path:
        """Where the first run's checkpoints are."""
        return checkpoint_root(self.root_of_all / "out")

    def __call__(
        self, name: str = "out", general=(), *, texts=None, overwrite=False, dtype="keep", **settings
    ) -> list[str]:
        said: list[str] = []
        merge_auto_folders(
            self.folders, self.root_of_all / name, base=self.panel.base, texts=texts or dict(self.panel.texts), general=general,
            settings=replace(self.settings, **settings), overwrite=overwrite, dtype=dtype, on_progress=said.append,
        )  # fmt: skip
        return said
