"""The prompt of each kind of query, and the user's own queries that it shows.

``question`` is asked with ``query_generation``'s prompts. ``--prompt`` is, as there, a text or file with ``{passage}``
(for one kind), or a folder: ``{kind}.txt``, or ``{kind}/`` with ``{language}.txt``; kinds that it lacks have ours.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from FlagEmbedding.collections.trec import read_topics
from FlagEmbedding.mining.common.rows import data_files
from FlagEmbedding.mining.from_corpus.arguments import FromCorpusOptions
from FlagEmbedding.mining.query_generation.checks import main_script
from FlagEmbedding.mining.query_generation.prompting import PLACE, make_prompter
from FlagEmbedding.schema import Problems, read_rows
from FlagEmbedding.utils.errors import DataError, UsageError
from FlagEmbedding.utils.identity import digest
from FlagEmbedding.utils.io import numbered_lines, packing
from FlagEmbedding.utils.texts import half_pair, is_blank

_OURS = Path(__file__).with_name("prompts")
_MANNER = "Queries that our users typed, to show their manner (not the subject, and not to be copied):"
_LONGEST = 200  # characters of an example

Prompter = Callable[[str], str]


def make_prompters(options: FromCorpusOptions) -> dict[str, Prompter]:
    """A function from a passage to the message about it, for each kind. Raises ``UserError``."""
    examples = read_examples(options.kinds.examples)
    count, seed = options.kinds.examples_per_prompt, options.sampling.seed
    found = {kind: _prompter(kind, options) for kind in options.kinds.kinds}
    return {kind: with_examples(prompter, examples, count, seed) for kind, prompter in found.items()}


def _prompter(kind: str, options: FromCorpusOptions) -> Prompter:
    given, language = options.writing.prompt, options.writing.language
    if given is not None and (PLACE in given or not Path(given).is_dir()):
        if len(options.kinds.kinds) > 1:
            raise UsageError(
                "--prompt is one message, and there are several --kinds: name one kind, or a folder of {kind}.txt files"
            )
        return make_prompter(given, language)
    folder = Path(given) if given is not None else _OURS
    for place in (folder / kind, folder / f"{kind}.txt", _OURS / f"{kind}.txt"):
        if place.exists():
            return make_prompter(str(place), language)
    if kind == "question":
        return make_prompter(None, language)
    raise UsageError(
        f"--kinds {kind}: no prompt of that name; write {kind}.txt into a folder and name it with --prompt"
    )


def with_examples(prompter: Prompter, examples: Sequence[str], count: int, seed: int) -> Prompter:
    """``prompter`` whose messages begin with ``count`` of the examples, drawn by the seed for each passage.

    They are drawn from those in the passage's script; where there is none, the message shows none.
    """
    pools = defaultdict[str | None, list[str]](list)
    for example in examples:
        pools[main_script(example)].append(example)

    def prompt(passage: str) -> str:
        pool = pools.get(main_script(passage), [])
        if not pool:
            return prompter(passage)
        drawn = random.Random(digest(seed, passage)).sample(pool, min(count, len(pool)))
        return "\n".join([_MANNER, *(f"- {example}" for example in drawn), "", prompter(passage)])

    return prompt


def read_examples(names: Sequence[str]) -> list[str]:
    """The different queries of a log, in order: topics (``.tsv``), rows with ``query`` or ``text``, or lines of text.

    Raises:
        DataError: a file that is not there, cannot be read, or holds no query.
    """
    problems, found = Problems(), dict[str, None]()
    for name in names:
        path, before = Path(name), len(found)
        kind = path.name[: -len(packing(path.name)) or None].rpartition(".")[2].lower()
        if kind in ("txt", "log"):
            found |= dict.fromkeys(_short(line) for _, line in numbered_lines(path, "examples") if not is_blank(line))
        elif kind == "tsv":
            found |= dict.fromkeys(map(_short, read_topics(path).values()))
        else:
            for file in data_files([name]):
                for line, row in read_rows(file, problems):
                    text = row.get("query", row.get("text"))
                    if isinstance(text, str) and not is_blank(text) and half_pair(text) is None:
                        found[_short(text)] = None
                    else:
                        problems.report(str(file), line, "query", "is no text", "give every row a query")
        problems.raise_if_any()
        if len(found) == before:
            raise DataError(f"--examples {name}: no query in it that was not there before")
    return list(found)


def _short(text: str) -> str:
    return " ".join(text.split())[:_LONGEST]
