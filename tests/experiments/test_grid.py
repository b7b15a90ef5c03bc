"""A small real grid end to end: every kind of row, ended in the middle and gone on with; and grids that do not fit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import REPOSITORY, run_command_here

from experiments import chain
from experiments.__main__ import main
from experiments.grid import read_grid
from FlagEmbedding.evaluation.arguments import CollectionArguments, SearchArguments
from FlagEmbedding.finetune.parsing import parse_arguments
from FlagEmbedding.indexing.arguments import IndexArguments
from FlagEmbedding.inference.arguments import EncoderArguments
from FlagEmbedding.utils.cli import parse
from FlagEmbedding.utils.errors import DataError

SHORT = {"max_passage_length": 24, "batch_size": 16}


def value(base: Path, sample: Path) -> dict[str, Any]:
    def collection(lang: str) -> dict[str, Any]:
        data = {"mined": str(sample / f"train/{lang}_CLPL_train_data.jsonl")}
        return {"data_dir": str(sample), "language": lang, "data": data}

    return {
        "base": str(base), "seeds": [1, 2], "measures": ["ndcg@10", "recall@20"], "choose": 0.5,
        "train": {
            "max_steps": 1, "per_device_train_batch_size": 2, "query_max_len": 16, "passage_max_len": 24,
            "train_group_size": 3, "learning_rate": 1e-3, "moe": "intermediate", "fp16": False, "save_strategy": "no",
        },
        "index": SHORT, "search": {"max_query_length": 16, "hits": 20},
        "collections": {"hindi": collection("hi")},
        "rows": [
            {"name": "CLP 0.5", "data": "mined", "train": {"penalty_weight": 0.5}},
            {"name": "both seeds", "merge": {"CLP 0.5": 0.5, "CLP 0.5@next": 0.5}},
            {"name": "folded", "fold": "CLP 0.5", "method": "average"},
        ],
        "tests": [["CLP 0.5", "folded"]],
    }  # fmt: skip


def write(path: Path, content: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def test_a_grid_runs_goes_on_and_reports(
    tiny_model_dir: Path, sample_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(chain, "run_command", run_command_here)
    caplog.set_level("INFO")
    out, content = tmp_path / "out", value(tiny_model_dir, sample_dir)
    words = [str(write(tmp_path / "grid.yaml", content)), "--output_dir", str(out)]

    def run(*more: str) -> tuple[int, list[str]]:
        caplog.clear()
        code = main([*words, *more])
        return code, [r.getMessage().split("] ", 1)[1] for r in caplog.records if r.name.endswith("experiments.chain")]

    # Ends where a user's grid may end: in the middle, by a command that fails. What was done stays.
    broken = {**content, "search": {**content["search"], "hits": 0}}
    write(tmp_path / "grid.yaml", broken)
    code, stages = run("--seeds", "1", "--rows", "base")
    assert (code, len(stages)) == (2, 2)
    assert "search failed (exit 2): error: --hits 0" in capsys.readouterr().err
    write(tmp_path / "grid.yaml", content)
    code, stages = run()
    trained = [f"clp-0-5-hindi-seed{seed}" for seed in (1, 2)]
    assert code == 0 and [stage for stage in stages if stage in trained] == trained  # each once, also as a part
    assert not [stage for stage in stages if stage.endswith("base.index")]
    page = (out / "report.md").read_text(encoding="utf-8")
    assert "crossed random effects" in page and (out / "report.png").stat().st_size > 5000
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(lines) == 1 + 3 * 2
    assert {line["row"] for line in lines} == {"base", "CLP 0.5", "both seeds", "folded"}
    by_name = {(line["row"], line["seed"]): line["ndcg@10"] for line in lines}
    assert by_name["both seeds", 1] == by_name["both seeds", 2]  # the same two models
    assert by_name["CLP 0.5", 1] != by_name["base", None]
    tests = json.loads((out / "report.json").read_text())["tests"]
    assert [(test["against"], test["row"]) for test in tests][-1] == ("CLP 0.5", "folded")
    mean = sum(by_name["folded", seed] - by_name["CLP 0.5", seed] for seed in (1, 2)) / 2
    assert tests[-1]["mean"] == pytest.approx(mean)

    assert run() == (0, [])  # nothing is done again
    assert run("--dry_run")[1] == [] and "run.py" not in capsys.readouterr().out.rsplit("report.png", 1)[1]
    # The held-out queries are others, and a look at them is counted.
    assert run("--say", "--report_only") == (0, [])
    said = [json.loads(line) for line in (out / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    assert all(line["held_out"] for line in said) and said[0]["ndcg@10"] != lines[0]["ndcg@10"]
    assert "looked at 1 time;" not in page and "looked at 1 time." in (out / "report.md").read_text(encoding="utf-8")
    # One row's option changes: that row and what is made of it, nothing else.
    content["rows"][2]["method"] = "expert:0"
    write(tmp_path / "grid.yaml", content)
    code, stages = run("--seeds", "2")
    assert code == 0 and [stage.split(".")[0] for stage in stages] == ["folded-hindi-seed2"] * 3


@pytest.mark.parametrize("path", sorted((REPOSITORY / "experiments/grids").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_grid_of_the_repository_says_what_the_commands_take(path: Path, tmp_path: Path) -> None:
    grid = read_grid(path)
    with pytest.raises(DataError, match="is no folder"):
        chain.Chain(replace(grid, base="../nowhere"), tmp_path)
    plan = chain.Chain(replace(grid, base="hub/model"), tmp_path)
    stages = {stage.id: stage for cell in plan.cells() for stage in plan.stages(cell)}
    assert len(stages) > 100
    for stage in stages.values():
        if stage.command[1].endswith("run.py"):
            parse_arguments(stage.command[2:])
        elif "step" in stage.command[1]:
            groups = [SearchArguments if "step1" in stage.command[1] else IndexArguments]
            parse([EncoderArguments, CollectionArguments, *groups], stage.command[2:], "")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seeds": [1, 1]}, "seeds: expected a list of different whole numbers"),
        ({"seed": 1}, "expected a mapping of"),
        ({"choose": 2}, "choose: expected a share between 0 and 1"),
        ({"rows": [{"name": "a", "data": "minned"}]}, "collection hindi has no data 'minned'"),
        ({"rows": [{"name": "a", "merge": {"base": 1}}]}, "two or more rows with their weights"),
        ({"rows": [{"name": "a", "merge": {"base": 0.5, "b": 0.5}}]}, "'b' is no row above it"),
        ({"rows": [{"name": "a", "data": "mined", "method": "load"}]}, "expected data (with train), merge, or fold"),
        ({"rows": [{"name": "Base", "data": "mined"}]}, "different names"),
        ({"rows": [{"name": "a", "data": ["mined"]}]}, "data: expected a text"),
        ({"rows": [{"name": "a", "data": "mined", "train": 5}]}, "train: expected a mapping"),
        ({"measures": "ndcg@10"}, "measures: expected a list"),
        ({"collections": {"x": {"data_dir": 3, "language": "ko"}}}, "data_dir: expected a text"),
        ({"collections": {"../x": {"data_dir": ".", "language": "ko"}}}, "becomes part of file names"),
        ({"tests": [["base", "z"]]}, "'z' is to be tested and is no row"),
        ({"collections": {"x": {"data_dir": "nowhere", "language": "ko"}}}, "nowhere does not exist"),
    ],
)
def test_a_grid_that_does_not_fit_is_refused(
    tiny_model_dir: Path, sample_dir: Path, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    path = write(tmp_path / "grid.yaml", {**value(tiny_model_dir, sample_dir), **change})
    with pytest.raises(DataError) as refused:
        read_grid(path)
    assert words in str(refused.value) and str(path) in str(refused.value)
