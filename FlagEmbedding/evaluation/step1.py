"""Step 1: the queries of MIRACL languages, or of one's own collection, against their indexes, as TREC run files."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from FlagEmbedding.collections.source import Source, sources
from FlagEmbedding.collections.trec import Topics, write_run
from FlagEmbedding.evaluation import tuning
from FlagEmbedding.evaluation.arguments import SearchArguments, SearchOptions
from FlagEmbedding.evaluation.run_record import run_file
from FlagEmbedding.indexing.arguments import ModeArguments
from FlagEmbedding.indexing.hybrid import HybridRetriever, ModeFolders
from FlagEmbedding.indexing.retriever import Retriever
from FlagEmbedding.inference.heads import with_heads
from FlagEmbedding.inference.text_encoder import TextEncoder
from FlagEmbedding.retrieval.approximate import SearchEffort, recall, search_approximate
from FlagEmbedding.retrieval.fusion import Found
from FlagEmbedding.retrieval.index import index_folder, index_name
from FlagEmbedding.retrieval.searcher import Hit
from FlagEmbedding.retrieval.shards import clear_disk_errors
from FlagEmbedding.utils.cli import flag_values
from FlagEmbedding.utils.distributed import world_size
from FlagEmbedding.utils.errors import UsageError
from FlagEmbedding.utils.io import write_json_atomic
from FlagEmbedding.utils.logging import get_logger
from FlagEmbedding.utils.modes import DENSE, Mode
from FlagEmbedding.utils.provenance import provenance

logger = get_logger(__name__)


def search_collections(options: SearchOptions) -> None:
    """A run file of every language's queries for every mode, and a record of where it came from beside it.

    Raises:
        UserError: options, an index or topics that cannot be used; known before the first query is encoded.
    """
    if world_size() > 1:
        raise UsageError("step 1 runs in one process (--threads shares out the work); start it without torchrun")
    name, place, chosen, modes = options.encoder.encoder, options.collection, options.search, options.modes
    tuning.check_split(modes.parsed, place.split)
    languages = sources(place.languages, place.split, place.data_dir, options.encoder.cache_dir)
    told = with_heads(options.encoder, modes.parts)
    folders = {
        lang: _open(index_folder(place.index_save_dir, name, lang), modes, languages[lang]) for lang in languages
    }
    topics = {lang: source.topics() for lang, source in languages.items()}
    encoder = TextEncoder(told)
    for own in folders.values():
        own.check_encoder(encoder, "give step 1 the flags of step 0, or run step 0 with --overwrite True")
    results = Path(chosen.result_save_dir) / index_name(name)
    for lang, source in languages.items():
        paths = {mode: run_file(results, mode, lang) for mode in modes.parsed}
        for path in [path for path in paths.values() if path.exists() and not chosen.overwrite]:
            logger.info("%s: %s is there already and kept (--overwrite False)", lang, path)
        paths = {mode: path for mode, path in paths.items() if chosen.overwrite or not path.exists()}
        if paths:
            retriever = HybridRetriever(
                encoder, folders[lang], modes, query_length=chosen.max_query_length,
                query_instruction=_query_instruction(encoder, chosen), threads=chosen.threads,
            )  # fmt: skip
            _write_runs(options, retriever, source, topics[lang], paths)


def _open(folder: Path, modes: ModeArguments, source: Source) -> ModeFolders:
    """The folders that the modes need; the corpus too where colbert vectors are not stored."""
    exact = "colbert" in modes.parts and modes.rerank == 0
    found = ModeFolders.open(folder, modes.parts, stored=exact)
    if "colbert" in modes.parts and "colbert" not in found.tables:
        logger.info("%s: no stored colbert vectors: what is reranked is encoded now", folder)
        return replace(found, files=source.corpus())
    return found


def _write_runs(
    options: SearchOptions, retriever: HybridRetriever, source: Source, topics: Topics, paths: dict[Mode, Path]
) -> None:
    """The runs of one language."""
    chosen, lang, queries = options.search, source.lang, list(topics.values())
    top_k, how = chosen.hits, retriever.how
    dense = None
    if any("dense" in how.searching(mode) for mode in paths):
        assert retriever.dense is not None
        dense = _search_language(retriever.dense, lang, queries, chosen)
    found, tuned = list[Found](), dict[Mode, tuning.Tuned]()
    if others := [mode for mode in paths if mode != DENSE]:
        if by_train := [mode for mode in others if mode.fusion == "tuned"]:
            tuned = tuning.tune(source, topics, retriever, by_train, top_k, options.modes.tune_queries)
        started = time.perf_counter()
        found = retriever.find(queries, others, top_k, dense)
        said = "%s: %s of %d passages for %d queries took %.2f s"
        names = " ".join(mode.name for mode in others)
        logger.info(said, lang, names, retriever.folders.rows, len(queries), time.perf_counter() - started)
    for mode, path in paths.items():
        if mode == DENSE:
            assert dense is not None
            hits = dense
        else:
            own = replace(how, weights=tuned[mode].weights) if mode in tuned else how
            hits = retriever.join(found, mode, top_k, own)
        lines = zip(topics, ([(hit.docid, hit.score) for hit in each] for each in hits), strict=True)
        with clear_disk_errors(f"writing {path}"):
            path.with_suffix(".json").unlink(missing_ok=True)  # never a new run beside an old record
            write_run(path, lines, *(() if mode == DENSE else (mode.name,)))
            record = _record(options, retriever, len(hits))
            if mode != DENSE:
                record["mode"] = {"name": mode.name, "tuned": asdict(tuned[mode]) if mode in tuned else None}
            write_json_atomic(path.with_suffix(".json"), record)
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


def _record(options: SearchOptions, retriever: HybridRetriever, queries: int) -> dict[str, Any]:
    """What the run came from, beside it."""
    folders = retriever.folders
    return {
        "arguments": flag_values(options.encoder, options.collection, options.search, options.modes),
        "queries": queries,
        "query_instruction": retriever.query_instruction,
        "encoder": retriever.encoder.describe(),
        "index": {"folder": str(folders.folder), "rows": folders.rows, **folders.manifest.get("identity", {})},
        "provenance": provenance(),
    }
