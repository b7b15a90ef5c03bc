"""Contents to try: files that can be read, with a few bytes, texts or lines of them changed; and anything at all."""

from __future__ import annotations

import gzip
import json
from typing import Any

from hypothesis import strategies as st

# What breaks readers: marks, halves of pairs, NULs, line ends, quotes, numbers beyond all limits, depth, escapes.
PIECES = [
    b"", b"\n", b"\r", b"\r\n", b"\t", b" ", b'"', b"'", b"\0", b"\xff", b"\xef\xbb\xbf", b"\xff\xfe", b"\xed\xa0\x80",
    b'"\\ud800"', b'"\\udc00\\ud800"', b"\\u0000", b"null", b"true", b"[]", b"{}", b"[[]]", b'""', b"NaN", b"-Infinity",
    b"1e999", b"9" * 400, b"9" * 5000, b"-1", b"0", b"1.5", b"[" * 3000, b'{"a":' * 3000, b"\xc2\xb2", b"\xd9\xa3",
    b"\x1b[31m", b"\xe2\x80\x8b", b"\xe2\x80\xa8", b"&x [1]", b"*x", b"!!python/object:os.system", b": ", b"- ", b"{",
    b"}",
    b"[", b"]", b",", b"sha256", b"identity", b"files", b"rows", b"docid", b"_id", b"../../etc/passwd", b"x" * 70_000,
]  # fmt: skip


# What stands where another kind of value is expected.
VALUES = [
    None, True, False, 0, -1, 1.5, 10**19, 10**400, float("nan"), float("inf"), "", " ", "\u200b", "a", "a b", "1",
    "a\nb", "a\tb", "\0", "\ud800", "\ufeffa", "\x1b[31m", "../x", "x" * 70_000, [], {}, [None], [[]], [1], [""],
    {"a": None}, ["a", "b", "c"],
]  # fmt: skip


def _leaf(draw: st.DrawFn, value: Any) -> Any:
    """``value`` with one part of it replaced, left out or called otherwise."""
    if isinstance(value, dict) and value and draw(st.integers(0, 9)):
        key = draw(st.sampled_from(sorted(value)))
        kind = draw(st.integers(0, 5))
        rest = {name: item for name, item in value.items() if name != key}
        if kind == 0:
            return rest
        if kind == 1:
            return {**rest, draw(st.sampled_from(["", "a", "text", "query", "_id", "docid", "pos"])): value[key]}
        return {**value, key: _leaf(draw, value[key])}
    if isinstance(value, list) and value and draw(st.integers(0, 5)):
        place = draw(st.integers(0, len(value) - 1))
        return [*value[:place], _leaf(draw, value[place]), *value[place + 1 :]]
    return draw(st.sampled_from(VALUES))


@st.composite
def other_values(draw: st.DrawFn, seed: bytes) -> bytes:
    """``seed``, lines of JSON or one value, with a part of one value exchanged; bytes that are no JSON as they are."""
    try:
        lines = [json.loads(line) for line in seed.decode().splitlines()]
    except ValueError:
        return draw(changed(seed))
    place = draw(st.integers(0, len(lines) - 1)) if lines else 0
    lines[place : place + 1] = [_leaf(draw, line) for line in lines[place : place + 1]]
    return "".join(json.dumps(line, ensure_ascii=True) + "\n" for line in lines).encode()


@st.composite
def changed(draw: st.DrawFn, seed: bytes) -> bytes:
    """``seed`` with one to four places cut, replaced or repeated."""
    content = seed
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(content)))
        length = draw(st.one_of(st.integers(0, 8), st.integers(0, len(content))))
        kind = draw(st.integers(0, 4))
        if kind == 0:
            middle = draw(st.sampled_from(PIECES))
        elif kind == 1:
            middle = draw(st.binary(max_size=6))
        elif kind == 2:
            middle = content[start : start + length] * 2
        elif kind == 3:
            middle = bytes([draw(st.integers(0, 255))])
        else:
            middle = b""
        content = content[:start] + middle + content[start + length :]
    return content


def packed(name: str, content: bytes) -> bytes:
    """``content`` as a file of that name would hold it."""
    if name.endswith(".gz"):
        return gzip.compress(content, 1)
    if name.endswith(".zst"):
        import pyarrow

        sink = pyarrow.BufferOutputStream()
        with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
            stream.write(content)
        return bytes(sink.getvalue())
    return content


@st.composite
def files(draw: st.DrawFn, reader: Any) -> dict[str, bytes]:
    """The files of a reader: one of its seeds, changed in one file or more, before or after it is packed."""
    seed = draw(st.sampled_from(reader.seeds))
    found = {}
    for name, content in zip(reader.names, seed, strict=True):
        how = draw(st.integers(0, 9))
        if how >= 8 and len(reader.names) > 1:
            found[name] = packed(name, content)
        elif how == 0:
            found[name] = draw(st.binary(max_size=64))
        elif how == 1:
            found[name] = packed(name, b"".join(draw(st.lists(st.sampled_from(PIECES), max_size=12))))
        elif how == 2:
            found[name] = draw(changed(packed(name, content)))
        elif how < 6:
            found[name] = packed(name, draw(other_values(content)))
        else:
            found[name] = packed(name, draw(changed(content)))
    return found
