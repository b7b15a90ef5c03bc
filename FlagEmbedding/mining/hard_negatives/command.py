"""Hard negatives (ANCE, Xiong et al. 2021, arXiv 2007.00808): ``python -m FlagEmbedding.mining.hard_negatives``.

From queries with their positives (training rows, or MIRACL's topics and qrels) and a corpus to training rows:
everything is embedded by one checkpoint, each query's neighbours are searched, and negatives are taken out of a rank
window after what ``filters.py`` leaves out. An index that step 0 built for the encoder is used as it is; otherwise one
is built where step 0 would. The same command gives the same bytes, also after being killed (``jobs.py``).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from FlagEmbedding.collections import miracl
from FlagEmbedding.indexing.encoding import WORK, EncodingConfig, build_index
from FlagEmbedding.indexing.retriever import Retriever
from FlagEmbedding.inference.arguments import EncoderArguments
from FlagEmbedding.inference.text_encoder import TextEncoder
from FlagEmbedding.mining.common.jobs import Job, Progress, check_output
from FlagEmbedding.mining.common.passages import PassageStore, corpus_files, index_label, passages_of_rows
from FlagEmbedding.mining.common.queries import Item, JudgedTopics, TrainingRows
from FlagEmbedding.mining.hard_negatives.arguments import MiningArguments, parse_mining_arguments
from FlagEmbedding.mining.hard_negatives.miner import Mined, Miner, check_index, chunks, training_row
from FlagEmbedding.mining.hard_negatives.report import markdown, summarize, write_report
from FlagEmbedding.mining.hard_negatives.reranker import CrossEncoder
from FlagEmbedding.retrieval.index import DOCID, INDEX, FlatIndex, index_folder
from FlagEmbedding.retrieval.shards import MANIFEST, read_manifest
from FlagEmbedding.schema import Problems, find_files
from FlagEmbedding.utils.cli import entry_point
from FlagEmbedding.utils.distributed import world_size
from FlagEmbedding.utils.errors import UsageError
from FlagEmbedding.utils.identity import fingerprints, model_fingerprint
from FlagEmbedding.utils.logging import get_logger
from FlagEmbedding.utils.provenance import provenance

logger = get_logger(__name__)


class Items(Protocol):
    """A sized stream of items that can be read again."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Any: ...


@dataclass(frozen=True)
class IndexSettings:
    """How passages became vectors, so that queries and positives are treated alike."""

    folder: Path
    max_length: int
    instruction: str | None
    with_title: bool


def mine_into(
    job: Job, items: Items, miner: Miner, chunk_size: int, row_of: Callable[[Mined], dict[str, Any] | None]
) -> None:
    """Mine for every item that ``job`` has not finished, chunk by chunk; ``row_of`` makes the row (None: no row)."""
    # The chunk in which an earlier run stopped is searched again as a whole, so that its scores are the same.
    start = job.done // chunk_size * chunk_size if job.done < len(items) else len(items)
    progress = Progress("hard negatives", len(items), job.done)
    rest: Iterable[Item] = islice(iter(items), start, None)
    for chunk in chunks(rest, chunk_size):
        for mined in miner.mine(chunk, skip=job.done - start):
            row = row_of(mined)
            mined.note["written"] = row is not None
            job.add([] if row is None else [row], mined.note)
            progress.step()
        start += len(chunk)


def index_settings(a: MiningArguments, label: str) -> IndexSettings:
    """The index folder, and length, instruction and title rule: as it says, or as the flags say where it is new."""
    assert a.encoder is not None
    folder = Path(a.index_dir) if a.index_dir else index_folder(a.index_save_dir, a.encoder, label)
    manifest = read_manifest(folder / MANIFEST) or read_manifest(folder / WORK / MANIFEST)
    there = manifest["identity"] if manifest else {}
    settled: dict[str, Any] = {}
    for flag, key, default in (
        ("passage_max_length", "max_passage_length", 512),
        ("passage_instruction_for_retrieval", "passage_instruction", None),
        ("with_title", "with_title", False),
    ):
        given = getattr(a, flag)
        if given is not None and key in there and there[key] != given:
            raise UsageError(
                f"--{flag} {given}: the index {folder} was made with {there[key]}; leave the flag out, or name "
                "another --index_dir"
            )
        settled[key] = there.get(key, default if given is None else given)
    return IndexSettings(folder, settled["max_passage_length"], settled["passage_instruction"], settled["with_title"])


