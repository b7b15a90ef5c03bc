"""``--report_to``: what trackers are told beside the log's scalars, which Hugging Face's callbacks send by themselves.

Per-layer lists stand in ``trainer_state.json`` alone; a tracker draws curves, so it gets each of their values under a
name of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback


def flat(details: dict[str, Any]) -> dict[str, float]:
    """``router_load`` ``[layers][experts]`` as ``router_load/layer_0/expert_1`` …, lists per layer as ``…/layer_0``."""
    named: dict[str, float] = {}
    for name, layers in details.items():
        for layer, value in enumerate(layers):
            place = f"{name.removesuffix('_per_layer')}/layer_{layer}"
            if isinstance(value, list):
                named |= {f"{place}/expert_{expert}": share for expert, share in enumerate(value)}
            else:
                named[place] = value
    return named


def tell(callbacks: Sequence[TrainerCallback], details: dict[str, Any], *state: Any, **more: Any) -> None:
    """Send ``details`` to those of ``callbacks`` that are trackers, at the step that ``state`` says.

    Args:
        state: the Trainer's arguments, state and control, as its callbacks take them.
        more: what they take beside these.
    """
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    kinds = tuple(kind for kind in INTEGRATION_TO_CALLBACK.values() if isinstance(kind, type))
    for callback in callbacks:
        if isinstance(callback, kinds):
            callback.on_log(*state, logs=flat(details), **more)
