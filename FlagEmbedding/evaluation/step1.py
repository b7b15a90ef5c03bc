"""Step 1: the queries of MIRACL languages, or of one's own collection, against their indexes, as TREC run files."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from FlagEmbedding.collections.source import sources
from FlagEmbedding.collections.trec import write_run
from FlagEmbedding.evaluation.arguments import SearchArguments, SearchOptions
from FlagEmbedding.indexing.retriever import Retriever
from FlagEmbedding.inference.text_encoder import TextEncoder
from FlagEmbedding.retrieval.approximate import SearchEffort, recall, search_approximate
from FlagEmbedding.retrieval.index import FlatIndex, index_folder, index_name
from FlagEmbedding.retrieval.searcher import Hit
from FlagEmbedding.retrieval.shards import clear_disk_errors
from FlagEmbedding.utils.cli import flag_values
from FlagEmbedding.utils.distributed import world_size
from FlagEmbedding.utils.errors import UsageError
from FlagEmbedding.utils.io import write_json_atomic
from FlagEmbedding.utils.logging import get_logger
from FlagEmbedding.utils.provenance import provenance

logger = get_logger(__name__)


def search_collections(options: SearchOptions) -> None:
    """A run file of every language's queries, and a record of where it came from beside it.

    Raises:
        UserError: options, an index or topics that cannot be used; known before the first query is encoded.
    """
    if world_size() > 1:
        raise UsageError("step 1 runs in one process (--threads shares out the work); start it without torchrun")
    name, place, chosen = options.encoder.encoder, options.collection, options.search
    languages = sources(place.languages, place.split, place.data_dir, options.encoder.cache_dir)
    indexes = {lang: FlatIndex(index_folder(place.index_save_dir, name, lang)) for lang in languages}
    topics = {lang: source.topics() for lang, source in languages.items()}
    encoder = TextEncoder(options.encoder)
    for index in indexes.values():
        index.check_encoder(encoder.describe(), "give step 1 the flags of step 0, or run step 0 with --overwrite True")
    for lang in languages:
        path = Path(chosen.result_save_dir) / index_name(name) / f"{lang}.txt"
        if path.exists() and not chosen.overwrite:
            logger.info("%s: %s is there already and kept (--overwrite False)", lang, path)
            continue
        retriever = Retriever(
            encoder, indexes[lang], query_length=chosen.max_query_length,
            query_instruction=_query_instruction(encoder, chosen), threads=chosen.threads,
        )  # fmt: skip
        hits = _search_language(retriever, lang, list(topics[lang].values()), chosen)
        found = zip(topics[lang], ([(hit.docid, hit.score) for hit in each] for each in hits), strict=True)
        with clear_disk_errors(f"writing {path}"):
            path.with_suffix(".json").unlink(missing_ok=True)  # never a new run beside an old record
            write_run(path, found)
            write_json_atomic(path.with_suffix(".json"), _record(options, retriever, len(hits)))
        logger.info("%s: %d queries, %d hits each at most: %s", lang, len(hits), chosen.hits, path)


def _query_instruction(encoder: TextEncoder, chosen: SearchArguments) -> str | None:
    """What the flags say, else what the checkpoint says; ``--add_instruction`` alone means its own before BGE's."""
    if chosen.add_instruction is False:
        return None
    given = chosen.query_instruction_for_retrieval
    if given is None and encoder.stored.instructions.query is None:
        return chosen.query_instruction
    return encoder.instruction("query", given)


def _search_language(
    retriever: Retriever, lang: str, queries: Sequence[str], chosen: SearchArguments
) -> list[list[Hit]]:
    index, kind = retriever.index, chosen.index_type
    vectors = retriever.embed_queries(queries)
    started = time.perf_counter()
    exact = retriever.search(vectors, chosen.hits)
    exact_seconds = time.perf_counter() - started
    if kind.lower() == "flat":
        logger.info("%s: exact search of %d vectors took %.2f s", lang, index.rows, exact_seconds)
        return exact
    effort = SearchEffort(chosen.n_probe, chosen.ef_search, chosen.rescore)
    found, seconds = search_approximate(index, vectors, chosen.hits, kind, threads=chosen.threads, effort=effort)
    said, share = "%s: %s finds %.2f %% of the exact top %d in %.3f s (exact: %.3f s)", 100 * recall(found, exact)
    logger.info(said, lang, kind, share, chosen.hits, seconds, exact_seconds)
    return found


def _record(options: SearchOptions, retriever: Retriever, queries: int) -> dict[str, Any]:
    """What the run came from, beside it."""
    index = retriever.index
    return {
        "arguments": flag_values(options.encoder, options.collection, options.search),
        "queries": queries,
        "query_instruction": retriever.query_instruction,
        "encoder": retriever.encoder.describe(),
        "index": {"folder": str(index.folder), "rows": index.rows, **(index.manifest or {}).get("identity", {})},
        "provenance": provenance(),
    }
