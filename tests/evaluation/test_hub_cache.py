"""--cache_dir reaches everything that comes from the hub: the checkpoint, the corpus, the queries, the judgments."""

from __future__ import annotations

from pathlib import Path

import pytest
from hub_cache import keep

from FlagEmbedding.evaluation.__main__ import embed, score, search
from tests.evaluation.conftest import QUERIES, make_passages, write_collection


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    """A hub's cache with a checkpoint and both datasets of MIRACL."""
    folder = tmp_path_factory.mktemp("hub")
    files = write_collection(folder / "files", "ko", make_passages(20), QUERIES)
    judged = files / "miracl-v1.0-ko/qrels/qrels.miracl-v1.0-ko-dev.tsv"
    judged.parent.mkdir()
    judged.write_text("".join(f"{qid}\tQ0\t0#0\t1\n" for qid in QUERIES))
    for dataset in ("miracl/miracl-corpus", "miracl/miracl"):
        keep(folder / "cache", dataset, files, "dataset")
    return keep(folder / "cache", "org/tiny", tiny_model_dir)


def test_every_step_finds_what_the_cache_holds(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = ["--encoder", "org/tiny", "--languages", "ko"]
    for step in (embed, search, score):
        assert step([*given, "--cache_dir", str(tmp_path)]) == 2
        assert step([*given, "--cache_dir", str(cache)]) == 0
    assert (tmp_path / "eval_results/tiny.json").is_file()
