"""The stages of a run, each over functions of another command: queries, negatives, the queries of those."""

from __future__ import annotations

import shutil
from collections import ChainMap, Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from FlagEmbedding.collections.writing import write_judgments
from FlagEmbedding.mining.common.jobs import Job
from FlagEmbedding.mining.common.negative_table import NegativeTable, fill, negative_table
from FlagEmbedding.mining.common.queries import Item, TrainingRows
from FlagEmbedding.mining.common.reranker import Reranker
from FlagEmbedding.mining.common.rows import data_files, json_line
from FlagEmbedding.mining.from_corpus.arguments import FromCorpusOptions
from FlagEmbedding.mining.from_corpus.prompting import Prompter
from FlagEmbedding.mining.from_corpus.sampling import Drawn
from FlagEmbedding.mining.hard_negatives.miner import Miner, training_row
from FlagEmbedding.mining.hard_negatives.pipeline import describe_miner, mine_into
from FlagEmbedding.mining.hard_negatives.report import summarize
from FlagEmbedding.mining.query_generation.answer_cache import AnswerCache
from FlagEmbedding.mining.query_generation.pipeline import Generation, Model, write_rows
from FlagEmbedding.mining.query_generation.round_trip import RoundTrip
from FlagEmbedding.utils.errors import DataError
from FlagEmbedding.utils.identity import digest, fingerprints
from FlagEmbedding.utils.io import atomic_text

Found = dict[tuple[str, str], str]  # (docid, kind) → the query of that kind


class TrainRows(TrainingRows):
    """Rows whose negatives may not be passages of dev; ``dev``: the keys of those."""

    def __init__(self, file: Path, dev: dict[bytes, None]) -> None:
        self.dev = dev
        super().__init__([file])

    def __iter__(self) -> Iterator[Item]:
        for item in super().__iter__():
            yield replace(item, judged=ChainMap(dict.fromkeys(item.judged), self.dev))


@dataclass
class Run:
    """What all stages of one run share.

    Attributes:
        trip: the search for a passage by its query, with the index that negatives are mined in.
        stages: the figures of each time that the model was asked.
    """

    options: FromCorpusOptions
    work: Path
    drawn: list[Drawn]
    language: str
    prompters: dict[str, Prompter]
    trip: RoundTrip
    cache: AnswerCache
    model: Model
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def dev_keys(self) -> dict[bytes, None]:
        return dict.fromkeys(passage.key for passage in self.drawn if passage.dev)

    def ask(self, stage: str, table: NegativeTable, prompter: Prompter, rejected: Any) -> None:
        """Have a query written for every passage of ``table`` that waits for one."""
        asked = table.count("open = 1")
        attempts = 1 if self.options.writing.temperature == 0 else self.options.checks.attempts
        generation = Generation(table, self.cache, self.model, prompter, self.options.checks, self.trip)
        generation.run(attempts)
        for passage, tried in table.listed():
            attempts_made = [{"attempt": n + 1, "query": query, "reason": reason} for n, query, reason in tried]
            rejected.write(json_line({"stage": stage, "passage": passage, "tried": attempts_made}))
        reasons = Counter[str]()
        for _, reason, count in table.rejections():
            reasons[reason] += count
        self.stages[stage] = {
            "asked": asked, "accepted": asked - table.count("open = 1"), "rejected": dict(reasons),
            "not_asked": generation.not_asked, **{name: generation.tokens[name] for name in ("prompt", "completion")},
        }  # fmt: skip

    def write_queries(self, rejected: Any) -> Found:
        """A query of each kind for each passage, where one passed; none twice."""
        found: Found = {}
        texts = {passage.docid: passage.text for passage in self.drawn}
        for kind, prompter in self.prompters.items():
            with negative_table(self.work / "waiting", self.options.sampling.seed) as table:
                for (docid, _), query in found.items():
                    table.add_real(query, [texts[docid]])  # so that no other passage or kind gets it, too
                for text in texts.values():
                    table.add_waiting(text)
                self.ask(kind, table, prompter, rejected)
                written = {docid: table.generated(text) for docid, text in texts.items()}
            found |= {(docid, kind): query for docid, query in written.items() if query}
        return found

    def mine(self, rows: Path) -> tuple[Path, dict[str, Any]]:
        """The rows with negatives, and how mining went."""
        options, sampling = self.options, self.options.sampling
        items, mined = TrainRows(rows, self.dev_keys), self.work / "mined.jsonl"
        reranker = Reranker(options.reranker, options.encoder) if options.reranker.cross_encoder else None
        retriever = None if sampling.random_negatives else self.trip.retriever
        miner = Miner(self.trip.store, sampling, options.filters, retriever, reranker)
        identity = {
            **describe_miner(miner), "inputs": fingerprints([rows]), "dev": digest(sorted(k.hex() for k in items.dev)),
            "reranker": asdict(options.reranker), "with_scores": options.output.with_scores,
        }  # fmt: skip
        with Job(mined, identity, overwrite=True) as job:
            row_of = partial(training_row, with_scores=options.output.with_scores)
            mine_into(job, items, miner, options.search.search_batch_size, row_of)
            result = summarize(job.notes(), sampling.negative_number)
            job.finish()
        return mined, result

    def write_training(self, mined: Path, target: Path, found: Found, rejected: Any) -> dict[str, int]:
        """``mined`` with the queries of its negatives; returns how many got theirs from where."""
        how = self.options.kinds.neg_q
        if how == "none":
            shutil.copyfile(mined, target)
            return {}
        texts = {passage.docid: passage.text for passage in self.drawn}
        more = data_files(self.options.kinds.reuse_from)
        with negative_table(self.work / "waiting", self.options.sampling.seed) as table:
            for (docid, _), query in found.items():
                table.add_real(query, [texts[docid]])
            fill(table, [mined], more, replace=False)
            if how == "generate":
                prompter = self.prompters.get("question") or next(iter(self.prompters.values()))
                self.ask("neg_q", table, prompter, rejected)
            with atomic_text(target) as stream:
                return dict(write_rows(stream, [mined], table, self.options.query_options([]).rows))


