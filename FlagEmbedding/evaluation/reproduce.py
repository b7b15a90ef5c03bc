"""The paper's table in one command: six rows, trained, embedded, searched and scored by the public commands.

    python evaluation/reproduce_table.py --base_model BAAI/bge-m3 --languages ko fa hi --train_dir DIR --seeds 42 43 44

``--train_dir`` holds {lang}_CLPL_train_data.jsonl and {lang}_random_train_data.jsonl; corpus, queries and judgements
come from ``--data_dir`` or the hub. Recipes are configs/paper/*.yaml; flags here override them for every row. Started
again, it goes on where it was.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from FlagEmbedding.collections import miracl
from FlagEmbedding.collections.trec import find_qrels
from FlagEmbedding.evaluation.metrics import Measure, parse_measures
from FlagEmbedding.evaluation.reproduce_plan import STAGES, Cell, Options, cells, choose_rows, read_table, stage_keys
from FlagEmbedding.evaluation.reproduce_report import write_table
from FlagEmbedding.evaluation.reproduce_run import run_cell
from FlagEmbedding.evaluation.significance import RESAMPLES
from FlagEmbedding.utils.cli import Parser, add_bool_flag
from FlagEmbedding.utils.errors import DataError, UsageError
from FlagEmbedding.utils.identity import fingerprints as corpus_fingerprints
from FlagEmbedding.utils.identity import model_fingerprint
from FlagEmbedding.utils.io import sha256_file
from FlagEmbedding.utils.logging import get_logger
from FlagEmbedding.utils.provenance import provenance

logger = get_logger(__name__)

# Flags of run.py that are given here under the same name, for every row.
_TRAIN_FLAGS: dict[str, type] = {
    "learning_rate": float, "max_steps": int, "num_train_epochs": float, "per_device_train_batch_size": int,
    "gradient_accumulation_steps": int, "train_group_size": int, "temperature": float, "query_max_len": int,
    "passage_max_len": int, "warmup_ratio": float,
}  # fmt: skip


@dataclass(frozen=True)
class ReproduceArguments:
    """reproduce_table.py, without the flags handed on to run.py."""

    base_model: str
    languages: list[str]
    train_dir: list[str]
    data_dir: str | None
    qrels_dir: str | None
    split: str
    output_dir: str
    seeds: list[int]
    rows: list[str] | None
    table: str | None
    metrics: list[str]
    pooling_method: str
    query_instruction_for_retrieval: str | None
    passage_instruction_for_retrieval: str | None
    fp16: bool
    max_query_length: int
    max_passage_length: int
    batch_size: int
    hits: int
    threads: int
    with_title: bool
    train_args: str
    train_launcher: str | None
    keep_indexes: bool
    dry_run: bool
    resamples: int


def parse_reproduce_arguments(argv: Sequence[str] | None) -> tuple[ReproduceArguments, dict[str, Any]]:
    """The command line, and what of it overrides the recipes."""
    parser = Parser("Train, embed, search and score every row of the paper's table.")
    add = parser.add_argument
    add("--base_model", required=True, help="hub id or folder of the model that is the baseline and is trained")
    add("--languages", nargs="+", required=True, help="MIRACL languages, such as ko fa hi")
    files = "{lang}_CLPL_train_data.jsonl and {lang}_random_train_data.jsonl"
    add("--train_dir", nargs="+", required=True, help=f"folder(s) that hold {files}")
    add("--data_dir", help="corpus, queries and judgements in the hub's layout; otherwise the hub")
    add("--qrels_dir", help="judgements, when they are elsewhere")
    add("--split", choices=["train", "dev"], default="dev", help="queries and judgements")
    add("--output_dir", default="./reproduced", help="models, runs, scores, records, logs and the table")
    add("--seeds", nargs="+", type=int, default=[42], help="each row is trained once a seed")
    add("--rows", nargs="+", help="some of the rows, such as baseline ance-clp")
    add("--table", help="rows and recipes; default: configs/paper/table.yaml")
    add("--metrics", nargs="+", default=["ndcg@5", "ndcg@10", "recall@20"], help="the first one is tested")
    add("--pooling_method", choices=["cls", "mean"], default="cls", help="in training and evaluation")
    add("--query_instruction_for_retrieval", metavar="TEXT", help="text before queries, in training and evaluation")
    add("--passage_instruction_for_retrieval", metavar="TEXT", help="text before passages, likewise")
    add_bool_flag(parser, "--fp16", default=True, help="as published; False: fp32 in training and evaluation")
    add("--max_query_length", type=int, default=512, help="step 1: tokens of a query")
    add("--max_passage_length", type=int, default=8192, help="step 0: tokens of a passage")
    add("--batch_size", type=int, default=4, help="step 0 and 1: texts of full length at a time")
    add("--hits", type=int, default=100, help="step 1: passages a query")
    add("--threads", type=int, default=4, help="step 1: threads of the search")
    add_bool_flag(parser, "--with_title", help="step 0: embed title and text; published: text alone")
    for name, kind in _TRAIN_FLAGS.items():
        add(f"--{name}", type=kind, help="overrides the recipes" if name == "learning_rate" else "likewise")
    add("--train_args", default="", metavar="WORDS", help="more words for run.py, in one string")
    add("--train_launcher", metavar="WORDS", help="instead of python, such as 'torchrun --nproc_per_node 4'")
    add_bool_flag(parser, "--keep_indexes", help="keep every index; default: delete each once it was searched")
    add_bool_flag(parser, "--dry_run", help="print the commands and stop")
    add("--resamples", type=int, default=RESAMPLES, help="of the randomisation test")
    found = vars(parser.parse_args(argv))
    overrides = {name: found.pop(name) for name in _TRAIN_FLAGS}
    return ReproduceArguments(**found), {name: value for name, value in overrides.items() if value is not None}


def reproduce(root: Path, argv: Sequence[str] | None = None) -> int:
    """``evaluation/reproduce_table.py``; ``root`` is the checkout with run.py and evaluation/."""
    arguments, overrides = parse_reproduce_arguments(argv)
    languages = miracl.check_languages(arguments.languages)
    if len(set(arguments.seeds)) != len(arguments.seeds):
        raise UsageError(f"--seeds {' '.join(map(str, arguments.seeds))}: each seed once")
    measures = parse_measures(arguments.metrics)
    table = read_table(Path(arguments.table) if arguments.table else root / "configs" / "paper" / "table.yaml")
    rows = choose_rows(table, arguments.rows)
    options = build_options(root, arguments, overrides, measures)
    todo = list(cells(rows, languages, arguments.seeds))
    if arguments.dry_run:
        for cell in todo:
            stages = STAGES if cell.row.recipe else STAGES[1:]
            print(f"# {cell}", *(shlex.join(options.command(cell, stage)) for stage in stages), "", sep="\n")
        return 0
    files = _Files(options, arguments.qrels_dir)
    qrels = {lang: files.qrels(lang) for lang in languages}
    keys = {cell.id: stage_keys(options, cell, files.fingerprints(cell)) for cell in todo}
    records = {
        cell.id: run_cell(
            options,
            cell,
            keys[cell.id],
            f"{number}/{len(todo)}",
            qrels=qrels[cell.lang],
            keep_index=arguments.keep_indexes,
        )
        for number, cell in enumerate(todo, 1)
    }
    origin = {"arguments": {**asdict(arguments), **overrides}, "provenance": provenance()}
    print(write_table(options, table, todo, records, qrels, measures, arguments.resamples, origin))
    return 0


def build_options(
    root: Path, arguments: ReproduceArguments, overrides: dict[str, Any], measures: Sequence[Measure]
) -> Options:
    """The words of the four commands that all cells share."""
    train = [word for name, value in overrides.items() for word in (f"--{name}", str(value))]
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
    return Options(
        root=root,
        output_dir=Path(arguments.output_dir).resolve(),
        base_model=str(Path(arguments.base_model).resolve())
        if Path(arguments.base_model).exists()
        else arguments.base_model,
        train_dirs=[Path(folder).resolve() for folder in arguments.train_dir],
        data_dir=Path(arguments.data_dir).resolve() if arguments.data_dir else None,
        split=arguments.split,
        metrics=[measure.key for measure in measures],
        train_options=[*train, *shlex.split(arguments.train_args)],
        index_options=index,
        search_options=search,
        launcher=shlex.split(arguments.train_launcher) if arguments.train_launcher else [sys.executable],
        python=sys.executable,
    )


class _Files:
    """What the cells read, found and hashed once, before the first command runs."""

    def __init__(self, options: Options, qrels_dir: str | None) -> None:
        self.options = options
        self.qrels_dir = qrels_dir
        self._known: dict[Any, Any] = {}

    def qrels(self, lang: str) -> Path:
        """A language's judgements; ``DataError`` where there are none."""
        place = self.qrels_dir or self.options.data_dir
        found = find_qrels(place, lang, self.options.split, only_language=False) if place else None
        if self.qrels_dir and found is None:
            raise DataError(f"--qrels_dir {self.qrels_dir}: no judgements of {lang} for {self.options.split} in it")
        return found or miracl.qrels_file(lang, self.options.split, self.options.data_dir)

    def fingerprints(self, cell: Cell) -> dict[str, Any]:
        """Stage -> hashes of what it reads; for the hub's data sets and models their names."""
        lang, data_dir = cell.lang, self.options.data_dir
        train: dict[str, Any] = {"base_model": self._once("base", self._base_model)}
        if cell.row.train_file is not None:
            path = self.options.train_file(cell)
            train["train_file"] = self._once(path, lambda: sha256_file(path))
        corpus, topics = "miracl/miracl-corpus", "miracl/miracl"
        if data_dir is not None:
            split = self.options.split
            corpus = self._once(("corpus", lang), lambda: corpus_fingerprints(miracl.corpus_files(lang, data_dir)))
            topics = self._once(("topics", lang), lambda: sha256_file(miracl.topics_file(lang, split, data_dir)))
        judged = self._once(("qrels", lang), lambda: sha256_file(self.qrels(lang)))
        return {"train": train, "index": corpus, "search": topics, "score": judged}

    def _base_model(self) -> str:
        base = Path(self.options.base_model)
        return model_fingerprint(base) if base.is_dir() else self.options.base_model

    def _once(self, key: Any, find: Any) -> Any:
        if key not in self._known:
            self._known[key] = find()
        return self._known[key]
