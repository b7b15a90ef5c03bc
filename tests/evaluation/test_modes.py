"""Steps 0 to 2 by every mode: runs against upstream's pair scores in float64, what is refused, tables of modes."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import STEPS, run_together
from options_walk import Case, assert_acts, assert_complete

from FlagEmbedding import BGEM3FlagModel
from FlagEmbedding.evaluation.__main__ import embed, score, search
from FlagEmbedding.indexing.arguments import ModeArguments, StoreArguments
from FlagEmbedding.retrieval.ragged import RaggedTable
from tests.evaluation.conftest import QUERIES, make_passages, write_collection

MODES = "dense sparse colbert bm25 dense+sparse all dense+sparse-rrf dense+bm25-rrf all-tuned"


@pytest.fixture(scope="module")
def place(tiny_heads_dir: Path, tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with heads and one without, two languages with judged train and dev queries, all folders and runs."""
    folder = tmp_path_factory.mktemp("modes")
    shutil.copytree(tiny_heads_dir, folder / "m3")
    shutil.copytree(tiny_model_dir, folder / "plain")
    for seed, lang in enumerate(("ko", "fa")):
        passages = make_passages(40, seed)
        write_collection(folder / "data", lang, passages, QUERIES)
        root = folder / f"data/miracl-v1.0-{lang}"
        train = {f"t{i}": f"{row['text'].split()[0]} {row['text'].split()[-1]}" for i, row in enumerate(passages[:9])}
        lines = "".join(f"{qid}\t{query}\n" for qid, query in train.items())
        (root / f"topics/topics.miracl-v1.0-{lang}-train.tsv").write_text(lines)
        (root / "qrels").mkdir()
        for split, qids in (("dev", QUERIES), ("train", train)):
            judged = "".join(f"{qid}\tQ0\t{passages[i]['docid']}\t1\n" for i, qid in enumerate(qids))
            (root / f"qrels/qrels.miracl-v1.0-{lang}-{split}.tsv").write_text(judged)
    assert step(embed, folder, "--modes all bm25 --colbert_type fp32 --shard_size 16") == 0
    assert step(search, folder, f"--modes {MODES} --hits 12 --rerank 12") == 0
    return folder


def step(command: object, folder: Path, words: str, languages: str = "ko fa", encoder: str = "m3") -> int:
    given = ["--encoder", str(folder / encoder), "--languages", *languages.split(), "--data_dir", str(folder / "data")]
    places = {"--index_save_dir": "index", "--result_save_dir": "runs"}
    if command is embed:
        places.pop("--result_save_dir")
    for flag, name in places.items():
        given += [flag, str(folder / name)] if flag not in words else []
    words = words.replace("{}", str(folder))
    return command([*given, *words.split()])  # type: ignore[operator]


def read(path: Path) -> dict[str, dict[str, float]]:
    run: dict[str, dict[str, float]] = {}
    for line in path.read_text().splitlines():
        qid, _, docid, _, value, _ = line.split()
        run.setdefault(qid, {})[docid] = float(value)
    return run


@pytest.fixture(scope="module")
def pairs(place: Path) -> dict[str, np.ndarray]:
    """Every pair of a query and a passage of ko by tensors in float64: ``{part: [queries, passages]}``."""
    model = BGEM3FlagModel(str(place / "m3"))
    texts = [row["text"] for row in make_passages(40, 0)]
    sides = [model.encode(each, return_sparse=True, return_colbert_vecs=True) for each in ([*QUERIES.values()], texts)]
    dense = [torch.from_numpy(side["dense_vecs"]).double() for side in sides]
    sparse = [torch.zeros(len(side["dense_vecs"]), 500, dtype=torch.float64) for side in sides]
    for matrix, side in zip(sparse, sides, strict=True):
        for row, weights in enumerate(side["lexical_weights"]):
            matrix[row, [int(token) for token in weights]] = torch.tensor([*weights.values()], dtype=torch.float64)
    late = torch.stack([
        torch.stack([
            (torch.from_numpy(q).double() @ torch.from_numpy(p).double().T).amax(dim=1).mean()
            for p in sides[1]["colbert_vecs"]
        ])
        for q in sides[0]["colbert_vecs"]
    ])  # fmt: skip
    products = {"dense": dense[0] @ dense[1].T, "sparse": sparse[0] @ sparse[1].T, "colbert": late}
    return {part: value.numpy() for part, value in products.items()}


WEIGHTS = {"dense": 1.0, "sparse": 0.3, "colbert": 1.0}


