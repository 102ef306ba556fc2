"""Passes that begin where an earlier one of the same inputs has come to: blocks that change no more are not run again."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn


@dataclass(slots=True)
class Resuming:
    """What the blocks of a model have put out, batch by batch, as far as they will not change any more.

    Args:
        blocks: The model's blocks, which run one after the other, each on what the one before puts out; () for a model that
            is run from the start every time.
        block_of: Module name -> the block it lies in.
    """

    blocks: Sequence[nn.Module] = ()
    block_of: Mapping[str, int] = field(default_factory=dict)
    _outputs: dict[Hashable, tuple[int, Any]] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, modules: Mapping[str, nn.Module]) -> Resuming:
        """Find the outermost list of blocks in which all these modules lie; without one nothing is resumed."""
        for blocks in (m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) > 1):
            owner = {id(inner): i for i, block in enumerate(blocks) for inner in block.modules()}
            if all(id(m) in owner for m in modules.values()):
                return cls(list(blocks), {name: owner[id(m)] for name, m in modules.items()})
        return cls()

    @contextmanager
    def at(self, key: Hashable, modules: Sequence[str]) -> Iterator[None]:
        """Within the block, let one pass begin at the last block reached, and note what the one before these modules' puts out.

        Args:
            key: The batch; its inputs are those of every other pass of this key.
            modules: Modules the pass is run for: no module of the blocks before theirs is changed later.
        """
        if not self.blocks:
            yield
            return
        target = min(self.block_of[m] for m in modules)
        done, output = self._outputs.get(key, (0, None))
        noted: list[Any] = []
        if target > done:
            handle = self.blocks[target - 1].register_forward_hook(lambda _, inputs, result: noted.append(result))
        ready = self.blocks[: done if done <= target else 0]
        before = [block.__dict__.get("forward") for block in ready]
        try:
            for block in ready:
                # What those before the last one say is not read by it.
                block.forward = lambda *_, **__: output
            yield
        finally:
            for block, own in zip(ready, before, strict=True):
                if own is None:
                    del block.forward
                else:
                    block.forward = own
            if target > done:
                handle.remove()
        if noted:
            self._outputs[key] = (target, noted[-1])

    def stop(self) -> None:
        """Run every pass from the start from here on."""
        self.blocks = ()
        self._outputs.clear()
