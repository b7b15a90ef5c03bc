"""The record of a command line holds no token and no key."""

from __future__ import annotations

import sys

import pytest

from FlagEmbedding.utils.provenance import provenance, without_secrets


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        (["run.py", "--hub_token", "hf_x", "--seed", "3"], ["run.py", "--hub_token", "***", "--seed", "3"]),
        (["--hub-token=hf_x", "--seed=3"], ["--hub-token=***", "--seed=3"]),
        (["--api_key", "x", "--Password=y"], ["--api_key", "***", "--Password=***"]),
        (["--api_key_env", "NAME", "token", "x"], ["--api_key_env", "NAME", "token", "x"]),
        (["--hub_token"], ["--hub_token"]),
    ],
)
def test_values_of_tokens_and_keys_are_struck_out(words: list[str], kept: list[str]) -> None:
    assert without_secrets(words) == kept


def test_the_record_of_a_run_has_them_struck_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", "--hub_token", "hf_x"])
    assert "hf_x" not in str(provenance())
