# ruff: noqa: F811  (fixtures of another file are arguments here)
"""Step 0 over the actors of a Ray cluster: the same bytes, with an actor killed, and refusals in one line.

A cluster starts some ten processes that import torch: minutes on two cores, so it runs where RAY_CLUSTER_TESTS is set.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from indexing.test_encoding import OPTIONS, contents, encoder, names  # noqa: F401

from FlagEmbedding.indexing.encoding import build_index
from FlagEmbedding.indexing.ray import main
from FlagEmbedding.inference.text_encoder import TextEncoder

ray = pytest.importorskip("ray")


on_a_cluster = pytest.mark.skipif(not os.environ.get("RAY_CLUSTER_TESTS"), reason="set RAY_CLUSTER_TESTS=1 to run it")


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100_000_000)
    yield
    ray.shutdown()


@on_a_cluster
def test_two_actors_one_of_which_is_killed_write_the_same_index(
    cluster: None, encoder: TextEncoder, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data" / "miracl-corpus-v1.0-ko"
    data.mkdir(parents=True)
    path = data / "docs-0.jsonl"
    path.write_text("".join(json.dumps({"docid": f"{i}#0", "text": f"text {i * i} {i}"}) + "\n" for i in range(1200)))
    build_index(encoder, [path], tmp_path / "whole", "ko", OPTIONS)
    folder, killed = tmp_path / "out" / tiny_model_dir.name / "ko", []

    def kill() -> None:
        until = time.monotonic() + 300
        while len(list(folder.glob("shards/*.json"))) < 20 and time.monotonic() < until:
            time.sleep(0.01)
        for process in Path("/proc").iterdir():
            if process.name.isdigit() and _is_actor(process):
                os.kill(int(process.name), signal.SIGKILL)
                killed.append(len(list(folder.glob("shards/*.json"))))
                return

    hunter = threading.Thread(target=kill)
    hunter.start()
    words = ["--encoder", str(tiny_model_dir), "--languages", "ko", "--data_dir", str(tmp_path / "data")]
    words += ["--shard_size", "4", "--index_save_dir", str(tmp_path / "out"), "--min_actors", "2", "--max_actors", "2"]
    words += ["--cpus_per_actor", "0.5"]
    assert main([*words, "--max_passage_length", "32"]) == 0
    hunter.join()
    assert killed and killed[0] < 300, "no actor was killed while there was work"
    assert contents(folder) == contents(tmp_path / "whole") and names(folder) == ["docid", "index", "manifest.json"]
    assert main([*words, "--max_passage_length", "16"]) == 2
    assert "error: " in (said := capsys.readouterr().err) and "max_passage_length: 32 there, 16 here" in said
    assert "Traceback" not in said.partition("error: ")[2]


def _is_actor(process: Path) -> bool:
    """Whether a process is an actor of this test's cluster: a child of the raylet that this process has started."""
    try:
        raylet = _parent(process)
        return b"ShardEncoder" in (process / "cmdline").read_bytes() and _parent(raylet).name == str(os.getpid())
    except OSError:
        return False


def _parent(process: Path) -> Path:
    return process.with_name((process / "stat").read_text().rpartition(")")[2].split()[1])


@pytest.mark.parametrize(
    ("words", "message"),
    [("--min_actors 3 --max_actors 2", "--min_actors 3 --max_actors 2: give 1 or more"), ("--gpus_per_actor -1", "0")],
)
def test_numbers_of_actors_that_cannot_be(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--encoder", "m", "--languages", "ko", *words.split()]) == 2
    assert message in capsys.readouterr().err
