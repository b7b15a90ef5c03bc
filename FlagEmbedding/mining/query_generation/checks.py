"""Whether what a model wrote can serve as the query of a passage: script and language, one line, length, no copy.

Script is told by Unicode's names of the letters. Half of the query's words must hold a letter of the passage's script,
so that "HTML5와 XHTML 차이" is Korean and "What is 한강?" is not. Between languages of one script py3langid decides,
and only where it is sure of both texts.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from functools import cache, lru_cache
from typing import Any

from FlagEmbedding.mining.query_generation.answer_cache import Answer
from FlagEmbedding.mining.query_generation.arguments import CheckArguments
from FlagEmbedding.utils.pages import CONTROLS
from FlagEmbedding.utils.texts import normalize_text

REASONS = {
    "empty": "no text came back",
    "cut_off": "the answer ended at --max_tokens",
    "refusal": "the model declines to answer",
    "several_lines": "more than one line",
    "control": "holds control characters",
    "markup": "JSON, XML or code, and no query",
    "too_short": "fewer characters than --min_length",
    "too_long": "more characters than --max_length, or longer than the passage",
    "other_script": "not in the script of the passage",
    "other_language": "the passage's script, another language",
    "copy": "copied from the passage",
    "repeated": "a query of the rows, or the same for several passages",
    "not_retrieved": "does not bring its passage back into the top k",
}

_COPY_WORDS, _COPY_CHARACTERS, _COPY_SHARE = 5, 20, 0.8
_WRAPPED = re.compile(
    r"^(?:```\w*\s*(.*?)\s*```|\"(.*)\"|'(.*)'|“(.*)”|«(.*)»|「(.*)」|\*\*(.*)\*\*|`(.*)`)$", re.DOTALL
)
_LABEL = re.compile(
    r"^(?:[-*•]\s+|\d{1,2}[.)]\s+)?"
    r"(?:(?:search\s+)?quer(?:y|ies)|question|질문|검색어|쿼리|پرسش|سؤال|سوال|प्रश्न|सवाल|問|问题)\s*[:：]\s*",
    re.IGNORECASE,
)  # fmt: skip
_BULLET = re.compile(r"^(?:[-*•]\s+|\d{1,2}[.)]\s+)")
_REFUSAL = re.compile(
    r"(?:i(?:['’]m| am) (?:very |so |really )?(?:sorry|unable|not able)|sorry,|unfortunately,? i|i apologi[sz]e|"
    r"i (?:can(?:['’]t|not| not)|won['’]t|do not|don['’]t) |as an? (?:ai|large language)\b|"
    r"죄송|미안하지만|متأسف|متاسف|عذرًا|عذرا|آسف|क्षमा कर|माफ़ कर|माफ कर|抱歉|对不起|對不起|申し訳|"
    r"lo siento|je suis désolé|désolé,|es tut mir leid|к сожалению, я|извините)",
    re.IGNORECASE,
)
_MARKUP = re.compile(r"[\[{<].*[\]}>]|.*(?:\{\s*\"|</\w+>|```).*", re.DOTALL)
_THOUGHTS = re.compile(r"<think>.*?</think>", re.DOTALL)

# Told apart from each other: MIRACL's 18, and others that an answer may come in. Fewer are told more surely than all.
LANGUAGES = ("ar", "bn", "de", "en", "es", "fa", "fi", "fr", "hi", "id", "it", "ja", "ko", "mr", "ne", "nl", "pt", "ru",
             "sw", "te", "th", "uk", "ur", "yo", "zh")  # fmt: skip
_SURE = 0.9


@lru_cache(maxsize=65_536)
def script_of(character: str) -> str | None:
    """The script of a letter by its Unicode name (kana and Han by group); None for what is no letter."""
    if not character.isalpha() and unicodedata.category(character) not in ("Mn", "Mc"):
        return None
    name = unicodedata.name(character, "").split(" ", 1)[0]
    if name in ("COMBINING", "MODIFIER", ""):
        return None
    return {"HIRAGANA": "KANA", "KATAKANA": "KANA", "KATAKANA-HIRAGANA": "KANA", "CJK": "HAN"}.get(name, name)


def main_script(text: str) -> str | None:
    """The script of most letters; kana makes a text Japanese, however much Han it holds. None without letters."""
    counts = Counter(script for script in map(script_of, text) if script)
    if not counts:
        return None
    if counts["KANA"] and counts["KANA"] + counts["HAN"] > sum(counts.values()) / 2:
        return "KANA"
    return max(counts, key=lambda script: (counts[script], script))


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    identifier.set_languages(LANGUAGES)
    return identifier


def guess_language(text: str, sure: float = 0.0) -> str | None:
    """A language code out of ``LANGUAGES``; None for a text without letters or, below ``sure`` (0 to 1), in doubt."""
    if main_script(text) is None:
        return None
    language, confidence = _identifier().classify(text)
    return str(language) if confidence >= sure else None


def clean(text: str) -> str:
    """An answer without what models put around it: thoughts, quotation marks, a label, a bullet, code fences."""
    text = _THOUGHTS.sub("", text).strip()
    for _ in range(3):
        before = text
        match = _WRAPPED.match(text)
        if match:
            text = next(group for group in match.groups() if group is not None).strip()
        text = _BULLET.sub("", _LABEL.sub("", text)).strip()
        if text == before:
            break
    return unicodedata.normalize("NFC", text)


def judge(answer: Answer, passage: str, limits: CheckArguments) -> tuple[str, str | None]:
    """``(query, reason)`` for an answer about ``passage``; the reason (of ``REASONS``) is None for a good one."""
    query = clean(answer.text)
    return query, _reason(query, answer.finish, passage, limits)


def _reason(query: str, finish: str, passage: str, limits: CheckArguments) -> str | None:
    if finish == "length":
        return "cut_off"
    if not query:
        return "empty"
    if finish == "content_filter" or _REFUSAL.match(query):
        return "refusal"
    if _MARKUP.fullmatch(query):
        return "markup"
    if len(query.splitlines()) > 1:
        return "several_lines"
    if CONTROLS.search(query):
        return "control"
    if len(query) < limits.min_length:
        return "too_short"
    if len(query) > limits.max_length or len(query) > max(len(passage), limits.min_length):
        return "too_long"
    if not same_script(query, passage):
        return "other_script"
    if other_language(query, passage):
        return "other_language"
    return "copy" if is_copy(query, passage) else None


def same_script(query: str, passage: str) -> bool:
    """True when half of the query's words hold a letter of the passage's main script (Japanese: kana or Han)."""
    script = main_script(passage)
    if script is None:
        return True
    wanted = {"KANA", "HAN"} if script == "KANA" else {script}
    words = [{s for s in map(script_of, word) if s} for word in query.split()]
    lettered = [scripts for scripts in words if scripts]
    return bool(lettered) and 2 * sum(bool(scripts & wanted) for scripts in lettered) >= len(lettered)


def other_language(query: str, passage: str) -> bool:
    """True when query and passage clearly are in different languages."""
    here = guess_language(query, _SURE)
    return here is not None and guess_language(passage, _SURE) not in (None, here)


def is_copy(query: str, passage: str) -> bool:
    """True when at least 80 % of the query stands in the passage in one piece.

    Phrases of under 5 words or 20 characters may: that is how people search.
    """
    query, passage = (re.sub(r"[^\w\s]+", "", normalize_text(text)) for text in (query, passage))
    query, passage = " ".join(query.split()), " ".join(passage.split())
    if len(query) < _COPY_CHARACTERS or (" " in passage and len(query.split()) < _COPY_WORDS):
        return query == passage
    length = max(1, int(_COPY_SHARE * len(query)))
    return any(query[start : start + length] in passage for start in range(len(query) - length + 1))
