"""The merged checkpoint against averages computed by hand, and in every library that loads it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from transformers import AutoModel

from FlagEmbedding import BGEM3FlagModel, FlagModel
from FlagEmbedding.merge.__main__ import main
from tests.conftest import TEXTS
from tests.merge.conftest import Make


def merge(*words: object) -> dict[str, torch.Tensor]:
    """Run the command and read what it wrote."""
    assert main([str(word) for word in words]) == 0
    folder = Path(str(words[words.index("--output_dir") + 1]))
    assert {path.name for path in folder.parent.iterdir() if path.name.startswith(".")} == set()
    return load_file(folder / "model.safetensors")


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for k, v in load_file(folder / "model.safetensors").items() if "pooler" not in k}


def test_the_weighted_mean_and_every_library(tiny_model_dir: Path, tuned: Make, tmp_path: Path) -> None:
    other, out = tuned(1), tmp_path / "merged"
    found = merge(tiny_model_dir, other, "--weights", 0.25, 0.75, "--output_dir", out)
    base, trained = weights_of(tiny_model_dir), weights_of(other)
    assert found.keys() == trained.keys()
    for key, value in found.items():
        torch.testing.assert_close(value, base[key] * 0.25 + trained[key] * 0.75, rtol=0, atol=1e-7)
    # The base says nothing of pooling and instructions: they are the trained checkpoint's.
    ours = FlagModel(str(out))
    assert (ours.pooling_method, ours.query_instruction_for_retrieval) == ("mean", "query: ")
    vectors = ours.encode_queries(TEXTS)
    np.testing.assert_allclose(SentenceTransformer(str(out)).encode_query(TEXTS), vectors, atol=1e-5)
    model = AutoModel.from_pretrained(out).eval()
    features = ours.tokenizer([f"query: {text}" for text in TEXTS], return_tensors="pt", padding=True)
    with torch.no_grad():
        states, mask = model(**features).last_hidden_state, features["attention_mask"].unsqueeze(-1)
    mean = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
    np.testing.assert_allclose(mean.numpy(), vectors, atol=1e-5)


def test_a_dense_base_counts_as_upcycled(tiny_model_dir: Path, tuned: Make, tmp_path: Path) -> None:
    other = tuned(2, experts=3)
    found = merge(tiny_model_dir, other, "--weights", 0.5, 0.5, "--output_dir", tmp_path / "half")
    base, trained = weights_of(tiny_model_dir), weights_of(other)
    place = "encoder.layer.1.intermediate.dense"
    for expert in range(3):
        for part in ("weight", "bias"):
            key = f"{place}.experts.{expert}.{part}"
            torch.testing.assert_close(found[key], (base[f"{place}.{part}"] + trained[key]) / 2)
    assert torch.equal(found[f"{place}.gate.weight"], trained[f"{place}.gate.weight"])
    torch.testing.assert_close(
        found["encoder.layer.0.output.dense.weight"],
        (base["encoder.layer.0.output.dense.weight"] + trained["encoder.layer.0.output.dense.weight"]) / 2,
    )
    merge(tiny_model_dir, other, "--weights", 1, 0, "--output_dir", tmp_path / "base")
    expected = FlagModel(str(tiny_model_dir), pooling_method="mean").encode(TEXTS)
    np.testing.assert_allclose(FlagModel(str(tmp_path / "base")).encode(TEXTS), expected, atol=1e-6)
    in_st = SentenceTransformer(str(tmp_path / "half"), trust_remote_code=True).encode(TEXTS)
    np.testing.assert_allclose(in_st, FlagModel(str(tmp_path / "half")).encode(TEXTS), atol=1e-5)


def test_several_checkpoints_with_experts(tiny_model_dir: Path, tuned: Make, tmp_path: Path) -> None:
    folders = [tiny_model_dir, tuned(2, experts=3), tuned(3, experts=3)]
    found = merge(*folders, "--weights", 0.5, 0.1, 0.4, "--output_dir", tmp_path / "merged")
    base, one, two = map(weights_of, folders)
    place = "encoder.layer.0.intermediate.dense"
    expert = f"{place}.experts.2.weight"
    expected = 0.5 * base[f"{place}.weight"] + 0.1 * one[expert] + 0.4 * two[expert]
    torch.testing.assert_close(found[expert], expected)
    gate = f"{place}.gate.weight"
    torch.testing.assert_close(found[gate], 0.2 * one[gate] + 0.8 * two[gate])  # among those that have one
    # Without weights each counts the same.
    found = merge(*folders, "--output_dir", tmp_path / "equal")
    torch.testing.assert_close(found[expert], (base[f"{place}.weight"] + one[expert] + two[expert]) / 3)


def test_the_arc_between_two(tiny_model_dir: Path, tuned: Make, tmp_path: Path) -> None:
    other = tuned(1)
    found = merge(
        tiny_model_dir, other, "--weights", 0.3, 0.7, "--method", "slerp", "--output_dir", tmp_path / "merged"
    )
    base, trained = weights_of(tiny_model_dir), weights_of(other)
    key = "encoder.layer.1.output.dense.weight"
    one, two = base[key].double().numpy().ravel(), trained[key].double().numpy().ravel()
    angle = np.arccos(one @ two / np.linalg.norm(one) / np.linalg.norm(two))
    assert angle > 0.1
    expected = (np.sin(0.3 * angle) * one + np.sin(0.7 * angle) * two) / np.sin(angle)
    np.testing.assert_allclose(found[key].numpy().ravel(), expected, atol=1e-6)
    ends = merge(tiny_model_dir, other, "--weights", 0, 1, "--method", "slerp", "--output_dir", tmp_path / "end")
    assert all(torch.equal(ends[key], trained[key]) for key in trained)
    same = merge(other, other, "--weights", 0.4, 0.6, "--method", "slerp", "--output_dir", tmp_path / "same")
    for key, value in trained.items():
        torch.testing.assert_close(same[key], value, rtol=1e-6, atol=1e-7)


def test_half_precision_is_averaged_in_float32(tiny_model_dir: Path, tuned: Make, tmp_path: Path) -> None:
    half = tuned(4, dtype=torch.float16)
    found = merge(tiny_model_dir, half, "--weights", 0.9, 0.1, "--output_dir", tmp_path / "merged")
    base, trained = weights_of(tiny_model_dir), weights_of(half)
    for key, value in found.items():
        assert value.dtype == torch.float16
        assert torch.equal(value, (base[key] * 0.9 + trained[key].float() * 0.1).half())
    assert json.loads((tmp_path / "merged/config.json").read_text())["dtype"] == "float16"
    found = merge(half, tiny_model_dir, "--weights", 0.9, 0.1, "--output_dir", tmp_path / "whole")
    assert {value.dtype for value in found.values()} == {torch.float32}  # as the last one


def test_heads_are_averaged_among_those_that_have_them(tiny_model_dir: Path, tuned: Make, tmp_path: Path) -> None:
    one, two = tuned(5, heads=True), tuned(6, heads=True)
    merge(tiny_model_dir, one, two, "--weights", 0.5, 0.1, 0.4, "--output_dir", tmp_path / "merged")
    for file in ("colbert_linear.pt", "sparse_linear.pt"):
        states = [torch.load(folder / file, weights_only=True) for folder in (one, two, tmp_path / "merged")]
        for key, value in states[2].items():
            torch.testing.assert_close(value, 0.2 * states[0][key] + 0.8 * states[1][key])
    outputs = BGEM3FlagModel(str(tmp_path / "merged")).encode(TEXTS[0], return_sparse=True, return_colbert_vecs=True)
    assert outputs["colbert_vecs"].shape[1] == 16


def test_a_base_of_another_layout(tiny_model_dir: Path, tuned: Make, tmp_path: Path) -> None:
    """BGE-M3's own file is a pickle; a language model's keys stand below ``roberta.``, beside its head's."""
    weights = weights_of(tiny_model_dir)
    prefixed = {f"roberta.{key}": value for key, value in weights.items()} | {"lm_head.bias": torch.zeros(9)}
    other = tuned(1)
    expected = merge(tiny_model_dir, other, "--output_dir", tmp_path / "expected")
    for name, save in (
        ("pickle", lambda folder: torch.save(weights, folder / "pytorch_model.bin")),
        ("old", lambda folder: torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)),
        ("prefixed", lambda folder: save_file(prefixed, folder / "model.safetensors", metadata={"format": "pt"})),
    ):
        folder = tmp_path / name
        folder.mkdir()
        for file in tiny_model_dir.iterdir():
            if file.name != "model.safetensors":
                (folder / file.name).write_bytes(file.read_bytes())
        save(folder)
        found = merge(folder, other, "--output_dir", tmp_path / f"{name}-merged")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in found), name


