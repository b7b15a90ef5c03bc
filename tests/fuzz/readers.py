"""Every reader of the product, with whole files to start from: any bytes give rows or one ``UserError``.

A reader is given a folder in which each of its files holds some bytes, and reads all of it.
"""

from __future__ import annotations

import hashlib
import json
import struct
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from FlagEmbedding.collections import corpus, trec
from FlagEmbedding.collections.source import Source
from FlagEmbedding.evaluation.run_record import check_judged, read_record, run_origin
from FlagEmbedding.finetune.parsing import config_words
from FlagEmbedding.mining.common.jobs import Job
from FlagEmbedding.mining.common.passages import PassageStore, corpus_files, passages_of_rows
from FlagEmbedding.mining.common.queries import JudgedTopics, TrainingRows
from FlagEmbedding.mining.common.rows import data_files
from FlagEmbedding.mining.common.triples import read_triples, rows_of_triples
from FlagEmbedding.mining.from_corpus.prompting import read_examples
from FlagEmbedding.mining.query_generation.answer_cache import Answer, AnswerCache
from FlagEmbedding.mining.query_generation.endpoint import parse_answer
from FlagEmbedding.retrieval.index import DOCID, INDEX, FlatIndex, flat_header
from FlagEmbedding.retrieval.shards import MANIFEST, ShardStore, check_manifest, read_manifest
from FlagEmbedding.schema import Problems, find_files, read_records
from FlagEmbedding.utils.errors import DataError
from paper_table.plan import read_table


@dataclass(frozen=True)
class Reader:
    """What reads the files ``names`` of a folder; ``seeds`` are contents of them that can be read."""

    names: tuple[str, ...]
    seeds: tuple[tuple[bytes, ...], ...]
    read: Callable[[Path], object]


def lines(*rows: object) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


ROW = {"query": "q", "pos": ["p", "강"], "neg": ["n", "m"], "pos_scores": [1, 0.5], "neg_scores": [0, 1e-3],
       "neg_q": ["", ["a", "b"]], "id": 7}  # fmt: skip
ROWS = lines(ROW, {"query": "q2", "pos": "p", "neg": "n"})
CORPUS = lines({"docid": "1#0", "title": "t", "text": "x"}, {"docid": "1#1", "text": "رود"})
BEIR_CORPUS = lines({"_id": "a", "title": "t", "text": "x"}, {"_id": "b", "text": "y"})
QUERIES = lines({"_id": "q", "text": "what"}, {"_id": "r", "text": "who"})
BEIR_QRELS = b"query-id\tcorpus-id\tscore\nq\ta\t1\nr\tb\t0\n"
TOPICS, QRELS = "1\tone\n2\t강 two\n".encode(), b"1 Q0 1#0 1\n2 Q0 1#1 0\n"
RUN = b"1 Q0 1#0 1 0.500000 Faiss\n1 Q0 1#1 2 0.25 Faiss\n"
TRIPLES = lines({"query": "a", "positive": "p", "negative": "n", "score": [1, 0]}, ["a", "p", "m"])
TABLE = b'query,positive,negative\na,"p, ""x""",n\nb,"two\nlines",m\n'
VECTORS = flat_header(2, 3) + struct.pack("<6f", *range(6))
IDENTITY = {
    "identity": {"model": "m", "pooling": "cls"},
    "rows": 2,
    "dimension": 3,
    "shard_size": 1,
    "passages": [2],
    "run": "r",
}
FILES = {name: {"sha256": hashlib.sha256(held).hexdigest()} for name, held in ((INDEX, VECTORS), (DOCID, b"a\nb\n"))}
RECORD = {"encoder": {"pooling": "cls"}, "index": {"rows": 2}, "arguments": {"split": "dev"}}


def parquet() -> bytes:
    import pyarrow
    import pyarrow.parquet

    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"query": "q", "pos": ["p"], "neg": ["n"]}]), sink)
    return bytes(sink.getvalue())


def arrow() -> bytes:
    import pyarrow

    table, sink = pyarrow.Table.from_pylist([{"query": "q", "pos": ["p"], "neg": ["n"]}]), pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


