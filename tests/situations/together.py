"""Situations of several processes and of the Python classes."""

from __future__ import annotations

import copy
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from finetune.helpers import TORCHRUN, environment, train_words
from situations.world import Outcome, Place, Situation, difference, seen

from FlagEmbedding import BGEM3FlagModel, FlagModel
from FlagEmbedding.utils.locking import exclusive

WORKER = Path(__file__).parents[1] / "finetune" / "lost_training.py"
TEXTS = ["one short text", "a text of somewhat more words about a river and a mountain " * 3]


def lost(place: Place) -> None:
    """Training in two processes, of which one is killed."""
    words = train_words(
        place.model, place.rows(), place.folder / "out", max_steps=100_000, save_strategy="steps", save_steps=1,
        save_total_limit=1, lr_scheduler_type="constant", cache_path=place.folder.parent / "kept",
    )  # fmt: skip
    command = [sys.executable, *TORCHRUN, str(WORKER), str(place.folder), *words]
    before = seen(place.folder)
    with subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True) as run:
        while not list((place.folder / "out").glob("checkpoint-*")) and run.poll() is None:
            time.sleep(0.1)
        os.kill(int((place.folder / "1.pid").read_text()), signal.SIGKILL)
        _, printed = run.communicate(timeout=120)
    ours = "\n".join(line for line in printed.splitlines() if "gave no sign of life" in line)
    place.outcomes.append(Outcome(run.returncode, ours or printed, difference(before, seen(place.folder))))


def locked(place: Place) -> None:
    place.collection()
    place.index.mkdir(parents=True)
    with exclusive(place.index / ".shards.lock", place.index):
        place.step0()


def smaller_batches(place: Place) -> None:
    """Step 0 that goes on after a kill with half the batch size."""
    place.step0("--shard_size", "5", "--batch_size", "16")
    manifest = (place.index / "manifest.json").read_text()
    for name in ("index", "docid", "manifest.json"):
        (place.index / name).unlink()
    (place.index / "shards").mkdir()
    (place.index / "shards/manifest.json").write_text(manifest)
    place.step0("--shard_size", "5", "--batch_size", "8")


def model(act: Callable[[FlagModel], object], **options: Any) -> Callable[[Place], object]:
    return lambda place: place.call(lambda: act(FlagModel(str(place.model), **options)))


def threads(found: FlagModel) -> str:
    """Queries and passages embedded by four threads at once, compared with one after the other."""
    right = [found.encode_queries(TEXTS, max_length=6), found.encode_corpus(TEXTS)]
    wrong = []

    def work(kind: int) -> None:
        for _ in range(10):
            got = found.encode_corpus(TEXTS) if kind % 2 else found.encode_queries(TEXTS, max_length=6)
            wrong.extend([kind] * (got.tobytes() != right[kind % 2].tobytes()))

    each = [threading.Thread(target=work, args=(kind,)) for kind in range(4)]
    for thread in each:
        thread.start()
    for thread in each:
        thread.join()
    return f"{len(wrong)} of 40 results differ in a bit"


def copied(found: FlagModel) -> str:
    right = found.encode(TEXTS).tobytes()
    copies = [pickle.loads(pickle.dumps(found)), copy.deepcopy(found)]
    return f"{sum(each.encode(TEXTS).tobytes() == right for each in copies)} of 2 copies give the same bits"


def batches(found: FlagModel) -> str:
    right = found.encode(TEXTS * 5, batch_size=1).tobytes()
    return (
        f"{sum(found.encode(TEXTS * 5, batch_size=size).tobytes() == right for size in (2, 3, 256))} of 3 are the same"
    )


def encoded(texts: Sequence[Any] | Any, **options: Any) -> Callable[[Place], object]:
    return model(lambda found: f"{found.encode_queries(texts).shape} vectors", **options)


INSTRUCTION = {"query_instruction_for_retrieval": "find: "}
SITUATIONS = {
    "Several processes": [
        Situation("one of two processes is killed", "the other waits 30 minutes or 7 days", lost, "no sign of life"),
        Situation("a second step 0 in one folder", "vectors of two settings under one manifest, exit 0", locked),
        Situation("step 0 goes on with a smaller --batch_size", "starts over", smaller_batches, "slabs of|vectors of"),
    ],
    "The classes": [
        Situation("queries and passages from four threads", "passages cut at the queries' length", model(threads)),
        Situation("other batch sizes", "last bits differ", model(batches)),
        Situation("pickle and deepcopy", "TypeError", model(copied)),
        *[Situation(f"{name} with an instruction", "its name is embedded", encoded(["a", value], **INSTRUCTION))
          for name, value in (("None", None), ("NaN", float("nan")), ("a number", 5))],
        Situation("a dictionary", "its keys are embedded", encoded({"text": "a"})),
        Situation("half a surrogate pair", "TypeError", encoded(["a\ud800"])),
        Situation("query_instruction_format without its fields", "the query is dropped",
                  encoded(["a"], **INSTRUCTION, query_instruction_format="find it")),
        Situation("max_length=0", "traceback", model(lambda found: found.encode(TEXTS, max_length=0))),
        Situation("truncate_dim=-1", "last dimension lost", model(lambda found: found.encode(TEXTS), truncate_dim=-1)),
        Situation("three texts in compute_score", "traceback", lambda place: place.call(
            lambda: BGEM3FlagModel(str(place.model)).compute_score([("a", "b", "c")]))),
        Situation("FlagLLMReranker", "bare ImportError", lambda place: place.call(
            lambda: __import__("FlagEmbedding", fromlist=["FlagLLMReranker"]).FlagLLMReranker)),
        Situation("convert_to_numpy, device, with", "TypeError", lambda place: place.call(
            lambda: FlagModel(str(place.model), device="cpu").encode("a", convert_to_numpy=False).shape)),
    ],
}  # fmt: skip
