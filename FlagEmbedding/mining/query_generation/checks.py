"""Whether what a model wrote can serve as the query of a passage: script and language, one line, length, no copy.

Script is told by Unicode's names of the letters. Half of the query's words must hold a letter of the passage's script,
so that "HTML5와 XHTML 차이" is Korean and "What is 한강?" is not. Between languages of one script, function words (and
the letters that Persian and Arabic do not share) decide, and only where they speak clearly.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

from FlagEmbedding.mining.common.alignment import normalize_text
from FlagEmbedding.mining.query_generation.answer_cache import Answer

REASONS = {
    "empty": "no text came back",
    "cut_off": "the answer ended at --max_tokens",
    "several_lines": "more than one line",
    "too_short": "fewer characters than --min_length",
    "too_long": "more characters than --max_length, or longer than the passage",
    "other_script": "not in the script of the passage",
    "other_language": "the passage's script, another language",
    "copy": "copied from the passage",
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
_THOUGHTS = re.compile(r"<think>.*?</think>", re.DOTALL)

# Function words that sister languages do not share; a language is named where they speak for it alone.
_FUNCTION_WORDS = {
    "en": "the of and is what which who how does did was were are with from",
    "de": "der die das und ist wer wie wurde nicht mit welche welcher ein eine",
    "fr": "le les des est qui que quel quelle dans une pour avec sont comment",
    "es": "el los las es qué quién cuál cómo una por para con fue dónde",
    "fi": "ja on mikä kuka missä miten milloin oli ovat mitä että kuinka",
    "id": "yang dan di adalah apa siapa bagaimana dengan dari untuk pada kapan",
    "sw": "na ya wa ni nini nani kwa katika gani lini wapi cha",
    "yo": "ni ti àwọn kí wọn fún nínú ṣe jẹ́ tí",
    "fa": "است از که به چه در را این کدام چگونه بود شد می برای",
    "ar": "من في على ما هي هو التي الذي إلى متى كيف هل أين كان",
    "ur": "ہے میں کی کے کا سے کیا اور پر نے ہیں تھا",
    "hi": "है में की के का से क्या और पर ने हैं था किस कौन",
    "mr": "आहे आणि च्या मध्ये काय होते होता कोण किती आहेत",
    "ne": "छ र मा को ले हो के थियो हुन् गर्न",
}
_WORDS = {language: frozenset(words.split()) for language, words in _FUNCTION_WORDS.items()}
_BY_SCRIPT = {"HANGUL": "ko", "KANA": "ja", "DEVANAGARI": "hi", "BENGALI": "bn", "TELUGU": "te", "THAI": "th",
              "CYRILLIC": "ru", "HAN": "zh"}  # fmt: skip
_PERSIAN, _ARABIC = frozenset("پچژگکی"), frozenset("يكةى")


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


def guess_language(text: str) -> str | None:
    """A language code by script and function words; None where they do not say."""
    script = main_script(text)
    if script in ("LATIN", "ARABIC", "DEVANAGARI"):
        named = language_by_words(text)
        if named is None and script == "ARABIC":
            return "fa" if set(text) & _PERSIAN else "ar"
        return named or _BY_SCRIPT.get(script)
    return _BY_SCRIPT.get(script or "")


def language_by_words(text: str) -> str | None:
    """The language whose function words come most often, at least two and half as many again as any other's."""
    counts = Counter(re.findall(r"[^\W\d_](?:[^\W\d_]|[\u0300-\u036f\u0900-\u0963\u200c])*", text.lower()))
    found = [(sum(counts[word] for word in words), language) for language, words in _WORDS.items()]
    best, second = sorted(found, reverse=True)[:2]
    return best[1] if best[0] >= 2 and best[0] >= 1.5 * second[0] else None


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


@dataclass(frozen=True)
class QueryChecks:
    """The limits; lengths in characters."""

    min_length: int = 5
    max_length: int = 200

    def judge(self, answer: Answer, passage: str) -> tuple[str, str | None]:
        """``(query, reason)`` for an answer about ``passage``; the reason (of ``REASONS``) is None for a good one."""
        query = clean(answer.text)
        return query, self._reason(query, answer.finish, passage)

    def _reason(self, query: str, finish: str, passage: str) -> str | None:
        if not query:
            return "cut_off" if finish == "length" else "empty"
        if finish == "length":
            return "cut_off"
        if len(query.splitlines()) > 1:
            return "several_lines"
        if len(query) < self.min_length:
            return "too_short"
        if len(query) > self.max_length or len(query) > max(len(passage), self.min_length):
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
    """True when query and passage clearly are in different languages of one script."""
    if main_script(passage) == "ARABIC":
        # The same letters are encoded apart in Persian and Arabic; some Persian text uses the Arabic codes throughout.
        persian, arabic = set(passage) & _PERSIAN, set(passage) & _ARABIC
        if persian and not arabic and set(query) & _ARABIC and not set(query) & _PERSIAN:
            return True
    there, here = language_by_words(passage), language_by_words(query)
    return there is not None and here is not None and there != here


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
