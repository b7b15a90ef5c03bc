"""An index in the stores people run: loaded and searched it gives the hits of step 1; files are as documented."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow.parquet
import pytest
from options_walk import Case, assert_acts, assert_complete

from FlagEmbedding.evaluation.__main__ import embed, search
from FlagEmbedding.export import stores
from FlagEmbedding.export.__main__ import main
from FlagEmbedding.export.arguments import VectorArguments
from FlagEmbedding.inference.arguments import EncoderArguments
from FlagEmbedding.inference.text_encoder import TextEncoder, encode_texts
from FlagEmbedding.retrieval.index import FlatIndex
from tests.evaluation.conftest import QUERIES, make_passages, write_collection

ROWS = 60
PASSAGES = make_passages(ROWS, seed=3)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    """A collection, its index and step 1's run."""
    folder = tmp_path_factory.mktemp("stores")
    write_collection(folder / "data", "ko", PASSAGES, QUERIES)
    write_collection(folder / "other", "ko", make_passages(ROWS, seed=4), QUERIES)
    given = ["--encoder", str(tiny_model_dir), "--languages", "ko", "--data_dir", str(folder / "data")]
    given += ["--index_save_dir", str(folder / "index")]
    assert embed([*given, "--shard_size", "16"]) == 0
    assert search([*given, "--result_save_dir", str(folder / "runs"), "--hits", "10"]) == 0
    return folder


@pytest.fixture
def index(place: Path, tiny_model_dir: Path) -> Path:
    return place / "index" / tiny_model_dir.name / "ko"


@pytest.fixture(scope="module")
def queries(tiny_model_dir: Path) -> np.ndarray:
    return encode_texts(TextEncoder(EncoderArguments(encoder=str(tiny_model_dir))), list(QUERIES.values()), 512)


@pytest.fixture(scope="module")
def expected(place: Path, tiny_model_dir: Path) -> list[list[str]]:
    """The ten docids that step 1 found for each query."""
    lines = [line.split() for line in (place / f"runs/{tiny_model_dir.name}/ko.txt").read_text().splitlines()]
    return [[line[2] for line in lines if line[0] == qid] for qid in QUERIES]


def export(index: Path, to: str, out: Path, *more: object) -> int:
    return main(["vectors", str(index), "--to", to, "--output_dir", str(out), *map(str, more)])


def in_qdrant(out: Path, name: str = "passages") -> Callable[[Any, str], list[tuple[str, float]]]:
    from qdrant_client import QdrantClient

    client = QdrantClient(path=str(out / "qdrant"))

    def ask(query: Any, field: str) -> list[tuple[str, float]]:
        found = client.query_points(name, query, using=field, limit=10, with_payload=True).points
        return [((point.payload or {})["docid"], point.score) for point in found]

    return ask


def test_qdrant_finds_what_step_1_finds(
    index: Path, place: Path, queries: np.ndarray, expected: list[list[str]], tmp_path: Path
) -> None:
    pytest.importorskip("qdrant_client")
    words = ["--payload", "title", "text", "--data_dir", place / "data", "--batch_rows", 25]
    assert export(index, "qdrant", tmp_path / "out", *words) == 0
    ask = in_qdrant(tmp_path / "out")
    found = [ask(query.tolist(), "dense") for query in queries]
    assert [[docid for docid, _ in hits] for hits in found] == expected
    vectors = FlatIndex(index).read_rows(range(ROWS)).astype(np.float64)
    best = np.sort(vectors @ queries.T.astype(np.float64), axis=0)[::-1][:10].T
    np.testing.assert_allclose([[score for _, score in hits] for hits in found], best, atol=1e-5)


def test_lancedb_finds_what_step_1_finds(
    index: Path, queries: np.ndarray, expected: list[list[str]], tmp_path: Path
) -> None:
    lancedb = pytest.importorskip("lancedb")
    assert export(index, "lancedb", tmp_path / "out", "--batch_rows", 25) == 0
    table = lancedb.connect(str(tmp_path / "out/lancedb")).open_table("passages")
    found = [
        table.search(query, vector_column_name="dense").distance_type("dot").limit(10).to_list() for query in queries
    ]
    assert [[row["docid"] for row in rows] for rows in found] == expected


def test_parquet_holds_the_index(index: Path, place: Path, tmp_path: Path) -> None:
    words = ["--payload", "text", "title", "--data_dir", place / "data", "--batch_rows", 25]
    assert export(index, "parquet", tmp_path / "out", *words) == 0
    files = sorted((tmp_path / "out/parquet").iterdir())
    assert [path.name for path in files] == [f"passages-0000000{first}.parquet" for first in ("00", "25", "50")]
    table = pyarrow.parquet.read_table(files)
    assert table["docid"].to_pylist() == [row["docid"] for row in PASSAGES]
    assert table["text"].to_pylist() == [row["text"] for row in PASSAGES]
    assert table["title"].to_pylist() == [row["title"] for row in PASSAGES]
    assert table["row"].to_pylist() == list(range(ROWS))
    assert str(table.schema.field("dense").type) == "fixed_size_list<element: float>[32]"
    np.testing.assert_array_equal(np.array(table["dense"].to_pylist(), "<f4"), FlatIndex(index).read_rows(range(ROWS)))