def test_the_record_says_what_went_in(tiny_model_dir: Path, tuned: Make, tmp_path: Path) -> None:
    from FlagEmbedding.utils.identity import model_fingerprint

    merge(tiny_model_dir, tuned(1), "--weights", 0.25, 0.75, "--output_dir", tmp_path / "merged")
    record = json.loads((tmp_path / "merged/merge.json").read_text())
    assert [model["weight"] for model in record["models"]] == [0.25, 0.75]
    assert [model["sha256"] for model in record["models"]] == [
        model_fingerprint(tiny_model_dir),
        model_fingerprint(tuned(1)),
    ]
    assert record["method"] == "linear" and "commit" in record["provenance"]
    assert "model.safetensors" in record["files"] and "1_Pooling/config.json" in record["files"]


def refusal(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    said = capsys.readouterr().err
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and said.rstrip().endswith(lines[0])
    return lines[0]


def test_what_cannot_be_averaged_is_refused(
    tiny_model_dir: Path, tiny_bert_dir: Path, tuned: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.conftest import write_tiny

    out = ("--output_dir", tmp_path / "merged")
    deeper = write_tiny(tmp_path / "deeper", "xlmr", num_hidden_layers=3)
    wider = write_tiny(tmp_path / "wider", "xlmr", intermediate_size=64)
    spelled = write_tiny(tmp_path / "spelled", "xlmr")
    text = (spelled / "tokenizer.json").read_text()
    (spelled / "tokenizer.json").write_text(text.replace('"normalizer":null', '"normalizer":{"type":"Lowercase"}'))
    if spelled.joinpath("tokenizer.json").read_text() == text:
        content = json.loads(text) | {"normalizer": {"type": "Lowercase"}}
        (spelled / "tokenizer.json").write_text(json.dumps(content))
    assert "num_hidden_layers is 2 there, 3 here" in refusal(capsys, tiny_model_dir, deeper, *out)
    assert "intermediate_size is 48 there, 64 here" in refusal(capsys, tiny_model_dir, wider, *out)
    assert "model_type is xlm-roberta there, bert here" in refusal(capsys, tiny_model_dir, tiny_bert_dir, *out)
    assert "different tokenizers" in refusal(capsys, tiny_model_dir, spelled, *out)
    assert "pooling is mean there, cls here" in refusal(capsys, tuned(1), tuned(1, pooling="cls"), *out)
    assert "instructions is" in refusal(capsys, tuned(1), tuned(1, query="ask: "), *out)
    said = refusal(capsys, tuned(2, experts=3), tuned(2, experts=2), *out)
    assert re.search(r"experts is 3 in intermediate, 1 per token there, 2 in intermediate", said)
    assert "neither a checkpoint folder" in refusal(capsys, tiny_model_dir, "/no/such", *out)
    assert not (tmp_path / "merged").exists()


def test_an_output_in_the_way_is_refused(
    tiny_model_dir: Path, tuned: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "merged"
    words = (tiny_model_dir, tuned(1), "--output_dir", out)
    merge(*words)
    before = (out / "model.safetensors").read_bytes()
    assert "--overwrite True replaces it" in refusal(capsys, *words)
    merge(*words, "--weights", 0, 1, "--overwrite", "True")
    assert (out / "model.safetensors").read_bytes() != before
    (out / "notes.txt").write_text("mine")
    assert "holds 'notes.txt'" in refusal(capsys, *words, "--overwrite", "True")
    assert (out / "notes.txt").read_text() == "mine"
    assert "holds 'config.json'" in refusal(
        capsys, tiny_model_dir, tuned(1), "--output_dir", tiny_model_dir, "--overwrite"
    )
    (tmp_path / "file").write_text("")
    assert "is a file" in refusal(capsys, tiny_model_dir, tuned(1), "--output_dir", tmp_path / "file")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["a", "--output_dir", "o"], "give two models or more"),
        (["a", "b", "--output_dir", "o", "--weights", "1"], "1 for 2 models"),
        (["a", "b", "--output_dir", "o", "--weights", "0.5", "0.6"], "their sum is 1.1, not 1"),
        (["a", "b", "c", "--output_dir", "o", "--method", "slerp"], "between two models, got 3"),
        (["a", "b", "--output_dir", "o", "--method", "slerp", "--weights", "-1", "2"], "give weights of 0 to 1"),
        (["a", "b", "--output_dir", "o", "--sweep", "0.5"], "needs a dev collection"),
        (["a", "b", "--output_dir", "o", "--sweep", "0.5", "--weights", "0.5", "0.5"], "leave --weights out"),
        (["a", "b", "--output_dir", "o", "--eval_data_dir", "d"], "belong together"),
    ],
)
def test_options_that_do_not_fit_are_refused(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert says in refusal(capsys, *words)
