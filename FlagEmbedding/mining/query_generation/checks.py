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
    "several": "more than one question",
    "control": "holds control characters",
    "markup": "JSON, XML or code, and no query",
    "too_short": "fewer characters than --min_length",
    "too_long": "more characters than --max_length, or longer than the passage",
    "other_script": "not in the script of the passage",
    "other_language": "the passage's script, another language",
    "copy": "copied from the passage",
    "echo": "copied from the prompt",
    "repeated": "a query of the rows, or the same for several passages",
    "not_retrieved": "does not bring its passage back into the top k",
}

_COPY_WORDS, _COPY_CHARACTERS, _COPY_SHARE = 5, 20, 0.8
_WRAPPED = re.compile(
    r"^(?:```\w*\s*(.*?)\s*```|\"(.*)\"|'(.*)'|“(.*)”|„(.*)[“”]|‘(.*)’|«(.*)»|「(.*)」|『(.*)』|\*\*(.*)\*\*|`(.*)`)$",
    re.DOTALL,
)
_BULLET = re.compile(r"^(?:[-*•]\s+|\d{1,2}[.)]\s+|#{1,6}\s+)")
_LABEL = re.compile(
    r"^(?:\w+\s+)?(?:quer(?:y|ies)|question|q|keywords?|claim|질문|검색어|쿼리|질의|پرسش|سؤال|سوال|प्रश्न|सवाल|প্রশ্ন|ప్రశ్న|"
    r"問|問題|问题|查询|質問|検索クエリ|クエリ|вопрос|запрос|pregunta|consulta|frage|suchanfrage|requête|kysymys|"
    r"pertanyaan|swali|คำถาม)\s*\d{0,2}\s*[:：]\s*",
    re.IGNORECASE,
)
_BOLD = re.compile(r"^\*\*([^*\n]{1,40}?)\s*(?:[:：]\s*\*\*|\*\*\s*[:：])")  # a label in bold letters
# "Sure! Here is a query: …"
_CHATTER = re.compile(
    r"^(?:sure|certainly|of course|okay|here(?:['’]s| is| are)|물론|네,|다음은|당연|البته|بله|यहाँ|यहां|ज़रूर|ज़रूर|"
    r"はい|以下|もちろん|当然|好的|конечно|вот|claro|voici|bien sûr|gerne|hier ist)[^\n:：]{0,80}[:：]\s*",
    re.IGNORECASE,
)
_REFUSAL = re.compile(
    r"(?:i(?:['’]m| am) (?:very |so |really )?(?:sorry|unable|not able|afraid)|sorry(?:,|\.|!| but\b)|unfortunately\b|"
    r"i apologi[sz]e|my apologies|i (?:can(?:['’]t|not| not)|won['’]t|do not|don['’]t) |as an? (?:ai|large language)\b|"
    r"(?:there is |there's )?no passage\b|the (?:given |provided )?(?:passage|text) (?:does not|doesn['’]t|is empty)|"
    r"please provide\b|(?:none|null|n/?a|not applicable|undefined|no (?:query|question|answer))\W*$|"
    r"죄송|미안하지만|유감스럽|(?:문단|본문|지문)이? ?(?:제공되지|없습니다)|(?:문단|본문|지문)을 (?:제공|입력)해|"
    r"متأسف|متاسف|با عرض پوزش|ببخشید|نمی‌توانم|عذرًا|عذرا|آسف|لا أستطيع|क्षमा|माफ़|माफ़|मुझे खेद|मैं असमर्थ|"
    r"抱歉|对不起|對不起|很遗憾|我(?:无法|不能)|申し訳|すみません|ごめんなさい|恐れ入り|残念ながら|"
    r"lo siento|lamento|no puedo|(?:je suis )?désolée?\b|je ne (?:peux|suis)|es tut mir leid|leider\b|ich kann nicht|"
    r"к сожалению|извините|простите|я не могу|দুঃখিত|আমি দুঃখিত|క్షమించండి|ขออภัย|ขอโทษ|maaf[,!. ]|samahani|"
    r"(?:ma|ẹ má|e ma) binu|olen pahoillani|valitettavasti)",
    re.IGNORECASE,
)
_MARKUP = re.compile(r"[\[{<].*[\]}>]|.*(?:\{\s*\"|</\w+>|<\|\w+\|>|<think>|```).*", re.DOTALL)
_SEVERAL = re.compile(r".*[?？؟]\s*[^\s\W].*[?？؟]|.*\s(?:2[.)]|②)\s.*", re.DOTALL)
_SENTENCES = re.compile(r"(?<=[.!?。！？؟।])\s*|\n+")
_LONGEST = 20_000  # characters; nothing is taken off an answer of more, which is none

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
    """An answer without what models put around it: thoughts, quotation marks, a preface, a label, a bullet, fences."""
    text = text.rpartition("</think>")[2].strip()
    for _ in range(4 if len(text) <= _LONGEST else 0):
        before = text
        text = _BOLD.sub(r"\1:", text)
        match = _WRAPPED.match(text)
        if match:
            text = next(group for group in match.groups() if group is not None).strip()
        text = _LABEL.sub("", _BULLET.sub("", _CHATTER.sub("", text))).strip()
        if text == before:
            break
    return unicodedata.normalize("NFC", text)


def judge(answer: Answer, passage: str, limits: CheckArguments, prompt: str = "") -> tuple[str, str | None]:
    """``(query, reason)`` for an answer about ``passage``; the reason (of ``REASONS``) is None for a good one.

    ``prompt`` is the whole message that was answered.
    """
    query = clean(answer.text)
    return query, _reason(query, answer.finish, passage, limits, prompt)


def _reason(query: str, finish: str, passage: str, limits: CheckArguments, prompt: str) -> str | None:
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
    if _SEVERAL.fullmatch(query):
        return "several"
    if not same_script(query, passage):
        return "other_script"
    if other_language(query, passage):
        return "other_language"
    if is_copy(query, passage):
        return "copy"
    return "echo" if is_copy(query, prompt) else None


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


class _Words(dict[int, int | None]):
    """For ``str.translate``: takes out punctuation and joiners; keeps the signs of Hindi vowels, and C# beside C++."""

    def __missing__(self, code: int) -> int | None:
        category = unicodedata.category(chr(code))
        self[code] = None if category == "Cf" or (category[0] == "P" and chr(code) not in "#%&@*") else code
        return self[code]


_WORDS = _Words()


def bare(text: str) -> str:
    """The words of a text alone, for comparison: no punctuation, lower case."""
    return " ".join(normalize_text(text).translate(_WORDS).split())


def is_copy(query: str, passage: str) -> bool:
    """True when at least 80 % of the query stands in the passage in one piece.

    Phrases of under 5 words or 20 characters may, unless they are a whole sentence: that is how people search.
    """
    sentences = {bare(sentence) for sentence in _SENTENCES.split(passage)}
    query, passage = bare(query), bare(passage)
    if query in sentences:
        return True
    if len(query) < _COPY_CHARACTERS or (" " in passage and len(query.split()) < _COPY_WORDS):
        return query == passage
    length = max(1, int(_COPY_SHARE * len(query)))
    return any(query[start : start + length] in passage for start in range(len(query) - length + 1))
