"""What the step scripts call: argument objects end here, the rooms below get plain values."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from FlagEmbedding.collections import miracl
from FlagEmbedding.collections.trec import read_topics
from FlagEmbedding.evaluation.arguments import (
    EncodeArguments,
    SearchArguments,
    parse_encode_arguments,
    parse_search_arguments,
    query_instruction,
)
from FlagEmbedding.indexing.encoding import EncodingConfig, build_index
from FlagEmbedding.inference.arguments import EncoderArguments
from FlagEmbedding.inference.text_encoder import TextEncoder, encode_texts
from FlagEmbedding.retrieval.approximate import SearchEffort, recall, search_approximate
from FlagEmbedding.retrieval.index import FlatIndex, index_folder, index_name
from FlagEmbedding.retrieval.searcher import Hit, search
from FlagEmbedding.retrieval.shards import clear_disk_errors
from FlagEmbedding.utils.distributed import world_size
from FlagEmbedding.utils.errors import UsageError
from FlagEmbedding.utils.io import atomic_open, write_json_atomic
from FlagEmbedding.utils.logging import get_logger
from FlagEmbedding.utils.processes import on_main, processes
from FlagEmbedding.utils.provenance import provenance

logger = get_logger(__name__)


def generate_embedding(argv: Sequence[str] | None = None) -> int:
    """Step 0: an index of every language's corpus."""
    arguments = parse_encode_arguments(argv)
    languages = miracl.check_languages(arguments.languages)
    config = EncodingConfig(
        max_length=arguments.max_passage_length,
        batch_size=arguments.batch_size,
        with_title=arguments.with_title,
        instruction=arguments.passage_instruction_for_retrieval,
        shard_size=arguments.shard_size,
        allow_empty=arguments.allow_empty,
        overwrite=arguments.overwrite,
    )
    with processes():
        # The main process fetches what is not on disk; the others then find it there.
        files = on_main(lambda: {lang: _corpus(lang, arguments) for lang in languages})
        encoder = TextEncoder(encoder_of(arguments))
        for lang in languages:
            folder = index_folder(arguments.index_save_dir, arguments.encoder, lang)
            build_index(encoder, files[lang], folder, lang, config)
    return 0


def _corpus(lang: str, arguments: EncodeArguments) -> list[Path]:
    return miracl.corpus_files(lang, arguments.data_dir, arguments.cache_dir)


def encoder_of(arguments: Any) -> EncoderArguments:
    """The encoder's part of a step's arguments."""
    return EncoderArguments(
        **{f.name: getattr(arguments, f.name) for f in fields(EncoderArguments) if hasattr(arguments, f.name)}
    )


def search_results(argv: Sequence[str] | None = None) -> int:
    """Step 1: a run file of every language's queries."""
    arguments = parse_search_arguments(argv)
    if world_size() > 1:
        raise UsageError("step 1 runs in one process (--threads shares out the work); start it without torchrun")
    languages = miracl.check_languages(arguments.languages)
    if arguments.hits < 1 or arguments.threads < 1:
        raise UsageError(f"--hits {arguments.hits} --threads {arguments.threads}: both must be at least 1")
    instruction = query_instruction(arguments)
    folder = Path(arguments.result_save_dir) / index_name(arguments.encoder)
    # Everything that can be missing is asked for before the first query is encoded.
    indexes = {lang: FlatIndex(index_folder(arguments.index_save_dir, arguments.encoder, lang)) for lang in languages}
    topics = {
        lang: read_topics(miracl.topics_file(lang, arguments.split, arguments.data_dir, arguments.cache_dir))
        for lang in languages
    }
    encoder = TextEncoder(encoder_of(arguments))
    for index in indexes.values():
        index.check_encoder(encoder.describe(), "give step 1 the flags of step 0, or run step 0 with --overwrite True")
    for lang in languages:
        path = folder / f"{lang}.txt"
        if path.exists() and not arguments.overwrite:
            logger.info("%s: %s is there already and kept (--overwrite False)", lang, path)
            continue
        hits = _search_language(encoder, indexes[lang], lang, list(topics[lang].values()), instruction, arguments)
        with clear_disk_errors(f"writing {path}"):
            path.with_suffix(".json").unlink(missing_ok=True)  # never a new run beside an old record
            write_run(path, list(topics[lang]), hits)
            write_json_atomic(path.with_suffix(".json"), _record(arguments, indexes[lang], encoder, len(hits)))
        logger.info("%s: %d queries, %d hits each at most: %s", lang, len(hits), arguments.hits, path)
    return 0


def _search_language(
    encoder: TextEncoder,
    index: FlatIndex,
    lang: str,
    queries: list[str],
    instruction: str | None,
    arguments: SearchArguments,
) -> list[list[Hit]]:
    vectors = encode_texts(encoder, queries, arguments.max_query_length, instruction)
    started = time.perf_counter()
    exact = search(index, vectors, arguments.hits, threads=arguments.threads, device=encoder.device)
    exact_seconds = time.perf_counter() - started
    if arguments.index_type.lower() == "flat":
        logger.info("%s: exact search of %d vectors took %.2f s", lang, index.rows, exact_seconds)
        return exact
    effort = SearchEffort(arguments.n_probe, arguments.ef_search)
    found, seconds = search_approximate(
        index, vectors, arguments.hits, arguments.index_type, threads=arguments.threads, effort=effort
    )
    logger.info(
        "%s: %s finds %.2f %% of the exact top %d in %.3f s (exact: %.3f s)",
        lang,
        arguments.index_type,
        100 * recall(found, exact),
        arguments.hits,
        seconds,
        exact_seconds,
    )
    return found


def write_run(path: Path, qids: list[str], hits: list[list[Hit]], tag: str = "Faiss") -> None:
    """A TREC run file: ``qid Q0 docid rank score tag``, score with 6 decimals, rank from 1."""
    with atomic_open(path) as stream:
        for qid, found in zip(qids, hits, strict=True):
            for place, hit in enumerate(found, 1):
                stream.write(f"{qid} Q0 {hit.docid} {place} {hit.score:.6f} {tag}\n")


def _record(arguments: SearchArguments, index: FlatIndex, encoder: TextEncoder, queries: int) -> dict[str, Any]:
    """What the run came from, beside it."""
    return {
        "arguments": asdict(arguments),
        "queries": queries,
        "query_instruction": query_instruction(arguments),
        "encoder": encoder.describe(),
        "index": {"folder": str(index.folder), "rows": index.rows, **(index.manifest or {}).get("identity", {})},
        "provenance": provenance(),
    }