def test_milvus_files_fit_the_schema_beside_them(index: Path, place: Path, tmp_path: Path) -> None:
    words = ["--payload", "text", "--data_dir", place / "data", "--name", "bge"]
    assert export(index, "milvus", tmp_path / "out", *words) == 0
    folder = tmp_path / "out/milvus"
    schema = json.loads((folder / "schema.json").read_text())
    assert schema["collection"] == "bge"
    # Types of Milvus's data import: VARCHAR is a string column, FLOAT_VECTOR a list of floats.
    kinds = {"VARCHAR": "string", "FLOAT_VECTOR": "list<element: float>"}
    table = pyarrow.parquet.read_table(folder / "bge-000000000.parquet")
    assert {f["name"]: kinds[f["type"]] for f in schema["fields"]} == {f.name: str(f.type) for f in table.schema}
    assert [f["name"] for f in schema["fields"] if f.get("is_primary")] == ["docid"]
    assert next(f["dim"] for f in schema["fields"] if f["name"] == "dense") == len(table["dense"][0].as_py()) == 32
    np.testing.assert_array_equal(np.array(table["dense"].to_pylist(), "<f4"), FlatIndex(index).read_rows(range(ROWS)))


def test_elasticsearch_files_are_bulk_requests(index: Path, place: Path, tmp_path: Path) -> None:
    words = ["--payload", "text", "--data_dir", place / "data", "--batch_rows", 25]
    assert export(index, "elasticsearch-json", tmp_path / "out", *words) == 0
    folder = tmp_path / "out/elasticsearch-json"
    properties = json.loads((folder / "mapping.json").read_text())["mappings"]["properties"]
    assert properties["dense"] == {
        "type": "dense_vector", "dims": 32, "index": True, "similarity": "max_inner_product"
    }  # fmt: skip
    files = sorted(folder.glob("*.ndjson"))
    assert len(files) == 3 and all(path.read_bytes().endswith(b"}\n") for path in files)
    lines = [json.loads(line) for path in files for line in path.read_text("utf-8").splitlines()]
    assert [line["index"] for line in lines[::2]] == [{"_index": "passages", "_id": row["docid"]} for row in PASSAGES]
    assert [line["text"] for line in lines[1::2]] == [row["text"] for row in PASSAGES]
    assert {key for line in lines[1::2] for key in line} == set(properties)
    np.testing.assert_array_equal(
        np.array([line["dense"] for line in lines[1::2]], "<f4"), FlatIndex(index).read_rows(range(ROWS))
    )


