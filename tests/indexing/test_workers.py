# ruff: noqa: F811  (fixtures of another file are arguments here)
"""Workers that share a disk and nothing else: what they claim, what they leave behind, and always the same bytes."""

from __future__ import annotations

import json
import os
import pickle
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from indexing.test_encoding import OPTIONS, contents, encoder, ended_by, files, names, whole  # noqa: F401

from FlagEmbedding.collections import corpus
from FlagEmbedding.evaluation.__main__ import embed
from FlagEmbedding.indexing import Plan, claims, encode_shard, finish, merge, plan
from FlagEmbedding.indexing.claims import Claims
from FlagEmbedding.indexing.encoding import build_index, work
from FlagEmbedding.indexing.planning import load_encoder
from FlagEmbedding.inference.arguments import EncoderArguments
from FlagEmbedding.inference.text_encoder import TextEncoder
from FlagEmbedding.retrieval.shards import ShardStore
from FlagEmbedding.utils.errors import DataError, UsageError


@pytest.fixture
def made(encoder: TextEncoder, files: list[Path], tmp_path: Path) -> Plan:
    """Five shards of at most four passages, none encoded."""
    found = plan(files, encoder, tmp_path / "out", "ko", OPTIONS)
    assert found is not None and len(found) == 5
    return found


def shards(folder: Path) -> set[int]:
    return {int(path.stem[6:]) for path in (folder / "shards").glob("shard-*.json")}


def test_shards_in_any_order_and_twice_are_the_index_of_step_0(made: Plan, whole: tuple[bytes, bytes]) -> None:
    sent: Plan = pickle.loads(pickle.dumps(made))
    for shard in (4, 0, 3, 3, 1):
        encode_shard(sent, shard)
    with pytest.raises(DataError, match="1 of 5 shards are missing, the first is 2; start one or more workers again"):
        finish(made.folder)
    encode_shard(sent, 2)
    assert finish(made.folder) is True
    assert contents(made.folder) == whole and names(made.folder) == ["docid", "index", "manifest.json"]
    manifest = json.loads((made.folder / "manifest.json").read_text())
    assert manifest["identity"] == made.identity and manifest["arguments"]["max_passage_length"] == 32
    assert not {"starts", "stored"} & set(manifest)
    assert finish(made.folder) is False
    assert plan(made.files, made.encoder, made.folder, "ko", OPTIONS) is None


def test_a_plan_is_not_for_other_encoders(made: Plan, tiny_moe_dir: Path) -> None:
    other = TextEncoder(EncoderArguments(encoder=str(tiny_moe_dir)))
    with pytest.raises(UsageError, match="model: "):
        encode_shard(made, 0, other)
    assert shards(made.folder) == set()
    with pytest.raises(UsageError, match="--overwrite True would remove what other workers encode"):
        plan(made.files, made.encoder, made.folder, "ko", replace(OPTIONS, overwrite=True))


