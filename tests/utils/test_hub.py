"""The hub without a hub: what is in its cache or beside it is found, what is not is one line."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from FlagEmbedding.utils.errors import UsageError
from FlagEmbedding.utils.hub import HubError, download, resolve_dataset, resolve_folder

FILES = {"config.json": b"{}", "model.safetensors": b"weights" * 1000, "picture.png": b"large"}
COMMIT = "c" * 40


class StandIn(BaseHTTPRequestHandler):
    """As much of the hub's interface as a download asks for; the repository's name says how it behaves."""

    asked: ClassVar[Counter[str]] = Counter()

    def do_GET(self) -> None:
        """Repository, its list of files, or one of them."""
        found = re.match(r"/(?:api/models/)?maker/(\w+)(?:/(revision|tree|resolve)/\w+/?([\w.]*))?", self.path)
        assert found is not None, self.path
        name, what, file = found.groups()
        self.asked[f"{name} {what}"] += 1
        busy = name == "busy" or (name == "flaky" and self.asked[f"{name} {what}"] < 3 and what == "revision")
        if busy or name in ("gated", "absent"):
            status, code = {"gated": (403, "GatedRepo"), "absent": (401, "RepoNotFound")}.get(name, (503, ""))
            self.answer(b"{}", status, **{"X-Error-Code": code})
        elif what == "revision":
            self.answer(json.dumps({"id": f"maker/{name}", "sha": COMMIT, "siblings": []}).encode())
        elif what == "tree":
            files = [{"type": "file", "path": p, "size": len(c), "oid": f"{len(c):040d}"} for p, c in FILES.items()]
            self.answer(json.dumps(files).encode())
        else:
            self.answer(FILES[file], ETag=f'"{len(FILES[file]):040d}"', **{"X-Repo-Commit": COMMIT})

    do_HEAD = do_GET

    def answer(self, content: bytes, status: int = 200, **headers: str) -> None:
        """Send it, or its head alone."""
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def hub() -> Iterator[str]:
    """Address of a stand-in for the hub."""
    StandIn.asked.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), StandIn) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def resolve(hub: str, cache: Path, name: str) -> subprocess.CompletedProcess[str]:
    """What a command prints that asks this hub for a model."""
    code = "import sys\nfrom FlagEmbedding.utils import cli, hub\nhub._WAITS = (0, 0)\n"
    code += "print_folder = lambda: print(hub.resolve_folder(*sys.argv[1:2], cache_dir=sys.argv[2]))\n"
    code += "sys.exit(cli.entry_point(print_folder)())"
    environment = {**os.environ, "HF_ENDPOINT": hub, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, "-c", code, name, str(cache)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_a_model_is_downloaded_once_and_serves_when_the_hub_is_gone(hub: str, tmp_path: Path) -> None:
    for asked, address in ((1, hub), (2, hub), (2, "http://127.0.0.1:9")):  # the last: nobody answers there
        done = resolve(address, tmp_path, "maker/good")
        assert done.returncode == 0, done.stderr
        folder = Path(done.stdout.strip())
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
            name: content for name, content in FILES.items() if name != "picture.png"
        }
        assert StandIn.asked["good revision"] == asked


def test_a_hub_that_is_busy_for_a_moment_is_asked_again(hub: str, tmp_path: Path) -> None:
    done = resolve(hub, tmp_path, "maker/flaky")
    assert done.returncode == 0 and StandIn.asked["flaky revision"] == 3, done.stderr
    assert done.stderr.count("the hub is busy or out of order (503); asking again") == 2


@pytest.mark.parametrize(
    ("name", "why", "asked"),
    [
        ("busy", r"the hub is busy or out of order \(503\)", 3),
        ("gated", r"no permission \(403\): accept its terms on its page there, and log in", 1),
        ("absent", r"no repository of that name to be seen \(401\): check the name; if it is private, log in", 1),
    ],
)
def test_every_refusal_of_the_hub_says_what_to_do(hub: str, tmp_path: Path, name: str, why: str, asked: int) -> None:
    done = resolve(hub, tmp_path, f"maker/{name}")
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and re.match(f"error: maker/{name} is not a folder here, and .*{why}", last), (
        done.stderr
    )
    assert "Traceback" not in done.stderr and StandIn.asked[f"{name} revision"] == asked


def test_a_hub_that_is_not_there_is_named(tmp_path: Path) -> None:
    done = resolve("http://127.0.0.1:9", tmp_path, "maker/model")
    assert done.returncode == 2 and "the hub cannot be reached (ConnectError)" in done.stderr.splitlines()[-1]


def cached(cache: Path, kind: str, repo: str, names: list[str], revision: str = "main", commit: str = "a" * 40) -> Path:
    """A repository as huggingface_hub keeps it."""
    folder = cache / f"{kind}s--{repo.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / revision).write_text(commit)
    snapshot = folder / "snapshots" / commit
    for name in names:
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).write_text(f"{repo} {revision} {name}")
    return snapshot


def test_a_model_in_the_cache_is_found_by_name_and_revision(tmp_path: Path) -> None:
    main = cached(tmp_path, "model", "maker/model", ["config.json", "model.safetensors"])
    other = cached(tmp_path, "model", "maker/model", ["config.json", "model.safetensors"], "v2", "b" * 40)
    cache = str(tmp_path)
    assert resolve_folder("maker/model", cache_dir=cache) == main
    assert resolve_folder("maker/model", cache_dir=cache, revision="v2") == other
    assert download("maker/model", ["*.json"], cache_dir=cache, revision="v2") == other
    pickled = cached(tmp_path, "model", "maker/older", ["config.json", "pytorch_model.bin"])
    assert resolve_folder("maker/older", cache_dir=cache) == pickled


@pytest.mark.parametrize("name", ["maker/absent", "absent"])
def test_a_model_that_is_nowhere_is_one_line(tmp_path: Path, name: str) -> None:
    with pytest.raises(
        UsageError,
        match=rf"^{name} is not a folder here, .* HF_HUB_OFFLINE is set; ask her$",
    ) as caught:
        resolve_folder(name, cache_dir=str(tmp_path), hint="ask her")
    assert "\n" not in str(caught.value)
    with pytest.raises(HubError):
        download(name, ["*"], cache_dir=str(tmp_path))


def test_a_path_that_is_no_checkpoint_is_never_taken_to_the_hub(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for name in (tmp_path / "file", "a/b/c", "/nowhere/model", "name with space", ""):
        with pytest.raises(UsageError, match=r"is neither a checkpoint folder nor a hub id|is no checkpoint"):
            resolve_folder(name)
    with pytest.raises(UsageError, match=r"is no checkpoint: it holds no config.json"):
        resolve_folder(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert resolve_folder(str(tmp_path)) == tmp_path


def test_a_file_of_a_dataset_comes_from_the_first_place_that_has_it(tmp_path: Path) -> None:
    places = [tmp_path / "one", tmp_path / "two"]
    cache = tmp_path / "cache"
    snapshot = cached(cache, "dataset", "maker/data", ["a/docs-0.gz", "a/docs-1.gz"])
    found = resolve_dataset("maker/data", "a", pattern="a/docs-*", places=places, cache_dir=str(cache))
    assert found == snapshot / "a"
    (places[1] / "a").mkdir(parents=True)
    assert resolve_dataset("maker/data", "a", places=places, cache_dir=str(cache)) == places[1] / "a"
    (places[0] / "a").mkdir(parents=True)
    assert resolve_dataset("maker/data", "a", places=places, cache_dir=str(cache)) == places[0] / "a"
    assert resolve_dataset("maker/data", "a/docs-1.gz", cache_dir=str(cache)) == snapshot / "a" / "docs-1.gz"
    with pytest.raises(HubError, match="the dataset holds no such file"):
        resolve_dataset("maker/data", "b", cache_dir=str(cache))
    with pytest.raises(HubError):  # a model of that name is no dataset
        cached(cache, "model", "maker/model", ["x"])
        resolve_dataset("maker/model", "x", cache_dir=str(cache))
