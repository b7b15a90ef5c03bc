"""Step 0: right vectors in the right order, resumable to the byte, and one clear line for everything wrong."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from transformers import AutoModel

from FlagEmbedding.evaluation.__main__ import generate_embedding
from FlagEmbedding.evaluation.arguments import EmbedOptions
from FlagEmbedding.retrieval.index import FlatIndex
from FlagEmbedding.utils.cli import parse_whole
from FlagEmbedding.utils.errors import DataError, UsageError

PUBLISHED = (
    "--encoder CreaLabs/bge-m3-fa-CLPL-outputMoE --languages ko --index_save_dir ./corpus-index --max_passage_length "
    "8192 --batch_size 4 --fp16 --pooling_method cls --normalize_embeddings True --moe intermediate"
)


def passages_of(collection: Path, lang: str) -> list[dict[str, str]]:
    rows = []
    for path in sorted((collection / f"miracl-corpus-v1.0-{lang}").iterdir()):
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            rows += [json.loads(line) for line in lines]
    return rows


def step0(model: Path, collection: Path, out: Path, *more: str, languages: tuple[str, ...] = ("ko",)) -> Path:
    argv = ["--encoder", str(model), "--languages", *languages, "--data_dir", str(collection)]
    assert generate_embedding([*argv, "--index_save_dir", str(out), *more]) == 0
    return out / model.name / languages[0]


@pytest.mark.parametrize("engine", ["packed", "padded"])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_vectors_are_those_of_one_text_at_a_time(
    tiny_model_dir: Path,
    collection: Path,
    tmp_path: Path,
    reference_vectors: Callable[..., np.ndarray],
    engine: str,
    pooling: str,
) -> None:
    folder = step0(
        tiny_model_dir, collection, tmp_path, "--pooling_method", pooling, "--engine", engine,
        "--max_passage_length", "64", "--batch_size", "3", "--shard_size", "16",
    )  # fmt: skip
    rows = passages_of(collection, "ko")
    index = faiss.read_index(str(folder / "index"))
    found = index.reconstruct_n(0, index.ntotal)
    expected = reference_vectors(tiny_model_dir, [row["text"] for row in rows], 64, pooling)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert (folder / "docid").read_text().split() == [row["docid"] for row in rows]
    assert not (folder / "shards").exists()


def test_titles_and_instruction_go_before_the_text(
    tiny_model_dir: Path, collection: Path, tmp_path: Path, reference_vectors: Callable[..., np.ndarray]
) -> None:
    folder = step0(
        tiny_model_dir, collection, tmp_path, "--with_title", "--passage_instruction_for_retrieval", "passage: "
    )
    texts = [f"passage: {row['title']} {row['text']}" for row in passages_of(collection, "ko")]
    np.testing.assert_allclose(
        FlatIndex(folder).read_rows(range(50)), reference_vectors(tiny_model_dir, texts), atol=1e-5
    )
    identity = json.loads((folder / "manifest.json").read_text())["identity"]
    assert identity["with_title"] is True
    assert identity["passage_instruction"] == "passage: "


def test_unnormalized_and_bf16_vectors(
    tiny_model_dir: Path, collection: Path, tmp_path: Path, reference_vectors: Callable[..., np.ndarray]
) -> None:
    folder = step0(tiny_model_dir, collection, tmp_path, "--normalize_embeddings", "False", languages=("fa",))
    raw = FlatIndex(folder).read_rows(range(20))
    norms = np.linalg.norm(raw, axis=1, keepdims=True)
    assert np.abs(norms - 1).max() > 0.1
    expected = reference_vectors(tiny_model_dir, [row["text"] for row in passages_of(collection, "fa")])
    np.testing.assert_allclose(raw / norms, expected, atol=1e-5)
    folder = step0(tiny_model_dir, collection, tmp_path / "half", "--dtype", "bf16", languages=("fa",))
    half = FlatIndex(folder).read_rows(range(20))
    assert 1e-4 < np.abs(half - expected).max() < 0.1
    assert json.loads((folder / "manifest.json").read_text())["identity"]["dtype"] == "bf16"


def test_experts_come_from_the_checkpoint_and_contradictions_are_refused(
    tiny_model_dir: Path, tiny_moe_dir: Path, collection: Path, tmp_path: Path
) -> None:
    plain = step0(tiny_moe_dir, collection, tmp_path / "plain", languages=("fa",))
    told = step0(tiny_moe_dir, collection, tmp_path / "told", "--moe", "intermediate", languages=("fa",))
    assert (plain / "index").read_bytes() == (told / "index").read_bytes()
    with pytest.raises(UsageError, match=r"--moe output: .* is a mixture of experts in 'intermediate'"):
        step0(tiny_moe_dir, collection, tmp_path, "--moe", "output")
    with pytest.raises(UsageError, match=r"--moe intermediate: .* is a dense model"):
        step0(tiny_model_dir, collection, tmp_path, "--moe", "intermediate")
    with pytest.raises(UsageError, match="--moe"):
        step0(tiny_model_dir, collection, tmp_path, "--moe", "foo")


def test_what_is_there_is_kept_unless_told_otherwise(tiny_model_dir: Path, collection: Path, tmp_path: Path) -> None:
    folder = step0(tiny_model_dir, collection, tmp_path)
    before = (folder / "index").stat().st_mtime_ns
    step0(tiny_model_dir, collection, tmp_path)
    assert (folder / "index").stat().st_mtime_ns == before
    step0(tiny_model_dir, collection, tmp_path, "--overwrite", "True")
    assert (folder / "index").stat().st_mtime_ns != before


def test_an_index_of_other_arguments_is_refused_by_name(
    tiny_model_dir: Path, tiny_moe_dir: Path, collection: Path, tmp_path: Path
) -> None:
    folder = step0(tiny_model_dir, collection, tmp_path)
    with pytest.raises(UsageError, match=r"max_passage_length: 128 there, 32 here; pooling: cls there, mean here"):
        step0(tiny_model_dir, collection, tmp_path, "--max_passage_length", "32", "--pooling_method", "mean")
    shutil.copytree(tiny_moe_dir, retrained := tmp_path / "retrained" / tiny_model_dir.name)
    with pytest.raises(UsageError, match="model: "):
        step0(retrained, collection, tmp_path)
    shutil.copytree(collection, changed := tmp_path / "changed")
    with gzip.open(changed / "miracl-corpus-v1.0-ko" / "docs-1.jsonl.gz", "at") as out:
        out.write(json.dumps({"docid": "new#0", "title": "", "text": "one more"}) + "\n")
    with pytest.raises(UsageError, match="corpus: "):
        step0(tiny_model_dir, changed, tmp_path)
    step0(tiny_model_dir, changed, tmp_path, "--overwrite", "True")
    assert FlatIndex(folder).rows == 51


def test_an_index_of_another_program_is_left_alone(tiny_model_dir: Path, collection: Path, tmp_path: Path) -> None:
    folder = step0(tiny_model_dir, collection, tmp_path)
    (folder / "manifest.json").unlink()
    before = (folder / "index").stat().st_mtime_ns
    step0(tiny_model_dir, collection, tmp_path, "--pooling_method", "mean")
    assert (folder / "index").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"docid": "0#0"}, "docid '0#0' was there before"),
        ({"text": " "}, "has no text"),
        ({"text": 3}, "expected a string as 'text'"),
    ],
)
def test_a_broken_corpus_is_refused_before_anything_is_written(
    tiny_model_dir: Path, collection: Path, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    shutil.copytree(collection, broken := tmp_path / "broken")
    with gzip.open(broken / "miracl-corpus-v1.0-ko" / "docs-1.jsonl.gz", "at") as out:
        out.write(json.dumps({"docid": "x", "title": "", "text": "y", **change}) + "\n")
    with pytest.raises(DataError, match=message):
        step0(tiny_model_dir, broken, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.*"))


def test_an_empty_passage_may_be_allowed(tiny_model_dir: Path, collection: Path, tmp_path: Path) -> None:
    shutil.copytree(collection, some := tmp_path / "some")
    with gzip.open(some / "miracl-corpus-v1.0-ko" / "docs-1.jsonl.gz", "at") as out:
        out.write(json.dumps({"docid": "x", "title": "", "text": ""}) + "\n")
    assert FlatIndex(step0(tiny_model_dir, some, tmp_path / "out", "--allow_empty", "True")).rows == 51


def test_a_model_that_overflows_is_named(tiny_model_dir: Path, collection: Path, tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(tiny_model_dir)
    with torch.no_grad():
        model.encoder.layer[0].output.dense.bias.fill_(float("inf"))
    shutil.copytree(tiny_model_dir, folder := tmp_path / "broken")
    model.save_pretrained(folder)
    with pytest.raises(DataError, match=r"vector of passage .* is not finite"):
        step0(folder, collection, tmp_path / "out")


def test_checkpoints_are_named_after_their_run(tiny_model_dir: Path, collection: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model_dir, checkpoint := tmp_path / "run7" / "checkpoint-40")
    step0(checkpoint, collection, tmp_path / "out", languages=("fa", "hi"))
    assert (tmp_path / "out" / "run7_checkpoint-40" / "fa" / "index").exists()
    assert (tmp_path / "out" / "run7_checkpoint-40" / "hi" / "docid").exists()


def test_a_length_beyond_the_model_is_cut_with_a_word(
    tiny_model_dir: Path, collection: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = step0(tiny_model_dir, collection, tmp_path, "--max_passage_length", "8192", languages=("fa",))
    assert "reads at most 128 tokens" in caplog.text
    assert json.loads((folder / "manifest.json").read_text())["identity"]["max_passage_length"] == 128


@pytest.mark.parametrize("fp16", ["--fp16", "--fp16 y", "--fp16 True"])
def test_the_published_command_parses(fp16: str) -> None:
    found = parse_whole(EmbedOptions, PUBLISHED.replace("--fp16", fp16).split(), "")
    assert found.encoder.fp16 is True
    assert (found.encoder.batch_size, found.index.max_passage_length, found.encoder.moe) == (4, 8192, "intermediate")
    assert (found.encoder.pooling_method, found.encoder.normalize_embeddings) == ("cls", True)
    assert found.index.overwrite is False
    assert parse_whole(EmbedOptions, [*PUBLISHED.split(), "--overwrite", "True"], "").index.overwrite is True


def test_published_defaults() -> None:
    found = parse_whole(EmbedOptions, ["--encoder", "m", "--languages", "ko"], "")
    assert (found.index.max_passage_length, found.encoder.batch_size) == (512, 256)
    assert found.collection.index_save_dir == "./corpus-index"
    assert found.encoder.fp16 is False
    assert found.encoder.dtype is None


def test_fp16_on_a_processor_goes_on_with_a_word(
    tiny_model_dir: Path, collection: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU computes fp16 as asked")
    step0(tiny_model_dir, collection, tmp_path, "--fp16", languages=("fa",))
    assert "--fp16: this processor has no fast fp16" in caplog.text
    with pytest.raises(UsageError, match="--fp16 and --dtype"):
        step0(tiny_model_dir, collection, tmp_path, "--fp16", "--dtype", "bf16")
