"""FSDP2 under the packed engine: each layer's weights lie divided over the processes and are gathered when it runs.

FSDP gathers the weights in a module's own ``forward``, which the packed engine goes around. So each layer gets its
packed computation as a method, and FSDP is told that this method is a forward too.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from FlagEmbedding.modeling.encoder import M3Encoder
from FlagEmbedding.modeling.linear import KEEPS
from FlagEmbedding.modeling.packed import LAYER_METHOD, run_layer


def shard(model: M3Encoder, mesh: DeviceMesh | None = None, **options: Any) -> None:
    """Divide the model's weights over the processes, layer by layer, and the rest (embeddings, heads) as one group.

    Args:
        model: changed in place; its parameters become DTensors.
        mesh: the processes; None: all of them.
        options: of ``torch.distributed.fsdp.fully_shard``.
    """
    for layer in model.model.encoder.layer:  # type: ignore[union-attr]
        fully_shard(layer, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    let_packed(model)


def let_packed(model: M3Encoder) -> None:
    """Let a model that FSDP2 has sharded already run packed, and be asked outside of its forward (``encode_alone``)."""
    for layer in model.model.encoder.layer:  # type: ignore[union-attr]
        if isinstance(layer, FSDPModule):
            setattr(layer, LAYER_METHOD, MethodType(run_layer, layer))
            register_fsdp_forward_method(layer, LAYER_METHOD)  # type: ignore[arg-type]
    for module in model.modules():
        setattr(module, KEEPS, False)  # a whole copy of frozen weights would undo the sharding
    register_fsdp_forward_method(model, "encode_alone")
    model.sharded = True
