"""A checkpoint's tokenizer, checked against its embedding table: the one place that loads tokenizers for an encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from FlagEmbedding.modeling.files import first_line
from FlagEmbedding.utils.adapter_folder import files_of
from FlagEmbedding.utils.errors import DataError
from FlagEmbedding.utils.hub import resolve_folder
from FlagEmbedding.utils.io import PathLike

# A table is padded to round numbers, or has room for pieces to come; a tokenizer of under this share is another one's.
_LEAST_SHARE = 0.5


def load_tokenizer(
    name_or_path: PathLike,
    backbone: PreTrainedModel | None = None,
    *,
    cache_dir: str | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """The tokenizer of a checkpoint folder or hub id.

    Args:
        backbone: the encoder that reads its ids; None: do not compare with it.

    Raises:
        DataError: the folder holds no tokenizer (transformers would make up an empty one), or its ids are not those
            of the encoder's embeddings.
    """
    from transformers import AutoTokenizer

    folder = Path(name_or_path)
    if not folder.is_dir():
        folder = resolve_folder(name_or_path, cache_dir=cache_dir)
    folder = files_of(folder, "tokenizer.json", "tokenizer_config.json", cache_dir=cache_dir)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # a tokenizer's own code and libraries, which may raise anything
        raise DataError(f"{folder} holds no tokenizer that can be loaded: {first_line(error)}") from error
    _check_files(tokenizer, folder)
    if backbone is not None:
        _check_size(tokenizer, backbone, folder)
    return tokenizer


def _check_files(tokenizer: Any, folder: Path) -> None:
    named = set(getattr(tokenizer, "vocab_files_names", {}).values())
    # A tokenizer of bytes or code points needs no file.
    if named and not any((folder / name).is_file() for name in named | {"tokenizer.json"}):
        raise DataError(
            f"{folder} holds no tokenizer files ({', '.join(sorted(named))}), every word would be unknown: copy the "
            "tokenizer of the model that this one was made from into the folder"
        )


def _check_size(tokenizer: Any, backbone: PreTrainedModel, folder: Path) -> None:
    try:
        table: Any = backbone.get_input_embeddings()
        rows = int(table.weight.shape[0])
    except (AttributeError, NotImplementedError):
        return  # an encoder without a table (CANINE hashes code points)
    pieces = len(tokenizer)
    if pieces > rows:
        problem = "their last ones have no vector"
    elif pieces < _LEAST_SHARE * rows:
        problem = "this looks like another model's tokenizer"
    else:
        return
    raise DataError(
        f"{folder}: the tokenizer has {pieces:,} pieces and the model's embedding table {rows:,} rows: {problem}; give "
        "the tokenizer that the model was trained with"
    )
