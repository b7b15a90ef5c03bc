"""The paper's table in one command: six rows, trained, embedded, searched and scored by the public commands.

Recipes are configs/paper/*.yaml; flags here override them for every row. Started again, it goes on where it was.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from FlagEmbedding.collections import miracl
from FlagEmbedding.collections.trec import find_qrels
from FlagEmbedding.evaluation.arguments import RESAMPLES
from FlagEmbedding.evaluation.metrics import parse_measures
from FlagEmbedding.inference.arguments import Pooling
from FlagEmbedding.utils.cli import choice, option, parse, switch
from FlagEmbedding.utils.errors import DataError, UsageError
from FlagEmbedding.utils.identity import fingerprints, model_fingerprint
from FlagEmbedding.utils.provenance import provenance
from paper_table.plan import STAGES, Cell, Options, cells, choose_rows, read_table, stage_keys
from paper_table.report import write_table
from paper_table.run import run_cell

_CORPUS, _TOPICS = "miracl/miracl-corpus", "miracl/miracl"
JudgedSplit = Literal["train", "dev"]


@dataclass(frozen=True)
class ReproduceArguments:
    """The table."""

    base_model: str = option(help="hub id or folder of the model that is the baseline and is trained")
    languages: list[str] = option(help="MIRACL languages, such as ko fa hi")
    train_dir: list[str] = option(help="folder(s) of {lang}_CLPL_train_data.jsonl, {lang}_random_train_data.jsonl")
    data_dir: str | None = option(None, "corpus, queries and judgments in the hub's layout; otherwise the hub")
    qrels_dir: str | None = option(None, "judgments, when they are elsewhere")
    split: JudgedSplit = choice(JudgedSplit, "dev", "queries and judgments")
    output_dir: str = option("./reproduced", "models, runs, scores, records, logs and the table")
    seeds: list[int] = option([42], "each row is trained once per seed")
    rows: list[str] = option([], "some of the rows, such as baseline ance-clp")
    table: str | None = option(None, "rows and recipes; default: configs/paper/table.yaml")
    metrics: list[str] = option(["ndcg@5", "ndcg@10", "recall@20"], "the first one is tested")
    pooling_method: Pooling = choice(Pooling, "cls", "in training and evaluation")
    query_instruction_for_retrieval: str | None = option(None, "before queries, in training too", metavar="TEXT")
    passage_instruction_for_retrieval: str | None = option(None, "before passages, in training too", metavar="TEXT")
    fp16: bool = switch(True, "as published; False: fp32 in training and evaluation")
    max_query_length: int = option(512, "step 1: tokens per query")
    max_passage_length: int = option(8192, "step 0: tokens per passage")
    batch_size: int = option(4, "step 0 and 1: texts of full length at a time")
    hits: int = option(100, "step 1: passages per query")
    threads: int = option(4, "step 1: threads of the search")
    with_title: bool = switch(False, "step 0: embed title and text; published: text alone")
    train_args: str = option("", "more words for run.py, in one string", metavar="WORDS")
    train_launcher: str | None = option(None, "for python: 'torchrun --nproc_per_node 4'", metavar="WORDS")
    keep_indexes: bool = switch(False, "keep every index; default: delete each once it was searched")
    dry_run: bool = switch(False, "print the commands and stop")
    resamples: int = option(RESAMPLES, "of the randomization test")

    def __post_init__(self) -> None:
        if len(set(self.seeds)) != len(self.seeds):
            raise UsageError(f"--seeds {' '.join(map(str, self.seeds))}: each seed once")


@dataclass(frozen=True)
class TrainOverrides:
    """Training: in place of what the recipes say."""

    learning_rate: float | None = option(None, "overrides the recipes")
    max_steps: int | None = option(None, "likewise")
    num_train_epochs: float | None = option(None, "likewise")
    per_device_train_batch_size: int | None = option(None, "likewise")
    gradient_accumulation_steps: int | None = option(None, "likewise")
    train_group_size: int | None = option(None, "likewise")
    temperature: float | None = option(None, "likewise")
    query_max_len: int | None = option(None, "likewise")
    passage_max_len: int | None = option(None, "likewise")
    warmup_ratio: float | None = option(None, "likewise")

    def given(self) -> dict[str, Any]:
        """Those that the command line names."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def reproduce(root: Path, argv: Sequence[str] | None = None) -> int:
    """``evaluation/reproduce_table.py``; ``root`` is the checkout with run.py and evaluation/."""
    what = "Train, embed, search and score every row of the paper's table."
    arguments, overrides = parse([ReproduceArguments, TrainOverrides], argv, what)
    languages = miracl.check_languages(arguments.languages)
    table = read_table(Path(arguments.table) if arguments.table else root / "configs" / "paper" / "table.yaml")
    rows = choose_rows(table, arguments.rows)
    options = build_options(root, arguments, overrides)
    todo = list(cells(rows, languages, arguments.seeds))
    if arguments.dry_run:
        for cell in todo:
            stages = STAGES if cell.row.recipe else STAGES[1:]
            print(f"# {cell}", *(shlex.join(options.command(cell, stage)) for stage in stages), "", sep="\n")
        return 0
    qrels = {lang: _qrels(options, arguments.qrels_dir, lang) for lang in languages}
    keys = {cell.id: stage_keys(options, cell, _fingerprints(options, cell, qrels[cell.lang])) for cell in todo}
    records = {}
    for number, cell in enumerate(todo, 1):
        place, judged = f"{number}/{len(todo)}", qrels[cell.lang]
        records[cell.id] = run_cell(options, cell, keys[cell.id], place, judged, arguments.keep_indexes)
    origin = {"arguments": {**asdict(arguments), **overrides.given()}, "provenance": provenance()}
    print(write_table(options, table, todo, records, qrels, arguments.resamples, origin))
    return 0


