"""Which bases store their linear layers (in, out), as Conv1D does."""

from __future__ import annotations

# Model types of transformers whose linear layers, or all square ones of them, are Conv1D.
_CONV1D = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"}


def is_turned(model_type: object, fan_in_fan_out: bool, delta: tuple[int, int], stored: tuple[int, ...]) -> bool:
    """Whether a base stores a linear layer's weight (in, out); of a square one its shape does not tell.

    Then the model decides, not the adapter: PEFT sets `fan_in_fan_out` aside where it meets a linear layer, and on one of 4 or 8 bits
    leaves it in the config as somebody wrote it. It counts for models that transformers does not know.

    Args:
        model_type: Of the base's config.
        fan_in_fan_out: Of the adapter's.
        delta: (out, in).
        stored: Shape of the weight.
    """
    if tuple(stored) != (delta[1], delta[0]) or not (fan_in_fan_out or model_type in _CONV1D):
        return False
    if delta[0] != delta[1] or model_type in _CONV1D:
        return True
    from transformers import CONFIG_MAPPING

    return model_type not in CONFIG_MAPPING
