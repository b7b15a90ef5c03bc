"""Files of MIRACL in the hub's layout: found, read, and refused with file and line."""

from __future__ import annotations

from pathlib import Path

import pytest

from FlagEmbedding.collections import miracl
from FlagEmbedding.collections.trec import read_topics
from FlagEmbedding.utils.errors import DataError, UsageError


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")


def test_the_eighteen_languages() -> None:
    assert len(miracl.LANGUAGES) == 18
    assert miracl.check_languages(["ko", "fa", "ko"]) == ["ko", "fa"]
    with pytest.raises(UsageError, match="--languages it: not in MIRACL"):
        miracl.check_languages(["ko", "it"])


def test_corpus_files_come_in_number_order(tmp_path: Path) -> None:
    touch(tmp_path, *(f"miracl-corpus-v1.0-ko/docs-{i}.jsonl.gz" for i in range(12)))
    names = [path.name for path in miracl.corpus_files("ko", tmp_path)]
    assert names == [f"docs-{i}.jsonl.gz" for i in range(12)]


def test_a_hole_in_the_corpus_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, *(f"miracl-corpus-v1.0-ko/docs-{i}.jsonl.gz" for i in (0, 2)))
    with pytest.raises(DataError, match="docs-1 is missing"):
        miracl.corpus_files("ko", tmp_path)
    touch(tmp_path, "miracl-corpus-v1.0-fa/docs-0.jsonl.gz", "miracl-corpus-v1.0-fa/docs-0.jsonl")
    with pytest.raises(DataError, match="docs-0 is there twice"):
        miracl.corpus_files("fa", tmp_path)


def test_clones_of_the_hub_are_found_too(tmp_path: Path) -> None:
    touch(tmp_path, "miracl/miracl-corpus/miracl-corpus-v1.0-sw/docs-0.jsonl.gz")
    touch(tmp_path, "miracl/miracl-v1.0-sw/qrels/qrels.miracl-v1.0-sw-dev.tsv")
    assert miracl.corpus_files("sw", tmp_path)[0].is_file()
    assert miracl.qrels_file("sw", "dev", tmp_path).is_file()


def test_what_is_neither_on_disk_nor_on_the_hub_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        miracl.corpus_files("ko", tmp_path / "nowhere")
    for lookup in (miracl.corpus_files, miracl.topics_file):
        with pytest.raises(DataError, match=r"not in --data_dir .* not from hub dataset miracl/miracl") as caught:
            lookup("ko", data_dir=tmp_path, cache_dir=str(tmp_path / "cache"))
        assert "\n" not in str(caught.value)


def test_topics_of_the_sample(sample_dir: Path) -> None:
    for lang in ("ko", "fa", "hi"):
        topics = read_topics(miracl.topics_file(lang, "dev", sample_dir))
        assert len(topics) > 10
        assert all(query.strip() == query and query for query in topics.values())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("1\tone\n2 two\n", ":2: expected 'qid<tab>query'"),
        ("1\tone\n1\tagain\n", ":2: query '1' is there twice"),
        ("1\t \n", ":1: expected"),
        ("a b\tone\n", "white space"),
        ("\n", "no queries"),
    ],
)
def test_broken_topics_name_file_and_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "topics.tsv"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        read_topics(path)


def test_only_files_of_the_published_layout_are_the_corpus(tmp_path: Path) -> None:
    folder = "miracl-corpus-v1.0-ko"
    others = ["old_docs-1.jsonl", "._docs-0.jsonl", "docs-1.jsonl.gz.bak", "docs-x.jsonl", "docs-2.json", "README.md"]
    touch(tmp_path, f"{folder}/docs-0.jsonl.gz", f"{folder}/docs-1.jsonl", *(f"{folder}/{name}" for name in others))
    assert [path.name for path in miracl.corpus_files("ko", tmp_path)] == ["docs-0.jsonl.gz", "docs-1.jsonl"]
    touch(tmp_path, "miracl-corpus-v1.0-fa/docs.jsonl")
    with pytest.raises(DataError, match=r"expected docs-0.jsonl.gz"):
        miracl.corpus_files("fa", tmp_path)


def test_topics_and_qrels_of_every_split(tmp_path: Path) -> None:
    for split in ("dev", "train"):
        for kind, find in (("topics", miracl.topics_file), ("qrels", miracl.qrels_file)):
            name = f"miracl-v1.0-ko/{kind}/{kind}.miracl-v1.0-ko-{split}.tsv"
            touch(tmp_path, name)
            assert find("ko", split, tmp_path) == tmp_path / name
    with pytest.raises(DataError, match=r"topics.miracl-v1.0-ko-testA.tsv: not in --data_dir .* wants its terms"):
        miracl.topics_file("ko", "testA", tmp_path, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(DataError, match=r"or give a folder of the same layout with --data_dir$"):
        miracl.corpus_files("ko", cache_dir=str(tmp_path / "cache"))


def test_the_cache_of_the_hub_is_asked_when_the_folder_has_nothing(tmp_path: Path) -> None:
    cache = tmp_path / "cache" / "datasets--miracl--miracl-corpus"
    touch(cache, "snapshots/abc/miracl-corpus-v1.0-yo/docs-0.jsonl.gz")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc")
    (tmp_path / "data").mkdir()
    for data_dir in (None, tmp_path / "data"):
        (found,) = miracl.corpus_files("yo", data_dir, cache_dir=str(tmp_path / "cache"))
        assert found == cache / "snapshots/abc/miracl-corpus-v1.0-yo/docs-0.jsonl.gz"


def test_a_byte_order_mark_is_no_part_of_the_first_query(tmp_path: Path) -> None:
    path = tmp_path / "topics.tsv"
    path.write_text("\ufeff1\tone \r\n\n2\t two\tmore\n", encoding="utf-8")
    assert read_topics(path) == {"1": "one", "2": "two\tmore"}