def build_options(root: Path, arguments: ReproduceArguments, overrides: TrainOverrides) -> Options:
    """What all cells share; among it the words of the four commands."""
    train = [word for name, value in overrides.given().items() for word in (f"--{name}", str(value))]
    train += ["--sentence_pooling_method", arguments.pooling_method]
    encode = ["--pooling_method", arguments.pooling_method, "--normalize_embeddings", "True"]
    encode += ["--batch_size", str(arguments.batch_size)]
    if arguments.fp16:
        encode.append("--fp16")
    else:
        train += ["--fp16", "False"]
    index = ["--max_passage_length", str(arguments.max_passage_length), *encode]
    search = ["--max_query_length", str(arguments.max_query_length), "--hits", str(arguments.hits), *encode]
    search += ["--threads", str(arguments.threads)]
    if arguments.with_title:
        index += ["--with_title", "True"]
    for flag, words in (("query_instruction_for_retrieval", search), ("passage_instruction_for_retrieval", index)):
        text = getattr(arguments, flag)
        if text is not None:
            # One word with =, since an instruction may start with a dash.
            words.append(f"--{flag}={text}")
            train.append(f"--{flag}={text}")
    base = Path(arguments.base_model)
    return Options(
        root=root, output_dir=Path(arguments.output_dir).resolve(),
        base_model=str(base.resolve()) if base.exists() else arguments.base_model,
        train_dirs=[Path(folder).resolve() for folder in arguments.train_dir],
        data_dir=Path(arguments.data_dir).resolve() if arguments.data_dir else None, split=arguments.split,
        metrics=[measure.key for measure in parse_measures(arguments.metrics)],
        train_options=[*train, *shlex.split(arguments.train_args)], index_options=index, search_options=search,
        launcher=shlex.split(arguments.train_launcher) if arguments.train_launcher else [sys.executable],
    )  # fmt: skip


def _qrels(options: Options, qrels_dir: str | None, lang: str) -> Path:
    """A language's judgments; ``DataError`` where there are none."""
    place = qrels_dir or options.data_dir
    found = find_qrels(place, lang, options.split, only_language=False) if place else None
    if qrels_dir and found is None:
        raise DataError(f"--qrels_dir {qrels_dir}: no judgments of {lang} for {options.split} in it")
    return found or miracl.qrels_file(lang, options.split, options.data_dir)


def _fingerprints(options: Options, cell: Cell, qrels: Path) -> dict[str, Any]:
    """Stage -> hashes of what it reads (each file read once); for the hub's data sets and models their names."""
    lang, data_dir, base = cell.lang, options.data_dir, Path(options.base_model)
    train = {"base_model": model_fingerprint(base) if base.is_dir() else options.base_model}
    if cell.row.train_file is not None:
        train["train_file"] = _sha256(options.train_file(cell))
    if data_dir is None:
        return {"train": train, "index": _CORPUS, "search": _TOPICS, "score": _sha256(qrels)}
    corpus = fingerprints(miracl.corpus_files(lang, data_dir))
    topics = _sha256(miracl.topics_file(lang, options.split, data_dir))
    return {"train": train, "index": corpus, "search": topics, "score": _sha256(qrels)}


def _sha256(path: Path) -> str:
    return fingerprints([path])[0]["sha256"]
