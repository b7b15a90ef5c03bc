"""What a model writes is cleaned, then judged by script, language, lines, length and copying."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from FlagEmbedding.collections.corpus import read_file
from FlagEmbedding.mining.query_generation.answer_cache import Answer
from FlagEmbedding.mining.query_generation.arguments import CheckArguments
from FlagEmbedding.mining.query_generation.checks import bare, clean, guess_language, main_script
from FlagEmbedding.mining.query_generation.checks import judge as judge_answer
from FlagEmbedding.mining.query_generation.prompting import make_prompter
from FlagEmbedding.utils.errors import UsageError
from FlagEmbedding.utils.texts import text_key

KO = (
    "한강은 서울을 지나 서해로 흘러든다. 길이는 약 오백 킬로미터이며 예부터 뱃길로 쓰였고 "
    "지금은 다리가 서른 개 넘게 놓여 있다."
)
FA = "رود کارون پرآب‌ترین رود ایران است و از زاگرس سرچشمه می‌گیرد و به خلیج فارس می‌ریزد. این رود از شهر اهواز می‌گذرد."
HI = "गंगा नदी हिमालय से निकलकर बंगाल की खाड़ी में गिरती है और इसके तट पर वाराणसी तथा पटना जैसे नगर बसे हैं।"
EN = "The Han river runs through Seoul and reaches the Yellow Sea, and it was used by boats for centuries."
JA = "漢江は韓国の首都ソウルを流れる川で、黄海に注ぐ。古くから水運に使われ、現在は三十を超える橋が架かっている。"


def judge(query: str, passage: str, finish: str = "stop") -> str | None:
    return judge_answer(Answer(query, finish), passage, CheckArguments())[1]


@pytest.mark.parametrize(
    ("query", "passage", "reason"),
    [
        ("서울의 강은 어느 바다에 닿나요?", KO, None),
        ("HTML5와 XHTML 차이는?", KO, None),  # foreign names are no other language
        ("What is 한강 about?", KO, "other_script"),
        ("What is 한강 다리 about?", KO, "other_script"),
        ("Which river reaches the sea at Seoul?", KO, "other_script"),
        ("漢江 流域", KO, "other_script"),
        ("12345678", KO, "other_script"),
        ("آب اهواز به کجا می‌رسد؟", FA, None),
        ("أين يقع نهر كارون في إيران؟", FA, "other_language"),
        ("دریائے کارون ہے کہاں اور میں کیا", FA, "other_language"),
        ("पटना किस नदी के किनारे है?", HI, None),
        ("पटना कोणत्या नदीच्या काठी आहे आणि काय?", HI, "other_language"),
        ("Which sea does the river of Seoul reach?", EN, None),
        ("Welche Stadt ist das und wie wurde der Fluss genannt?", EN, "other_language"),
        ("ソウルの川はどの海に流れる？", JA, None),
        ("漢江 橋 数量", JA, None),
        ("한강의 다리는 몇 개?", JA, "other_script"),
        ("", KO, "empty"),
        ("  \n ", KO, "empty"),
        ("서울의 강은?\n어느 바다?", KO, "several_lines"),
        ("강?", KO, "too_short"),
        ("강은 어디로 " * 40, KO, "too_long"),
        ("서울에서 강은 어느 바다로 가는지 알려 주세요", KO[:20], "too_long"),
        (KO[:40], KO, "copy"),
        ("길이는 약 오백 킬로미터이며 예부터 뱃길로 쓰였나?", KO, "copy"),
        ("한강 길이", KO, None),  # a short phrase is how people search
        (JA[:24], JA, "copy"),
        ("I'm sorry, but I cannot help with that.", EN, "refusal"),
        ("I cannot write a query about this.", EN, "refusal"),
        ("죄송하지만 이 문단으로는 질문을 만들 수 없습니다.", KO, "refusal"),
        ("متأسفم، نمی‌توانم پرسشی بنویسم.", FA, "refusal"),
        ("क्षमा करें, मैं यह नहीं लिख सकता।", HI, "refusal"),
        ("Sorry state of which river at Seoul?", EN, None),  # a question that begins like one
        ("I can see which sea from Seoul?", EN, None),
        ("Who sang I'm sorry by the river at Seoul?", EN, None),
        ('{"query": "Which sea does it reach?"}', EN, "markup"),
        ("[Which sea does it reach?]", EN, "markup"),
        ("<query>Which sea does it reach?</query>", EN, "markup"),
        ('Here: {"query": "which sea?"}', EN, "markup"),
        ("Is a < b and c > d for the river?", EN, None),
        ("Which sea\x00 does it reach?", EN, "control"),
        ("Which \x1b[31msea does it reach?", EN, "control"),
        ("Which sea\u202e does it reach?", EN, "control"),
        ("Sorry, but the passage is about something else.", EN, "refusal"),
        ("Unfortunately the text says nothing of a sea.", EN, "refusal"),
        ("The passage does not name any sea.", EN, "refusal"),
        ("Please provide the passage to ask about.", EN, "refusal"),
        ("No query.", EN, "refusal"),
        ("None!!", EN, "refusal"),
        ("None of which rivers reaches the sea?", EN, None),
        ("문단을 제공해 주시면 질문을 쓰겠습니다.", KO, "refusal"),
        ("すみませんが、質問は書けません。", JA, "refusal"),
        ("با عرض پوزش، این متن پرسشی ندارد", FA, "refusal"),
        ("मुझे खेद है, मैं प्रश्न नहीं लिख सकता", HI, "refusal"),
        ("Which sea does it reach? How old is it?", EN, "several"),
        ("Which sea is it 2. Which city is it", EN, "several"),
        ("강은 어디로 가나? 다리는 몇 개인가?", KO, "several"),
        ("Which sea does it reach?!?", EN, None),
        ("<think>The river reaches a sea", EN, "markup"),
        ("Which sea does it reach?<|im_end|>", EN, "markup"),
        ("한강은 서울을 지나 서해로 흘러든다.", KO, "copy"),  # a whole sentence, if a short one
        ("한강은 서울을 지나", KO, None),
        ("?" * 30, EN, "other_script"),
    ],
)
def test_reasons(query: str, passage: str, reason: str | None) -> None:
    assert judge(query, passage) == reason


def test_an_answer_that_was_cut_off_is_rejected() -> None:
    assert judge("서울의 강은 어느 바다에", KO, "length") == "cut_off"
    assert judge("", KO, "length") == "cut_off"
    assert judge("서울의 강은 어느 바다에", KO, "content_filter") == "refusal"


@pytest.mark.parametrize(
    "text",
    ["강은 어디로?", '"강은 어디로?"', "“강은 어디로?”", "질문: 강은 어디로?", "Query: 강은 어디로?", "1. 강은 어디로?",
     "- 강은 어디로?", "```\n강은 어디로?\n```", "**강은 어디로?**", "<think>hm\nhm</think>\n강은 어디로?",
     '질문: "강은 어디로?"', "\n 강은 어디로? \n", "Sure! Here is a query: 강은 어디로?", "Here's one:\n\n강은 어디로?",
     "네, 다음은 질문입니다: 강은 어디로?", "**Query:** 강은 어디로?", "**질문**: 강은 어디로?",
     "## Query: 강은 어디로?", "Q: 강은 어디로?", "Search query: 강은 어디로?", "질문 1: 강은 어디로?",
     "Korean query: 강은 어디로?", "『강은 어디로?』", "„강은 어디로?“",
     "hm, a thought without a beginning</think> 강은 어디로?"],
)  # fmt: skip
def test_wrapping_is_taken_off(text: str) -> None:
    assert clean(text) == "강은 어디로?"


@pytest.mark.parametrize(
    "text", ["''", '""', "“”", '" "', "「」", "``", "****", "Query:", "질문: ", "Sure, here it is:"]
)
def test_wrapping_around_nothing_is_an_empty_answer(text: str) -> None:
    assert judge(text, EN) == "empty"


def test_what_repeats_the_prompt_is_no_query() -> None:
    for passage in (KO, FA, HI, EN):
        prompt = make_prompter(None, None)(passage)
        asked = max((line for line in prompt.replace(passage, "").splitlines()), key=len).lstrip("- ")
        for echo in (asked, asked.split(". ")[0]):
            found = judge_answer(Answer(echo), passage, CheckArguments(max_length=400), prompt)[1]
            assert found in ("echo", "too_long") and (len(echo) > len(passage)) == (found == "too_long")
    example = "Question about: <p>{passage}</p>, such as 'which river reaches the sea at Hamburg?'"
    limits = CheckArguments()
    assert judge_answer(Answer("Which river reaches the sea at Hamburg?"), EN, limits, example)[1] == "echo"
    assert judge_answer(Answer("How far do boats go up from Incheon?"), EN, limits, example)[1] is None


def test_a_hostile_answer_is_judged_in_no_time() -> None:
    for text in (
        "```" + " " * 60_000 + "x",
        "?a" * 30_000,
        "<think>" * 20_000,
        "{ " * 50_000,
        '"' * 100_000,
        "1. " * 30_000,
    ):
        started = time.monotonic()
        assert judge(text, EN) in ("too_long", "several_lines", "markup")
        assert time.monotonic() - started < 10


def test_texts_of_the_same_words_are_the_same() -> None:
    assert bare("How long, is the “River”?") == bare("how long is the river")
    assert text_key(bare("پرآب\u200cترین رود")) == text_key(bare("پرآبترین رود؟"))
    assert bare("नदी") != bare("नद") and bare("C++") != bare("C#") != bare("C")


def test_real_queries_pass_and_languages_are_told_apart(sample_dir: Path) -> None:
    """No false alarm on the sample: every real query passes against its passage, every passage is told by language."""
    for code in ("fa", "hi"):
        rows = [json.loads(line) for line in (sample_dir / f"train/{code}_CLPL_train_data.jsonl").open()]
        found = [judge(row["query"], row["pos"][0]) for row in rows]
        assert found.count(None) >= 0.98 * len(found), [r for r in found if r]
        for passage in read_file(sample_dir / f"miracl-corpus-v1.0-{code}/docs-0.jsonl.gz"):
            assert guess_language(passage.text) == code
    assert [guess_language(text) for text in (KO, EN, JA, "漢江流經首爾", "12 + 3")] == ["ko", "en", "ja", "zh", None]
    assert [main_script(text) for text in (KO, FA, HI, EN, JA, "!?")] == [
        "HANGUL", "ARABIC", "DEVANAGARI", "LATIN", "KANA", None,
    ]  # fmt: skip


# ---- prompts ----


def test_shipped_prompts_name_the_passage_in_its_own_language() -> None:
    prompter = make_prompter(None, None)
    for passage, word in ((KO, "문단"), (FA, "متن"), (HI, "अनुच्छेद"), (EN, "Passage"), (JA, "in the language of the")):
        message = prompter(passage)
        assert passage in message and word in message
        assert "{passage}" not in message and not message.startswith("#")


def test_prompts_of_ones_own(tmp_path: Path) -> None:
    assert make_prompter("Ask about {passage}!", None)("a {passage} b") == "Ask about a {passage} b!"
    (tmp_path / "ko.txt").write_text("# remark\n질문: {passage}\n")
    assert make_prompter(str(tmp_path / "ko.txt"), None)("x") == "질문: x"
    assert make_prompter(str(tmp_path), "ko")("x") == "질문: x"
    with pytest.raises(UsageError, match=r"neither fa\.txt nor default\.txt"):
        make_prompter(str(tmp_path), "fa")
    (tmp_path / "bad.txt").write_text("no place")
    with pytest.raises(UsageError, match=r"expected \{passage\}"):
        make_prompter(str(tmp_path / "bad.txt"), None)
    with pytest.raises(UsageError, match="no such file or folder"):
        make_prompter("nowhere", None)
