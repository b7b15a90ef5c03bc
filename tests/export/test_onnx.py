"""The graph in onnxruntime against the public classes, and the command that refuses a graph that differs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from FlagEmbedding import BGEM3FlagModel, FlagModel
from FlagEmbedding.export import onnx_graph
from FlagEmbedding.export.__main__ import main
from tests.conftest import TEXTS
from tests.dev_collection import write_judged
from tests.evaluation.conftest import cells

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")


def export(model: Path, out: Path, *words: object) -> Path:
    assert main(["onnx", str(model), "--output_dir", str(out), *map(str, words)]) == 0
    return out


def run(folder: Path, texts: list[str], file: str = "model.onnx") -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Outputs by name, and the mask, as somebody without this package gets them."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    features = tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="np")
    session = onnxruntime.InferenceSession(str(folder / "onnx" / file), providers=["CPUExecutionProvider"])
    inputs = {name: features[name].astype(np.int64) for name in ("input_ids", "attention_mask")}
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, inputs), strict=True)), inputs["attention_mask"]


def test_three_outputs_of_one_graph(tiny_heads_dir: Path, tmp_path: Path) -> None:
    out = export(tiny_heads_dir, tmp_path / "out")
    ours = BGEM3FlagModel(str(tiny_heads_dir))
    expected = ours.encode(TEXTS, return_dense=True, return_sparse=True, return_colbert_vecs=True)
    tokens = AutoTokenizer.from_pretrained(out)(TEXTS, truncation=True, max_length=128)["input_ids"]
    for rows in (slice(0, 6), slice(2, 3), slice(1, 4)):  # other numbers of rows and tokens than at the export
        found, mask = run(out, TEXTS[rows])
        np.testing.assert_allclose(found["dense"], expected["dense_vecs"][rows], atol=1e-5)
        assert found["sparse"].shape == mask.shape and not found["sparse"][mask == 0].any()
        for place, text in enumerate(range(6)[rows]):
            length = int(mask[place].sum())
            np.testing.assert_allclose(found["colbert"][place, : length - 1], expected["colbert_vecs"][text], atol=1e-5)
            assert not found["colbert"][place, length - 1 :].any()
            weights = dict.fromkeys(expected["lexical_weights"][text], 0.0)
            for token, weight in zip(tokens[text], found["sparse"][place], strict=False):
                if str(token) in weights:
                    weights[str(token)] = max(weights[str(token)], float(weight))
            assert weights == pytest.approx(expected["lexical_weights"][text], abs=1e-5)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_experts_are_all_run_and_selected(tiny_moe_dir: Path, tmp_path: Path, pooling: str) -> None:
    words = [] if pooling == "cls" else ["--pooling_method", pooling]
    out = export(tiny_moe_dir, tmp_path / "out", *words)
    expected = FlagModel(str(tiny_moe_dir), pooling_method=pooling).encode(TEXTS)  # type: ignore[arg-type]
    np.testing.assert_allclose(run(out, TEXTS)[0]["dense"], expected, atol=1e-5)
    assert json.loads((out / "export.json").read_text())["pooling"] == pooling


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_other_encoders(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    model: Path = request.getfixturevalue(f"tiny_{kind}_dir")
    out = export(model, tmp_path / "out")
    np.testing.assert_allclose(run(out, TEXTS)[0]["dense"], FlagModel(str(model)).encode(TEXTS), atol=1e-5)


def test_two_experts_per_token(tiny_model_dir: Path, tmp_path: Path) -> None:
    from FlagEmbedding.modeling.backbone import load_backbone, moe_layers, save_checkpoint
    from FlagEmbedding.modeling.moe import MoEConfig

    torch.manual_seed(3)
    model = load_backbone(str(tiny_model_dir), moe=MoEConfig(moe="output", num_experts=4, num_experts_per_tok=2))
    with torch.no_grad():
        for layer in moe_layers(model):
            for parameter in layer.experts.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    save_checkpoint(model, tmp_path / "experts", tokenizer=AutoTokenizer.from_pretrained(tiny_model_dir))
    out = export(tmp_path / "experts", tmp_path / "out")
    expected = FlagModel(str(tmp_path / "experts")).encode(TEXTS)
    np.testing.assert_allclose(run(out, TEXTS)[0]["dense"], expected, atol=1e-5)


def test_the_real_base_in_eight_bits(
    demo_base_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], sample_dir: Path
) -> None:
    out = export(
        demo_base_dir, tmp_path / "out", "--int8", "--pooling_method", "mean", "--samples", "40",
        "--eval_passage_length", "64", "--eval_data_dir", sample_dir, "--eval_languages", "ko",
        "--query_instruction_for_retrieval", "query: ", "--passage_instruction_for_retrieval", "passage: ",
    )  # fmt: skip
    header, _, *lines = cells(capsys.readouterr().out)
    by_name = {line[0]: dict(zip(header, line, strict=True)) for line in lines}
    assert list(by_name) == ["checkpoint", "onnx", "onnx int8"]
    assert by_name["onnx"]["nDCG@10"] == by_name["checkpoint"]["nDCG@10"]
    sizes = {name: (out / "onnx" / name).stat().st_size for name in ("model.onnx", "model_int8.onnx")}
    assert 3.5 < sizes["model.onnx"] / sizes["model_int8.onnx"] < 4.2
    assert float(by_name["onnx int8"]["MB"]) == round(sizes["model_int8.onnx"] / 1e6, 1)
    record = json.loads((out / "export.json").read_text())["kinds"]
    texts = [f"query: {text}" for text in TEXTS]
    expected = FlagModel(str(demo_base_dir), pooling_method="mean").encode(texts)
    cosines = (run(out, texts, "model_int8.onnx")[0]["dense"] * expected).sum(axis=1)
    assert cosines.min() > 0.98 and 0.98 < record["onnx int8"]["cosine_min"] < 0.9999
    assert record["onnx"]["cosine_min"] > 1 - 1e-6
    assert abs(record["onnx int8"]["ndcg@10"] - record["onnx"]["ndcg@10"]) < 0.05
    assert all(kind["query_milliseconds"] > 0 for kind in record.values())


def test_only_the_heads_that_were_asked_for(
    tiny_heads_dir: Path, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = export(tiny_heads_dir, tmp_path / "out", "--heads", "sparse")
    found, _ = run(out, TEXTS[:2])
    assert set(found) == {"dense", "sparse", "last_hidden_state"}
    assert json.loads((out / "export.json").read_text())["heads"] == ["dense", "sparse"]
    assert main(["onnx", str(tiny_model_dir), "--output_dir", str(tmp_path / "no"), "--heads", "sparse"]) == 2
    assert "only dense vectors" in capsys.readouterr().err
    assert main(["onnx", str(tiny_model_dir), "--output_dir", str(tmp_path / "no"), "--heads", "all"]) == 2
    assert "choose from dense sparse colbert" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("head", ["dense", "sparse", "colbert"])
def test_a_graph_that_differs_is_not_kept(
    tiny_heads_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], head: str
) -> None:
    """A real graph with one output a little off, as a wrong operation of an exporter would give it."""
    forward = onnx_graph.Graph.forward

    def off(self: onnx_graph.Graph, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = list(forward(self, input_ids, attention_mask))
        found[self.heads.index(head)] = found[self.heads.index(head)] * 1.001
        return tuple(found)

    monkeypatch.setattr(onnx_graph.Graph, "forward", off)
    assert main(["onnx", str(tiny_heads_dir), "--output_dir", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert f"{head} is off by" in said and "nothing was written" in said
    assert list(tmp_path.iterdir()) == []


def test_weights_beyond_one_file(tiny_heads_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_graph, "LARGEST_FILE", 50_000)
    out = export(tiny_heads_dir, tmp_path / "out", "--int8")
    assert (out / "onnx/model.onnx_data").stat().st_size > (out / "onnx/model.onnx").stat().st_size
    assert not (out / "onnx/scratch").exists()
    expected = FlagModel(str(tiny_heads_dir)).encode(TEXTS)
    np.testing.assert_allclose(run(out, TEXTS)[0]["dense"], expected, atol=1e-5)
    record = json.loads((out / "export.json").read_text())["kinds"]
    assert record["onnx"]["bytes"] == sum(path.stat().st_size for path in (out / "onnx").glob("model.onnx*"))
    assert (run(out, TEXTS, "model_int8.onnx")[0]["dense"] * expected).sum(axis=1).min() > 0.95


def test_what_lies_beside_the_graph(tiny_moe_dir: Path, tmp_path: Path) -> None:
    out = export(tiny_moe_dir, tmp_path / "out", "--data", _lines(tmp_path, TEXTS))
    names = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert {"onnx/model.onnx", "config.json", "tokenizer.json", "modules.json", "1_Pooling/config.json"} <= names
    assert not [name for name in names if name.endswith((".safetensors", ".pt", ".bin"))]
    record = json.loads((out / "export.json").read_text())
    assert record["difference"] <= 1e-5 and record["max_length"] == 128 and set(record["files"]) == names


def _lines(folder: Path, texts: list[str]) -> Path:
    path = folder / "texts.txt"
    path.write_text("\n".join(texts) + "\n")
    return path


def test_a_collection_is_asked_for_texts(tiny_model_dir: Path, tmp_path: Path) -> None:
    from FlagEmbedding.evaluation.arguments import DevArguments
    from FlagEmbedding.export.arguments import SampleArguments
    from FlagEmbedding.export.samples import BUILT_IN, find_samples

    data = write_judged(tmp_path / "data")
    dev = DevArguments(eval_data_dir=str(data), eval_languages=["ko", "fa"])
    found = find_samples(SampleArguments(samples=7), dev)
    assert len(found.queries) == len(found.passages) == 7 and all(found.passages)
    queries = (data / "miracl-v1.0-fa/topics/topics.miracl-v1.0-fa-dev.tsv").read_text()
    assert any(text in queries for text in found.queries)  # of every language
    lines = find_samples(SampleArguments(data=[str(_lines(tmp_path, TEXTS))]), dev)
    assert lines.passages == TEXTS
    none = find_samples(SampleArguments(), DevArguments())
    assert set(none.passages) | set(none.queries) == set(BUILT_IN)
