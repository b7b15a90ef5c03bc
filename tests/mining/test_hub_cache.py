"""--cache_dir of the mining commands reaches everything that comes from the hub."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hub_cache import keep
from mining.corpora import write_collection, write_rows

from FlagEmbedding.mining.convert import main as convert
from FlagEmbedding.mining.doctor.command import main as doctor
from FlagEmbedding.mining.hard_negatives.command import main as hard_negatives
from FlagEmbedding.mining.split_data_by_length import main as split_data_by_length

MODEL = "--encoder org/tiny"
WINDOW = "--range_for_sampling 2-20 --negative_number 6"
COMMANDS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "convert": (convert, "--format miracl --language ko --output_file out.jsonl"),
    "hard_negatives": (hard_negatives, f"{MODEL} {WINDOW} --language ko --output_file out.jsonl"),
    "a reranker": (
        hard_negatives,
        f"{MODEL} {WINDOW} --input_file rows.jsonl --cross_encoder org/reranker --with_scores --output_file out.jsonl",
    ),
    "the doctor": (doctor, "rows.jsonl --model org/tiny"),
    "the doctor's tokenizer": (doctor, "rows.jsonl --tokenizer org/tiny"),
    "split_data_by_length": (
        split_data_by_length, "--input_path rows.jsonl --output_dir out --model_name_or_path org/tiny",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path, cross_encoder_dir: Path) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    files = write_collection(folder / "files")
    for dataset in ("miracl/miracl-corpus", "miracl/miracl"):
        keep(folder / "cache", dataset, files, "dataset")
    keep(folder / "cache", "org/reranker", cross_encoder_dir)
    return keep(folder / "cache", "org/tiny", tiny_model_dir)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_finds_what_the_cache_holds(
    name: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", [{"query": f"q{i}", "pos": [f"P{i}"], "neg": [f"N{i}"]} for i in range(30)])
    command, words = COMMANDS[name]
    assert command([*words.split(), "--cache_dir", str(tmp_path / "nothing")]) == 2
    assert command([*words.split(), "--cache_dir", str(cache)]) == 0