def prepare_index(
    encoder: TextEncoder, files: Sequence[Path], settings: IndexSettings, label: str, batch_size: int
) -> FlatIndex:
    """The index in ``settings.folder``: as it stands there, or built now (and continued, if that was killed)."""
    folder = settings.folder
    whole = (folder / INDEX).is_file() and (folder / DOCID).is_file() and not (folder / WORK).is_dir()
    if whole:
        logger.info("%s: using the index that is there", folder)
    else:
        config = EncodingConfig(settings.max_length, batch_size, settings.with_title, settings.instruction)
        build_index(encoder, files, folder, label, config)
    return FlatIndex(folder)


def load_encoder(a: MiningArguments) -> TextEncoder:
    """The checkpoint that the flags describe."""
    assert a.encoder is not None
    return TextEncoder(
        EncoderArguments(**{f.name: getattr(a, f.name) for f in fields(EncoderArguments) if hasattr(a, f.name)})
    )


def mine_hard_negatives(a: MiningArguments) -> dict[str, Any]:
    """Run the command; returns the report. Raises ``UserError``."""
    output = Path(a.output_file)
    work = output.with_name(f".{output.name}.work")
    check_output(output, a.overwrite)
    rows = None if a.language else TrainingRows(_input_files(a))
    work.mkdir(parents=True, exist_ok=True)
    try:
        return _mine(a, rows, output, work)
    finally:
        # A kill leaves it for the next run; an error does not.
        shutil.rmtree(work, ignore_errors=True)


def _mine(a: MiningArguments, rows: TrainingRows | None, output: Path, work: Path) -> dict[str, Any]:
    files, label = _corpus(a, rows, work)
    settings = None if a.random_negatives else index_settings(a, label)
    with_title = settings.with_title if settings else bool(a.with_title)
    store = PassageStore.prepare(files, work, with_title)
    items = _items(a, rows, store)
    cross_encoder = _cross_encoder(a)
    retriever = None if settings is None else _retriever(a, files, settings, label, store)
    miner = Miner(store, a.sampling(), retriever, cross_encoder)
    with Job(output, _identity(a, rows, miner, with_title), overwrite=a.overwrite) as job:
        mine_into(job, items, miner, a.search_batch_size, lambda mined: training_row(mined, a.with_scores))
        record = _report(a, job, items, miner)
        folder = Path(a.report_dir) if a.report_dir else output.parent / "reports"
        paths = write_report(folder / output.name.removesuffix(".jsonl"), record)
        count = job.finish()
    logger.info("%s: %d rows; report: %s", output, count, paths[1])
    return record


def _input_files(a: MiningArguments) -> list[Path]:
    problems = Problems()
    files = [Path(file.path) for file in find_files(a.input_file, problems)]
    problems.raise_if_any()
    return files


def _corpus(a: MiningArguments, rows: TrainingRows | None, work: Path) -> tuple[list[Path], str]:
    """Its files, and the name of its index where none is given."""
    if a.corpus:
        return corpus_files(a.corpus, work), a.language or index_label(a.corpus[0])
    if a.language:
        miracl.check_languages([a.language])
        return miracl.corpus_files(a.language, a.data_dir, a.cache_dir), a.language
    assert rows is not None
    return passages_of_rows(rows.files, work), f"{index_label(rows.files[0])}-passages"


def _items(a: MiningArguments, rows: TrainingRows | None, store: PassageStore) -> TrainingRows | JudgedTopics:
    if rows is not None:
        return rows
    assert a.language is not None
    topics, qrels = _topic_files(a)
    return JudgedTopics(topics, qrels, store)


def _topic_files(a: MiningArguments) -> tuple[Path, Path]:
    assert a.language is not None
    place = (a.language, a.split, a.data_dir, a.cache_dir)
    return miracl.topics_file(*place), miracl.qrels_file(*place)


