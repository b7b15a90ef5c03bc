"""Folded experts against sums computed by hand, and the folder in libraries that know no experts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer, XLMRobertaModel

from FlagEmbedding import BGEM3FlagModel, FlagModel
from FlagEmbedding.export.__main__ import main
from FlagEmbedding.modeling.backbone import load_backbone, moe_layers, save_checkpoint
from FlagEmbedding.modeling.encoder import M3Encoder
from FlagEmbedding.modeling.interchange import Instructions
from FlagEmbedding.modeling.moe import MoEConfig
from tests.conftest import TEXTS
from tests.dev_collection import write_judged
from tests.evaluation.conftest import cells

Make = Callable[..., Path]


@pytest.fixture
def make(tiny_model_dir: Path, tmp_path: Path) -> Make:
    """A checkpoint with experts: ``apart`` says how far the experts are from each other."""

    def build(
        apart: float, *, experts: int = 3, per_token: int = 1, pooling: str = "mean", heads: bool = False,
        moe: str = "intermediate", dtype: torch.dtype = torch.float32,
    ) -> Path:  # fmt: skip
        torch.manual_seed(11)
        config = MoEConfig(moe=moe, num_experts=experts, num_experts_per_tok=per_token)  # type: ignore[arg-type]
        backbone = load_backbone(str(tiny_model_dir), moe=config)
        with torch.no_grad():
            for layer in moe_layers(backbone):
                layer.gate.weight.normal_()
                for parameter in layer.experts.parameters():
                    parameter.add_(torch.randn_like(parameter) * apart)
        linears = {"colbert_linear": torch.nn.Linear(32, 16), "sparse_linear": torch.nn.Linear(32, 1)} if heads else {}
        model = M3Encoder(
            backbone.to(dtype), **linears, pooling=pooling, instructions=Instructions("query: ", "passage: ")
        )
        folder = tmp_path / "experts"
        save_checkpoint(model, folder, tokenizer=AutoTokenizer.from_pretrained(tiny_model_dir))
        return folder

    return build


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Training rows: the first three texts are queries, the others their positives."""
    path = tmp_path / "rows.jsonl"
    lines = [{"query": query, "pos": [text], "neg": ["no"]} for query, text in zip(TEXTS[:3], TEXTS[3:], strict=True)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def fold(model: Path, out: Path, *words: object) -> dict[str, torch.Tensor]:
    assert main(["fold", str(model), "--output_dir", str(out), *map(str, words)]) == 0
    return load_file(out / "model.safetensors")


def test_identical_experts_fold_exactly(make: Make, rows: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    model = make(0.0)
    for method in ("average", "load", "expert:2"):
        found = fold(model, tmp_path / method.replace(":", ""), "--data", rows, "--method", method)
        base = load_file(tiny_model_dir / "model.safetensors")
        assert all(torch.equal(value, base[key]) for key, value in found.items())


def test_average_and_one_expert(make: Make, rows: Path, tmp_path: Path) -> None:
    model = make(0.1)
    before = load_file(model / "model.safetensors")
    place = "encoder.layer.1.intermediate.dense"
    for part in ("weight", "bias"):
        experts = [before[f"{place}.experts.{number}.{part}"] for number in range(3)]
        found = fold(model, tmp_path / "average", "--data", rows, "--method", "average", "--overwrite")
        torch.testing.assert_close(found[f"{place}.{part}"], sum(experts) / 3)
        found = fold(model, tmp_path / "one", "--data", rows, "--method", "expert:1", "--overwrite")
        torch.testing.assert_close(found[f"{place}.{part}"], experts[1])


@pytest.mark.parametrize("per_token", [1, 2])
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_by_load_counts_what_the_vectors_read(
    make: Make, rows: Path, tmp_path: Path, per_token: int, pooling: str
) -> None:
    model = make(0.1, per_token=per_token, pooling=pooling, moe="output")
    found = fold(model, tmp_path / "folded", "--data", rows, "--method", "load")
    # By hand: transformers' own class, one text at a time, and a hook on each gate's input.
    network = AutoModel.from_pretrained(model, trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    loads = torch.zeros(2, 3, dtype=torch.float64)
    layers = [layer.output.dense for layer in network.encoder.layer]
    for number, layer in enumerate(layers):

        def count(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], number: int = number) -> None:
            states = inputs[0][0]
            if pooling == "cls" and number == 1:  # the last layer: first tokens alone
                states = states[:1]
            values, chosen = (states @ module.gate.weight.T).topk(per_token)
            for experts, shares in zip(chosen, values.softmax(-1), strict=True):
                for expert, share in zip(experts, shares, strict=True):
                    loads[number, expert] += float(share)

        layer.register_forward_pre_hook(count)
    with torch.no_grad():
        for text in [*(f"query: {text}" for text in TEXTS[:3]), *(f"passage: {text}" for text in TEXTS[3:])]:
            network(**tokenizer(text, truncation=True, max_length=128, return_tensors="pt"))
    shares = loads / loads.sum(dim=1, keepdim=True)
    assert (shares.max(dim=1).values < 1).any()  # more than one expert is in use
    record = json.loads((tmp_path / "folded/export.json").read_text())
    np.testing.assert_allclose(record["shares"], shares.numpy(), atol=1e-6)
    for number, layer in enumerate(layers):
        expected = sum(s * e.weight.detach() for s, e in zip(shares[number].float(), layer.experts, strict=True))
        torch.testing.assert_close(found[f"encoder.layer.{number}.output.dense.weight"], expected)


def test_libraries_without_our_code_load_it(make: Make, rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "folded"
    fold(make(0.05, heads=True), out, "--data", rows)
    vectors = FlagModel(str(out)).encode_queries(TEXTS)
    np.testing.assert_allclose(SentenceTransformer(str(out)).encode_query(TEXTS), vectors, atol=1e-5)
    model, info = XLMRobertaModel.from_pretrained(out, output_loading_info=True)
    assert {key for key in info["missing_keys"] if "pooler" not in key} == set() == set(info["unexpected_keys"])
    assert type(AutoModel.from_pretrained(out)) is type(model)
    config = json.loads((out / "config.json").read_text())
    assert not {"moe", "num_experts", "num_experts_per_tok", "auto_map", "transformers_weights"} & config.keys()
    assert config["architectures"] == ["XLMRobertaModel"]
    outputs = BGEM3FlagModel(str(out)).encode(TEXTS[0], return_sparse=True, return_colbert_vecs=True)
    assert outputs["colbert_vecs"].shape[1] == 16


def test_the_page_says_what_folding_costs(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, data, out = make(0.1), write_judged(tmp_path / "data"), tmp_path / "folded"
    fold(model, out, "--eval_data_dir", data, "--eval_languages", "ko", "--method", "average")
    header, _, before, after = cells(capsys.readouterr().out)
    assert header[1:4] == ["MB", "cosine (mean)", "cosine (least)"] and header[5] == "nDCG@10"
    assert [before[2], before[3]] == ["1.00000", "1.00000"]
    record = json.loads((out / "export.json").read_text())["kinds"]
    assert float(before[5]) == round(100 * record["with experts"]["ndcg@10"], 2)
    assert float(after[5]) == round(100 * record["folded (average)"]["ndcg@10"], 2)
    # The cosines are those of the folder on the collection's queries and passages.
    texts = [
        line.split("\t")[1]
        for line in (data / "miracl-v1.0-ko/topics/topics.miracl-v1.0-ko-dev.tsv").read_text().splitlines()
    ]
    one, two = (FlagModel(str(folder)).encode_queries(texts) for folder in (model, out))
    least = float((one * two).sum(axis=1).min())
    assert record["folded (average)"]["cosine_min"] <= least + 1e-6 < 1
    assert (
        record["folded (average)"]["bytes"]
        == (out / "model.safetensors").stat().st_size
        < record["with experts"]["bytes"]
    )


def test_half_precision_stays(make: Make, rows: Path, tmp_path: Path) -> None:
    model = make(0.1, dtype=torch.bfloat16)
    before = load_file(model / "model.safetensors")
    found = fold(model, tmp_path / "folded", "--data", rows, "--method", "average")
    assert {value.dtype for value in found.values()} == {torch.bfloat16}
    place = "encoder.layer.0.intermediate.dense"
    experts = [before[f"{place}.experts.{number}.weight"].float() for number in range(3)]
    torch.testing.assert_close(found[f"{place}.weight"].float(), sum(experts) / 3, rtol=2**-8, atol=1e-6)


def test_what_cannot_be_folded_is_refused(
    make: Make, rows: Path, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make(0.1)

    def refused(*words: object) -> str:
        assert main(["fold", *map(str, words), "--output_dir", str(tmp_path / "out")]) == 2
        return capsys.readouterr().err

    assert "has no experts" in refused(tiny_model_dir, "--data", rows)
    assert "has 3 experts, 0 to 2" in refused(model, "--data", rows, "--method", "expert:3")
    assert "average, load or expert:K" in refused(model, "--data", rows, "--method", "best")
    assert "give --data or --eval_data_dir" in refused(model)
    assert "no such file" in refused(model, "--data", tmp_path / "none.jsonl")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("")
    assert "holds 'mine'" in refused(model, "--data", rows)
