"""Hard negatives (ANCE, Xiong et al. 2021, arXiv 2007.00808): ``python -m FlagEmbedding.mining.hard_negatives``.

From queries with their positives (training rows, or MIRACL's topics and qrels) and a corpus to training rows:
everything is embedded by one checkpoint, each query's neighbors are searched, and negatives are taken out of a rank
window after what ``filters.py`` leaves out. An index that step 0 built for the encoder is used as it is; otherwise one
is built where step 0 would. The same command gives the same bytes, also after being killed (``jobs.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from FlagEmbedding.collections.source import Source, sources
from FlagEmbedding.inference.heads import with_heads
from FlagEmbedding.mining.common.index import Corpus, named_corpus, open_retriever
from FlagEmbedding.mining.common.jobs import Job, check_output, chunks, progress, work_folder
from FlagEmbedding.mining.common.passages import PassageStore
from FlagEmbedding.mining.common.queries import Items, JudgedTopics, TrainingRows
from FlagEmbedding.mining.common.reranker import Reranker
from FlagEmbedding.mining.common.rows import data_files
from FlagEmbedding.mining.hard_negatives.arguments import InputArguments, MiningOptions
from FlagEmbedding.mining.hard_negatives.candidates import ModeCandidates
from FlagEmbedding.mining.hard_negatives.filters import Sampling
from FlagEmbedding.mining.hard_negatives.miner import Mined, Miner, training_row
from FlagEmbedding.mining.hard_negatives.report import summarize, write_report
from FlagEmbedding.utils.identity import fingerprints, model_fingerprint
from FlagEmbedding.utils.logging import get_logger
from FlagEmbedding.utils.provenance import provenance

logger = get_logger(__name__)


def mine_into(
    job: Job, items: Items, miner: Miner, chunk_size: int, row_of: Callable[[Mined], dict[str, Any] | None]
) -> None:
    """Mine for every item that ``job`` has not finished, chunk by chunk; ``row_of`` makes the row (None: no row)."""
    # The chunk in which an earlier run stopped is searched again as a whole, so that its scores are the same.
    start = job.done // chunk_size * chunk_size if job.done < len(items) else len(items)
    bar: tqdm[Any] = progress("hard negatives", total=len(items), done=job.done)
    with bar:
        for chunk in chunks(islice(items, start, None), chunk_size):
            for mined in miner.mine(chunk, skip=job.done - start):
                row = row_of(mined)
                mined.note["written"] = row is not None
                job.add([] if row is None else [row], mined.note)
                bar.update()
            start += len(chunk)


def mine_hard_negatives(options: MiningOptions) -> dict[str, Any]:
    """Run the command; returns the report. Raises ``UserError``."""
    output, given = options.output, options.input
    check_output(output.path, output.overwrite)
    rows = None if given.language else TrainingRows(data_files(given.input_file))
    with work_folder(output.path) as work:
        corpus = _corpus(given, options.encoder.cache_dir, rows, work)
        retriever = candidates = None
        if options.sampling.random_negatives:
            store = PassageStore.prepare(corpus.files, work, bool(options.search.with_title))
        else:
            modes = options.candidates.searched
            encoder = with_heads(options.encoder, modes.parts)
            retriever, store = open_retriever(encoder, options.search, corpus, work)
            if not options.candidates.dense_alone:
                candidates = ModeCandidates.open(retriever, modes, corpus.files, corpus.label, store.with_title)
        items: Items = rows or _topics(given, options.encoder.cache_dir, store)
        _check_window(options.sampling, store)
        reranker = Reranker(options.reranker, options.encoder) if options.reranker.cross_encoder else None
        miner = Miner(store, options.sampling, options.filters, retriever, reranker, candidates)
        with Job(output.path, _identity(options, items, miner), overwrite=output.overwrite) as job:
            row_of = partial(training_row, with_scores=output.with_scores)
            mine_into(job, items, miner, options.search.search_batch_size, row_of)
            record = _report(options, job, items, miner)
            page = write_report(output.report(), record)
            count = job.finish()
    logger.info("%s: %d rows; report: %s", output.path, count, page)
    return record


def _corpus(given: InputArguments, cache_dir: str | None, rows: TrainingRows | None, work: Path) -> Corpus:
    if given.language and not given.corpus:
        return Corpus(_source(given, cache_dir).corpus(), given.language)
    return named_corpus(given.corpus, given.language, rows.inputs if rows else [], work)


def _topics(given: InputArguments, cache_dir: str | None, store: PassageStore) -> JudgedTopics:
    return JudgedTopics(_source(given, cache_dir), store)


def _check_window(sampling: Sampling, store: PassageStore) -> None:
    """Say that a corpus ends before the window begins."""
    first, last = sampling.window
    if not sampling.random_negatives and len(store) <= first:
        kept = "every negative is drawn at random" if sampling.fill == "random" else "there is no negative"
        said = "--range_for_sampling %s: the corpus holds %d passages, ranks %d to %d are not there, so %s"
        logger.warning(said, sampling.range_for_sampling, len(store), first + 1, last, kept)


def _source(given: InputArguments, cache_dir: str | None) -> Source:
    assert given.language is not None
    return sources([given.language], given.split, given.data_dir, cache_dir)[given.language]


def describe_miner(miner: Miner) -> dict[str, Any]:
    """What decides the negatives, flat, so that a difference reads as one: sampling, corpus, encoder, index."""
    corpus = [file["sha256"] for file in miner.store.corpus]
    described = {**asdict(miner.sampling), **asdict(miner.filters), "corpus": corpus}
    if miner.retriever is not None:
        r = miner.retriever
        described |= {f"encoder {key}": value for key, value in r.encoder.describe().items()}
        described |= {
            "index": r.index.checksum(), "query_max_length": r.query_length, "passage_max_length": r.passage_length,
            "query_instruction": r.query_instruction, "passage_instruction": r.passage_instruction,
            "batch_size": r.encoder.options.batch_size,
        }  # fmt: skip
    return described if miner.candidates is None else {**described, **miner.candidates.describe()}


def _identity(options: MiningOptions, items: Items, miner: Miner) -> dict[str, Any]:
    reranker, name = None, options.reranker.cross_encoder
    if name:
        reranker = asdict(options.reranker) | {"model": model_fingerprint(name) if Path(name).is_dir() else name}
    return {
        **describe_miner(miner), "inputs": [file["sha256"] for file in fingerprints(items.inputs)],
        "cross_encoder": reranker, "search_batch_size": options.search.search_batch_size,
        "with_scores": options.output.with_scores, "with_title": miner.store.with_title,
    }  # fmt: skip


def _by(options: MiningOptions) -> str:
    return "" if options.candidates.dense_alone else f" by {' and '.join(options.candidates.modes)}"


def _report(options: MiningOptions, job: Job, items: Items, miner: Miner) -> dict[str, Any]:
    sampling, filters, judge = miner.sampling, miner.filters, options.reranker.cross_encoder
    how, passages = f"{sampling.negative_number} negatives per query", f"{miner.store.rows:,} passages"
    first, last = sampling.window
    if sampling.random_negatives:
        how += f" at random from {passages}, seed {sampling.seed}"
    else:
        limits = ", ".join(f"{name} {getattr(filters, name)}" for name in filters.given()) or "none"
        how += (
            f", {sampling.sampling_strategy} of ranks {first + 1} to {last} of {passages} as "
            f"{options.encoder.encoder} ranks them{_by(options)}; "
            f"filters: {limits}{f' by the scores of {judge}' if judge else ''}; "
            f"fill: {sampling.fill}; seed {sampling.seed}"
        )
    return {
        "output": options.output.path.name,
        "how": how,
        "result": summarize(job.notes(), sampling.negative_number),
        "skipped": {name: count for name, count in items.skipped.items() if count},
        "arguments": asdict(options),
        "identity": describe_miner(miner),
        "provenance": provenance(),
    }
