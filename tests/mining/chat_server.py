"""A real HTTP server that speaks chat/completions, as well or as badly as it is told.

It notes every request: what came (passage, body, time) and the kind of response. The answer is a function of the
passage and of how often it was asked about, so that every right way of asking ends with the same file.
"""

from __future__ import annotations

import gzip
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def passage_of(message: str) -> str:
    """The passage in a prompt that wraps it in <p>…</p>."""
    return message.split("<p>", 1)[1].rsplit("</p>", 1)[0]


def good_query(passage: str) -> str:
    """A short question out of the passage's own words, every other one: right script, no copy."""
    words = passage.split()[:12:2]
    return " ".join(reversed(words)) + "?"


class ChatServer(ThreadingHTTPServer):
    """``script(passage, nth request about it)`` gives the kind of each response: see ``Handler.respond``."""

    daemon_threads = True

    def __init__(
        self, script: Callable[[str, int], str] = lambda passage, nth: "good", *, delay: float = 0.0,
        key: str | None = None, answer: Callable[[str, int], str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.delay, self.key = script, delay, key
        self.answer = answer or (lambda passage, nth: good_query(passage))
        self.requests: list[dict[str, Any]] = []
        self.counts: Counter[str] = Counter()
        self.lock = threading.Lock()
        self.under_way = self.most_under_way = 0
        self.written = 0  # bytes of answers without end

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def note(self, entry: dict[str, Any]) -> None:
        with self.lock:
            self.requests.append(entry)

    def __enter__(self) -> ChatServer:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that was killed leaves broken pipes behind


class Handler(BaseHTTPRequestHandler):
    server: ChatServer
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        passage = passage_of(body["messages"][-1]["content"])
        with server.lock:
            nth = server.counts[passage]
            server.counts[passage] += 1
            server.under_way += 1
            server.most_under_way = max(server.most_under_way, server.under_way)
        kind = server.script(passage, nth)
        if self.path != "/v1/chat/completions" and not kind.startswith("to:"):
            kind = "404"
        if server.key is not None and self.headers.get("Authorization") != f"Bearer {server.key}":
            kind = "401"
        server.note(
            {"passage": passage, "nth": nth, "kind": kind, "time": time.time(), "body": body, "headers": self.headers}
        )
        time.sleep(server.delay)
        try:
            self.respond(kind, passage, nth, body)
        finally:
            with server.lock:
                server.under_way -= 1

    def respond(self, kind: str, passage: str, nth: int, body: dict[str, Any]) -> None:
        if kind == "good":
            self.send(200, self.completion(self.server.answer(passage, nth), body))
        elif kind == "cut":
            self.send(200, self.completion(self.server.answer(passage, nth)[:8], body, finish="length"))
        elif kind == "slow":
            time.sleep(1.5)
            self.send(200, self.completion(self.server.answer(passage, nth), body))
        elif kind == "html":
            self.send(200, "<html>Bad gateway</html>", "text/html")
        elif kind == "half":
            self.send(200, self.completion(self.server.answer(passage, nth), body)[:-20])
        elif kind == "no_choices":
            self.send(200, json.dumps({"id": "x", "object": "chat.completion", "choices": []}))
        elif kind == "null":
            self.send(200, self.completion(None, body))
        elif kind == "hangup":
            self.close_connection = True
        elif kind == "coded":
            headers = {"Content-Encoding": "gzip", "Content-Type": "application/json; charset=latin-1"}
            answer = json.loads(self.completion(self.server.answer(passage, nth), body))
            self.send(200, gzip.compress(json.dumps(answer, ensure_ascii=False).encode()), headers=headers)
        elif kind == "endless":
            self.close_connection = True
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n")
            while self.server.written < 1 << 26:  # until the client hangs up
                self.server.written += self.wfile.write(b" " * 65_536)
        elif kind == "drip":
            self.close_connection = True
            for byte in b"HTTP/1.1 200 OK\r\nX-Padding: " + b"x" * 400:
                self.wfile.write(bytes([byte]))
                time.sleep(0.05)
        elif kind.startswith("to:"):
            self.send(307, "", headers={"Location": kind[3:]})
        elif kind.startswith("body:"):
            self.send(200, kind[5:])
        elif kind.startswith("429"):
            headers = {"Retry-After": kind.split(":")[1]} if ":" in kind else {}
            self.send(429, '{"error": {"message": "slow down"}}', headers=headers)
        elif kind == "quota":
            self.send(429, '{"error": {"message": "no money left", "code": "insufficient_quota"}}')
        elif kind == "401":
            key = self.headers.get("Authorization", "").removeprefix("Bearer ")
            self.send(401, json.dumps({"error": {"message": f"Incorrect API key provided: {key}"}}))
        else:
            self.send(int(kind), json.dumps({"error": {"message": f"status {kind}"}}))

    def completion(self, text: str | None, body: dict[str, Any], finish: str = "stop") -> str:
        return json.dumps({
            "id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": body["model"],
            "choices": [{"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text}}],
            "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15},
        })  # fmt: skip

    def send(
        self, status: int, text: str | bytes, kind: str = "application/json", headers: dict[str, str] | None = None
    ) -> None:
        data = text.encode() if isinstance(text, str) else text
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


FAILURES = ("500", "503", "429", "429:0", "html", "half", "no_choices", "hangup")


def failing(share: float, kinds: tuple[str, ...] = FAILURES, seed: int = 1) -> Callable[[str, int], str]:
    """A script in which that share of all requests fails, in all the ways there are."""
    generator = random.Random(seed)
    return lambda passage, nth: generator.choice(kinds) if generator.random() < share else "good"
