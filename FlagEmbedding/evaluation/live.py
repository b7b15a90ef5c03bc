"""Measures of a model that is in memory: steps 0, 1 and 2 in one go, by their engine, search and measures.

A collection is read, checked and tokenized once; a model is then scored on it as often as it changes. The figures are
those of the steps to the digit, since texts go through the engine in the same windows. Under torchrun every process
keeps the tokens of its share of the windows and encodes them; the main one collects the vectors, searches and scores.

Memory: 4 bytes per token of a process's share, kept; 4 bytes per dimension and passage on the main process, while it
scores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from FlagEmbedding.collections.corpus import Passage, Survey, passage_text, read_file, stream, survey
from FlagEmbedding.collections.source import Source
from FlagEmbedding.collections.trec import Qrels, Run, Topics, relevant
from FlagEmbedding.evaluation.compare import score_run
from FlagEmbedding.evaluation.live_modes import search_modes
from FlagEmbedding.evaluation.metrics import Measure
from FlagEmbedding.evaluation.systems import LanguageScores, System
from FlagEmbedding.inference.arguments import WINDOW
from FlagEmbedding.inference.text_encoder import TextEncoder
from FlagEmbedding.inference.tokenization import TokenRows, tokenize
from FlagEmbedding.retrieval.memory import MemoryIndex
from FlagEmbedding.retrieval.searcher import Hit, search
from FlagEmbedding.utils.distributed import all_gather_rows, is_main, rank, world_size
from FlagEmbedding.utils.errors import DataError
from FlagEmbedding.utils.logging import get_logger
from FlagEmbedding.utils.modes import DENSE, Mode
from FlagEmbedding.utils.processes import on_main

logger = get_logger(__name__)

_Read = Callable[[Sequence[tuple[int, int]]], Iterator[list[str]]]
ROLES: tuple[Literal["query", "passage"], ...] = ("query", "passage")
HITS = 1_000  # passages per query, as step 1 takes by default
SHOWN = 10  # of them are kept for a reader
FirstHits = dict[str, list[str]]  # qid -> docids, best first


@dataclass(frozen=True)
class Reading:
    """How texts become tokens: at most so many each (and no more than the model reads), with or without titles."""

    query: int = 512
    passage: int = 512
    with_title: bool = False
    query_instruction: str | None = None  # None: what the checkpoint says
    passage_instruction: str | None = None


@dataclass(frozen=True)
class _Texts:
    """This process's share of some texts: the windows of tokens it encodes, and how many texts each window has."""

    max_length: int
    sizes: list[int]  # of all windows
    own: dict[int, TokenRows]

    def vectors(self, encoder: TextEncoder) -> np.ndarray | None:
        """``[N, dimension]`` float32 of all texts, on the main process; every process must call this together."""
        world, found = world_size(), []
        for first in range(0, len(self.sizes), world):
            sizes = [*self.sizes[first : first + world], *[0] * world][:world]
            number = first + rank()
            mine = torch.empty((0, encoder.hidden_size), device=encoder.device)
            if number in self.own:
                mine = encoder.encode_rows(self.own[number], self.max_length).float()
            every = all_gather_rows(mine, sizes)
            if is_main():
                found.append(every.cpu().numpy())
        return np.concatenate(found) if is_main() else None