@pytest.mark.parametrize("mode", ["dense", "sparse", "colbert", "dense+sparse", "dense+sparse+colbert"])
def test_runs_have_the_scores_of_compute_score(mode: str, place: Path, pairs: dict[str, np.ndarray]) -> None:
    parts = mode.split("+")
    whole = sum(WEIGHTS[part] * pairs[part] for part in parts) / sum(WEIGHTS[part] for part in parts)
    docids = [row["docid"] for row in make_passages(40, 0)]
    first = {part: np.argsort(-pairs[part], axis=1)[:, :12] for part in ("dense", "sparse")}
    run = read(place / "runs/m3" / ("ko.txt" if mode == "dense" else f"{mode}/ko.txt"))
    assert list(run) == list(QUERIES)
    for row, hits in enumerate(run.values()):
        searched = [part for part in parts if part != "colbert"] or ["dense"]
        rows = {int(i) for part in searched for i in first[part][row] if part == "dense" or pairs[part][row, i] > 0}
        expected = sorted(((whole[row, i], docids[i]) for i in rows), reverse=True)[:12]
        assert [*hits.values()] == pytest.approx([value for value, _ in expected], abs=2e-6)
        near = {docid: value for value, docid in expected}
        assert all(value == pytest.approx(near.get(docid, expected[-1][0]), abs=2e-6) for docid, value in hits.items())


def test_pairs_agree_with_the_public_class(place: Path) -> None:
    texts = {row["docid"]: row["text"] for row in make_passages(40, 0)}
    run = read(place / "runs/m3/dense+sparse+colbert/ko.txt")
    wanted = [(QUERIES[qid], texts[docid]) for qid, hits in run.items() for docid in [*hits][:4]]
    scores = BGEM3FlagModel(str(place / "m3")).compute_score(wanted, weights_for_different_modes=[1, 0.3, 1])
    own = [value for hits in run.values() for value in [*hits.values()][:4]]
    assert own == pytest.approx(scores["colbert+sparse+dense"], abs=2e-6)


def test_reciprocal_ranks_and_bm25(place: Path) -> None:
    dense, bm25 = (read(place / f"runs/m3/{name}ko.txt") for name in ("", "bm25/"))
    joined = read(place / "runs/m3/dense+bm25-rrf/ko.txt")
    for qid, hits in joined.items():
        ranks = [{docid: place for place, docid in enumerate(run.get(qid, {}), 1)} for run in (dense, bm25)]
        every = {docid for own in ranks for docid in own}
        sums = {d: sum(61 / (60 + own[d]) for own in ranks if d in own) / 2 for d in every}
        expected = sorted(((round(value, 6), docid) for docid, value in sums.items()), reverse=True)[:12]
        assert [*hits.items()] == [(docid, pytest.approx(value, abs=1e-6)) for value, docid in expected]


def test_tuned_weights_come_from_train_queries_and_stand_in_the_record(place: Path) -> None:
    record = json.loads((place / "runs/m3/dense+sparse+colbert-tuned/ko.json").read_text())
    tuned = record["mode"]["tuned"]
    assert record["mode"]["name"] == "dense+sparse+colbert-tuned"
    texts = {f"{row['text'].split()[0]} {row['text'].split()[-1]}" for row in make_passages(40, 0)[:9]}
    assert texts & {*QUERIES.values()}  # queries that are evaluated take no part
    assert tuned["queries"] == len(texts - {*QUERIES.values()}) and 0 < tuned["ndcg"] <= 1
    assert sum(tuned["weights"].values()) == pytest.approx(1) and min(tuned["weights"].values()) >= 0


