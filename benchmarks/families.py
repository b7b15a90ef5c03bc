"""What becomes of every class of the installed transformers: packed, padded, equal lengths, or refused, and how right.

    python benchmarks/families.py [--all] [--only NAME …] > benchmarks/results/families.md

For each model type a tiny random model is built from its own configuration class, saved, loaded as a user's checkpoint
is, and four sequences of 3 to 24 tokens are encoded. Beside them the class's own forward encodes each sequence alone;
the table gives the least cosine of the two mean vectors. Types that read text through masked or text encoding heads are
tried; ``--all`` tries every type that ``AutoModel`` knows (minutes).
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import logging
import re
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, MODEL_FOR_TEXT_ENCODING_MAPPING, MODEL_MAPPING, PreTrainedConfig
from transformers.models.auto import modeling_auto
from transformers.utils.logging import disable_progress_bar

from FlagEmbedding.modeling.backbone import load_backbone
from FlagEmbedding.modeling.encoder import M3Encoder
from FlagEmbedding.modeling.families import try_out
from FlagEmbedding.modeling.tokens import TokenBatch
from FlagEmbedding.utils.errors import UserError

# Sizes by what configurations call them; what is not named here stays at its default.
_SIZES = {
    "hidden_size d_model n_embd dim emb_dim embedding_size model_dim d_embed word_embed_proj_dim attention_hidden_size "
    "true_hidden_size intra_bottleneck_size lru_width": 32,
    "num_hidden_layers n_layers n_layer num_layers encoder_layers decoder_layers num_decoder_layers "
    "num_encoder_layers": 2,
    "num_attention_heads n_heads n_head encoder_attention_heads decoder_attention_heads num_heads num_key_value_heads "
    "n_kv_heads": 2,
    "head_dim d_kv attention_head_size qk_rope_head_dim v_head_dim qk_nope_head_dim d_head entity_emb_size "
    "q_lora_rank kv_lora_rank": 16,
    "intermediate_size d_ff n_inner ffn_dim encoder_ffn_dim decoder_ffn_dim hidden_dim d_inner moe_intermediate_size "
    "shared_expert_intermediate_size ffn_hidden_size expert_ffn_hidden_size": 64,
    "vocab_size entity_vocab_size src_vocab_size tgt_vocab_size": 400,
    "max_position_embeddings n_positions max_seq_len n_ctx": 64,
    "num_experts num_local_experts n_routed_experts moe_num_experts": 4,
    "attention_window": 8,
    "pronunciation_vocab_size shape_vocab_size": 50,
}
# What the defaults would leave untried, and what a tiny model needs.
VARIANTS: dict[str, dict[str, Any]] = {
    "ernie, task ids": {"use_task_id": True},
    "electra, narrow embeddings": {"embedding_size": 16},
    "roformer, narrow embeddings": {"embedding_size": 16},
    "bert, decoder": {"is_decoder": True},
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 8], "pad_token_id": 0},
    "esm": {"pad_token_id": 1, "mask_token_id": 3},
    "esm, absolute positions": {"pad_token_id": 1, "mask_token_id": 3, "position_embedding_type": "absolute"},
}
LARGEST = 5_000_000  # parameters of what still counts as tiny
LENGTHS = (17, 9, 3, 24)
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


@dataclass(frozen=True)
class Outcome:
    """What became of a model type.

    Attributes:
        name: model type, and the variant of its configuration.
        encoder: the class.
        way: ``packed``, ``padded``, ``equal lengths``, ``refused``, or ``not built``: no tiny model of it was made.
        cosine: least cosine of a vector with the class's own; None where it is refused.
        note: the reason.
    """

    name: str
    encoder: str
    way: str
    cosine: float | None = None
    note: str = ""


def encoder_types() -> list[str]:
    """Model types with a masked or a text encoding head, their variants, and a few that have neither."""
    names = {*modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, *modeling_auto.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES}
    return sorted({*names, *VARIANTS, "canine", "bert-generation", "splinter", "bros", "qwen3", "gpt2", "vit"})


def all_types() -> list[str]:
    """Every model type that ``AutoModel`` knows, and the variants."""
    return sorted({*modeling_auto.MODEL_MAPPING_NAMES, *VARIANTS})


def tiny_config(name: str) -> PreTrainedConfig:
    """The configuration of a model type, its sizes cut down."""
    kind = CONFIG_MAPPING[name.partition(",")[0]]
    plain = kind()
    known = {*plain.to_dict(), *inspect.signature(kind.__init__).parameters}
    sizes = {word: size for words, size in _SIZES.items() for word in words.split() if word in known}
    large = {key: value for key, value in _SPECIAL.items() if (getattr(plain, key, None) or 0) >= 400}
    layers = getattr(plain, "layer_types", None)
    kinds = {"layer_types": list(layers)[-2:]} if isinstance(layers, list | tuple) and len(layers) > 1 else {}
    return kind(**{**sizes, **large, **kinds, **VARIANTS.get(name, {})})  # type: ignore[no-any-return]


def encoder_class(config: PreTrainedConfig) -> type[Any]:
    """transformers' encoder for a configuration."""
    found: Any = MODEL_FOR_TEXT_ENCODING_MAPPING.get(type(config), None) or MODEL_MAPPING[type(config)]
    return found[0] if isinstance(found, tuple | list) else found  # type: ignore[no-any-return]


