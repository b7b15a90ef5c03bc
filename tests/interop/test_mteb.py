"""mteb files the results of folders apart, and finds what steps 0 to 2 find."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from finetune.dev_data import by_the_steps, write_dev
from transformers import AutoTokenizer

mteb = pytest.importorskip("mteb")

from mteb.abstasks.retrieval import AbsTaskRetrieval  # noqa: E402
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData  # noqa: E402
from mteb.abstasks.task_metadata import TaskMetadata  # noqa: E402

from FlagEmbedding.collections.corpus import read_file  # noqa: E402
from FlagEmbedding.collections.source import Source  # noqa: E402
from FlagEmbedding.evaluation.mteb_model import mteb_model  # noqa: E402
from FlagEmbedding.modeling.backbone import load_backbone, save_checkpoint  # noqa: E402
from FlagEmbedding.utils.errors import UsageError  # noqa: E402


def local_task(source: Source) -> Any:
    """A retrieval task over a folder, without the hub."""
    from datasets import Dataset

    class LocalTask(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name="LocalRetrieval", type="Retrieval", description="A collection of one's own.", main_score="ndcg_at_10",
            dataset={"path": "local", "revision": "1"}, reference=None, category="t2t", modalities=["text"],
            eval_splits=["dev"], eval_langs=["eng-Latn"], date=None, domains=[], task_subtypes=[], license=None,
            annotations_creators=None, dialect=[], sample_creation=None, bibtex_citation="",
        )  # fmt: skip

        def load_data(self, *_: Any, **__: Any) -> None:
            passages = [p for path in source.corpus() for p in read_file(path)]
            qrels = source.qrels()
            topics = {qid: query for qid, query in source.topics().items() if qid in qrels}
            split = RetrievalSplitData(
                corpus=Dataset.from_list([{"id": p.docid, "title": "", "text": p.text} for p in passages]),
                queries=Dataset.from_list([{"id": qid, "text": query} for qid, query in topics.items()]),
                relevant_docs=qrels, top_ranked=None,
            )  # fmt: skip
            self.dataset = {"default": {"dev": split}}
            self.data_loaded = True

    return LocalTask()


def test_two_folders_are_two_models(
    tiny_model_dir: Path, tiny_moe_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MTEB_CACHE", str(tmp_path / "cache"))
    dense = tmp_path / "dense"  # as we save one: a bare folder is pooled by the mean elsewhere
    save_checkpoint(load_backbone(tiny_model_dir), dense, tokenizer=AutoTokenizer.from_pretrained(tiny_model_dir))
    data = write_dev(tmp_path / "data", "en", 30, queries=12)
    task, cache = local_task(Source("en", "dev", data)), mteb.ResultCache(tmp_path / "cache")
    scores = {}
    for folder in (dense, tiny_moe_dir):
        model = mteb_model(str(folder), device="cpu")
        assert model.mteb_model_meta.name == f"local/{folder.name}"
        (result,) = mteb.evaluate(model, task, cache=cache, show_progress_bar=False).task_results
        scores[folder.name] = result.get_score()
        steps = by_the_steps(folder, data, ["en"], tmp_path / "steps", ["ndcg@10"])
        assert scores[folder.name] == pytest.approx(steps["en"]["ndcg@10"], abs=1e-4)
    assert len(set(scores.values())) == 2, "the second is not given the first one's score"
    # Trained further under the same name it is another revision; one's own name is taken.
    changed = tmp_path / "tiny-xlmr"
    shutil.copytree(dense, changed)
    was = mteb_model(str(changed), device="cpu").mteb_model_meta
    (changed / "config.json").write_text((changed / "config.json").read_text() + "\n")
    now = mteb_model(str(changed), name="me/mine", device="cpu").mteb_model_meta
    assert now.name == "me/mine" and now.revision != was.revision
    with pytest.raises(UsageError, match="expected owner/name, such as local/tiny-xlmr"):
        mteb_model(str(changed), name="mine")
