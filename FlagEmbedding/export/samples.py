"""Texts to compare two forms of a checkpoint on: queries and passages as a search would meet them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from FlagEmbedding.collections.corpus import read_file
from FlagEmbedding.collections.source import Source, sources
from FlagEmbedding.evaluation.arguments import DevArguments
from FlagEmbedding.export.arguments import SampleArguments
from FlagEmbedding.inference.text_encoder import TextEncoder, encode_texts
from FlagEmbedding.schema import Problems, find_files, read_records
from FlagEmbedding.utils.errors import DataError
from FlagEmbedding.utils.io import numbered_lines

# Where neither rows nor a collection are given: scripts, lengths, empty and odd ones.
BUILT_IN = (
    "How long is the river, and where does it end?",
    "한강은 서울을 지나 서해로 흘러든다. 길이는 약 오백 킬로미터이다.",
    "رود کارون پرآب‌ترین رود ایران است و از زاگرس سرچشمه می‌گیرد.",
    "गंगा नदी हिमालय से निकलकर बंगाल की खाड़ी में गिरती है।",
    "東京の人口はどのくらいですか。",
    "x",
    "",
    "The cabbage is salted, rinsed, mixed with chili, garlic and ginger, and left to ferment for several days. " * 6,
)


@dataclass(frozen=True)
class Samples:
    """Texts without instructions."""

    queries: list[str]
    passages: list[str]

    def prefixed(self, encoder: TextEncoder, dev: DevArguments) -> list[tuple[list[str], int]]:
        """The queries, then the passages, after their instructions, and how many tokens of them are read."""
        query = encoder.instruction("query", dev.query_instruction_for_retrieval) or ""
        passage = encoder.instruction("passage", dev.passage_instruction_for_retrieval) or ""
        query_length, passage_length = dev.eval_query_length, dev.eval_passage_length
        if encoder.longest is not None:
            query_length, passage_length = min(query_length, encoder.longest), min(passage_length, encoder.longest)
        return [
            ([query + text for text in self.queries], query_length),
            ([passage + text for text in self.passages], passage_length),
        ]

    def vectors(self, encoder: TextEncoder, dev: DevArguments) -> np.ndarray:
        """Unit vectors ``[N, D]`` float32, queries first."""
        parts = [encode_texts(encoder, texts, length) for texts, length in self.prefixed(encoder, dev)]
        found = np.concatenate(parts)
        return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)  # type: ignore[no-any-return]


def find_samples(asked: SampleArguments, dev: DevArguments) -> Samples:
    """The first ``asked.samples`` queries and passages of the rows, else of the dev collection, else the built-in ones.

    Raises:
        UserError: rows or a collection that cannot be read, or that hold no text.
    """
    if asked.data:
        queries, passages = _of_files(asked.data)
    elif dev.eval_data_dir:
        found = sources(dev.eval_languages, dev.eval_split, dev.eval_data_dir).values()
        queries = {text: None for each in found for text in [*each.topics().values()][: asked.samples]}
        passages = {text: None for each in found for text in islice(_corpus(each), asked.samples) if text}
    else:
        queries, passages = dict.fromkeys(BUILT_IN[:1]), dict.fromkeys(BUILT_IN[1:])
    return Samples(_some(list(queries), asked.samples), _some(list(passages), asked.samples))


def _of_files(paths: Sequence[str]) -> tuple[dict[str, None], dict[str, None]]:
    problems = Problems()
    queries: dict[str, None] = {}
    passages: dict[str, None] = {}
    for file in find_files(paths, problems):
        if file.path.endswith(".txt"):
            passages |= dict.fromkeys(line.strip() for _, line in numbered_lines(file.path, "text") if line.strip())
            continue
        for record in read_records(file.path, problems):
            queries[record.query] = None
            passages[record.pos[0]] = None
    problems.raise_if_any()
    if not passages:
        raise DataError(f"--data {' '.join(paths)}: no texts in it")
    return queries or passages, passages


def _corpus(source: Source) -> Iterator[str]:
    for file in source.corpus():
        for passage in read_file(file):
            yield passage.text


def _some(texts: list[str], most: int) -> list[str]:
    """At most ``most`` of the texts, evenly spread."""
    if len(texts) <= most:
        return texts
    return [texts[round(place)] for place in np.linspace(0, len(texts) - 1, most)]
