"""Every file that a command writes has the mode of any new file: the umask decides."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import STEPS, run_script
from finetune.helpers import rows, run_training, train_words, write_rows

from FlagEmbedding.mining.__main__ import main as mining


@pytest.fixture(params=[0o022, 0o027], ids=["022", "027"])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_all_files_of_training_evaluation_and_mining(
    umask: int, tiny_moe_dir: Path, sample_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where mining puts its index
    out, data = tmp_path / "out", write_rows(tmp_path / "rows/a.jsonl", rows(12))
    run_training(train_words(
        tiny_moe_dir, data, out, max_steps=1, save_strategy="steps", save_steps=1, report_to="tensorboard",
        unified_finetuning=True, cache_path=tmp_path / "cache", query_instruction_for_retrieval="find: ",
    ))  # fmt: skip
    common = ["--encoder", out, "--languages", "hi"]
    places = ["--data_dir", sample_dir, "--index_save_dir", tmp_path / "index", "--max_passage_length", 16]
    assert run_script(STEPS[0], [*common, *places]).returncode == 0
    runs = [tmp_path / "runs", "--index_save_dir", tmp_path / "index", "--data_dir", sample_dir, "--split", "train"]
    searched = run_script(STEPS[1], [*common, "--result_save_dir", *runs, "--index_type", "HNSW32"])
    assert searched.returncode == 0, searched.stderr
    scored = run_script(STEPS[2], [
        *common, "--search_result_save_dir", tmp_path / "runs", "--data_dir", sample_dir, "--split", "train",
        "--eval_result_save_dir", tmp_path / "scores",
    ])  # fmt: skip
    assert scored.returncode == 0, scored.stderr
    commands = (
        f"hard_negatives --encoder {out} --input_file {data} --output_file {tmp_path}/mined.jsonl "
        f"--range_for_sampling 1-5 --negative_number 2 --report_dir {tmp_path}/report",
        f"merge --input_file {data} --output_file {tmp_path}/merged[1].jsonl",
        f"sample --input_file {data} --number 3 --output_file {tmp_path}/few.jsonl",
        f"doctor {data} --report_dir {tmp_path}/doctor",
    )
    for command in commands:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as left:
            patch.setattr("sys.argv", [])
            mining(command.split())
        assert not left.value.code, command
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 40 and {"model.safetensors", "index", "mined.jsonl"} <= {path.name for path in files}
    wrong = {str(path): oct(stat.S_IMODE(path.stat().st_mode)) for path in files
             if stat.S_IMODE(path.stat().st_mode) != 0o666 & ~umask}  # fmt: skip
    assert wrong == {}