class DevCollection:
    """The judged queries and the passages of one collection, tokenized for models of one tokenizer.

    Every process makes it, at the same time.

    Args:
        encoder: of such a model; gives the tokenizer, the instructions and the longest input.

    Raises:
        DataError: a corpus, topics or judgments that cannot be used.
    """

    def __init__(self, source: Source, encoder: TextEncoder, reading: Reading) -> None:
        self.source, self.name = source, source.lang
        self.topics: Topics = on_main(source.topics)
        self.qrels: Qrels = on_main(source.qrels)
        self.docids: list[str] = []  # of the main process alone
        found = on_main(self._survey)
        self.passages, self.queries = found.total, len(self.topics)
        given = {"query": reading.query_instruction, "passage": reading.passage_instruction}
        prefixes = [encoder.instruction(role, given[role]) or "" for role in ROLES]
        texts = [prefixes[0] + query for query in self.topics.values()]
        self.query_tokens = _tokenized(
            encoder, reading.query, len(texts), lambda spans: (texts[start:end] for start, end in spans)
        )

        def passages(spans: Sequence[tuple[int, int]]) -> Iterator[list[str]]:
            for part in stream(source.corpus(), found.passages, spans):
                yield [prefixes[1] + passage_text(passage, reading.with_title) for passage in part]

        self.passage_tokens = _tokenized(encoder, reading.passage, found.total, passages)

    def _survey(self) -> Survey:
        def keep(passage: Passage) -> None:
            self.docids.append(passage.docid)

        found = survey(self.source.corpus(), keep=keep)
        wanted = {docid for judged in self.qrels.values() for docid in relevant(judged)}
        missing = wanted.difference(self.docids)
        if len(missing) == len(wanted):
            raise DataError(f"{self.source.qrels_file()}: none of the {len(wanted)} relevant passages is in the corpus")
        if missing:
            logger.warning("%s: %d of %d relevant passages are not in the corpus", self.name, len(missing), len(wanted))
        return found

    def search(self, encoder: TextEncoder, hits: int = HITS) -> Callable[[], dict[str, list[Hit]]]:
        """Encode everything, all processes together; what is returned searches, and is for the main process to call.

        It gives the best passages of every query.
        """
        queries, vectors = self.vectors(encoder)

        def found() -> dict[str, list[Hit]]:
            return self.hits(encoder, queries, vectors, hits)

        return found

    def vectors(self, encoder: TextEncoder) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Of queries and passages, ``[N, dimension]`` on the main process; all processes call it together."""
        return self.query_tokens.vectors(encoder), self.passage_tokens.vectors(encoder)

    def hits(
        self, encoder: TextEncoder, queries: np.ndarray | None, vectors: np.ndarray | None, hits: int = HITS
    ) -> dict[str, list[Hit]]:
        """The best passages of every query, by their vectors (main process)."""
        assert queries is not None and vectors is not None
        broken = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
        if len(broken):
            raise DataError(f"{self.name}: the vector of passage {self.docids[broken[0]]!r} is not finite")
        index = MemoryIndex(Path(self.name), self.docids, vectors)
        every = search(index, queries, hits, threads=torch.get_num_threads(), device=encoder.device)
        return dict(zip(self.topics, every, strict=True))

    def score(self, encoder: TextEncoder, measures: Sequence[Measure]) -> tuple[LanguageScores, FirstHits]:
        """``measures`` and first hits of every judged query, the same on all processes, which call it together."""
        found = self.search(encoder)

        def scores() -> tuple[LanguageScores, FirstHits]:
            hits = found()
            first = {qid: [hit.docid for hit in hits[qid][:SHOWN]] for qid in self.qrels if qid in hits}
            return self.judge(hits, measures), first

        return on_main(scores)

    def judge(self, hits: dict[str, list[Hit]], measures: Sequence[Measure]) -> LanguageScores:
        """``measures`` of every judged query (main process)."""
        run: Run = {qid: {hit.docid: hit.score for hit in own} for qid, own in hits.items()}
        return score_run(self.qrels, run, measures)

    def score_modes(
        self, encoder: TextEncoder, measures: Sequence[Measure], modes: Sequence[Mode]
    ) -> tuple[FirstHits, dict[Mode, LanguageScores]]:
        """The first hits of dense, and ``measures`` of it and of every other mode, as :meth:`score`."""
        asked = list(dict.fromkeys([DENSE, *modes]))
        found = search_modes(self.name, self.docids, self.query_tokens, self.passage_tokens, encoder, asked, HITS)

        def scores() -> tuple[FirstHits, dict[Mode, LanguageScores]]:
            by_mode = {mode: dict(zip(self.topics, hits, strict=True)) for mode, hits in found().items()}
            first = {
                qid: [hit.docid for hit in by_mode[DENSE][qid][:SHOWN]] for qid in self.qrels if qid in self.topics
            }
            runs: dict[Mode, Run] = {
                mode: {qid: {hit.docid: hit.score for hit in own} for qid, own in hits.items()}
                for mode, hits in by_mode.items()
            }
            return first, {mode: score_run(self.qrels, run, measures) for mode, run in runs.items()}

        return on_main(scores)

    def texts(self, wanted: set[str]) -> dict[str, str]:
        """The texts of some passages, by docid, read again from the corpus."""
        if not wanted:
            return {}
        return {p.docid: p.text for path in self.source.corpus() for p in read_file(path) if p.docid in wanted}


@dataclass(frozen=True)
class Evaluated:
    """A model on all collections: its scores, by collection each query's first hits, and other modes by name."""

    system: System
    hits: dict[str, FirstHits]
    modes: dict[str, System] = field(default_factory=dict)


def score_model(
    name: str,
    encoder: TextEncoder,
    collections: Sequence[DevCollection],
    measures: Sequence[Measure],
    modes: Sequence[Mode] = (),
) -> Evaluated:
    """``encoder`` as the system ``name``, the same on every process, which call it together.

    Args:
        modes: what is measured beside dense.
    """
    if modes:
        by_lang = {each.name: each.score_modes(encoder, measures, modes) for each in collections}
        systems = {
            mode: System(f"{name} {mode.name}", {lang: own[mode] for lang, (_, own) in by_lang.items()})
            for mode in dict.fromkeys([DENSE, *modes])
        }
        first = {lang: hits for lang, (hits, _) in by_lang.items()}
        others = {mode.name: system for mode, system in systems.items() if mode != DENSE}
        return Evaluated(System(name, systems[DENSE].languages), first, others)
    found = {each.name: each.score(encoder, measures) for each in collections}
    system = System(name, {lang: scores for lang, (scores, _) in found.items()})
    return Evaluated(system, {lang: hits for lang, (_, hits) in found.items()})


def _tokenized(encoder: TextEncoder, max_length: int, count: int, read: _Read) -> _Texts:
    """Tokens of every ``world_size``-th window of ``count`` texts; ``read`` gives the texts of some spans."""
    numbers = range(math.ceil(count / WINDOW))
    spans = [(WINDOW * number, min(count, WINDOW * (number + 1))) for number in numbers]
    mine = list(numbers)[rank() :: world_size()]
    texts = read([spans[number] for number in mine])
    own = {n: tokenize(encoder.tokenizer, each, max_length) for n, each in zip(mine, texts, strict=True)}
    return _Texts(max_length, [end - start for start, end in spans], own)
