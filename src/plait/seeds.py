"""Seeds of named things, hashed from the run's seed: neither the order nor the number of the things matters."""

from __future__ import annotations

import hashlib


def seed_of(*parts: object) -> int:
    """Hash the parts to a seed of 63 bits.

    Args:
        parts: Numbers and names that tell one draw from every other, such as (seed, module, "cut").

    >>> seed_of(0, "layer.0.q", "cut") == seed_of(0, "layer.0.q", "cut") != seed_of(1, "layer.0.q", "cut")
    True
    """
    text = "\x1f".join(str(p) for p in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def named_seed(seed: int, name: str) -> int:
    """Hash a seed and one name to a seed of 56 bits: the starts of layers and of subspaces, whose bits are on record.

    Args:
        seed: The run's seed.
        name: What is drawn.
    """
    return int.from_bytes(hashlib.sha256(f"{seed}\0{name}".encode()).digest()[:7], "little")
