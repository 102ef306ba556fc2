"""What an encoder-decoder's decoder reads while it is asked for an answer that is known."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from plait.errors import InputError
from plait.tasks.task import IGNORED


def decoder_inputs(model: Any, labels: Tensor) -> Tensor:
    """Shift labels to the right behind the start token, pads in the place of those that are ignored.

    Most of transformers' classes have a method for it. Those of M2M100 (NLLB), NLLB-MoE and Blenderbot have none; what their `forward`
    makes of labels is this.

    Args:
        model: An encoder-decoder.
        labels: (n, length) token ids.

    Returns:
        (n, length) token ids.

    Raises:
        InputError: Its config names no token to start with, or none to pad with.
    """
    own = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if own is not None:
        shifted: Tensor = own(labels=labels)
        return shifted
    start, pad = (getattr(model.config, key, None) for key in ("decoder_start_token_id", "pad_token_id"))
    if start is None or pad is None:
        raise InputError(
            f"config.json has no {'decoder_start_token_id' if start is None else 'pad_token_id'}",
            where=f"a base of kind {model.config.model_type}",
            hint="the kind seq2seq needs it",
        )
    shifted = labels.roll(1, 1)
    shifted[:, 0] = start
    return shifted.masked_fill(shifted == IGNORED, pad)