def run_stages(run: Run, copies: Mapping[bytes, Sequence[str]]) -> dict[str, Any]:
    """Queries, judgments, negatives and their queries, in the work folder; returns the figures."""
    options, work = run.options, run.work
    with atomic_text(work / "rejected.jsonl") as rejected:
        found = run.write_queries(rejected)
        topics, qrels, rows = dict[str, str](), dict[str, dict[str, int]](), 0
        with atomic_text(work / "pairs.jsonl") as stream:
            for passage in run.drawn:
                for kind in run.prompters:
                    query = found.get((passage.docid, kind))
                    if query is None:
                        continue
                    if passage.dev:
                        qid = f"{passage.docid}_{kind}"
                        topics[qid], qrels[qid] = query, dict.fromkeys(copies[passage.key], 1)
                    else:
                        row = {"query": query, "pos": [passage.text], "kind": kind, "docid": passage.docid}
                        rows += stream.write(json_line(row)) > 0
        if not rows or (options.documents.dev_share and not topics):
            raise DataError(
                f"{options.output.path}: {rows} queries for training and {len(topics)} for dev passed the checks "
                f"({_why(run.stages)}), at least one of each is needed; answers are kept: see to the prompt, the model "
                "or --max_requests, or raise --passages, --attempts or --round_trip_top_k"
            )
        mined, negatives = run.mine(work / "pairs.jsonl")
        if not negatives["rows"]:
            raise DataError(
                f"{options.output.path}: no query has a negative; widen --range_for_sampling or the filters"
            )
        neg_q = run.write_training(mined, work / "train" / "rows.jsonl", found, rejected)
    if topics:
        write_judgments(work / "eval", run.language, topics, qrels)
    else:
        shutil.rmtree(work / "eval")
    return {"topics": len(topics), "rows": negatives["rows"], "stages": run.stages, "mining": negatives, "neg_q": neg_q}


def _why(stages: Mapping[str, dict[str, Any]]) -> str:
    reasons = sum((Counter(stage["rejected"]) for stage in stages.values()), Counter[str]())
    reasons["not asked, --max_requests is reached"] = sum(stage["not_asked"] for stage in stages.values())
    return ", ".join(f"{name}: {count}" for name, count in reasons.most_common(4) if count) or "none came"
