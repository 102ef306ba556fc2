"""mlx-lm: what `load(model, adapter_path=FOLDER)` makes of its own adapters."""

from __future__ import annotations

from collections import defaultdict

from plait.loading.account import Account, Fault, Placement
from plait.loading.contents import MlxFolder

VERSION = "0.28"
_HALVES = (".lora_a", ".lora_b")


def mlx_account(folder: MlxFolder) -> Account:
    """Every tensor: lora_a (in, rank) and lora_b (rank, out) of each module, at the config's one scale."""
    lines, faults = [], []
    halves: dict[str, dict[str, str]] = defaultdict(dict)
    parameters = folder.config.get("lora_parameters")
    rank = parameters.get("rank") if isinstance(parameters, dict) else None
    if not isinstance(parameters, dict) or not {"rank", "scale"} <= set(parameters):
        faults.append(Fault("lora_parameters", "does not say rank and scale: mlx-lm stops", "restore the config", True))
    for tensor, stored in folder.header.tensors.items():
        suffix = next((s for s in _HALVES if tensor.endswith(s)), "")
        if not suffix:
            faults.append(
                Fault(
                    tensor,
                    "is no half of factors: written over the base's weight of that name, if there is one",
                    "leave it out",
                )
            )
        elif len(stored.shape) < 2 or rank not in stored.shape:
            faults.append(
                Fault(tensor, f"is {list(stored.shape)}, and the config says rank {rank}", "restore the config", True)
            )
        else:
            halves[tensor.removesuffix(suffix)][suffix] = tensor
        lines.append(Placement(tensor, tensor, suffix[1:] or "weight", "loaded" if suffix else "overwrites"))
    for found in halves.values():
        if len(found) < 2:
            faults.append(
                Fault(
                    next(iter(found.values())),
                    "has no other half: that starts anew, without effect",
                    "take the whole file",
                )
            )
    return Account("mlx-lm", VERSION, tuple(lines), (), tuple(faults), own=True)