def test_colbert_vectors_need_not_be_stored(place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    index = tmp_path / "index/m3/ko"
    shutil.copytree(place / "index/m3/ko", index)
    shutil.rmtree(index / "colbert")
    words = f"--index_save_dir {tmp_path}/index --result_save_dir {tmp_path}/runs --hits 12 --rerank 12 --modes"
    with caplog.at_level(logging.INFO):
        assert step(search, place, f"{words} colbert all", "ko") == 0
    assert "no stored colbert vectors" in caplog.text
    for mode in ("colbert", "dense+sparse+colbert"):
        stored, computed = read(place / f"runs/m3/{mode}/ko.txt"), read(tmp_path / f"runs/m3/{mode}/ko.txt")
        for qid, hits in stored.items():
            assert computed[qid] == {docid: pytest.approx(value, abs=2e-6) for docid, value in hits.items()}
    assert step(search, place, f"{words[:-20]} --rerank 0 --modes colbert", "ko") == 2  # every passage: must be stored


def test_exact_maxsim_is_the_reranking_of_everything(place: Path, tmp_path: Path) -> None:
    for folder, more in (("exact", "--rerank 0"), ("all", "--rerank 40")):
        assert step(search, place, f"--result_save_dir {tmp_path}/{folder} --hits 9 {more} --modes colbert", "ko") == 0
    runs = [(tmp_path / f"{name}/m3/colbert/ko.txt").read_text() for name in ("exact", "all")]
    assert runs[0] == runs[1] and len(runs[0].splitlines()) == 9 * len(QUERIES)


def test_dense_files_are_those_without_other_modes(place: Path, tmp_path: Path) -> None:
    assert step(embed, place, f"--index_save_dir {tmp_path}/index --shard_size 16", "ko") == 0
    for name in ("index", "docid"):
        assert (tmp_path / f"index/m3/ko/{name}").read_bytes() == (place / f"index/m3/ko/{name}").read_bytes()
    words = f"--index_save_dir {tmp_path}/index --result_save_dir {tmp_path}/runs --hits 12"
    assert step(search, place, words, "ko") == 0
    assert (tmp_path / "runs/m3/ko.txt").read_bytes() == (place / "runs/m3/ko.txt").read_bytes()
    assert (
        RaggedTable(place / "index/m3/ko/sparse").docids.sha256 == RaggedTable(place / "index/m3/ko/bm25").docids.sha256
    )


def test_the_table_of_modes_tests_each_against_the_first(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--encoder", str(place / "m3"), "--languages", "ko", "fa", "--search_result_save_dir", str(place / "runs")]
    given += ["--qrels_dir", str(place / "data"), "--metrics", "ndcg@10", "recall@5", "--resamples", "200"]
    assert score([*given, "--eval_result_save_dir", str(tmp_path / "one")]) == 0
    dense = json.loads((tmp_path / "one/m3.json").read_text())["results"]
    capsys.readouterr()
    assert score([*given, "--eval_result_save_dir", str(tmp_path), "--modes", "dense", "sparse", "all", "bm25"]) == 0
    printed = capsys.readouterr().out
    lines = [
        [cell.strip().rstrip("*") for cell in line.split("|")[1:-1]] for line in printed.splitlines() if "|" in line
    ]
    assert lines[0][:4] == ["nDCG@10", "ko", "fa", "average"]
    assert [line[0] for line in lines[2:6]] == ["dense", "sparse", "dense+sparse+colbert", "bm25"]
    results = json.loads((tmp_path / "m3/modes.json").read_text())
    assert results["results"]["dense"] == dense and json.loads((tmp_path / "m3.json").read_text())["results"] == dense
    for line in lines[2:6]:
        own = results["results"][line[0]]
        assert line[1:4] == [f"{100 * own[lang]['ndcg@10']:.1f}" for lang in ("ko", "fa", "average")]
    tests = {(t["system"], t["language"]): t for t in results["tests"] if t["measure"] == "ndcg@10"}
    assert set(tests) == {(f"m3/{m}", lang) for m in ("sparse", "dense+sparse+colbert", "bm25")
                          for lang in ("ko", "fa", "average")}  # fmt: skip
    sparse = results["results"]["sparse"]["ko"]["ndcg@10"]
    assert tests["m3/sparse", "ko"]["difference"] == pytest.approx(sparse - dense["ko"]["ndcg@10"])
    assert json.loads((tmp_path / "m3/sparse.json").read_text())["results"]["ko"]["ndcg@10"] == sparse
    assert score([*given, "--eval_result_save_dir", str(tmp_path), "--modes", "dense", "bm25", "--compare"]) == 0
    assert (tmp_path / "m3_vs_m3_bm25/comparison.md").is_file()
    assert score([*given, "--eval_result_save_dir", str(tmp_path), "--modes", "sparse+colbert"]) == 2
    assert "--modes sparse+colbert with this encoder" in capsys.readouterr().err


STORE_CASES = {"modes": Case("--modes sparse"), "colbert_type": Case("--colbert_type int8", given="--modes colbert")}
MODE_CASES = {
    "modes": Case("--modes sparse"),
    "fusion_weights": Case("--fusion_weights 1 5 1", given="--modes dense+sparse"),
    "rrf_k": Case("--rrf_k 1", given="--modes dense+sparse-rrf"),
    "rerank": Case("--rerank 3", given="--modes colbert"),
    "rerank_from": Case("--rerank_from bm25", given="--modes colbert --rerank 5"),
    "tune_queries": Case("--tune_queries 2", given="--modes dense+sparse-tuned"),
}


@pytest.mark.parametrize("name", STORE_CASES)
def test_every_option_of_storing_acts(name: str, place: Path, tmp_path: Path) -> None:
    def observe(words: list[str]) -> dict[str, object]:
        out = tmp_path / f"{len([*tmp_path.iterdir()])}"
        assert step(embed, place, f"--index_save_dir {out} {' '.join(words)}", "ko") == 0
        return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.name == "vectors" or p.is_dir()
                if p.is_file()} | {"names": sorted(p.name for p in out.rglob("*"))}  # fmt: skip

    names = {"modes": "names", "colbert_type": "m3/ko/colbert/vectors"}

    def seen(words: list[str]) -> dict[str, object]:
        return {"seen": observe(words)[names[name]]}

    assert_complete((StoreArguments,), STORE_CASES, {})
    assert_acts(STORE_CASES[name], seen)


@pytest.mark.parametrize("name", MODE_CASES)
def test_every_option_of_searching_acts(name: str, place: Path, tmp_path: Path) -> None:
    def observe(words: list[str]) -> dict[str, object]:
        out = tmp_path / f"{len([*tmp_path.iterdir()])}"
        assert step(search, place, f"--result_save_dir {out} --hits 6 {' '.join(words)}", "ko") == 0
        found = {str(p.relative_to(out)): p.read_text() for p in out.rglob("*.txt")}
        tuned = [json.loads(p.read_text()).get("mode") for p in out.rglob("*.json")]
        return {"found": [found, tuned]}

    assert_complete((ModeArguments,), MODE_CASES, {})
    assert_acts(MODE_CASES[name], observe)


REFUSED = {
    "--modes sparse": (search, "no sparse_linear.pt", "plain"),
    "--modes dense colbert": (embed, "no colbert_linear.pt", "plain"),
    "--colbert_type int8": (embed, "no effect without colbert", "m3"),
    "--modes dance": (search, "expected dense, sparse, colbert, bm25", "m3"),
    "--modes sparse-rrf": (search, "joins several modes", "m3"),
    "--modes dense+bm25": (search, "no published weight", "m3"),
    "--modes sparse --index_type HNSW32": (search, "--index_type is of the dense index", "m3"),
    "--modes sparse --rerank 10": (search, "--rerank has no effect without colbert", "m3"),
    "--modes dense --fusion_weights 1 1 1": (search, "--fusion_weights has no effect", "m3"),
    "--modes dense+sparse --fusion_weights 0 0 1": (search, "are all 0", "m3"),
    "--modes dense+sparse --rrf_k 10": (search, "--rrf_k has no effect", "m3"),
    "--modes dense+sparse-tuned --split train": (search, "proves nothing", "m3"),
    "--modes all --rerank_from sparse": (search, "--rerank_from has no effect", "m3"),
    "--modes colbert --rerank_from colbert": (search, "--rerank_from colbert: give dense, sparse or bm25", "m3"),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_has_no_effect_or_no_head_is_refused_before_anything_is_loaded(
    words: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command, said, encoder = REFUSED[words]
    monkeypatch.setattr("FlagEmbedding.inference.text_encoder.load_backbone", lambda *_, **__: pytest.fail("loaded"))
    assert step(command, place, words, "ko", encoder) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_two_processes_write_the_same_bytes(place: Path, tmp_path: Path) -> None:
    words = ["--encoder", place / "m3", "--languages", "ko", "--data_dir", place / "data", "--index_save_dir", tmp_path]
    words += ["--modes", "all", "bm25", "--colbert_type", "fp32", "--shard_size", "16"]
    answer = run_together(STEPS[0], words, {**os.environ, "OMP_NUM_THREADS": "1"})
    assert answer.returncode == 0, answer.stderr[-2000:]
    alone, shared = place / "index/m3/ko", tmp_path / "m3/ko"
    written = sorted(path.relative_to(alone) for path in alone.rglob("*") if path.is_file())
    assert written == sorted(path.relative_to(shared) for path in shared.rglob("*") if path.is_file())
    assert len(written) > 12
    for path in written:
        if path.name != "manifest.json":  # says when and by how many it was made
            assert (alone / path).read_bytes() == (shared / path).read_bytes(), path
