"""Where a run came from: the record that step 1 left beside it, or the manifest of the index it was made with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from FlagEmbedding.collections.trec import Qrels, relevant
from FlagEmbedding.evaluation.arguments import ScoreArguments
from FlagEmbedding.retrieval.index import DOCID
from FlagEmbedding.retrieval.shards import MANIFEST, read_manifest
from FlagEmbedding.utils.errors import DataError, UsageError
from FlagEmbedding.utils.io import numbered_lines, read_json
from FlagEmbedding.utils.logging import get_logger
from FlagEmbedding.utils.modes import DENSE, Mode

logger = get_logger(__name__)

Record = dict[str, Any]


def run_file(folder: Path, mode: Mode, lang: str) -> Path:
    """The run of a mode in a model's ``folder`` of runs: dense ones as published, others in a folder of their own."""
    return (folder if mode == DENSE else folder / mode.name) / f"{lang}.txt"


def read_record(path: Path, index_folder: Path | None = None) -> Record:
    """Step 1's record at ``path``, else what the manifest in ``index_folder`` says.

    Empty where neither is there: then the run is another tool's, and taken as it is. Raises ``DataError`` for a file
    that is no record.
    """
    if not path.exists():
        manifest = (read_manifest(index_folder / MANIFEST) if index_folder else None) or {}
        identity = manifest.get("identity", {})
        return {"encoder": identity, "index": {"rows": manifest.get("rows"), **identity}} if identity else {}
    try:
        record = read_json(path)
        if not all(isinstance(record[key], dict) for key in ("encoder", "index", "arguments")):
            raise TypeError("encoder, index and arguments are not objects")
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise DataError(f"{path}: not a record of step 1 ({what}); run step 1 again") from error
    return record  # type: ignore[no-any-return]


def check_record(record: Record, path: Path, said: ScoreArguments) -> None:
    """Raise ``UsageError`` when what the command line says of a run is not what its record says."""
    encoder = record.get("encoder", {})
    for flag, asked, there in (
        ("pooling_method", said.pooling_method, encoder.get("pooling")),
        ("normalize_embeddings", said.normalize_embeddings, encoder.get("normalize_embeddings")),
        ("split", said.split, record.get("arguments", {}).get("split")),
    ):
        if None not in (asked, there) and asked != there:
            raise UsageError(f"--{flag} {asked}: the run was made with {there} ({path})")


def check_judged(qrels: Qrels, index_folder: Path | None) -> None:
    """Compare what is judged relevant with the ids of the index that was searched, where that is at hand.

    One line in the log says how many are missing; ``DataError`` when all are: every score would be 0.
    """
    wanted = {docid for judged in qrels.values() for docid in relevant(judged)}
    if index_folder is None or not (index_folder / DOCID).is_file():
        return
    missing = wanted.difference(line.strip() for _, line in numbered_lines(index_folder / DOCID, "docid"))
    if len(missing) == len(wanted):
        what = f"none of the {len(wanted)} passages judged relevant ({min(missing)} …) is in the index"
        raise DataError(f"{index_folder}: {what}: these are the judgments of another corpus")
    if missing:
        said = "%s: %d of %d passages judged relevant (%s …) are not in the index, so no run can find them"
        logger.warning(said, index_folder, len(missing), len(wanted), min(missing))


def run_origin(record: Record) -> dict[str, Any]:
    """Model hash, corpus size, title rule and the like out of a record; nulls where step 1 left none."""
    encoder, index, arguments = (record.get(key, {}) for key in ("encoder", "index", "arguments"))
    return {
        "model_sha256": encoder.get("model"),
        "dtype": encoder.get("dtype"),
        "query_instruction": record.get("query_instruction"),
        "passage_instruction": index.get("passage_instruction"),
        "corpus_passages": index.get("rows"),
        "with_title": index.get("with_title"),
        "max_passage_length": index.get("max_passage_length"),
        "hits": arguments.get("hits"),
        "index_type": arguments.get("index_type"),
    }


def warn_of_different_conditions(names: Sequence[str], records: Sequence[dict[str, Record]]) -> None:
    """A difference between models should not come from another corpus, title rule, length or depth.

    Args:
        records: language -> record, one mapping per model; the first is held against the others.
    """
    said = "%s: %s was made with %s %s, %s with %s: the comparison is not of the models alone"
    for name, record in zip(names[1:], records[1:], strict=True):
        for lang, other in record.items():
            ours, theirs = run_origin(records[0][lang]), run_origin(other)
            for key in ("corpus_passages", "with_title", "max_passage_length", "hits"):
                if None not in (ours[key], theirs[key]) and ours[key] != theirs[key]:
                    logger.warning(said, lang, names[0], key, ours[key], name, theirs[key])
