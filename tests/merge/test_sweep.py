"""The sweep on a real collection with a real model: figures as steps 0 to 2 give them, and the best one written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from FlagEmbedding.evaluation.__main__ import embed, score, search
from FlagEmbedding.merge.__main__ import main
from FlagEmbedding.modeling.backbone import load_backbone, save_checkpoint
from FlagEmbedding.modeling.encoder import M3Encoder
from FlagEmbedding.modeling.interchange import Instructions
from tests.conftest import SAMPLE
from tests.evaluation.conftest import cells


@pytest.fixture(scope="module")
def strayed(demo_base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real base after a training that went too far: its weights moved at random."""
    backbone = load_backbone(str(demo_base_dir))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            if name.endswith("dense.weight"):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.6 * parameter.std())
    model = M3Encoder(backbone, pooling="mean", instructions=Instructions("query: ", "passage: "))
    folder = tmp_path_factory.mktemp("strayed") / "strayed"
    save_checkpoint(model, folder, tokenizer=AutoTokenizer.from_pretrained(demo_base_dir))
    return folder


def steps_0_to_2(model: Path, out: Path) -> float:
    places = ["--languages", "ko", "--data_dir", str(SAMPLE)]
    index = ["--index_save_dir", str(out / "index")]
    assert embed(["--encoder", str(model), *places, *index]) == 0
    assert search(["--encoder", str(model), *places, *index, "--result_save_dir", str(out / "runs")]) == 0
    runs = ["--search_result_save_dir", str(out / "runs"), "--eval_result_save_dir", str(out / "scores")]
    assert score(["--encoder", str(model), *places, *runs]) == 0
    found = json.loads((out / f"scores/{model.name}.json").read_text())
    return float(found["results"]["ko"]["ndcg@10"])


def test_the_best_of_a_sweep_is_written(
    demo_base_dir: Path, strayed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "best"
    words = [str(demo_base_dir), str(strayed), "--eval_data_dir", str(SAMPLE), "--eval_languages", "ko"]
    assert main([*words, "--sweep", "0.1", "0.5", "--output_dir", str(out)]) == 0
    header, _, *lines = cells(capsys.readouterr().out)
    assert header[2] == "nDCG@10 ko"
    assert [line[0] for line in lines] == ["1 : 0", "0.9 : 0.1", "0.5 : 0.5", "0 : 1"]  # the ends are always there
    record = json.loads((out / "merge.json").read_text())
    tried = [record["tried"][line[0]]["ndcg@10"] for line in lines]
    assert [line[2] for line in lines] == [f"{100 * value:.1f}" for value in tried]
    assert tried[0] > tried[-1] + 0.05  # random moves cost something
    best = max(range(4), key=tried.__getitem__)
    assert [line[1] for line in lines] == ["written" if place == best else "" for place in range(4)]
    share = [0.0, 0.1, 0.5, 1.0][best]
    assert [model["weight"] for model in record["models"]] == [1 - share, share]
    key = "encoder.layer.2.output.dense.weight"
    base, far, found = (load_file(folder / "model.safetensors")[key] for folder in (demo_base_dir, strayed, out))
    torch.testing.assert_close(found, base * (1 - share) + far * share)
    assert not (tmp_path / "candidate").exists() and [path.name for path in tmp_path.iterdir()] == ["best"]
    # To the digit what the steps give for the same folder.
    assert steps_0_to_2(out, tmp_path) == tried[best]
    assert steps_0_to_2(strayed, tmp_path) == tried[-1]


def test_one_merge_is_measured_beside_base_and_tuned(
    demo_base_dir: Path, strayed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(demo_base_dir), str(strayed), "--eval_data_dir", str(SAMPLE), "--eval_languages", "ko"]
    assert main([*words, "--weights", "0.2", "0.8", "--output_dir", str(tmp_path / "merged")]) == 0
    lines = cells(capsys.readouterr().out)[2:]
    assert [line[:2] for line in lines] == [["1 : 0", ""], ["0 : 1", ""], ["0.2 : 0.8", "written"]]


def test_a_collection_that_is_not_there_costs_no_work(
    demo_base_dir: Path, strayed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(demo_base_dir), str(strayed), "--sweep", "0.5", "--output_dir", str(tmp_path / "merged")]
    assert main([*words, "--eval_data_dir", str(SAMPLE), "--eval_languages", "sw"]) == 2
    assert "sw" in capsys.readouterr().err
    assert main([*words, "--eval_data_dir", str(tmp_path / "none"), "--eval_languages", "ko"]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_several_tuned_checkpoints_share_and_stand_alone() -> None:
    from FlagEmbedding.merge.sweep import candidates

    assert candidates(2, [0.5]) == [[1, 0], [0.5, 0.5], [0, 1]]
    assert candidates(3, [0.5]) == [[1, 0, 0], [0.5, 0.25, 0.25], [0, 0.5, 0.5], [0, 1, 0], [0, 0, 1]]
