"""What other libraries read and write beside the weights: sentence-transformers' modules, transformers' remote code.

A dense checkpoint is a plain encoder that every library knows. One with experts names the file that travels with it in
``auto_map``, and is meant for ``AutoModel`` and ``SentenceTransformer`` with ``trust_remote_code=True``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from FlagEmbedding.modeling.options import POOLING_SPELLINGS
from FlagEmbedding.modeling.pooling import METHODS
from FlagEmbedding.modeling.remote_code import modeling_moe_encoder as remote
from FlagEmbedding.utils.adapter_folder import files_of
from FlagEmbedding.utils.errors import DataError
from FlagEmbedding.utils.io import PathLike
from FlagEmbedding.utils.logging import get_logger

logger = get_logger(__name__)

Choice = TypeVar("Choice", str, bool)
REMOTE_FILE = Path(remote.__file__)
PROMPTS_FILE = "config_sentence_transformers.json"
# sentence-transformers' names of our pooling methods, in the flags of ``1_Pooling/config.json``.
_POOLING_FLAGS = {"cls": "cls_token", "mean": "mean_tokens", "last_token": "lasttoken"}
_ORDER = ("Transformer", "Pooling", "Dense", "Normalize")
# What sentence-transformers' ``encode_document`` looks for, in its order.
_DOCUMENT_PROMPTS = ("document", "passage", "corpus")


@dataclass(frozen=True)
class Instructions:
    """Texts put before queries and passages; None: none was said."""

    query: str | None = None
    passage: str | None = None


NO_INSTRUCTIONS = Instructions()


@dataclass(frozen=True)
class StoredModules:
    """What a folder's sentence-transformers files say about its vectors; None where they do not say.

    Attributes:
        pooling: ``cls``, ``mean`` or ``last_token``.
        normalize: whether vectors are L2-normalized.
        dense: folders of ``Dense`` modules, in order, between pooling and normalization.
        instructions: the prompts for queries and documents.
    """

    pooling: str | None = None
    normalize: bool | None = None
    dense: tuple[Path, ...] = ()
    instructions: Instructions = NO_INSTRUCTIONS


def read_modules(folder: PathLike) -> StoredModules:
    """What the sentence-transformers files in ``folder`` say.

    Raises:
        DataError: they describe what this package does not compute, so that its vectors would be others.
    """
    root = files_of(folder, "modules.json")
    instructions = _instructions(root)
    listed = _json(root / "modules.json", list)
    if listed is None:
        pooling = _pooling(root / "1_Pooling") if (root / "1_Pooling" / "config.json").is_file() else None
        return StoredModules(pooling, instructions=instructions)
    kinds, paths = [], []
    for module in listed:
        package, _, kind = str(module.get("type", "")).rpartition(".")
        if kind not in _ORDER or package.split(".")[0] != "sentence_transformers":
            raise DataError(
                f"{root}/modules.json names the module {module.get('type')!r}, which is not computed here (known: "
                f"{', '.join(_ORDER)}): its vectors would be others than the checkpoint's"
            )
        kinds.append(kind)
        paths.append(root / module.get("path", ""))
    dense = tuple(path for kind, path in zip(kinds, paths, strict=True) if kind == "Dense")
    expected = ["Transformer", "Pooling", *["Dense"] * len(dense), *["Normalize"] * ("Normalize" in kinds)]
    if kinds != expected or paths[0] != root:
        raise DataError(
            f"{root}/modules.json: expected Transformer (in the folder itself), Pooling, any number of Dense, "
            f"Normalize, in this order, got {', '.join(kinds) or 'nothing'}"
        )
    return StoredModules(_pooling(paths[1]), "Normalize" in kinds, dense, instructions)


def choose(flag: str, given: Choice | None, said: Choice | None, source: PathLike) -> Choice | None:
    """What the user gave, else what the checkpoint ``source`` says; one line where they contradict each other."""
    if given is not None and said is not None and given != said:
        logger.warning("--%s %r: %s says %r; going on as the flag says", flag, given, source, said)
    return said if given is None else given


def _pooling(folder: Path) -> str:
    said = _json(folder / "config.json", dict)
    if said is None:
        raise DataError(f"{folder} lacks the config.json that says how vectors are pooled")
    if "pooling_mode" in said:
        modes: list[Any] = (
            [said["pooling_mode"]] if isinstance(said["pooling_mode"], str) else list(said["pooling_mode"])
        )
    else:
        modes = [
            key.removeprefix("pooling_mode_") for key, on in said.items() if key.startswith("pooling_mode_") and on
        ]
    known = {flag: method for method, flag in _POOLING_FLAGS.items()} | {method: method for method in METHODS}
    methods: list[str | None] = [known.get(POOLING_SPELLINGS.get(mode, mode)) for mode in modes]
    if len(methods) != 1 or methods[0] is None:
        raise DataError(
            f"{folder}/config.json: pooling by {' and '.join(map(str, modes)) or 'nothing'} is not computed here "
            f"(known: {', '.join(METHODS)})"
        )
    if said.get("include_prompt", True) is False:
        raise DataError(f"{folder}/config.json: include_prompt false (pooling without the prompt) is not computed here")
    return methods[0]


def _instructions(root: Path) -> Instructions:
    said = _json(root / PROMPTS_FILE, dict) or {}
    prompts = said.get("prompts") or {}
    if not isinstance(prompts, dict) or not all(isinstance(text, str) for text in prompts.values()):
        raise DataError(f"{root / PROMPTS_FILE}: prompts: expected texts by name")
    default = prompts.get(said.get("default_prompt_name"))
    passage = next((prompts[name] for name in _DOCUMENT_PROMPTS if name in prompts), default)
    return Instructions(prompts.get("query", default) or None, passage or None)


def _json(path: Path, kind: type[Any]) -> Any:
    """The file's content, None where there is no such file."""
    if not path.is_file():
        return None
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is no JSON: {error}") from error
    if not isinstance(content, kind) or (kind is list and not all(isinstance(each, dict) for each in content)):
        raise DataError(f"{path}: expected a {'list of modules' if kind is list else 'dictionary'}")
    return content


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
    width: int,
    pooling: str,
    normalize: bool,
    max_length: int | None,
    dense: tuple[dict[str, Any], ...] = (),
    instructions: Instructions = NO_INSTRUCTIONS,
) -> dict[str, Any]:
    """JSON files by path with which ``SentenceTransformer(folder)`` gives our dense vectors.

    Args:
        width: of the hidden states that are pooled.
        dense: configurations of the ``Dense`` modules.
        instructions: put before texts by ``encode_query`` and ``encode_document``.
    """
    kinds = ["Pooling", *["Dense"] * len(dense), *["Normalize"] * normalize]
    # Paths that sentence-transformers has understood since version 2 and still does.
    places = [("", "Transformer"), *((f"{number}_{kind}", kind) for number, kind in enumerate(kinds, 1))]
    files: dict[str, Any] = {
        "modules.json": [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{name}"}
            for i, (path, name) in enumerate(places)
        ],
        "sentence_bert_config.json": {"do_lower_case": False},
        "1_Pooling/config.json": {
            "word_embedding_dimension": width,
            "pooling_mode_cls_token": pooling == "cls",
            "pooling_mode_mean_tokens": pooling == "mean",
            "pooling_mode_max_tokens": False,
            "pooling_mode_mean_sqrt_len_tokens": False,
        },
    }
    if max_length is not None:
        files["sentence_bert_config.json"] = {"max_seq_length": max_length, "do_lower_case": False}
    if pooling == "last_token":
        files["1_Pooling/config.json"]["pooling_mode_lasttoken"] = True
    for number, said in enumerate(dense, 2):
        files[f"{number}_Dense/config.json"] = said
    if normalize:
        files[f"{len(kinds)}_Normalize/config.json"] = {}
    if instructions != NO_INSTRUCTIONS:
        files[PROMPTS_FILE] = {
            "prompts": {"query": instructions.query or "", "document": instructions.passage or ""},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine" if normalize else "dot",
        }
    return files