def ended(store: type[Any], after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process is ended in batch number ``after``, once it is in the store, before that is noted."""
    real, calls = store.write, []

    def write(self: Any, batch: Any) -> None:
        real(self, batch)
        calls.append(batch)
        if len(calls) == after:
            raise KeyboardInterrupt

    monkeypatch.setattr(store, "write", write)


@pytest.mark.parametrize("to", ["qdrant", "lancedb", "parquet", "milvus", "elasticsearch-json"])
def test_an_export_that_was_ended_goes_on(
    index: Path, to: str, queries: np.ndarray, expected: list[list[str]], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if (library := stores.STORES[to].library) is not None:
        pytest.importorskip(library)
    out, words = tmp_path / "out", ["--batch_rows", 9]
    with monkeypatch.context() as patch:
        ended(stores.STORES[to], 3, patch)
        assert export(index, to, out, *words) == 130
    assert json.loads((out / "export.json").read_text())["done"] == 18
    written: list[int] = []
    real = stores.STORES[to].write
    monkeypatch.setattr(
        stores.STORES[to], "write", lambda self, batch: (written.append(batch.first), real(self, batch))
    )
    assert export(index, to, out, *words) == 0
    assert written == [18, 27, 36, 45, 54]
    if to == "qdrant":
        ask = in_qdrant(out)
        assert [[docid for docid, _ in ask(query.tolist(), "dense")] for query in queries] == expected
    elif to == "lancedb":
        import lancedb

        rows = lancedb.connect(str(out / "lancedb")).open_table("passages").to_arrow()
        assert sorted(rows["row"].to_pylist()) == list(range(ROWS))
    else:
        assert export(index, to, tmp_path / "whole", *words) == 0
        assert contents(out / to) == contents(tmp_path / "whole" / to)
    written.clear()
    assert export(index, to, out, *words) == 0 and not written, "what was complete was loaded again"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def add_modes(index: Path) -> tuple[list[dict[int, float]], list[np.ndarray]]:
    """Lexical weights and token vectors beside the dense index; row 5 has none of either."""
    generator = np.random.default_rng(1)
    lengths = np.where(np.arange(ROWS) == 5, 0, generator.integers(1, 6, ROWS))
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype("<i8")
    ids = np.concatenate([np.sort(generator.choice(50, size, replace=False)) for size in lengths]).astype("<i4")
    weights = generator.uniform(0.01, 1, len(ids)).astype("<f4")
    vectors = generator.normal(size=(len(ids), 4)).astype("<f2")
    docid = (index / "docid").read_bytes()
    for mode, arrays in (("sparse", {"ids": ids, "weights": weights}), ("colbert", {"vectors": vectors})):
        (index / mode).mkdir()
        (index / mode / "docid").write_bytes(docid)
        files = {"docid": {"sha256": hashlib.sha256(docid).hexdigest(), "dtype": "text", "shape": [ROWS]}}
        for name, array in {"offsets": offsets, **arrays}.items():
            (index / mode / name).write_bytes(array.tobytes())
            digest = hashlib.sha256(array.tobytes()).hexdigest()
            files[name] = {"sha256": digest, "dtype": array.dtype.str, "shape": list(array.shape)}
        manifest = {"identity": {"mode": mode}, "rows": ROWS, "entries": len(ids), "files": files}
        (index / mode / "manifest.json").write_text(json.dumps(manifest))
    spans = list(itertools.pairwise(offsets))
    sparse = [dict(zip(ids[a:b].tolist(), weights[a:b].tolist(), strict=True)) for a, b in spans]
    return sparse, [vectors[a:b].astype(np.float32) for a, b in spans]


def test_lexical_weights_and_token_vectors_are_fields_too(index: Path, tmp_path: Path) -> None:
    models = pytest.importorskip("qdrant_client").models
    shutil.copytree(index, tmp_path / "index")
    sparse, colbert = add_modes(tmp_path / "index")
    for to in ("qdrant", "parquet", "milvus", "elasticsearch-json"):
        assert export(tmp_path / "index", to, tmp_path / to) == 0
    docids = [row["docid"] for row in PASSAGES]
    ask = in_qdrant(tmp_path / "qdrant")
    query = {3: 0.5, 7: 1.0, 20: 0.25}
    scores = [sum(weight * entry.get(token, 0.0) for token, weight in query.items()) for entry in sparse]
    best = sorted((row for row in range(ROWS) if scores[row] > 0), key=lambda row: -scores[row])[:10]
    found = ask(models.SparseVector(indices=list(query), values=list(query.values())), "sparse")
    assert [docid for docid, _ in found] == [docids[row] for row in best]
    tokens = np.random.default_rng(2).normal(size=(3, 4))
    maxsim = [(tokens @ part.T.astype(np.float64)).max(axis=1).sum() if len(part) else -np.inf for part in colbert]
    assert [docid for docid, _ in ask(tokens.tolist(), "colbert")] == [docids[r] for r in np.argsort(maxsim)[::-1][:10]]
    lancedb = pytest.importorskip("lancedb")
    assert export(tmp_path / "index", "lancedb", tmp_path / "lancedb") == 0
    table = lancedb.connect(str(tmp_path / "lancedb/lancedb")).open_table("passages")
    hits = table.search(tokens.astype("<f4"), vector_column_name="colbert").distance_type("cosine").limit(10)
    unit = [part / np.linalg.norm(part, axis=1, keepdims=True) for part in colbert]  # it knows no other MaxSim
    asked = tokens / np.linalg.norm(tokens, axis=1, keepdims=True)
    cosine = [(asked @ part.T.astype(np.float64)).max(axis=1).sum() if len(part) else -np.inf for part in unit]
    assert [row["row"] for row in hits.to_list()] == np.argsort(cosine)[::-1][:10].tolist()
    table = pyarrow.parquet.read_table(tmp_path / "parquet/parquet")
    pairs = zip(table["sparse_ids"].to_pylist(), table["sparse_weights"].to_pylist(), strict=True)
    assert [dict(zip(*pair, strict=True)) for pair in pairs] == sparse
    assert table["colbert"].to_pylist() == [part.tolist() for part in colbert]
    milvus = pyarrow.parquet.read_table(sorted((tmp_path / "milvus/milvus").glob("*.parquet")))
    read = [
        {int(k): float(np.float32(v)) for k, v in json.loads(text).items()} for text in milvus["sparse"].to_pylist()
    ]
    assert read == sparse and "colbert" not in milvus.column_names
    elastic = sorted((tmp_path / "elasticsearch-json/elasticsearch-json").glob("*.ndjson"))
    documents = [json.loads(line) for path in elastic for line in path.read_text().splitlines()][1::2]
    assert [{int(k): float(np.float32(v)) for k, v in doc["sparse"].items()} for doc in documents] == sparse
    assert [np.array(doc.get("colbert", []), "<f4").reshape(-1, 4).tolist() for doc in documents] == [
        part.tolist() for part in colbert
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--payload body", "--payload body: choose from title text"),
        ("--data_dir d", "--data_dir is read for --payload alone"),
        ("--batch_rows 0", "--batch_rows must be at least 1"),
        ("--url http://localhost:1", "--url belongs to --to qdrant"),
        ("--name A-b", "--name 'A-b': small letters"),
        ("--payload text --data_dir {place}/other", "corpus: "),
    ],
)
def test_what_cannot_be_exported_is_refused_in_one_line(
    index: Path, place: Path, tmp_path: Path, words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(index, "parquet", tmp_path / "out", *words.format(place=place).split()) == 2
    assert message in (said := capsys.readouterr().err) and said.count("error: ") == 1
    assert not (tmp_path / "out").exists()


def test_folders_in_the_way(index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert export(index, "parquet", out) == 0
    assert export(index, "parquet", out, "--name", "b") == 2
    assert "name: passages there, b here" in capsys.readouterr().err
    assert export(index, "milvus", out, "--overwrite") == 0
    assert sorted(path.name for path in out.iterdir()) == ["export.json", "milvus"]
    (out / "milvus/photo.txt").write_text("mine")
    assert export(index, "parquet", out, "--overwrite") == 0
    assert [path.name for path in (out / "milvus").iterdir()] == ["photo.txt"]
    pytest.importorskip("lancedb")
    assert export(index, "lancedb", tmp_path / "base") == 0
    assert export(index, "parquet", tmp_path / "base", "--overwrite") == 2
    assert "'passages' of lancedb, a database" in capsys.readouterr().err
    assert export(index, "lancedb", tmp_path / "base", "--overwrite") == 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/photo.txt").write_text("a memory")
    assert export(index, "parquet", tmp_path / "mine", "--overwrite") == 2
    assert "is in the way" in capsys.readouterr().err and (tmp_path / "mine/photo.txt").exists()
    assert export(tmp_path, "parquet", tmp_path / "none") == 2
    assert "no index file" in capsys.readouterr().err


def test_a_missing_library_is_named(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stores.Qdrant, "library", "no_such_library")
    assert export(index, "qdrant", tmp_path / "out") == 2
    assert "no_such_library is missing: pip install 'FlagEmbedding[vectors]'" in capsys.readouterr().err


CASES = {
    "to": Case("--to milvus", only=("files",)),
    "url": Case("--url http://127.0.0.1:9", only=("code",)),
    "name": Case("--name b", only=("files",)),
    "payload": Case("--payload text", only=("bytes",)),
    "data_dir": Case("--data_dir {place}/other", given="--payload text", only=("code",)),
    "batch_rows": Case("--batch_rows 7", only=("files",)),
}


def test_no_field_is_left_out() -> None:
    exempt = {
        "index": "given in every test", "output_dir": "read in every test", "overwrite": "test_folders_in_the_way",
        "cache_dir": "the hub's, see tests/utils/test_hub.py",
    }  # fmt: skip
    assert_complete((VectorArguments,), CASES, exempt)


@pytest.mark.parametrize("name", CASES)
def test_every_option_acts(name: str, index: Path, place: Path, tmp_path: Path) -> None:
    def observe(words: list[str]) -> dict[str, Any]:
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        words = [word.format(place=place) for word in words]
        if "--payload" in words and "--data_dir" not in words:
            words += ["--data_dir", str(place / "data")]
        code = main(["vectors", str(index), "--to", "parquet", "--output_dir", str(out), *words])
        files = {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*.*") if p.name != "export.json"}
        return {"code": code, "files": sorted(files), "bytes": files}

    assert_acts(CASES[name], observe)


class Server(BaseHTTPRequestHandler):
    """What Qdrant answers when it is asked for a collection."""

    def do_GET(self) -> None:
        body = json.dumps({"result": {"exists": True}, "status": "ok", "time": 0.0, "version": "1.20.0"}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        type(self).asked.append(self.path)

    asked: ClassVar[list[str]] = []

    def log_message(self, *_: object) -> None:
        return


def test_a_servers_collection_of_somebody_else_stays(
    index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("qdrant_client")
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert export(index, "qdrant", tmp_path / "out", "--url", url) == 2
        server.shutdown()
    assert "has a collection 'passages' already: give another --name" in capsys.readouterr().err
    assert "/collections/passages/exists" in Server.asked
    assert export(index, "qdrant", tmp_path / "out", "--url", url) == 2
    error = capsys.readouterr().err
    assert "no Qdrant answers there" in error and "Traceback" not in error and not (tmp_path / "out").exists()
