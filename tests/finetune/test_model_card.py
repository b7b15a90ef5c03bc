"""The model card: what the hub reads of it, code that gives the trained vectors, and cards that others wrote."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from finetune.dev_data import dev_lines, write_dev
from finetune.helpers import rows, run_training, train_words, write_rows
from hub_cache import keep
from huggingface_hub import ModelCard

from FlagEmbedding import FlagModel

OPTIONS: dict[str, Any] = {"max_steps": 2, "sentence_pooling_method": "mean", "query_instruction_for_retrieval": "q: "}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("secret_place") / "ko_rows.jsonl", rows(12))


@pytest.fixture(scope="module")
def base(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with a card of its own."""
    folder = shutil.copytree(tiny_model_dir, tmp_path_factory.mktemp("bases") / "base")
    text = "---\nlicense: apache-2.0\nlanguage: [ko, fa]\nbase_model: org/first\n---\n\nHow the base was made.\n"
    (folder / "README.md").write_text(text)
    return folder


def codes(card: str) -> dict[str, str]:
    """The Python blocks by the library before them."""
    return dict(re.findall(r"With ([^\n]+):\n\n```python\n(.*?)```", card, re.S))


def run_code(code: str, folder: Path, last: str) -> Any:
    """Execute a block of the card on one query and two passages: ``last``, evaluated after it."""
    code = code.replace(f"'{folder.name}'", repr(str(folder))).replace("['…', '…']", "['a lake', 'a river']")
    code = code.replace("['…']", "['a river']").replace("'…'", "'a river'")
    names: dict[str, Any] = {}
    exec(code, names)
    return eval(last, names)


@pytest.mark.parametrize(
    "options",
    [
        {"moe": "intermediate", "num_experts": 2, "passage_instruction_for_retrieval": "p: "},
        {"sentence_pooling_method": "cls", "unified_finetuning": True, "normlized": False},
    ],
)
def test_each_block_of_code_gives_the_trained_vectors(
    options: dict[str, Any], base: Path, data: Path, tmp_path: Path
) -> None:
    output = tmp_path / "my-model"
    words = train_words(base, data, output, **{**OPTIONS, **options})
    printed = run_training(words).stdout
    card = (output / "README.md").read_text()
    pooling, normalize = words[words.index("--sentence_pooling_method") + 1], "normlized" not in options
    plain = FlagModel(str(output), pooling_method=pooling, normalize_embeddings=normalize)
    before = options.get("passage_instruction_for_retrieval", "")
    query, passages = plain.encode(["q: a river"]), plain.encode([f"{before}a lake", f"{before}a river"])
    scores = query @ passages.T
    blocks = codes(card)
    flag, tail = blocks["FlagEmbedding"].rsplit("\n", 2)[0], "model.encode_queries(['a river'])"
    np.testing.assert_allclose(run_code(flag, output, tail), query, atol=1e-6)
    assert "model.encode_queries(['…']) @ model.encode_corpus(['…', '…']).T" in blocks["FlagEmbedding"]
    other = run_code(blocks["sentence-transformers"], output, "model.similarity(queries, documents)")
    np.testing.assert_allclose(other, scores, atol=1e-5)
    np.testing.assert_allclose(run_code(blocks["transformers"], output, "vectors"), query, atol=1e-5)
    if "unified_finetuning" in options:
        found = run_code(
            blocks["FlagEmbedding, dense, sparse and multi-vector"], output, "model.encode(['q: a river'])"
        )
        np.testing.assert_allclose(found["dense_vecs"], query, atol=1e-3)
    assert ("trust_remote_code=True" in blocks["transformers"]) == ("moe" in options) == ("read that file" in card)
    # One home: what is printed names the folder, the card what it is called.
    printed_code = [line.strip() for line in printed.split("Use it:\n")[1].splitlines()]
    assert blocks["FlagEmbedding"].replace(repr(output.name), repr(str(output))).splitlines() == printed_code[:3]


