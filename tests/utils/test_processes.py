"""Two processes under torchrun: who decides, what both know, and rows with the right gradient."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from FlagEmbedding.utils import distributed
from FlagEmbedding.utils.errors import UsageError
from FlagEmbedding.utils.processes import on_main, processes

WORKER = Path(__file__).with_name("two_processes.py")


def test_two_processes(tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, str(WORKER), str(tmp_path)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0 and done.stderr.count("error: one line") == 1, done.stderr[-3000:]
    assert "nobody goes on" not in done.stderr and done.stderr.count("exitcode  : 2") >= 1
    seen = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    rows = [[[1.0, 2.0]], [[1.0, 2.0], [3.0, 4.0]]]
    for rank, found in enumerate(seen):
        assert (found["rank"], found["world"], found["main"]) == (rank, 2, rank == 0)
        assert found["calls"] == ([0] if rank == 0 else []) and found["value"] == {"from": 0}
        assert found["objects"] == [["of", 0], ["of", 1]]
        for scaled, factor in (("True", 2), ("False", 1)):
            everything, gradient = found["gathered"][scaled]
            assert everything == rows[0] + rows[1]
            assert gradient == [[2 * factor * value for value in row] for row in rows[rank]]


def test_alone_every_function_is_the_identity() -> None:
    rows = torch.ones(2, 3, requires_grad=True)
    assert distributed.all_gather_rows(rows) is rows
    assert distributed.gather_objects(5) == [5]
    distributed.barrier()
    distributed.leave()
    with processes():
        assert not distributed.is_initialized()
        assert on_main(lambda: 7) == 7
        with pytest.raises(UsageError, match="no"):
            on_main(lambda: (_ for _ in ()).throw(UsageError("no")))


def test_before_the_group_the_launchers_word_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    def found() -> tuple[int, int, int, bool]:
        return distributed.rank(), distributed.world_size(), distributed.local_rank(), distributed.is_main()

    assert found() == (0, 1, 0, True)
    for name, value in (("RANK", "5"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert found() == (5, 8, 1, False)
