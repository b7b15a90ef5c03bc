"""The frame of every command: what a terminal without some characters and a user's mistake do to it."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Literal

import pytest

from FlagEmbedding.finetune.parsing import parse_arguments
from FlagEmbedding.utils.cli import check_words, choice, flag_values, internal, option, parse_whole, switch
from FlagEmbedding.utils.errors import UsageError

CODE = """
import sys
from FlagEmbedding.utils.cli import entry_point
from FlagEmbedding.utils.errors import UsageError

@entry_point
def main():
    print("2 × 한국")
    if "fail" in sys.argv:
        raise UsageError("expected ×, got 한")

sys.exit(main())
"""


def run(encoding: str, *words: str) -> subprocess.CompletedProcess[bytes]:
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    return subprocess.run([sys.executable, "-c", CODE, *words], env=environment, capture_output=True, check=False)


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [("ascii", rb"2 \xd7 \ud55c\uad6d"), ("cp1252", b"2 \xd7 \\ud55c\\uad6d"), ("utf-8", "2 × 한국".encode())],
)
def test_a_terminal_without_a_character_does_not_end_a_command(encoding: str, expected: bytes) -> None:
    done = run(encoding)
    assert (done.returncode, done.stdout.strip()) == (0, expected), done.stderr


def test_a_mistake_is_one_line_and_exit_code_2() -> None:
    done = run("ascii", "fail")
    assert done.returncode == 2
    assert done.stderr.strip() == rb"error: expected \xd7, got \ud55c"


@dataclass(frozen=True)
class Thing:
    """Things.

    More words.
    """

    size: int = option(3, "how large", "--use_size", metavar="N")
    names: list[str] = option(["a"], "their names")
    half: bool = switch(False, "half of it", "--use_half")
    maybe: bool | None = switch(None, "not said")
    kind: Literal["cls", "mean"] | None = choice(Literal["cls", "mean"], None, "which")
    text: str | None = option(None, "a text")
    place: float = internal(0.5)


@dataclass(frozen=True)
class Both:
    """A command."""

    thing: Thing


def told(*words: str) -> Thing:
    return parse_whole(Both, words, "About.", "Example: x").thing


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], True),
        *((([word]), True) for word in ("y", "YES", "True", "t", "1", "on")),
        *((([word]), False) for word in ("n", "no", "False", "F", "0", "off")),
    ],
)
def test_a_switch_stands_bare_or_with_any_word_for_yes_and_no(words: list[str], expected: bool) -> None:
    assert told("--half", *words).half is expected
    assert told("--use_half", *words, "--maybe", *words).maybe is expected


def test_defaults_other_spellings_and_lists() -> None:
    assert told() == Thing()
    assert told().maybe is None and told().kind is None and told().names == ["a"]
    found = told("--use_size", "5", "--names", "b", "c", "--kind", "mean", "--text", "x")
    assert (found.size, found.names, found.kind, found.text) == (5, ["b", "c"], "mean", "x")
    assert told().names is not told().names, "a list of one command line is not another's"
    assert flag_values(found) == {
        "size": 5, "names": ["b", "c"], "half": False, "maybe": None, "kind": "mean", "text": "x",
    }  # fmt: skip


@pytest.mark.parametrize(
    "words", ["--half maybe", "--size x", "--siz 4", "--kind max", "--place 1", "--unknown", "word", "--names"]
)
def test_what_is_no_flag_or_no_value_is_refused_in_one_line(words: str) -> None:
    with pytest.raises(UsageError, match=r"\(--help lists all options\)$") as caught:
        told(*words.split())
    assert "\n" not in str(caught.value)


def test_a_word_that_is_no_utf8_is_refused() -> None:
    words = ["--query_instruction_for_retrieval", os.fsdecode(b"caf\xe9: ")]
    message = "--query_instruction_for_retrieval: 'caf.*udce9: ' is not UTF-8 text"
    for parse in (check_words, parse_arguments):
        with pytest.raises(UsageError, match=message) as caught:
            parse(words)
        str(caught.value).encode()


def test_help_has_headings_defaults_spellings_and_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        told("--help")
    page = capsys.readouterr().out
    assert "[options]" in page and "About." in page and "Example: x" in page and "\nThings:\n" in page
    assert "--size, --use_size N" in page and "--half, --use_half [BOOL]" in page
    assert "how large (default: 3)" in page and "{cls,mean}" in page and "place" not in page
    assert "a text\n" in page and "None" not in page


def test_interrupted_and_a_reader_that_left() -> None:
    code = "import sys, os\nfrom FlagEmbedding.utils.cli import entry_point\n"
    code += "@entry_point\ndef main():\n    raise KeyboardInterrupt if 'stop' in sys.argv else BrokenPipeError\n"
    code += "sys.exit(main())"
    for word, expected in (("stop", (130, "interrupted\n")), ("pipe", (141, ""))):
        done = subprocess.run([sys.executable, "-c", code, word], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == expected


def test_only_the_main_process_tells_what_it_does() -> None:
    code = "from FlagEmbedding.utils.logging import configure_logging, get_logger\nimport logging\n"
    code += "configure_logging()\nlog = get_logger('FlagEmbedding.x')\nlog.info('said')\nlog.error('wrong')\n"
    code += "logging.getLogger('other').info('noise')"
    for rank, expected in (("0", ["said", "wrong"]), ("1", ["wrong"])):
        environment = {**os.environ, "RANK": rank}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert [line.split()[-1] for line in done.stderr.splitlines()] == expected and done.stdout == ""
