"""Small things that the checkpoint tests share."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn


def states(model: nn.Module) -> Tensor:
    """Hidden states of fixed rows, one of them padded."""
    ids = torch.randint(6, 300, (3, 11), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    ids = torch.where(mask.bool(), ids, model.config.pad_token_id)
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()]


def apart(model: nn.Module) -> nn.Module:
    """Move every weight, so that experts differ and nothing equals its initialization."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    mine, theirs = a.state_dict(), b.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


def edit_config(folder: Path, **fields: object) -> None:
    config = json.loads((folder / "config.json").read_text("utf-8")) | fields
    config = {key: value for key, value in config.items() if value != "REMOVE"}
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