SAVED = ("state.json", "dataset_info.json", "data-00000-of-00001.arrow")


def saved() -> tuple[bytes, ...]:
    import datasets

    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        datasets.Dataset.from_list([{"query": "q", "pos": ["p"], "neg": ["n"]}]).save_to_disk(folder)
        return tuple((Path(folder) / name).read_bytes() for name in SAVED)


def cache() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        made = AnswerCache(Path(folder) / "c")
        made.put([("k", Answer("text"))])
        made.put_ranks([("k", 3)])
        made.close()
        return (Path(folder) / "c").read_bytes()


def read_rows_of(name: str) -> Callable[[Path], object]:
    def read(folder: Path) -> object:
        problems = Problems()
        files = find_files([folder / name], problems)
        found = [record for file in files for record in read_records(file.path, problems)]
        problems.raise_if_any()
        return found, list(TrainingRows(data_files([str(folder / name)])))

    return read


def read_saved(folder: Path) -> object:
    problems = Problems()
    found = [list(read_records(file.path, problems)) for file in find_files([folder], problems)]
    problems.raise_if_any()
    return found


def read_corpus(folder: Path) -> object:
    files = [folder / "docs-0.jsonl"]
    found = corpus.survey(files, allow_empty=True)
    return list(corpus.stream(files, found.passages, [(0, found.total)]))


def read_pool(name: str) -> Callable[[Path], object]:
    def read(folder: Path) -> object:
        work = folder / "work"
        work.mkdir()
        store = PassageStore.prepare(corpus_files([folder / name], work), work)
        return [store[i] for i in range(len(store))], store.rows_of({"1#0"})

    return read


def read_own_passages(folder: Path) -> object:
    (folder / "work").mkdir()
    return PassageStore.prepare(passages_of_rows([folder / "a.jsonl"], folder / "work"), folder / "work").rows


def read_beir(folder: Path) -> object:
    source = Source("xx", "test", folder)
    (folder / "work").mkdir()
    store = PassageStore.prepare(source.corpus(), folder / "work", with_title=True)
    return source.topics(), list(JudgedTopics(source, store))


def read_triple_file(name: str) -> Callable[[Path], object]:
    def read(folder: Path) -> object:
        problems = Problems()
        found = list(rows_of_triples(read_triples(folder / name, problems, Counter())))
        problems.raise_if_any()
        return found

    return read


def read_index(folder: Path) -> object:
    index = FlatIndex(folder)
    index.check_encoder({"model": "m", "pooling": "cls"}, "hint")
    return list(index.docids), list(index.blocks(1)), index.checksum()


def read_shards(folder: Path) -> object:
    path = folder / MANIFEST
    manifest = read_manifest(path)
    if manifest is None:
        return None
    check_manifest(manifest, {"model": "m", "pooling": "cls"}, path)
    store = ShardStore(folder, manifest)
    if len(store) > 100:
        return len(store)
    return [store.digests(shard) for shard in range(len(store)) if shard in store.finished()]


def read_run_record(folder: Path) -> object:
    (folder / "index").mkdir()
    (folder / "index" / MANIFEST).write_bytes((folder / MANIFEST).read_bytes())
    (folder / "index" / DOCID).write_bytes((folder / DOCID).read_bytes())
    check_judged({"q": {"1#0": 1}}, folder / "index")
    found = [read_record(folder / "a.json"), read_record(folder / "none.json", folder / "index")]
    return [run_origin(record) for record in found]


def read_cache(folder: Path) -> object:
    made = AnswerCache(folder / "cache.sqlite")
    try:
        return made.get("k"), made.rank("k"), made.spent("j")
    finally:
        made.close()


def read_answer(folder: Path) -> object:
    try:
        return parse_answer((folder / "body").read_text("utf-8", "replace"))
    except ValueError as error:  # the endpoint's own word for it
        raise DataError(str(error)[:80].encode("ascii", "replace").decode()) from error


def read_journal(folder: Path) -> object:
    with Job(folder / "out.jsonl", {"a": 1}, overwrite=True) as job:
        return list(job.notes())