def write_tiny(name: str, folder: Path) -> type[Any]:
    """Write a tiny random model of a type into ``folder``; its class."""
    config = tiny_config(name)
    cls = encoder_class(config)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in cls(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size:,} parameters: its sizes have other names")
    torch.manual_seed(0)
    model = cls(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():  # so that no bias and no extra table is 0
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    model.save_pretrained(folder)
    return cls


def own_vectors(cls: type[Any], folder: Path, tokens: TokenBatch) -> torch.Tensor:
    """The mean of the class's own states, one sequence at a time: ``[N, D]``."""
    model = cls.from_pretrained(folder).eval()
    with torch.no_grad():
        states = [model(input_ids=ids[None]).last_hidden_state[0] for ids in tokens.ids.split(tokens.lengths)]
    return torch.stack([each.mean(dim=0) for each in states])


def try_type(name: str, folder: Path) -> Outcome:
    """Build, save, load and encode a model type."""
    try:
        cls = write_tiny(name, folder)
    except Exception as error:  # noqa: BLE001 — heuristics for sizes, and libraries that are not installed
        return Outcome(name, "", "not built", note=_line(error))
    generator = torch.Generator().manual_seed(2)
    rows = [torch.randint(10, 300, (length,), generator=generator).tolist() for length in LENGTHS]
    tokens = TokenBatch.from_lists(rows)
    try:
        encoder = M3Encoder(load_backbone(folder), pooling="mean", normalize=False).eval()
        with torch.no_grad():
            (found,) = encoder.encode([tokens], [{"dense"}])
    except UserError as error:
        return Outcome(name, cls.__name__, "refused", note=str(error).replace(str(folder), "…"))
    way = "equal lengths" if encoder.equal_lengths else encoder.engine.engine
    assert found.dense is not None
    cosines = torch.cosine_similarity(found.dense.double(), own_vectors(cls, folder, tokens).double(), dim=-1)
    return Outcome(name, cls.__name__, way, float(cosines.min()), try_out(encoder.model).note)


def outcomes(names: list[str]) -> Iterator[Outcome]:
    """What becomes of each."""
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            yield try_type(name, Path(folder))


def _line(error: BaseException) -> str:
    return re.sub(r"\s+", " ", f"{type(error).__name__}: {error}")[:150]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every type that AutoModel knows")
    parser.add_argument("--only", nargs="+", help="these types")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    disable_progress_bar()
    warnings.simplefilter("ignore")
    version = importlib.import_module("transformers").__version__
    print(f"transformers {version}, torch {torch.__version__}\n\n| model type | class | engine | cosine | note |")
    print("|---|---|---|---|---|")
    for found in outcomes(options.only or (all_types() if options.all else encoder_types())):
        cosine = "" if found.cosine is None else f"{found.cosine:.6f}"
        print(
            f"| {found.name} | {found.encoder} | {found.way} | {cosine} | {found.note.replace('|', ' ')} |", flush=True
        )


if __name__ == "__main__":
    main()
