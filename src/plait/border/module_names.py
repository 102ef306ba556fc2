"""Names of modules: dotted paths, of which people write the end."""

from __future__ import annotations


def named_by(module: str, target: str) -> bool:
    """Whether a target names a module: by its whole name, or by the words that the name ends in.

    This is how PEFT matches `target_modules` and `exclude_modules`. Other endings need a rule of their own: PEFT takes
    `modules_to_save` by their last letters, in the middle of a word as well, and the keys of `rank_pattern` as regexes.

    >>> named_by("layers.0.q_proj", "q_proj"), named_by("q_proj", "q_proj"), named_by("layers.0.my_q_proj", "q_proj")
    (True, True, False)
    """
    return module == target or module.endswith(f".{target}")
