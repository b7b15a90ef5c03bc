"""Keys and passwords are struck out of what is printed or written."""

from __future__ import annotations

import re
from typing import Any

STRUCK = "***"
_SHORTEST = 7  # what a server of one's own takes as a key ("EMPTY", "ollama") may be a word of an answer
# By shape: the password of an address, the keys of the usual services, what stands after "Bearer" or "api_key=".
_CREDENTIALS = re.compile(r"(?<=://)[^\s/?#\"']+(?=@)")  # a password may hold an @
_KEYS = re.compile(
    r"\b(?:sk|pk|rk|gsk|hf|xai|r8|ghp|gho|github_pat|glpat|xox[abps]|nvapi|pplx|tgp)[-_][\w-]{16,}|\bAIza[\w-]{30,}"
    r"|\bAKIA[A-Z0-9]{16}\b|\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]+|(?<=[Bb]earer )[^\s\"',]{8,}"
)
_NAMED = re.compile(
    r"(?i)((?:(?:api[-_]?|access[-_]?|[?&])(?:key|token)|[?&](?:sig|code|password|secret))"
    r"[\"'\\]*\s*[=:]\s*[\"'\\]*)[^\s\"'\\&,}]{8,}"
)


def strike(text: str, key: str | None = None) -> str:
    """``text`` without ``key``, and without anything that has the shape of a key or a password."""
    if key and len(key) >= _SHORTEST:
        text = text.replace(key, STRUCK)
    return _NAMED.sub(rf"\1{STRUCK}", _KEYS.sub(STRUCK, _CREDENTIALS.sub(STRUCK, text)))


def strike_all(value: Any, key: str | None = None) -> Any:
    """A JSON value whose texts are struck, at any depth."""
    if isinstance(value, dict):
        return {name: strike_all(item, key) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [strike_all(item, key) for item in value]
    return strike(value, key) if isinstance(value, str) else value
