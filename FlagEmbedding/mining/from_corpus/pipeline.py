"""From bare documents to two folders: ``python -m FlagEmbedding.mining.from_corpus``.

A chain over the other commands' functions: passages are drawn; a model writes a query of each kind for each of them,
which ``query_generation`` checks (refusals, language, copies, round trip); ``hard_negatives`` mines; negatives get the
queries that they answer. Choices:

* Dev is split off by passage: one whose queries are dev's is neither positive nor negative of a training row, nor are
  its copies. The eval folder has the whole corpus, and copies of a relevant passage are relevant.
* The output is a function of the corpus, the options and the cached answers. A killed run, given again, draws, checks
  and mines again, goes on with the index where it was, and asks for nothing that was answered.
* ``from_corpus.json`` is written last: where it stands, both folders are whole.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from FlagEmbedding.collections.corpus import passage_text, read_file
from FlagEmbedding.collections.miracl import is_code
from FlagEmbedding.collections.writing import write_corpus
from FlagEmbedding.mining.common.index import settle
from FlagEmbedding.mining.from_corpus.arguments import FromCorpusOptions
from FlagEmbedding.mining.from_corpus.estimate import estimate
from FlagEmbedding.mining.from_corpus.folders import (
    RECORD,
    check_folder,
    clear_stale_index,
    put_in_place,
    scratch_folder,
)
from FlagEmbedding.mining.from_corpus.prompting import make_prompters
from FlagEmbedding.mining.from_corpus.report import next_command
from FlagEmbedding.mining.from_corpus.sampling import Drawn, draw, given_files
from FlagEmbedding.mining.from_corpus.stages import Run, run_stages
from FlagEmbedding.mining.query_generation.answer_cache import AnswerCache
from FlagEmbedding.mining.query_generation.checks import guess_language
from FlagEmbedding.mining.query_generation.pipeline import open_model
from FlagEmbedding.mining.query_generation.redaction import strike_all
from FlagEmbedding.mining.query_generation.round_trip import RoundTrip
from FlagEmbedding.retrieval.index import index_folder
from FlagEmbedding.retrieval.shards import clear_disk_errors
from FlagEmbedding.utils.errors import UsageError
from FlagEmbedding.utils.identity import digest, fingerprints
from FlagEmbedding.utils.provenance import provenance
from FlagEmbedding.utils.texts import text_key


def build_from_corpus(options: FromCorpusOptions) -> dict[str, Any]:
    """Run the command; returns its record. Raises ``UserError``."""
    output, dry = options.output.path, options.writing.dry_run
    with ExitStack() as opened:
        if dry:
            work = Path(opened.enter_context(tempfile.TemporaryDirectory()))
        else:
            check_folder(output, options.output.overwrite)
            with clear_disk_errors(f"making {output}"):
                output.parent.mkdir(parents=True, exist_ok=True)
            work = opened.enter_context(scratch_folder(output))
        prompters = make_prompters(options)
        for name in ("given", "search", "train"):
            (work / name).mkdir(exist_ok=True)
        files = given_files(options.documents.corpus, work / "given")
        drawn, counts = draw(files, bool(options.search.with_title), options.documents, options.sampling.seed)
        language = _language(options, drawn)
        cache = opened.enter_context(closing(_cache(options, work)))
        job = digest(str(output.resolve()), options.endpoint.model, fingerprints(files))
        record = {"output": str(output), "dry_run": dry, "language": language, "counts": dict(counts)}
        if dry:
            return {**record, **estimate(options, drawn, counts, prompters, cache, job)}
        corpus, copies = _write_corpus(work / "eval", language, files, drawn, bool(options.search.with_title))
        options = _with_index(options, corpus, language)
        queries = options.query_options([str(corpus)])
        trip = RoundTrip(queries, [], work / "search", cache)
        run = Run(options, work, drawn, language, prompters, trip, cache, open_model(queries, cache, job))
        with clear_disk_errors(f"writing {work}"):
            record |= run_stages(run, copies)
        requests = cache.spent(job) if options.endpoint.model else run.model.sent
        record |= {
            "model": run.model.name, "requests": requests, "arguments": asdict(options), "provenance": provenance(),
            "corpus": fingerprints(files), "next": next_command(options, record),
        }  # fmt: skip
        record = dict(strike_all(record, os.environ.get(options.endpoint.api_key_env)))
        put_in_place(work, output, record)
        cache.settle(job)
    return record


def _language(options: FromCorpusOptions, drawn: Sequence[Drawn]) -> str:
    """``--language``, else what most of the passages are in; it names files of the eval folder."""
    given = options.writing.language
    if given is not None and not is_code(given):
        raise UsageError(f"--language {given!r}: give a code such as ko")
    guesses = Counter(guess for passage in drawn if (guess := guess_language(passage.text)))
    return given or (min(guesses, key=lambda code: (-guesses[code], code)) if guesses else "own")


def _cache(options: FromCorpusOptions, work: Path) -> AnswerCache:
    path = options.output.path.with_name(".neg_q_cache.sqlite")
    path = Path(options.writing.cache) if options.writing.cache else path
    return AnswerCache(work / "no_answers.sqlite" if options.writing.dry_run and not path.exists() else path)


def _write_corpus(
    folder: Path, language: str, files: Sequence[Path], drawn: Sequence[Drawn], with_title: bool
) -> tuple[Path, dict[bytes, list[str]]]:
    """The eval folder's corpus, which is what is searched, and the docids of each dev passage and its copies."""
    copies: dict[bytes, list[str]] = {passage.key: [] for passage in drawn if passage.dev}

    def passages() -> Iterator[tuple[str, str, str]]:
        for path in files:
            for passage in read_file(path):
                docids = copies.get(text_key(passage_text(passage, with_title)))
                if docids is not None:
                    docids.append(passage.docid)
                yield passage.docid, passage.title, passage.text

    with clear_disk_errors(f"writing {folder}"):
        return write_corpus(folder, language, passages()), copies


def _with_index(options: FromCorpusOptions, corpus: Path, language: str) -> FromCorpusOptions:
    """The options with the index's folder: where step 1 looks for it below ``corpus-index/`` of the output.

    Raises:
        UsageError: an index that the user names holds titles, and passages were drawn without.
    """
    search, encoder = options.search, options.encoder
    own = search.index_dir is None and search.index_save_dir == type(search).index_save_dir
    place = str(options.output.path / "corpus-index") if own else search.index_save_dir
    folder = Path(search.index_dir or index_folder(place, encoder.encoder, language))
    if own:
        clear_stale_index(folder, corpus, encoder, search, own=(options.output.path / RECORD).exists())
    if settle(search, folder).with_title and not search.with_title:
        raise UsageError(f"{folder} was made with titles: give --with_title True, or name another --index_dir")
    return replace(options, search=replace(search, index_dir=str(folder)))
