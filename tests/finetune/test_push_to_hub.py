"""``--push_to_hub`` against a stand-in for the hub's interface: what was saved at the end arrives, whole."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from finetune.helpers import rows, run_training, train_words, write_rows

TOKEN = "hf_" + "s" * 34
Train = Callable[..., subprocess.CompletedProcess[str]]
COMMIT = "c" * 40


class Hub(ThreadingHTTPServer):
    """What was asked, and what was committed."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), StandIn)
        self.asked: list[str] = []
        self.commits: list[dict[str, bytes]] = []
        self.status: dict[str, int] = {}  # of what is refused, by a part of its path


class StandIn(BaseHTTPRequestHandler):
    """As much of the hub's interface as an upload asks for."""

    server: Hub

    def do_POST(self) -> None:
        """Who is this, make a repository or a branch, how to upload, and the commit itself."""
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.asked.append(self.path)
        status = next((code for part, code in self.server.status.items() if part in self.path), 200)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            status = 401
        self.answer(status, self.found(content) if status == 200 else {"error": "no"})

    do_GET = do_POST

    def found(self, content: bytes) -> dict[str, Any]:
        """The answer to what is allowed."""
        if self.path.endswith("/whoami-v2"):
            return {"name": "maker", "type": "user"}
        if self.path.endswith("/repos/create"):
            return {"url": f"http://127.0.0.1/maker/{json.loads(content)['name']}", "id": "x"}
        if "/preupload/" in self.path:
            files = json.loads(content)["files"]
            return {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
        if "/commit/" in self.path:
            entries = [json.loads(line) for line in content.splitlines()]
            files = [entry["value"] for entry in entries if entry["key"] == "file"]
            self.server.commits.append({f["path"]: base64.b64decode(f["content"]) for f in files})
            return {"commitUrl": "http://127.0.0.1/maker/out/commit/c", "commitOid": COMMIT, "success": True}
        return {"id": "maker/out", "sha": COMMIT, "siblings": [], "errors": [], "warnings": []}

    def answer(self, status: int, value: dict[str, Any]) -> None:
        """JSON."""
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", rows(12)).parent


@pytest.fixture
def train(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Callable[..., subprocess.CompletedProcess[str]]:
    """run.py with this hub, which a process would read from its environment."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{hub.server_port}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)

    def run(words: list[str], token: str = TOKEN) -> subprocess.CompletedProcess[str]:
        monkeypatch.setenv("HF_TOKEN", token)
        return run_training([*words, "--push_to_hub", "True"], check=False)

    return run


def test_the_folder_that_was_saved_arrives_whole(
    train: Train, hub: Hub, tiny_model_dir: Path, data: Path, tmp_path: Path
) -> None:
    from sentence_transformers import SentenceTransformer

    output = tmp_path / "out"
    words = train_words(
        tiny_model_dir, data, output, max_steps=2, save_strategy="steps", save_steps=1, moe="intermediate",
        num_experts=2, sentence_pooling_method="mean", hub_token=TOKEN, query_instruction_for_retrieval="find: ",
    )  # fmt: skip
    answer = train(words, token="")
    assert answer.returncode == 0, answer.stderr[-3000:]
    (files,) = hub.commits
    saved = {p.relative_to(output).as_posix(): p for p in output.rglob("*") if p.is_file()}
    expected = {name: path.read_bytes() for name, path in saved.items() if not name.startswith("checkpoint-")}
    assert files == expected and {"modules.json", "1_Pooling/config.json", "README.md"} <= set(files)
    assert any(name.startswith("modeling_") for name in files)
    card = files["README.md"].decode()
    assert "FlagModel('maker/out'" in card and "library_name: sentence-transformers" in card
    assert not any(TOKEN.encode() in content for content in files.values())
    assert not any(name.startswith((".", "training_args.bin")) for name in files)
    copy = tmp_path / "copy"
    for name, content in files.items():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(content)
    ours, theirs = (SentenceTransformer(str(p), trust_remote_code=True).encode("a river") for p in (output, copy))
    assert (ours == theirs).all()


def test_a_branch_and_a_name_and_an_own_card(
    train: Train, hub: Hub, tiny_model_dir: Path, data: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "README.md").write_text("mine")
    words = train_words(
        tiny_model_dir, data, output, max_steps=1, hub_model_id="maker/other", hub_revision="v2", hub_strategy="end",
        eval_rows=2, eval_steps=1, report=True,
    )  # fmt: skip
    answer = train(words)
    assert answer.returncode == 0, answer.stderr[-3000:]
    assert "/api/models/maker/other/branch/v2" in hub.asked
    assert any(re.fullmatch(r"/api/models/maker/other/commit/v2.*", path) for path in hub.asked)
    assert hub.commits[0]["README.md"] == b"mine"
    # These hold rows of the training data.
    assert all((output / name).exists() for name in ("dev/held_out", "dev.html", "report.md"))
    assert not [name for name in hub.commits[0] if name.startswith(("dev", "report.md"))]


@pytest.mark.parametrize(
    ("part", "status", "line"),
    [
        ("whoami", 401, "error: --push_to_hub: "),
        ("whoami", 503, "busy or out of order (503)"),
        ("commit", 403, "may not write there (403)"),
        ("repos/create", 403, "may not write there (403)"),
    ],
)
def test_what_the_hub_refuses_is_one_line(
    part: str, status: int, line: str, train: Train, hub: Hub, tiny_model_dir: Path, data: Path, tmp_path: Path
) -> None:
    hub.status |= {part: status} | ({"/api/models/out": 404} if part == "repos/create" else {})
    model = tiny_model_dir if part != "whoami" else tmp_path / "absent"
    answer = train(train_words(model, data, tmp_path / "out", max_steps=1))
    assert answer.returncode == 2 and "Traceback" not in answer.stderr, answer.stderr[-2000:]
    (error,) = [text for text in answer.stderr.splitlines() if text.startswith("error: ")]
    assert line in error
    # Asked before the model is looked at; where the upload itself fails, nothing is lost.
    assert (tmp_path / "out/model.safetensors").exists() == (part != "whoami")


@pytest.mark.parametrize("words", [["--hub_strategy", "checkpoint"], ["--hub_always_push", "True"]])
def test_other_uploads_are_refused(words: list[str], train: Train, hub: Hub, tmp_path: Path) -> None:
    answer = train([*train_words(tmp_path / "absent", tmp_path / "none", tmp_path / "out"), *words])
    assert answer.returncode == 2 and f"{words[0]}" in answer.stderr and "at the end, once" in answer.stderr
    assert hub.asked == []
