"""The one help page of everything that prepares training data: ``python -m FlagEmbedding.mining``.

``python -m FlagEmbedding.mining COMMAND …`` is ``python -m`` of the command's own module.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from functools import partial

from FlagEmbedding.utils.cli import entry_point, run_command

# In the order in which they are used. Modules are named, not imported: a command pays for its own libraries alone.
COMMANDS = {
    "from_corpus": "bare documents → a training folder and an eval folder",
    "hard_negatives": "queries + positives + corpus → rows with negatives (ANCE)",
    "query_generation": "rows → rows with neg_q: reused queries, then an LLM",
    "doctor": "a report on training files: duplicates, false negatives, margins, lengths",
    "check_data": "every problem of training files, by file and line",
    "convert": "MIRACL, BEIR or sentence-transformers triples → rows",
    "score": "rows → rows with pos_scores and neg_scores of a reranker, for distillation",
    "merge": "several files → one, without repeated rows",
    "sample": "some rows of a file, drawn by a seed",
    "split_data_by_length": "a file → files of rows of like length",
}
_PAGE = """usage: python -m FlagEmbedding.mining COMMAND [options]

From any corpus to a training file. Commands give the same file for the same --seed. After a kill,
from_corpus, hard_negatives, query_generation, score and doctor go on where they stopped; the others
start over.

{commands}

python -m FlagEmbedding.mining COMMAND --help lists a command's options."""


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Print the page, or run a command's module as the program."""
    width = max(map(len, COMMANDS))
    page = _PAGE.format(commands="\n".join(f"  {name:{width}}  {what}" for name, what in COMMANDS.items()))
    return run_command({name: partial(_run_module, name) for name in COMMANDS}, page, argv)


def _run_module(name: str, words: Sequence[str]) -> int:
    module = f"FlagEmbedding.{'finetune' if name == 'check_data' else 'mining'}.{name}"
    sys.argv = [module, *words]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
