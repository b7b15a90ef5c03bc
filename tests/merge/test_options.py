"""Every option of the merge acts on what is written or measured."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from options_walk import Case, assert_acts, assert_complete

from FlagEmbedding.evaluation.arguments import DevArguments
from FlagEmbedding.merge.__main__ import main
from FlagEmbedding.merge.arguments import MergeArguments
from tests.dev_collection import write_judged
from tests.merge.conftest import Make

DEV = "--eval_data_dir {data} --eval_languages ko"
CASES = {
    "weights": Case("--weights 0.2 0.8", only=("weights",)),
    "method": Case("--method slerp", only=("weights",)),
    "sweep": Case("--sweep 0.3", given=DEV, only=("tried",)),
    "eval_data_dir": Case(DEV, only=("tried",)),
    "eval_languages": Case("--eval_languages ko fa", given=DEV, only=("tried",)),
    "eval_split": Case("--eval_split train", given=DEV, only=("tried",)),
    "eval_query_length": Case("--eval_query_length 4", given=DEV, only=("tried",)),
    "eval_passage_length": Case("--eval_passage_length 5", given=DEV, only=("tried",)),
    "query_instruction_for_retrieval": Case(
        "--query_instruction_for_retrieval 'river sea mountain kimchi '", given=DEV, only=("tried",)
    ),
    "passage_instruction_for_retrieval": Case(
        "--passage_instruction_for_retrieval 'river sea mountain kimchi '", given=DEV, only=("tried",)
    ),
}  # fmt: skip
EXEMPT = {
    "models": "given in every test of the room",
    "output_dir": "read in every test of the room",
    "overwrite": "test_an_output_in_the_way_is_refused",
    "cache_dir": "the hub's, see tests/utils/test_hub.py",
}


def test_no_field_is_left_out() -> None:
    assert_complete((MergeArguments, DevArguments), CASES, EXEMPT)


@pytest.mark.parametrize("name", CASES)
def test_every_option_acts(
    name: str, tiny_model_dir: Path, tuned: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = write_judged(tmp_path / "data"), tmp_path / "out"

    def observe(words: list[str]) -> dict[str, Any]:
        shutil.rmtree(out, ignore_errors=True)
        chosen = [word.format(data=data) for word in words]
        assert main([str(tiny_model_dir), str(tuned(1)), *chosen, "--output_dir", str(out)]) == 0
        record = json.loads((out / "merge.json").read_text())
        return {"weights": (out / "model.safetensors").read_bytes(), "tried": record["tried"]}

    assert_acts(CASES[name], observe)