def _cross_encoder(a: MiningArguments) -> CrossEncoder | None:
    if a.cross_encoder is None:
        return None
    return CrossEncoder(
        a.cross_encoder, a.cross_encoder_max_length, a.cross_encoder_batch_size, cache_dir=a.cache_dir,
        trust_remote_code=a.trust_remote_code,
    )  # fmt: skip


def _retriever(
    a: MiningArguments, files: Sequence[Path], settings: IndexSettings, label: str, store: PassageStore
) -> Retriever:
    encoder = load_encoder(a)
    index = prepare_index(encoder, files, settings, label, a.batch_size)
    check_index(index, encoder, store)
    return Retriever(
        encoder,
        index,
        query_length=a.query_max_length,
        passage_length=settings.max_length,
        query_instruction=a.query_instruction_for_retrieval,
        passage_instruction=settings.instruction,
        threads=a.threads,
    )


def describe_miner(miner: Miner) -> dict[str, Any]:
    """What decides the negatives, flat, so that a difference reads as one: sampling, corpus, encoder, index."""
    sampling = asdict(miner.sampling)
    filters = sampling.pop("filters")
    described = {**sampling, **filters, "corpus": [file["sha256"] for file in miner.store.corpus]}
    if miner.retriever is not None:
        r = miner.retriever
        described |= {
            **{f"encoder {key}": value for key, value in r.encoder.describe().items()},
            "index": r.index.checksum(),
            "query_max_length": r.query_length,
            "passage_max_length": r.passage_length,
            "query_instruction": r.query_instruction,
            "passage_instruction": r.passage_instruction,
            "batch_size": r.encoder.options.batch_size,
        }
    return described


def _identity(a: MiningArguments, rows: TrainingRows | None, miner: Miner, with_title: bool) -> dict[str, Any]:
    inputs = [Path(path) for path in rows.files] if rows is not None else list(_topic_files(a))
    cross_encoder = None
    if miner.cross_encoder is not None:
        folder = miner.cross_encoder.model.config._name_or_path
        name = model_fingerprint(folder) if Path(folder).is_dir() else folder
        cross_encoder = [name, a.cross_encoder_max_length, a.cross_encoder_batch_size]
    return {
        **describe_miner(miner),
        "inputs": [file["sha256"] for file in fingerprints(inputs)],
        "random_negatives": a.random_negatives,
        "cross_encoder": cross_encoder,
        "search_batch_size": a.search_batch_size,
        "with_scores": a.with_scores,
        "with_title": with_title,
    }


def _report(a: MiningArguments, job: Job, items: TrainingRows | JudgedTopics, miner: Miner) -> dict[str, Any]:
    sampling, filters = miner.sampling, miner.sampling.filters
    if a.random_negatives:
        how = f"{sampling.negatives} negatives a query at random from {miner.store.rows:,} passages, seed {a.seed}"
    else:
        limits = ", ".join(f"{name} {getattr(filters, name)}" for name in filters.given()) or "none"
        judge = f" by the scores of {a.cross_encoder}" if a.cross_encoder else ""
        how = (
            f"{sampling.negatives} negatives a query, {sampling.strategy} of ranks {sampling.first + 1} to "
            f"{sampling.last} of {miner.store.rows:,} passages as {a.encoder} ranks them; filters: {limits}{judge}; "
            f"fill: {sampling.fill}; seed {a.seed}"
        )
    skipped = {}
    if isinstance(items, JudgedTopics):
        skipped = {
            "topics left out: no relevant passage": items.unanswered,
            "relevant passages that the corpus lacks": items.missing,
        }
    return {
        "output": Path(a.output_file).name,
        "how": how,
        "result": summarize(job.notes(), a.negative_number),
        "skipped": {name: count for name, count in skipped.items() if count},
        "arguments": asdict(a),
        "identity": describe_miner(miner),
        "provenance": provenance(),
    }


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, mine, print the report."""
    arguments = parse_mining_arguments(argv)
    if world_size() > 1:
        raise UsageError("mining runs in one process; build the index with step 0 under torchrun, then mine without it")
    print(markdown(mine_hard_negatives(arguments)), end="")
    return 0
