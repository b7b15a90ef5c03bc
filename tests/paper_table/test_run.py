"""A cell's stages: what is run, known to be done, thrown away; with commands that only leave their product."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from FlagEmbedding.utils.errors import DataError
from paper_table.plan import STAGES, Cell, Options, Row
from paper_table.run import run_cell

LEAVE = "import pathlib, sys; p = pathlib.Path(sys.argv[1]); p.parent.mkdir(parents=True, exist_ok=True); p.touch()"
CELL = Cell(Row("ANCE-CLP", Path("clp.yaml"), "x"), "ko", 1)
KEYS = {stage: f"{stage} 1" for stage in STAGES}
Run = Callable[..., list[str]]


class Leaving(Options):
    """Commands that leave the product of their stage, and what they were given as judgments."""

    def command(self, cell: Cell, stage: str, qrels: Path | None = None) -> list[str]:
        broken = self.output_dir / f"break {stage}"
        code = f"import sys; sys.exit('broken {stage}')" if broken.exists() else LEAVE
        return [sys.executable, "-c", code, str(self.product(cell, stage)), str(qrels)]


@pytest.fixture
def options(tmp_path: Path) -> Leaving:
    return Leaving(
        root=tmp_path, output_dir=tmp_path, base_model="base", train_dirs=[], data_dir=None, split="dev",
        metrics=["ndcg@10"], train_options=[], index_options=[], search_options=[], launcher=[],
    )  # fmt: skip


@pytest.fixture
def run(options: Leaving, caplog: pytest.LogCaptureFixture) -> Run:
    """Run the cell; the stages that were run."""
    caplog.set_level("INFO")

    def call(keep_index: bool = False, **changed: str) -> list[str]:
        caplog.clear()
        run_cell(options, CELL, {**KEYS, **changed}, "3/11", Path("judged.tsv"), keep_index)
        messages = [record.getMessage() for record in caplog.records if "paper_table" in record.name]
        assert all(message.startswith("[3/11] ANCE-CLP, ko, seed 1: ") for message in messages)
        return [message.rsplit(": ", 1)[1] for message in messages]

    return call


def test_what_is_done_is_not_done_again(options: Leaving, run: Run) -> None:
    assert run() == list(STAGES)
    assert not options.product(CELL, "index").parent.exists()  # thrown away once it was searched
    assert run() == []
    record = json.loads((options.output_dir / "records/ance-clp-ko-seed1.json").read_text())
    assert {stage: found["key"] for stage, found in record.items()} == KEYS
    assert record["score"]["command"].endswith("judged.tsv")
    assert all(found["seconds"] > 0 and found["peak_rss_mb"] > 1 for found in record.values())


def test_a_changed_input_is_run_again(options: Leaving, run: Run) -> None:
    run()
    assert run(score="score 2") == ["score"]
    assert run(search="search 2", score="score 3") == ["index", "search", "score"]  # the index is needed again
    assert run(**{stage: f"{stage} 4" for stage in STAGES}) == list(STAGES)
    # A stage goes by its own key, also where what came out of it is the same and nothing after it has changed.
    assert run(**{stage: f"{stage} 4" for stage in STAGES} | {"train": "train 5"}) == ["train"]


def test_a_stage_that_was_broken_off_finds_its_checkpoints_again(options: Leaving, run: Run) -> None:
    (options.output_dir / "break train").touch()
    with pytest.raises(DataError, match="train failed"):
        run()
    checkpoint = Path(options.encoder(CELL)) / "checkpoint-7"
    checkpoint.mkdir(parents=True)
    photo = checkpoint.with_name("photo.txt")
    photo.write_text("mine")
    with pytest.raises(DataError, match="train failed"):
        run()
    assert checkpoint.exists()
    (options.output_dir / "break train").unlink()
    assert run(train="train 2")[0] == "train"
    assert not checkpoint.exists() and photo.read_text() == "mine"


def test_a_product_that_is_gone_is_made_again(options: Leaving, run: Run) -> None:
    run(keep_index=True)
    assert options.product(CELL, "index").exists()
    options.product(CELL, "train").unlink()  # a model may be thrown away once it was scored
    assert run() == []
    options.product(CELL, "score").unlink()
    assert run() == ["score"]
    options.product(CELL, "search").unlink()
    assert run() == ["search"]


def test_what_other_inputs_left_is_gone_before_a_stage_begins(options: Leaving, run: Run) -> None:
    run()
    checkpoint = Path(options.encoder(CELL)) / "checkpoint-7"
    checkpoint.mkdir()
    for stage in ("search", "score"):
        options.product(CELL, stage).write_text("of other inputs")
    (options.output_dir / "break search").touch()
    with pytest.raises(DataError, match=r"seed 1: search failed \(exit 1\): broken search; all of it in .*log"):
        run(**{stage: f"{stage} 2" for stage in STAGES})
    assert not checkpoint.exists()
    assert not options.product(CELL, "search").exists()
    (options.output_dir / "break search").unlink()
    assert run(**{stage: f"{stage} 2" for stage in STAGES}) == ["search", "score"]  # it goes on where it failed
    assert options.product(CELL, "score").read_text() == ""
