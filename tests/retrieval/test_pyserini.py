"""The real pyserini opens our folder and finds the same. Needs a Python that has it: PYSERINI_PYTHON=…/bin/python.

python -m venv DIR && DIR/bin/pip install pyserini==0.22.1 faiss-cpu "numpy<2" torch   (and a JDK)
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from FlagEmbedding.retrieval.index import FlatIndex, assemble_index
from FlagEmbedding.retrieval.searcher import search
from FlagEmbedding.retrieval.shards import ShardStore

PYTHON = os.environ.get("PYSERINI_PYTHON")
PROGRAM = """
import json, sys
import numpy as np
from pyserini.search.faiss import FaissSearcher
from pyserini.search.faiss._searcher import QueryEncoder
class Given(QueryEncoder):
    def encode(self, query):
        return queries[int(query)]
queries = np.load(sys.argv[2])
searcher = FaissSearcher(sys.argv[1], Given())
found = [[(hit.docid, float(hit.score)) for hit in searcher.search(str(i), 10)] for i in range(len(queries))]
json.dump(found, open(sys.argv[3], "w"))
"""


@pytest.mark.skipif(not PYTHON, reason="PYSERINI_PYTHON names no Python with pyserini")
def test_pyserini_finds_the_same(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    vectors = generator.standard_normal((200, 32)).astype(np.float32)
    queries = generator.standard_normal((6, 32)).astype(np.float32)
    store = ShardStore.create(tmp_path / "shards", {}, *vectors.shape, 64)
    for shard in range(len(store)):
        start, stop = store.span(shard)
        store.write(shard, vectors[start:stop], [f"{i}#0" for i in range(start, stop)])
    assemble_index(store, tmp_path)
    np.save(tmp_path / "queries.npy", queries)
    subprocess.run(
        [str(PYTHON), "-c", PROGRAM, str(tmp_path), str(tmp_path / "queries.npy"), str(tmp_path / "found.json")],
        check=True,
        capture_output=True,
        cwd=tmp_path,
    )
    theirs = json.loads((tmp_path / "found.json").read_text())
    ours = search(FlatIndex(tmp_path), queries, 10)
    for mine, other in zip(ours, theirs, strict=True):
        assert [hit.docid for hit in mine] == [docid for docid, _ in other]
        np.testing.assert_allclose([hit.score for hit in mine], [score for _, score in other], atol=2e-5)
