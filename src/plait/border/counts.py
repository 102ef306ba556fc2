"""Counts in sentences: one adapter is, two adapters are."""

from __future__ import annotations


def plural(count: int, noun: str, one: str = "", several: str = "") -> str:
    """Write a count with its noun, which takes an s where there are several, and with the verb that goes with it.

    Args:
        count: How many.
        noun: What, such as "row"; it takes an s.
        one: Verb, or another word behind the noun, where it is one.
        several: The same where it is another number.

    >>> plural(1, "seed"), plural(0, "seed"), plural(1200, "training row"), plural(1, "row", "is", "are")
    ('1 seed', '0 seeds', '1,200 training rows', '1 row is')
    """
    word = agreed(count, one, several)
    return f"{count:,} {noun}{'' if count == 1 else 's'}{word and ' '}{word}"


def agreed(count: int, one: str, several: str) -> str:
    """Choose the word that goes with a count.

    >>> agreed(1, "its", "their"), agreed(0, "its", "their")
    ('its', 'their')
    """
    return one if count == 1 else several
