"""What other libraries read in our checkpoints: sentence-transformers' module list, and transformers' remote code.

A dense checkpoint is a plain encoder that every library knows. One with experts names the file that travels with it in
``auto_map``, and is meant for ``AutoModel`` and ``SentenceTransformer`` with ``trust_remote_code=True``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from FlagEmbedding.modeling.remote_code import modeling_moe_encoder as remote

REMOTE_FILE = Path(remote.__file__)
# Paths that sentence-transformers has understood since version 2 and still does.
_MODULES = (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))


def remote_code_fields(base_class: str) -> dict[str, Any]:
    """Fields of ``config.json`` by which transformers finds the travelling class over ``base_class``.

    ``model_type`` stays the base's: the published layout has it so, and AutoConfig and AutoTokenizer need no remote
    code. But then AutoModel without trust_remote_code picks its own encoder, and gives every expert layer random dense
    weights behind a warning (transformers 5.23). ``transformers_weights`` prevents that: the plain class looks for a
    weights file of that name, which does not exist, and stops; the travelling class takes the field out. A model type
    of our own would stop it too, but would ask for trust even to read the configuration or the tokenizer.
    """
    return {
        "auto_map": {"AutoModel": f"{REMOTE_FILE.stem}.{remote.CLASS_PREFIX}{base_class}"},
        "transformers_weights": remote.GUARD,
    }


def sentence_transformers_files(
    config: PreTrainedConfig, pooling: str, normalize: bool, max_length: int
) -> dict[str, Any]:
    """JSON files by path with which ``SentenceTransformer(folder)`` gives our dense vectors."""
    modules = _MODULES if normalize else _MODULES[:2]
    files: dict[str, Any] = {
        "modules.json": [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{name}"}
            for i, (path, name) in enumerate(modules)
        ],
        "sentence_bert_config.json": {"max_seq_length": max_length, "do_lower_case": False},
        "1_Pooling/config.json": {
            "word_embedding_dimension": config.hidden_size,
            "pooling_mode_cls_token": pooling == "cls",
            "pooling_mode_mean_tokens": pooling == "mean",
            "pooling_mode_max_tokens": False,
            "pooling_mode_mean_sqrt_len_tokens": False,
        },
    }
    if normalize:
        files["2_Normalize/config.json"] = {}
    return files
