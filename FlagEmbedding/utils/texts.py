"""What is text and what is none, and when two texts are the same: one rule for files, mining, checks and encoders.

A tokenizer such as XLM-R's drops or turns into a space what no reader sees: zero width characters, marks of direction,
control characters, unusual spaces; and it composes what is written in parts. So such differences do not count here.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from hashlib import blake2b

# White space, control characters and Unicode's Default_Ignorable_Code_Point (zero width, fillers, selectors, tags).
_UNSEEN = (
    r"\s\x00-\x1f\x7f-\x9f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f"
    r"\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
)
_UNSEEN_RUN = re.compile(f"[{_UNSEEN}]+")
_SEEN = re.compile(f"[^{_UNSEEN}\u2800]")  # Braille's empty cell is a character of its own, but nothing to read


def is_blank(text: str) -> bool:
    """Whether ``text`` holds nothing to read: it is empty, or all white space, zero width or control characters."""
    return _SEEN.search(text) is None


def half_pair(text: str) -> int | None:
    """Place (from 1) of the first half of a surrogate pair, which JSON can write and UTF-8 cannot; None: no such."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return error.start + 1
    return None


def normalize_text(text: str) -> str:
    """``text`` for comparison: NFKC, lower case, one space for whatever is not seen, none at the ends."""
    return _UNSEEN_RUN.sub(" ", unicodedata.normalize("NFKC", text).casefold()).strip()


def text_key(text: str) -> bytes:
    """Sixteen bytes that are equal for texts that count as the same: what is not seen does not count at all."""
    seen = _UNSEEN_RUN.sub("", unicodedata.normalize("NFKC", text).casefold())
    return blake2b(seen.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def text_keys(texts: Iterable[str]) -> set[bytes]:
    """The keys of some texts."""
    return {text_key(text) for text in texts}
