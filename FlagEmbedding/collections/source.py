"""Where a language's corpus, queries and judgments come from: a folder in BEIR's or MIRACL's layout, or the hub."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from FlagEmbedding.collections import miracl
from FlagEmbedding.collections.beir import CORPUS, QUERIES, beir_file, beir_folder, beir_qrels, read_beir_queries
from FlagEmbedding.collections.trec import Qrels, Topics, read_qrels, read_topics
from FlagEmbedding.utils.io import PathLike


@dataclass(frozen=True)
class Source:
    """One language of a collection.

    Attributes:
        lang: a language of MIRACL, or what the folder calls its own.
        split: which queries and judgments.
        data_dir: a folder that is asked first; None: only the hub.
        only_language: False when other languages are read from the folder too.
    """

    lang: str
    split: str = "dev"
    data_dir: PathLike | None = None
    cache_dir: str | None = None
    only_language: bool = True

    @cached_property
    def beir(self) -> Path | None:
        """The folder in BEIR's layout, if it is one."""
        return None if self.data_dir is None else beir_folder(self.data_dir, self.lang, self.only_language)

    def corpus(self) -> list[Path]:
        """The corpus files, in order."""
        if self.beir is not None:
            return [beir_file(self.beir, CORPUS)]
        return miracl.corpus_files(self.lang, self.data_dir, self.cache_dir)

    def topics_file(self) -> Path:
        """The file with the queries."""
        if self.beir is not None:
            return beir_file(self.beir, QUERIES)
        return miracl.topics_file(self.lang, self.split, self.data_dir, self.cache_dir)

    def topics(self) -> Topics:
        """The queries of the split; BEIR's are those that it judges."""
        if self.beir is not None:
            return read_beir_queries(self.topics_file(), self.qrels().keys())
        return read_topics(self.topics_file())

    def qrels_file(self) -> Path:
        """The file with the judgments."""
        if self.beir is not None:
            return beir_qrels(self.beir, self.split)
        return miracl.qrels_file(self.lang, self.split, self.data_dir, self.cache_dir)

    def qrels(self) -> Qrels:
        """The judgments of the split."""
        return read_qrels(self.qrels_file(), beir=self.beir is not None)

    def files(self) -> list[Path]:
        """All of them. Raises ``UserError`` for one that is missing."""
        return [*self.corpus(), self.topics_file(), self.qrels_file()]


def sources(
    languages: Sequence[str], split: str = "dev", data_dir: PathLike | None = None, cache_dir: str | None = None
) -> dict[str, Source]:
    """A source for each language, each once. Raises ``UsageError`` for one that MIRACL and the folder lack."""
    checked = miracl.check_languages(list(languages), data_dir)
    return {lang: Source(lang, split, data_dir, cache_dir, len(checked) == 1) for lang in checked}