def test_the_front_matter(base: Path, data: Path, tmp_path: Path) -> None:
    dev = write_dev(tmp_path / "collection", "ko", 60)
    write_dev(dev, "fa", 40, seed=3)
    words = train_words(base, data, tmp_path / "my-model", **OPTIONS, eval_data_dir=dev, eval_steps=1, license="mit")
    run_training([*words, "--eval_languages", "ko", "fa", "--eval_metrics", "ndcg@10", "mrr@10"])
    card = ModelCard.load(tmp_path / "my-model/README.md")
    said = card.data.to_dict()
    assert said["language"] == ["ko", "fa"] and said["license"] == "mit" and said["base_model"] == "org/first"
    assert said["library_name"] == "sentence-transformers" and said["pipeline_tag"] == "sentence-similarity"
    assert "FlagEmbedding" in said["tags"] and "datasets" not in said
    last = dev_lines(tmp_path / "my-model")[-1]
    assert card.data.model_name == "my-model"
    found = {(r.dataset_config, r.metric_type): r.metric_value for r in card.data.eval_results}
    keys = {(lang, name): f"eval_{lang}_{name}@10" for lang in ("ko", "fa") for name in ("ndcg", "mrr")}
    assert found == {(lang, f"{name}_at_10"): round(last[key], 5) for (lang, name), key in keys.items()}
    assert {(r.dataset_name, r.dataset_split, r.metric_name) for r in card.data.eval_results} == {
        (f"collection {lang} dev", "dev", label) for lang in ("ko", "fa") for label in ("nDCG@10", "MRR@10")
    }
    text = card.text
    assert f"| {100 * last['eval_ko_ndcg@10']:.1f} |" in re.sub(" +", " ", text) and "Yu, Jeongsu" in text
    assert "2 steps" in text and "--max_steps 2" in text and "12 of ko_rows.jsonl" in text
    # No folder of this machine is published.
    assert not [part for part in ("secret_place", str(tmp_path), "/tmp/") if part in str(card)]


def test_the_licence_and_the_card_of_the_base(base: Path, tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    for name, model in (("with", base), ("without", tiny_model_dir)):
        run_training(train_words(model, data, tmp_path / name, **OPTIONS))
    said = ModelCard.load(tmp_path / "with/README.md").data
    assert said.license == "apache-2.0" and said.language == ["ko", "fa"] and said.eval_results is None
    assert (tmp_path / "with/README.base.md").read_bytes() == (base / "README.md").read_bytes()
    assert "How the base was made." in (base / "README.md").read_text()
    hub = keep(tmp_path / "hub", "org/tiny", base)
    run_training(train_words(Path("org/tiny"), data, tmp_path / "hubs", **OPTIONS, cache_dir=hub))
    said = ModelCard.load(tmp_path / "hubs/README.md").data
    assert said.base_model == "org/tiny" and said.license == "apache-2.0"
    assert not (tmp_path / "hubs/README.base.md").exists()  # everybody finds it there
    plain = ModelCard.load(tmp_path / "without/README.md").data.to_dict()
    assert not {"license", "language", "base_model", "model-index", "model_name"} & set(plain)
    assert not (tmp_path / "without/README.base.md").exists()


@pytest.mark.parametrize("text", ["---\nlicense: [a\n---\nx", "---\n- a\n---\nx", "---\nlicense:\n---"])
def test_a_base_whose_card_says_nothing(text: str, tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model_dir, tmp_path / "base")
    (folder / "README.md").write_text(text)
    run_training(train_words(folder, data, tmp_path / "out", **OPTIONS))
    assert "license" not in ModelCard.load(tmp_path / "out/README.md").data.to_dict()


def test_a_card_that_somebody_wrote_or_changed_stays(tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "README.md").write_text("mine\n")
    words = train_words(tiny_model_dir, data, output, **OPTIONS)
    answer = run_training(words)
    assert (output / "README.md").read_text() == "mine\n" and "it stays, the model card is" in answer.stderr
    assert "# out" in (output / "MODEL_CARD.md").read_text()
    (output / "README.md").unlink()
    run_training(words)
    first = (output / "README.md").read_text()
    answer = run_training([*words, "--license", "mit"])  # ours, as it was: written again
    second = (output / "README.md").read_text()
    assert "license: mit" in second and first != second and "it stays" not in answer.stderr
    changed = second.replace("# out", "# My model")
    (output / "README.md").write_text(changed)
    run_training(words)
    assert (output / "README.md").read_text() == changed


def test_it_can_be_left_out_and_texts_cannot_act(tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    words = train_words(tiny_model_dir, data, tmp_path / "none", **OPTIONS, model_card=False)
    run_training(words)
    assert not (tmp_path / "none/README.md").exists()
    answer = run_training([*words, "--license", "mit"], check=False)
    assert answer.returncode == 2 and "--license has no effect without --model_card" in answer.stderr
    text = "`</code>\n---\nlicense: x\n<script>alert(1)</script>"
    hostile = {**OPTIONS, "query_max_len": 99, "query_instruction_for_retrieval": text}
    run_training(train_words(tiny_model_dir, data, tmp_path / "a <b> [c](d)", **hostile))
    card = ModelCard.load(tmp_path / "a <b> [c](d)/README.md")
    assert "license" not in card.data.to_dict() and "# a &lt;b> [c\\](d)" in card.text