def test_a_plain_file_is_read_from_the_place_of_the_shard(
    encoder: TextEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "docs-0.jsonl"
    rows = [json.dumps({"docid": str(i), "text": f"한강 {i}"}, ensure_ascii=False) + "\n" for i in range(18)]
    path.write_text("".join([*rows[:5], "\n\n", *rows[5:]]), encoding="utf-8")
    build_index(encoder, [path], tmp_path / "whole", "ko", OPTIONS)
    monkeypatch.setattr(corpus, "_STRIDE", 8)
    found = plan([path], encoder, tmp_path / "out", "ko", OPTIONS)
    assert found is not None and [line for _, line in found.manifest["starts"][0]] == [1, 11, 19]
    stored = path.read_bytes()
    lost = stored.index(rows[16].encode())
    path.write_bytes(b"#" * lost + stored[lost:])  # what lies before the shard could not be read
    encode_shard(found, 4)
    path.write_bytes(stored)
    for shard in (2, 3, 0, 1):
        encode_shard(found, shard)
    finish(found.folder)
    assert contents(found.folder) == contents(tmp_path / "whole")


@pytest.mark.parametrize("part", [(1, 2), (3, 2), (0, 1), (0, 9)])
def test_a_worker_begins_at_its_part_and_helps_with_the_others(
    encoder: TextEncoder, made: Plan, whole: tuple[bytes, bytes], part: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    written: list[int] = []
    real = ShardStore.write
    monkeypatch.setattr(ShardStore, "write", lambda store, i, *more: (written.append(i), real(store, i, *more))[1])
    work(made, encoder, *part)
    begin = (part[0] % part[1]) * 5 // part[1]
    assert written == [*range(begin, 5), *range(begin)]
    finish(made.folder)
    assert contents(made.folder) == whole


def test_two_workers_claim_every_shard_once(made: Plan) -> None:
    with Claims(made.store) as one, Claims(made.store) as other:
        ways = one.unclaimed(range(5)), other.unclaimed(range(4, -1, -1))
        found = [next(ways[0]), next(ways[1]), next(ways[1]), next(ways[0]), next(ways[0])]
        assert found == [0, 4, 3, 1, 2]
        assert [*ways[0], *ways[1]] == []
        assert list(other.left_behind(range(5))) == [3, 4], "its own are nobody's work any more; the living keep theirs"


def lone_claim(made: Plan, owner: str, age: float = 0.0) -> Path:
    """A claim of shard 3 by ``owner``, and that worker's last sign of life, ``age`` seconds ago."""
    folder = made.folder / "shards/claims"
    folder.mkdir(exist_ok=True)
    (folder / "000003").write_text(owner)
    sign = folder / f"{owner}.alive"
    sign.touch()
    os.utime(sign, (time.time() - age,) * 2)
    return sign


def ended_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize(
    ("owner", "age", "taken"),
    [
        (lambda: f"{socket.gethostname()}-{ended_process()}-ab", 0.0, True),
        (lambda: f"{socket.gethostname()}-{os.getpid()}-ab", 0.0, False),
        (lambda: "else-where-1-ab", 30.0, False),
        (lambda: "else-where-1-ab", 90.0, True),
    ],
    ids=["ended here", "alive here", "alive elsewhere", "silent elsewhere"],
)
def test_claims_of_the_dead_are_taken_over(made: Plan, owner: Callable[[], str], age: float, taken: bool) -> None:
    lone_claim(made, owner(), age)
    with Claims(made.store) as mine:
        assert list(mine.unclaimed(range(5))) == [0, 1, 2, 4]
        assert list(mine.left_behind([3])) == [3] * taken


def test_a_claim_of_the_slow_is_taken_over_when_it_is_old(made: Plan) -> None:
    lone_claim(made, "elsewhere-1-ab")
    claim = made.folder / "shards/claims/000003"
    os.utime(claim, (time.time() - 90,) * 2)
    with Claims(made.store) as mine:
        mine.longest = 20.0
        assert list(mine.left_behind([3])) == []
        mine.longest = 10.0
        assert list(mine.left_behind([3])) == [3]
        assert claim.read_text() == mine.name


def test_a_plain_run_does_not_go_on_beside_workers(
    encoder: TextEncoder, made: Plan, whole: tuple[bytes, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "INTERVAL", 0.02)
    monkeypatch.setattr(claims, "PATIENCE", 0.2)
    with Claims(made.store), pytest.raises(UsageError, match=r"worker .* is encoding \(--shards\)"):
        build_index(encoder, made.files, made.folder, "ko", OPTIONS)
    lone_claim(made, "elsewhere-1-ab")  # gives no further sign
    assert build_index(encoder, made.files, made.folder, "ko", OPTIONS)
    assert contents(made.folder) == whole and names(made.folder) == ["docid", "index", "manifest.json"]


def test_a_worker_that_comes_late_writes_nothing_into_a_finished_folder(made: Plan) -> None:
    for shard in range(5):
        encode_shard(made, shard)
    finish(made.folder)
    encode_shard(made, 2)
    assert names(made.folder) == ["docid", "index", "manifest.json"]


def test_folders_of_workers_without_a_shared_disk_are_merged(
    encoder: TextEncoder, files: list[Path], tmp_path: Path, whole: tuple[bytes, bytes]
) -> None:
    places = [tmp_path / name for name in ("a", "b", "c")]
    for number, place in enumerate(places):
        own = plan(files, encoder, place, "ko", OPTIONS if number < 2 else replace(OPTIONS, max_passage_length=8))
        assert own is not None
        work(own, encoder, number, 2, others=False)
    assert shards(places[0]) == {0, 1} and shards(places[1]) == {2, 3, 4}
    assert merge(places[:2], tmp_path / "out") == 5
    assert merge(places[:2], tmp_path / "out") == 0
    with pytest.raises(UsageError, match="max_passage_length: 32 there, 8 here"):
        merge(places[2:], tmp_path / "out")
    with pytest.raises(DataError, match="no shards folder there"):
        merge([tmp_path / "nowhere"], tmp_path / "out")
    finish(tmp_path / "out")
    assert contents(tmp_path / "out") == whole
    assert shards(places[0]) == {0, 1}, "a source was touched"


@pytest.fixture
def step_0(tiny_model_dir: Path, files: list[Path], tmp_path: Path) -> Callable[..., int]:
    data = tmp_path / "data" / "miracl-corpus-v1.0-ko"
    data.mkdir(parents=True)
    for path in files:
        (data / path.name).write_bytes(path.read_bytes())

    def run(*more: Any, out: str = "out") -> int:
        words = ["--encoder", tiny_model_dir, "--languages", "ko", "--data_dir", tmp_path / "data", "--shard_size", 4]
        words += ["--index_save_dir", tmp_path / out, "--max_passage_length", 32, *more]
        return embed([str(word) for word in words])

    return run


def test_an_array_of_jobs_one_of_which_dies(
    step_0: Callable[..., int], tiny_model_dir: Path, tmp_path: Path, whole: tuple[bytes, bytes],
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")  # and no MASTER_ADDR, as srun leaves it
    folder = tmp_path / "out" / tiny_model_dir.name / "ko"
    assert step_0("--finish") == 2
    with ended_by("write", 1):
        assert step_0("--shards", "1/2") == 130
        raise KeyboardInterrupt  # which the command has turned into its exit code
    assert shards(folder) == {2}
    assert step_0("--finish") == 2
    assert step_0("--shards", "0/2") == 0
    assert shards(folder) == set(range(5))
    assert not (folder / "index").exists()
    assert step_0("--finish") == 0 == step_0("--finish") == step_0("--shards", "1/2")
    assert contents(folder) == whole
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "nothing was begun here; start workers with --shards first" in errors[0]
    assert "4 of 5 shards are missing, the first is 0" in errors[1] and len(errors) == 2


def test_jobs_without_a_shared_disk(
    step_0: Callable[..., int], tiny_model_dir: Path, tmp_path: Path, whole: tuple[bytes, bytes]
) -> None:
    for number in (1, 2):  # counted from 1
        assert step_0("--shards", f"{number}/2", "--help_others", "n", out=str(number)) == 0
    assert step_0("--finish", "--merge_from", tmp_path / "1", tmp_path / "2") == 0
    folder = tmp_path / "out" / tiny_model_dir.name / "ko"
    assert contents(folder) == whole
    assert step_0("--finish", "--merge_from", tmp_path / "1", tmp_path / "2") == 0  # it is there
    assert contents(folder) == whole
    (folder / "manifest.json").unlink()
    (folder / "docid").write_text("mine")  # an index of somebody else
    assert step_0("--finish", "--merge_from", tmp_path / "1") == 2
    assert (folder / "docid").read_text() == "mine" and not (folder / "shards").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--shards 3", "--shards 3: give the worker and the number of workers, such as 3/64"),
        ("--shards 5/4", "--shards 5/4: give"),
        ("--shards 0/0", "--shards 0/0: give"),
        ("--shards 1/2 --finish", "give one of the two"),
        ("--merge_from a", "--merge_from belongs to --finish"),
        ("--help_others n", "--help_others False belongs to --shards"),
        ("--shards 1/2 --overwrite y", "--overwrite True would remove"),
        ("--finish --overwrite y", "--overwrite True would remove"),
    ],
)
def test_options_that_contradict_each_other(
    step_0: Callable[..., int], words: str, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert step_0(*words.split()) == 2
    assert message in capfd.readouterr().err


def help_with(plan: Plan, part: int) -> None:
    """A worker, as the target of a process."""
    work(plan, load_encoder(plan.encoder), part, 2)


def test_workers_killed_at_ten_random_moments_lose_nothing(encoder: TextEncoder, tmp_path: Path) -> None:
    path = tmp_path / "docs-0.jsonl"
    path.write_text("".join(json.dumps({"docid": str(i), "text": f"text {i * i} {i}"}) + "\n" for i in range(600)))
    options = replace(OPTIONS, shard_size=2)
    build_index(encoder, [path], tmp_path / "whole", "ko", options)
    made = plan([path], encoder, tmp_path / "out", "ko", options)
    assert made is not None
    context = get_context("forkserver")  # a process each, and the imports once
    context.set_forkserver_preload(
        ["FlagEmbedding.indexing.encoding", "transformers.models.xlm_roberta.modeling_xlm_roberta", "pytest"]
    )

    def start(part: int) -> Any:
        worker = context.Process(target=help_with, args=(made, part))
        worker.start()
        return worker

    chance, workers, killed = random.Random(5), [start(0), start(1)], 0
    for target in sorted(chance.sample(range(3, 250), 10)):
        until = time.monotonic() + 120
        while len(shards(made.folder)) < target and time.monotonic() < until:
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.01))
        part = chance.randrange(2)
        workers[part].kill()
        workers[part].join()
        killed += workers[part].exitcode == -signal.SIGKILL
        workers[part] = start(part)
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert killed == 10
    finish(made.folder)
    assert contents(made.folder) == contents(tmp_path / "whole")
    assert names(made.folder) == ["docid", "index", "manifest.json"]
