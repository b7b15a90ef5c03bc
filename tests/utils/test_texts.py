"""What counts as text, which texts are the same, and what the encoders refuse, with its place."""

from __future__ import annotations

from unicodedata import normalize

import pytest
import sentencepiece

from FlagEmbedding.utils.texts import half_pair, is_blank, normalize_text, text_key

SENTENCE = "رود کارون پرآب‌ترین رود ایران است"


@pytest.mark.parametrize(
    "text",
    ["", " \t\r\n", "\u200b", "\u200c\u200d\ufeff", "\u00a0\u3000", "\u2060\u00ad", "\x00\x07", "\u2800", "\u3164",
     "\ufe0f", "\U000e0041"],
)  # fmt: skip
def test_what_nobody_sees_is_no_text(text: str) -> None:
    assert is_blank(text)
    assert not is_blank(f"{text}한{text}")


@pytest.mark.parametrize("text", ["a", "?", "0", "한", "م", "\U0001f600", "\u0301", "\ue000", "\ufffd"])
def test_whatever_is_seen_is_text(text: str) -> None:
    assert not is_blank(text)


TWINS = {
    "without the joiner": SENTENCE.replace("\u200c", ""),
    "a space for the joiner": SENTENCE.replace("\u200c", " "),
    "zero width space": SENTENCE.replace(" ", "\u200b "),
    "no-break spaces": SENTENCE.replace(" ", "\u00a0"),
    "several spaces and a line end": SENTENCE.replace(" ", "  ", 2) + "\r\n",
    "a byte order mark": "\ufeff" + SENTENCE,
    "marks of direction": f"\u200f{SENTENCE}\u200e",
    "decomposed": normalize("NFD", SENTENCE),
    "a control character": SENTENCE.replace(" ", "\x07 ", 1),
    "a soft hyphen": SENTENCE[:6] + "\u00ad" + SENTENCE[6:],
}


@pytest.mark.parametrize("twin", TWINS.values(), ids=TWINS)
def test_a_twin_is_the_same_text(twin: str) -> None:
    assert twin != SENTENCE
    assert text_key(twin) == text_key(SENTENCE)


def test_forms_of_characters_and_case_do_not_count_letters_do() -> None:
    assert text_key("Ｃａｆｅ\u0301") == text_key("café") == text_key("CAFÉ")
    assert text_key("한강") == text_key(normalize("NFD", "한강"))
    assert text_key("cafe") != text_key("café")
    assert text_key("rare") != text_key("rar")
    assert normalize_text(" a\u200cb\u00a0 c ") == "a b c"


def test_what_the_tokenizer_of_xlmr_makes_the_same_is_the_same() -> None:
    """Its normalizer, character by character within a word: where it gives the same, so does the key."""
    normalizer = sentencepiece.SentencePieceNormalizer(rule_name="nmt_nfkc")
    known = {normalizer.normalize(text): text_key(text) for text in ("ab cd", "abcd", "ab-cd")}
    same = 0
    for code in [*range(1, 0x3000), *range(0xFE00, 0x10000)]:
        text = f"ab{chr(code)}cd"
        expected = known.get(normalizer.normalize(text))
        if expected is not None and chr(code) not in "\u2581\ufffd":  # its own mark of a space; a lost character
            same += 1
            assert text_key(text) == expected, hex(code)
    assert same > 60


def test_a_whole_pair_is_no_half() -> None:
    assert half_pair("a\U0001f600") is None
    assert half_pair("a\ud83d") == 2
