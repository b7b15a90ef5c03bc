"""Training goes by what the base's folder says (pooling, Dense modules, prompts, tokenizer), and writes it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import build_tokenizer
from finetune.helpers import log_lines, rows, run_training, train_words, write_rows
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Qwen3Config, Qwen3Model, XLMRobertaConfig, XLMRobertaModel

from FlagEmbedding import FlagModel
from FlagEmbedding.finetune.arguments import DataArguments
from FlagEmbedding.finetune.data.collator import TrainCollator
from FlagEmbedding.finetune.data.dataset import TrainDataset
from FlagEmbedding.finetune.parsing import parse_arguments
from FlagEmbedding.finetune.resume.loss_window import LossWindow
from FlagEmbedding.finetune.runner import build_trainer

TEXTS = ["When do people visit the river of Seoul?", "The river of Seoul is number 3.", "한강"]
PREFIX = "sentence_transformers.models."


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", rows(16)).parent


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of Qwen3-Embedding's kind: causal, last token, a prompt for queries; bare of fine-tuning."""
    folder, tokenizer = tmp_path_factory.mktemp("causal") / "qwen", build_tokenizer()
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    torch.manual_seed(3)
    config = Qwen3Config(
        vocab_size=len(tokenizer), intermediate_size=48, head_dim=16, max_position_embeddings=120,
        initializer_range=0.2, pad_token_id=tokenizer.pad_token_id, **sizes,
    )  # fmt: skip
    Qwen3Model(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    say(folder, "lasttoken", prompts={"query": "find: ", "document": ""})
    return folder


def say(folder: Path, pooling: str, *, normalize: bool = True, dense: int = 0, prompts: dict | None = None) -> Path:
    """Write sentence-transformers' files into ``folder``, in its own hand."""
    places = [("", "Transformer"), ("1_Pooling", "Pooling")]
    places += [("2_Dense", "Dense")] * bool(dense) + [("3_Normalize", "Normalize")] * normalize
    modules = [{"idx": i, "name": str(i), "path": p, "type": PREFIX + kind} for i, (p, kind) in enumerate(places)]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    flags = {
        f"pooling_mode_{name}": name == pooling for name in ("cls_token", "mean_tokens", "lasttoken", "max_tokens")
    }
    (folder / "1_Pooling/config.json").write_text(json.dumps({"word_embedding_dimension": 32, **flags}))
    if dense:
        (folder / "2_Dense").mkdir(exist_ok=True)
        said = {
            "in_features": 32,
            "out_features": dense,
            "bias": True,
            "activation_function": "torch.nn.modules.activation.Tanh",
        }
        (folder / "2_Dense/config.json").write_text(json.dumps(said))
        torch.manual_seed(9)
        linear = torch.nn.Linear(32, dense)
        state = {f"linear.{name}": value.detach() for name, value in linear.named_parameters()}
        save_file(state, folder / "2_Dense/model.safetensors")
    if prompts is not None:
        (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": prompts}))
    return folder


def base_of(source: Path, folder: Path, pooling: str, **settings: Any) -> Path:
    shutil.copytree(source, folder)
    return say(folder, pooling, **settings)


def pooling_of(folder: Path) -> list[str]:
    said = json.loads((folder / "1_Pooling/config.json").read_text())
    return [key.removeprefix("pooling_mode_") for key, on in said.items() if key.startswith("pooling_mode_") and on]


def test_a_base_that_says_mean_stays_mean(tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    base = base_of(tiny_model_dir, tmp_path / "base", "mean_tokens")
    silent, given = tmp_path / "silent", tmp_path / "given"
    answer = run_training(train_words(base, data, silent))
    run_training(train_words(tiny_model_dir, data, given, sentence_pooling_method="mean"))
    losses = [[line["loss"] for line in log_lines(folder)] for folder in (silent, given)]
    assert losses[0] == losses[1]
    assert pooling_of(silent) == ["mean_tokens"]
    assert "pooling_method='mean'" in answer.stdout
    contrary = run_training(train_words(base, data, tmp_path / "cls", sentence_pooling_method="cls"))
    assert contrary.stderr.count("--sentence_pooling_method 'cls': ") == 1
    assert pooling_of(tmp_path / "cls") == ["cls_token"]


def test_a_base_without_normalization_trains_without(tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    base = base_of(tiny_model_dir, tmp_path / "base", "mean_tokens", normalize=False)
    answer = run_training(train_words(base, data, tmp_path / "out", learning_rate=1e-5))
    assert "does not normalize its vectors: the temperature is 1, as published" in answer.stderr
    assert len(json.loads((tmp_path / "out/modules.json").read_text())) == 2
    said = run_training(train_words(base, data, tmp_path / "told", normlized=True)).stderr
    assert "--normalize_embeddings True: " in said
    assert len(json.loads((tmp_path / "told/modules.json").read_text())) == 3


def test_dense_modules_are_computed_trained_and_saved(tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    base, output = base_of(tiny_model_dir, tmp_path / "base", "mean_tokens", dense=24), tmp_path / "out"
    run_training(train_words(base, data, output, save_strategy="steps", save_steps=2))
    before, after = (load_file(folder / "2_Dense/model.safetensors") for folder in (base, output))
    assert not torch.equal(before["linear.weight"], after["linear.weight"])
    model = FlagModel(str(output))
    found = model.encode(TEXTS)
    assert found.shape == (3, 24)
    encoder = XLMRobertaModel.from_pretrained(output, add_pooling_layer=False).eval()
    tokenizer = AutoTokenizer.from_pretrained(output)
    for text, vector in zip(TEXTS, found, strict=True):
        with torch.no_grad():
            pooled = encoder(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(dim=0)
            own = torch.tanh(after["linear.weight"] @ pooled + after["linear.bias"])
        np.testing.assert_allclose(vector, own / own.norm(), atol=1e-5)
    run_training(train_words(base, data, tmp_path / "again", max_steps=2, save_strategy="steps", save_steps=2))
    resumed = tmp_path / "resumed"
    shutil.copytree(output, resumed)
    shutil.rmtree(resumed / "checkpoint-4")
    run_training(train_words(base, data, resumed, save_strategy="steps", save_steps=2, resume_from_checkpoint=True))
    assert torch.equal(load_file(resumed / "2_Dense/model.safetensors")["linear.weight"], after["linear.weight"])


def test_a_causal_base_trains_by_its_last_token(causal: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    answer = run_training(train_words(causal, data, output, max_steps=12, temperature=0.1))
    lines = log_lines(output)
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert pooling_of(output) == ["lasttoken"]
    assert "query_instruction_for_retrieval='find: '" in answer.stdout
    model = FlagModel(str(output))
    assert model.pooling_method == "last_token"
    encoder, tokenizer = Qwen3Model.from_pretrained(output).eval(), AutoTokenizer.from_pretrained(output)
    for text, vector in zip(TEXTS, model.encode_queries(TEXTS), strict=True):
        with torch.no_grad():
            own = encoder(**tokenizer(f"find: {text}", return_tensors="pt")).last_hidden_state[0, -1]
        np.testing.assert_allclose(vector, own / own.norm(), atol=1e-5)


def test_cls_of_a_causal_base_is_refused(causal: Path, data: Path, tmp_path: Path) -> None:
    answer = run_training(train_words(causal, data, tmp_path / "out", sentence_pooling_method="cls"), check=False)
    assert answer.returncode == 2
    assert "Qwen3Model is causal" in answer.stderr
    assert "Traceback" not in answer.stderr


def test_instructions_stand_in_the_checkpoint_and_are_used(tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    output, words = (
        tmp_path / "out",
        {"query_instruction_for_retrieval": "Q: ", "passage_instruction_for_retrieval": "P: "},
    )
    answer = run_training(train_words(tiny_model_dir, data, output, **words))
    said = json.loads((output / "config_sentence_transformers.json").read_text())
    assert said["prompts"] == {"query": "Q: ", "document": "P: "}
    assert "query_instruction_for_retrieval='Q: ', passage_instruction_for_retrieval='P: '" in answer.stdout
    model, plain = FlagModel(str(output)), FlagModel(str(output), query_instruction_for_retrieval="")
    np.testing.assert_array_equal(model.encode_queries(TEXTS), model.encode([f"Q: {text}" for text in TEXTS]))
    np.testing.assert_array_equal(model.encode_corpus(TEXTS), model.encode([f"P: {text}" for text in TEXTS]))
    np.testing.assert_array_equal(plain.encode_queries(TEXTS), model.encode(TEXTS))
    # Training on goes by them, and an empty text switches one off.
    run_training(train_words(output, data, tmp_path / "on", passage_instruction_for_retrieval=""))
    said = json.loads((tmp_path / "on/config_sentence_transformers.json").read_text())
    assert said["prompts"] == {"query": "Q: ", "document": ""}
    arguments = json.loads((tmp_path / "on/training_args.json").read_text())
    assert arguments["data"]["query_instruction_for_retrieval"] == "Q: "
    # A checkpoint of a run without them, in the same folder, says nothing.
    run_training(train_words(tiny_model_dir, data, output))
    assert not (output / "config_sentence_transformers.json").exists()


@pytest.mark.parametrize("told", [True, False])
def test_the_queries_of_negatives_are_queries(told: bool, data: Path, tiny_model_dir: Path) -> None:
    options = DataArguments(
        train_data=[str(data)], train_group_size=3, query_instruction_for_retrieval="Q: ",
        passage_instruction_for_retrieval="P: ", neg_q_instruction=told,
    )  # fmt: skip
    drawn = TrainDataset(options)[0, 0]
    assert [query.startswith("Q: When") for queries in drawn.neg_q for query in queries] == [told, told]
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    batch = TrainCollator(tokenizer, options)([drawn])
    assert tokenizer.decode(batch["neg_q"].ids[: batch["neg_q"].lengths[0]]).startswith("<s> Q: When") == told


def test_lengths_are_cut_to_the_positions(tiny_model_dir: Path, tmp_path: Path) -> None:
    long = [{**row, "pos": [6 * row["pos"][0]]} for row in rows(16)]
    data, output = write_rows(tmp_path / "rows/long.jsonl", long).parent, tmp_path / "out"
    answer = run_training(train_words(tiny_model_dir, data, output, passage_max_len=512))
    assert answer.stderr.count(f"--passage_max_len 512: {tiny_model_dir} reads at most 128 tokens") == 1
    told = tmp_path / "told"
    assert "reads at most" not in run_training(train_words(tiny_model_dir, data, told, passage_max_len=128)).stderr
    assert [line["loss"] for line in log_lines(output)] == [line["loss"] for line in log_lines(told)]


def other_table(folder: Path, rows_of_it: int) -> None:
    config = XLMRobertaConfig.from_pretrained(folder)
    config.vocab_size = rows_of_it
    XLMRobertaModel(config, add_pooling_layer=False).save_pretrained(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: [path.unlink() for path in folder.glob("tokenizer*")], "holds no tokenizer"),
        (lambda folder: other_table(folder, 200), "the tokenizer has 400 pieces .* table 200 rows: their last ones"),
        (
            lambda folder: other_table(folder, 5000),
            "the tokenizer has 400 pieces .* table 5,000 rows: .* another model",
        ),
    ],
    ids=["none", "larger", "smaller"],
)
def test_a_tokenizer_that_is_not_the_models_is_refused(
    damage: Any, message: str, tiny_model_dir: Path, data: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_model_dir, base)
    damage(base)
    answer = run_training(train_words(base, data, tmp_path / "out"), check=False)
    assert answer.returncode == 2
    assert re.search(message, answer.stderr)
    with pytest.raises(Exception, match=message):
        FlagModel(str(base))


def test_a_loss_that_stays_at_ln_n_stops_the_run(tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    base = tmp_path / "collapsed"
    shutil.copytree(tiny_model_dir, base)
    state = load_file(base / "model.safetensors")
    state["encoder.layer.1.output.LayerNorm.weight"].zero_()  # every state becomes the bias
    state["encoder.layer.1.output.LayerNorm.bias"].fill_(0.3)
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    frozen = {"max_steps": 20, "learning_rate": 0.0, "sentence_pooling_method": "mean"}
    answer = run_training(train_words(base, data, tmp_path / "out", **frozen), check=False)
    assert answer.returncode == 2
    assert "the contrastive loss has been ln 6 for 10 steps" in answer.stderr
    assert "rows.jsonl:" in answer.stderr


def test_the_folders_prompts_stand_before_the_texts(causal: Path, data: Path, tmp_path: Path) -> None:
    trainer = build_trainer(parse_arguments(train_words(causal, data, tmp_path / "out")))
    batch = next(iter(trainer.get_train_dataloader()))
    for role, before in (("query", "find: "), ("neg_q", "find: "), ("passage", "")):
        tokens = batch[role]
        texts = [trainer.bare_model.tokenizer.decode(ids) for ids in tokens.ids.split(tokens.lengths)]
        assert [text.replace("<s>", "").strip().startswith("find: ") for text in texts] == [bool(before)] * len(texts)


def test_what_was_counted_goes_on_after_a_resume(tmp_path: Path) -> None:
    window = LossWindow()
    for flat in (True, True, False, True, True, True):
        window.saw(zero=False, flat=flat)
    window.save(tmp_path, {}, forwards=6)
    resumed = LossWindow()
    assert resumed.load(tmp_path, torch.device("cpu")) == {"forwards": 6}
    assert (resumed.flat_micro_batches, resumed.zero_micro_batches) == (3, 0)
