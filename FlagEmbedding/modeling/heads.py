"""The sparse and colbert heads of unified fine-tuning, in the two files that upstream's loader reads.

``colbert_linear.pt`` and ``sparse_linear.pt`` hold the state dict of one ``nn.Linear`` each (``weight``, ``bias``).
They are the only copy: a second one in another format could disagree with them. They are read with ``weights_only``, so
no pickled code runs.
"""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from torch import Tensor, nn

from FlagEmbedding.utils.adapter_folder import files_of
from FlagEmbedding.utils.errors import DataError, UsageError
from FlagEmbedding.utils.io import PathLike, atomic_open

FIRST_WEIGHT = 0.1  # of every token in a new sparse head: about what BGE-M3 gives a word
HEAD_FILES = {"colbert": "colbert_linear.pt", "sparse": "sparse_linear.pt"}


def load_heads(folder: PathLike | None, hidden_size: int, colbert_dim: int = -1) -> tuple[nn.Linear, nn.Linear, bool]:
    """Both heads from a checkpoint folder, or new ones (:func:`new_heads`) where it has none.

    Args:
        folder: checkpoint folder; None for new heads.
        hidden_size: D, what the heads read.
        colbert_dim: width of colbert vectors; -1: as stored, for new heads D.

    Returns:
        colbert head D to Dc, sparse head D to 1, and whether they were found.

    Raises:
        DataError: only one of the files is there, or one does not fit.
        UsageError: ``colbert_dim`` contradicts the stored head.
    """
    folder = None if folder is None else files_of(folder, *HEAD_FILES.values(), "modules.json")
    paths = {name: Path(folder) / file for name, file in HEAD_FILES.items()} if folder is not None else {}
    present = [name for name, path in paths.items() if path.is_file()]
    if not present:
        width = hidden_size if colbert_dim == -1 else colbert_dim
        return *new_heads(hidden_size, width), False
    if len(present) == 1:
        lacking = next(file for name, file in HEAD_FILES.items() if name not in present)
        raise DataError(f"{folder} holds {HEAD_FILES[present[0]]} but no {lacking}: both heads belong together")
    colbert = _read(paths["colbert"], hidden_size)
    sparse = _read(paths["sparse"], hidden_size)
    if sparse.out_features != 1:
        raise DataError(f"{paths['sparse']}: expected one weight a token, got {sparse.out_features}")
    if colbert_dim not in (-1, colbert.out_features):
        raise UsageError(
            f"--colbert_dim {colbert_dim} contradicts {paths['colbert']}, whose vectors have {colbert.out_features} "
            "dimensions: leave --colbert_dim out"
        )
    return colbert, sparse, True


def new_heads(hidden_size: int, colbert_dim: int) -> tuple[nn.Linear, nn.Linear]:
    """Heads that rank from the first step on, for a base that has none.

    Sparse: every token weighs ``FIRST_WEIGHT``, so the score starts as the number of tokens in common. With
    ``nn.Linear``'s own values half of the tokens (of some texts all) start below 0, where relu has no gradient.
    Colbert: orthonormal rows, so inner products of the encoder's own token states survive (all of them at full width).
    """
    colbert, sparse = nn.Linear(hidden_size, colbert_dim), nn.Linear(hidden_size, 1)
    with torch.no_grad():
        sparse.weight.zero_()
        sparse.bias.fill_(FIRST_WEIGHT)
        colbert.bias.zero_()
        if colbert_dim == hidden_size:
            nn.init.eye_(colbert.weight)
        else:  # a generator of its own: the same heads for every seed, and later draws stay as they were
            nn.init.orthogonal_(colbert.weight, generator=torch.Generator().manual_seed(0))
    return colbert, sparse


def read_state(path: Path) -> dict[str, Tensor]:
    """The state dict in a head file. Raises ``DataError`` if it holds anything else."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise DataError(f"{path} cannot be read as the weights of a head ({type(error).__name__})") from error
    if not isinstance(state, dict) or set(state) != {"weight", "bias"}:
        raise DataError(f"{path}: expected the tensors weight and bias of a linear layer")
    return state


def _read(path: Path, hidden_size: int) -> nn.Linear:
    state = read_state(path)
    width, reads = state["weight"].shape
    if reads != hidden_size:
        raise DataError(f"{path} reads states of {reads} dimensions, the encoder gives {hidden_size}")
    head = nn.Linear(reads, width, dtype=torch.float32)
    head.load_state_dict(state)
    return head


def save_heads(folder: PathLike, states: dict[str, dict[str, Tensor]]) -> None:
    """Write head state dicts (keys ``colbert`` and ``sparse``) into ``folder``, on the CPU."""
    for name, state in states.items():
        with atomic_open(Path(folder) / HEAD_FILES[name], "wb") as stream:
            torch.save({key: value.detach().cpu().contiguous() for key, value in state.items()}, stream)