def one(name: str, read: Callable[[Path], object], *seeds: bytes) -> Reader:
    return Reader((name,), tuple((seed,) for seed in seeds), read)


def several(names: Sequence[str], read: Callable[[Path], object], *seeds: tuple[bytes, ...]) -> Reader:
    return Reader(tuple(names), seeds, read)


READERS = {
    **{name: one(name, read_rows_of(name), ROWS, b"[" + lines(ROW).strip() + b"]")
       for name in ("a.jsonl", "a.json", "a.jsonl.gz", "a.jsonl.zst")},
    "a.parquet": one("a.parquet", read_rows_of("a.parquet"), parquet()),
    "a.arrow": one("a.arrow", read_rows_of("a.arrow"), arrow()),
    "saved dataset": several(SAVED, read_saved, saved()),
    "corpus": one("docs-0.jsonl", read_corpus, CORPUS, BEIR_CORPUS),
    "packed corpus": one("c.jsonl.gz", read_pool("c.jsonl.gz"), CORPUS),
    "pool": one("pool.json", read_pool("pool.json"), CORPUS, lines({"text": "x"}, {"id": 5, "text": "y"})),
    "passages of rows": one("a.jsonl", read_own_passages, ROWS),
    "topics": one("t.tsv", lambda folder: trec.read_topics(folder / "t.tsv"), TOPICS),
    "qrels": one("q.tsv", lambda folder: trec.read_qrels(folder / "q.tsv"), QRELS, BEIR_QRELS),
    "qrels of BEIR": one("q.tsv", lambda folder: trec.read_qrels(folder / "q.tsv", beir=True), QRELS, BEIR_QRELS),
    "run": one("r.txt", lambda folder: trec.read_run(folder / "r.txt"), RUN),
    "BEIR": several(("corpus.jsonl", "queries.jsonl", "qrels/test.tsv"), read_beir, (BEIR_CORPUS, QUERIES, BEIR_QRELS)),
    "triples": one("t.jsonl", read_triple_file("t.jsonl"), TRIPLES),
    "CSV": one("t.csv", read_triple_file("t.csv"), TABLE),
    "TSV": one("t.tsv", read_triple_file("t.tsv"), TABLE.replace(b",", b"\t")),
    "index": several((INDEX, DOCID), read_index, (VECTORS, b"a\nb\n"), (VECTORS, b"a\r\nb")),
    "index with manifest": several((INDEX, DOCID, MANIFEST), read_index, (
        VECTORS, b"a\nb\n", json.dumps({**IDENTITY, "files": FILES}).encode())),
    "shards": several((MANIFEST, "shard-000000.json"), read_shards, (
        json.dumps(IDENTITY).encode(), b'{"f32_sha256": "a", "docid_sha256": "b", "run": "r"}')),
    "run record": several(("a.json", MANIFEST, DOCID), read_run_record, (
        json.dumps(RECORD).encode(), json.dumps(IDENTITY).encode(), b"1#0\n")),
    "examples": one("e.txt", lambda folder: read_examples([str(folder / "e.txt")]), b"how deep\nwhere\n"),
    "example rows": one("e.jsonl", lambda folder: read_examples([str(folder / "e.jsonl")]), ROWS, QUERIES),
    "answer cache": one("cache.sqlite", read_cache, cache(), b""),
    "answer": one("body", read_answer, b'{"choices": [{"message": {"content": "x"}}], "usage": {"prompt_tokens": 1}}'),
    "journal": one(".out.jsonl.journal", read_journal,
                   lines({"journal": 1, "output": "out.jsonl", "a": 1}, {"rows": [], "note": 1})),
    "yaml": one("c.yaml", lambda folder: config_words(folder / "c.yaml"), b"output_dir: x\ntrain_data: [a, b]\nx: y\n"),
    "table.yaml": one("t.yaml", lambda folder: read_table(folder / "t.yaml"),
                      b"rows:\n- name: a\n- name: b\npublished: {source: x, scores: {a: 1}}\n"),
    "json settings": one("c.json", lambda folder: config_words(folder / "c.json"), b'{"output_dir": "x", "a": [1]}'),
}  # fmt: skip
