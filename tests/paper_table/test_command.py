"""The reproduced table: public commands that parse, done work known by its inputs, and a small real run."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from commands import run_command_here

from FlagEmbedding.evaluation.arguments import EmbedOptions, ScoreArguments, SearchOptions
from FlagEmbedding.evaluation.metrics import parse_measures
from FlagEmbedding.finetune.parsing import parse_arguments
from FlagEmbedding.utils.cli import entry_point, parse, parse_whole
from FlagEmbedding.utils.errors import DataError, UsageError
from paper_table.command import ReproduceArguments, TrainOverrides, build_options, reproduce
from paper_table.plan import STAGES, Cell, Options, Row, cells, choose_rows, read_table, stage_keys
from paper_table.report import duration, spread

REPOSITORY = Path(__file__).resolve().parents[2]
TABLE = REPOSITORY / "configs" / "paper" / "table.yaml"
NAMES = [
    "baseline", "random dataset", "ANCE dataset", "ANCE-CLP", "ANCE-CLP-intermediate", "ANCE-CLP-moe-intermediate",
]  # fmt: skip


def options_for(base: Path, sample: Path, out: Path, *words: str) -> Options:
    arguments, overrides = parse([ReproduceArguments, TrainOverrides], [
        "--base_model", str(base), "--languages", "fa", "--data_dir", str(sample), "--output_dir", str(out),
        "--train_dir", str(sample / "train"), str(sample / "train_random"), *words,
    ], "")  # fmt: skip
    return build_options(REPOSITORY, arguments, overrides)


def test_the_table_has_the_papers_rows_after_the_published_command() -> None:
    rows = read_table(TABLE).rows
    assert [row.name for row in rows] == NAMES
    assert rows[0].recipe is None
    differing = {"penalty_weight", "only_train", "moe", "num_experts"}
    found = {}
    for row in rows[1:]:
        words = [str(row.recipe), "--model_name_or_path", "m", "--train_data", "d", "--output_dir", "o"]
        parsed = parse_arguments([*words, "--fp16", "False"])
        training = parsed.training
        assert (training.learning_rate, training.num_train_epochs) == (1e-5, 2)
        assert (training.per_device_train_batch_size, training.gradient_accumulation_steps) == (1, 4)
        assert (parsed.data.query_max_len, parsed.data.passage_max_len, parsed.data.train_group_size) == (128, 512, 5)
        assert (parsed.objective.temperature, parsed.model.normalize_embeddings, training.dataloader_drop_last) == (
            0.02,
            True,
            True,
        )
        assert parsed.experts.router_gradient == "none"
        values = {**vars(parsed.experts), **vars(parsed.objective)}
        found[row.name] = tuple(values[name] for name in sorted(differing))
    assert found == {  # moe, num_experts, only_train, penalty_weight
        "random dataset": (None, 1, None, 0.0),
        "ANCE dataset": (None, 1, None, 0.0),
        "ANCE-CLP": (None, 1, None, 0.1),
        "ANCE-CLP-intermediate": (None, 1, "intermediate", 0.1),
        "ANCE-CLP-moe-intermediate": ("intermediate", 2, "intermediate", 0.1),
    }
    assert [row.train_file for row in rows[1:]] == ["{lang}_random_train_data.jsonl"] + [
        "{lang}_CLPL_train_data.jsonl"
    ] * 4


def test_published_scores_are_those_of_the_picture() -> None:
    table = read_table(TABLE)
    drawn = json.loads((REPOSITORY / "imgs" / "paper_table.json").read_text("utf-8"))
    languages = [{"Korean": "ko", "Persian": "fa", "Hindi": "hi"}[name] for name in drawn["columns"][:3]]
    key = parse_measures([drawn["measure"]])[0].key
    for name, row in zip(NAMES, drawn["rows"], strict=True):
        assert [table.published[name][lang][key] for lang in languages] == row["values"][:3]
    assert table.published.keys() == set(NAMES)


def test_every_command_is_one_that_a_user_could_type(
    tiny_model_dir: Path, sample_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    instructions = ["--query_instruction_for_retrieval", "-q: ", "--passage_instruction_for_retrieval", "p: "]
    code = reproduce(REPOSITORY, [
        "--base_model", str(tiny_model_dir), "--languages", "fa", "hi", "--seeds", "1", "2", "--dry_run",
        "--train_dir", str(sample_dir / "train"), str(sample_dir / "train_random"), "--data_dir", str(sample_dir),
        "--output_dir", str(tmp_path), "--max_steps", "3", "--learning_rate", "1e-3", "--fp16", "False", *instructions,
    ])  # fmt: skip
    assert code == 0
    lines = capsys.readouterr().out.splitlines()
    commands = [shlex.split(line) for line in lines if line and not line.startswith("#")]
    # two baselines of three commands, then 5 rows x 2 languages x 2 seeds of four
    assert len(commands) == 2 * 3 + 5 * 2 * 2 * 4
    assert not list(tmp_path.iterdir())
    parsers = {
        "run.py": parse_arguments,
        "step0-generate_embedding.py": lambda words: parse_whole(EmbedOptions, words, ""),
        "step1-search_results.py": lambda words: parse_whole(SearchOptions, words, ""),
        "step2-eval_dense_mldr.py": lambda words: parse([ScoreArguments], words, "")[0],
    }  # fmt: skip
    seen, seeds = set(), []
    for command in commands:
        name = Path(command[1]).name
        parsed = parsers[name](command[2:])  # raises for anything that is no option
        seen.add(name)
        if name == "run.py":
            seeds.append(parsed.training.seed)
            assert (parsed.training.max_steps, parsed.training.learning_rate, parsed.training.fp16) == (3, 1e-3, False)
            assert parsed.data.query_instruction_for_retrieval == "-q: "
            assert Path(parsed.data.train_data[0]).is_file()
        elif name == "step1-search_results.py":
            assert parsed.search.query_instruction_for_retrieval == "-q: "
    assert seen == set(parsers)
    assert (seeds.count(1), seeds.count(2)) == (10, 10)


def test_cells_are_in_an_order_that_gives_a_whole_table_early() -> None:
    rows = choose_rows(read_table(TABLE), ["ance-clp", "baseline"])
    order = [(cell.row.name, cell.lang, cell.seed) for cell in cells(rows, ["ko", "fa"], [1, 2])]
    assert order == [
        ("baseline", "ko", None), ("baseline", "fa", None), ("ANCE-CLP", "ko", 1), ("ANCE-CLP", "fa", 1),
        ("ANCE-CLP", "ko", 2), ("ANCE-CLP", "fa", 2),
    ]  # fmt: skip
    with pytest.raises(UsageError, match="--rows ance: choose from baseline, random-dataset"):
        choose_rows(read_table(TABLE), ["ance"])


def test_keys_follow_what_decides_a_stage(tiny_model_dir: Path, sample_dir: Path, tmp_path: Path) -> None:
    row = read_table(TABLE).rows[3]
    prints = {"train": {"base_model": "b", "train_file": "t"}, "index": "c", "search": "q", "score": "j"}

    def keys(*words: str, out: str = "out", seed: int = 1, **changed: object) -> dict[str, str]:
        options = options_for(tiny_model_dir, sample_dir, tmp_path / out, *words)
        return stage_keys(options, Cell(row, "fa", seed), {**prints, **changed})

    before = keys()
    assert list(before) == list(STAGES)
    assert keys(out="moved") == before  # folders do not matter

    def first_changed(after: dict[str, str]) -> str:
        changed = [stage for stage in STAGES if after[stage] != before[stage]]
        assert changed == list(STAGES[STAGES.index(changed[0]) :])  # and everything after it
        return changed[0]

    assert first_changed(keys(seed=2)) == "train"
    assert first_changed(keys("--learning_rate", "1e-3")) == "train"
    assert first_changed(keys(train={"base_model": "b", "train_file": "other"})) == "train"
    assert first_changed(keys("--max_passage_length", "64")) == "index"
    assert first_changed(keys(index="other corpus")) == "index"
    assert first_changed(keys("--hits", "5")) == "search"
    assert first_changed(keys("--metrics", "map")) == "score"
    assert first_changed(keys(score="other qrels")) == "score"


def test_keys_of_the_baseline_and_of_hub_data(tiny_model_dir: Path, sample_dir: Path, tmp_path: Path) -> None:
    options = options_for(tiny_model_dir, sample_dir, tmp_path)
    prints = {"train": {"base_model": "b"}, "index": "miracl/miracl-corpus", "search": "miracl/miracl", "score": "j"}

    def keys(cell: Cell, options: Options = options, base: str = "b") -> dict[str, str]:
        return stage_keys(options, cell, {**prints, "train": {"base_model": base}})

    row = read_table(TABLE).rows[0]
    before = keys(Cell(row, "fa", None))
    assert list(before) == ["index", "search", "score"]
    for after in (
        keys(Cell(row, "fa", None), base="other weights"),
        keys(Cell(row, "hi", None)),  # the hub's data set has one name for all languages
    ):
        assert all(after[stage] != before[stage] for stage in before)
    other = keys(Cell(row, "fa", None), options_for(tiny_model_dir, sample_dir, tmp_path, "--split", "train"))
    assert [stage for stage in before if other[stage] != before[stage]] == ["search", "score"]


def test_the_judgments_of_a_language_go_to_step_2(tiny_model_dir: Path, sample_dir: Path, tmp_path: Path) -> None:
    options = options_for(tiny_model_dir, sample_dir, tmp_path)
    cell = Cell(read_table(TABLE).rows[0], "fa", None)
    for qrels, expected in ((tmp_path / "fa.tsv", tmp_path / "fa.tsv"), (None, sample_dir)):
        words = options.command(cell, "score", qrels)
        assert words[words.index("--qrels_dir") + 1] == str(expected)


def test_a_changed_recipe_is_trained_again(tiny_model_dir: Path, sample_dir: Path, tmp_path: Path) -> None:
    options = options_for(tiny_model_dir, sample_dir, tmp_path)
    recipe = tmp_path / "recipe.yaml"
    prints = {"train": {"base_model": "b", "train_file": "t"}, "index": "c", "search": "q", "score": "j"}
    found = []
    for content in ("learning_rate: 1.0e-5\n", "# a comment\nlearning_rate: 1.0e-5\n", "learning_rate: 2.0e-5\n"):
        recipe.write_text(content)
        found.append(stage_keys(options, Cell(Row("x", recipe, "t"), "fa", 1), prints))
    assert found[0] == found[1]
    assert all(found[2][stage] != found[0][stage] for stage in STAGES)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("rows: [{name: a, recipe: none.yaml, train_file: x}]", "none.yaml does not exist"),
        ("rows: [{name: a, recipe: x.yaml}]", "recipe and train_file go together"),
        ("rows: [{nam: a}]", "row 1: expected name"),
        ("rows: [{name: a}, {name: A}]", "different names"),
        ("rows: [", "cannot be read"),
        ("- a", "expected a mapping"),
    ],
)
def test_a_broken_table_file(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "table.yaml"
    path.write_text(content)
    with pytest.raises(DataError, match=words):
        read_table(path)


def test_spread_and_durations() -> None:
    assert spread([0.5]) == "50.0"
    assert spread([0.5, 0.52]) == "51.0 ± 1.4"
    assert [duration(s) for s in (4.4, 99, 150, 4000, 7190)] == ["4 s", "99 s", "2.5 min", "1 h 07 min", "2 h 00 min"]


SMALL = shlex.split(
    "--languages fa --seeds 3 --rows baseline ance-clp-moe-intermediate --max_steps 2 --learning_rate 1e-3 "
    "--per_device_train_batch_size 2 --gradient_accumulation_steps 1 --query_max_len 16 --passage_max_len 32 "
    "--max_passage_length 32 --batch_size 16 --threads 1 --fp16 False --resamples 200"
)


def test_a_small_real_table_and_going_on_with_it(
    tiny_model_dir: Path, sample_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("paper_table.run.run_command", run_command_here)
    caplog.set_level("INFO")
    places = ["--base_model", str(tiny_model_dir), "--data_dir", str(sample_dir), "--output_dir", str(tmp_path)]
    places += ["--train_dir", str(sample_dir / "train"), str(sample_dir / "train_random")]

    def run(*words: str) -> tuple[int, list[str]]:
        caplog.clear()
        code = entry_point(reproduce)(REPOSITORY, [*places, *SMALL, *words])
        lines = [record.getMessage() for record in caplog.records if "paper_table.run" in record.name]
        return code, [line.split("] ", 1)[1] for line in lines]

    # Fails where a user's run may fail, half-way through a chain. What was done stays.
    assert run("--hits", "0") == (2, ["baseline, fa: index", "baseline, fa: search"])
    error = capsys.readouterr().err
    assert error.startswith("error: baseline, fa: search failed (exit 2): error: --hits 0")
    row = "ANCE-CLP-moe-intermediate, fa, seed 3"
    chain = [f"{row}: {stage}" for stage in STAGES]
    assert run() == (0, ["baseline, fa: search", "baseline, fa: score", *chain])
    table = json.loads((tmp_path / "table.json").read_text())
    assert [r["name"] for r in table["rows"]] == ["baseline", "ANCE-CLP-moe-intermediate"]
    for r, encoder in zip(table["rows"], [tiny_model_dir.name, "ance-clp-moe-intermediate-fa-seed3"], strict=True):
        scored = json.loads((tmp_path / f"eval_results/fa/{encoder}.json").read_text())
        for key, value in scored["results"]["fa"].items():  # the table's numbers are those of step 2
            assert r["results"]["fa"][key]["mean"] == pytest.approx(value)
        (record,) = r["models"].values()
        assert record["search"]["seconds"] > 0
        assert 100 < record["index"]["peak_rss_mb"] < 4000
    assert len(table["tests"]) == 1
    assert "| ANCE-CLP-moe-intermediate |" in (tmp_path / "table.md").read_text()
    assert (tmp_path / "table.png").stat().st_size > 10_000
    assert not list(tmp_path.glob("corpus-index/*/fa"))  # thrown away once searched
    config = json.loads((tmp_path / "models/ance-clp-moe-intermediate-fa-seed3/config.json").read_text())
    assert (config["moe"], config["num_experts"]) == ("intermediate", 2)
    assert run() == (0, [])  # nothing left to do but the table
    assert run("--metrics", "map")[1] == ["baseline, fa: score", f"{row}: score"]
    table = json.loads((tmp_path / "table.json").read_text())
    assert run("--metrics", "map", "--resamples", "150") == (0, [])  # the tests are made again all the same
    assert json.loads((tmp_path / "table.json").read_text())["tests"] != table["tests"]

    # Other judgments are scored again, and an index is kept where that is asked for.
    lines = (sample_dir / "miracl-v1.0-fa/qrels/qrels.miracl-v1.0-fa-dev.tsv").read_text().splitlines()
    (tmp_path / "judged").mkdir()
    (tmp_path / "judged/fa.tsv").write_text("\n".join(lines[: len(lines) // 2]))
    baseline = ["--rows", "baseline", "--metrics", "map", "--qrels_dir", str(tmp_path / "judged")]
    assert run(*baseline) == (0, ["baseline, fa: score"])
    other = json.loads((tmp_path / "table.json").read_text())["rows"][0]["results"]["fa"]["map"]["mean"]
    assert other != table["rows"][0]["results"]["fa"]["map"]["mean"]
    stages = [f"baseline, fa: {stage}" for stage in ("index", "search", "score")]
    assert run(*baseline, "--hits", "7", "--keep_indexes") == (0, stages)
    assert [path.parent.name for path in tmp_path.glob("corpus-index/*/fa")] == [tiny_model_dir.name]
    (tmp_path / "records" / "baseline-fa.json").write_text("{")
    assert run()[0] == 2
    assert "not a readable record" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rows", "foo"], "--rows foo: choose from"),
        (["--seeds", "1", "1"], "each seed once"),
        (["--languages", "xx"], "not in MIRACL"),
        (["--train_dir", "/nowhere"], "no fa_CLPL_train_data.jsonl there, which row 'ANCE-CLP' is trained on"),
        (["--data_dir", "/nowhere"], "--data_dir /nowhere: no such folder"),
        (["--metrics", "foo"], "--metrics foo"),
        (["--qrels_dir", "/nowhere"], "no judgments of fa"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_runs(
    words: list[str],
    message: str,
    tiny_model_dir: Path,
    sample_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["--base_model", str(tiny_model_dir), "--languages", "fa", "--train_dir", str(sample_dir / "train")]
    command += ["--data_dir", str(sample_dir), "--output_dir", str(tmp_path), "--rows", "ance-clp", *words]
    assert entry_point(reproduce)(REPOSITORY, command) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
