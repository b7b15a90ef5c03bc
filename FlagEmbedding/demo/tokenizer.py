"""XLM-R's tokenizer out of its parts, and cutting its vocabulary down to what some text needs.

The cut keeps every piece that the text uses and every piece of one character. The best segmentation of that text uses
kept pieces alone and loses only its competitors, so it stays the same; other text falls back to smaller pieces.
"""

from __future__ import annotations

import tempfile
import unicodedata
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from FlagEmbedding.demo.parts import SPECIALS
from FlagEmbedding.utils.io import numbered_lines, parse_json, write_json_atomic

Pieces = list[tuple[str, float]]

SPACE = "\u2581"  # stands for a space in pieces
PREFIXES = ("query: ", "passage: ")  # what the E5 family puts before every text
_LAST_COMPOSED = 0x30000  # no character from here on is a composition
_TEXTS_AT_ONCE = 2000


def compile_rules(rules: dict[str, str]) -> bytes:
    """SentencePiece's ``precompiled_charsmap`` of rules ``{character: text}``, completed by canonical composition.

    The rules speak of single characters. Text in decomposed form (é as e + ´) would slip by them, so each decomposition
    is led to its composed character, and by that character's rule where it has one. ``tokenizers`` looks up one mark
    at most, within five bytes, so Hangul in jamo stays as it is there: with the original XLM-R tokenizer too.
    """
    import sentencepiece
    from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

    table = dict(rules)
    for code in range(0xC0, _LAST_COMPOSED):
        character = chr(code)
        parts = unicodedata.normalize("NFD", character)
        if len(parts) > 1 and unicodedata.normalize("NFC", parts) == character:
            table[parts] = rules.get(character, character)
    sentencepiece.set_min_log_level(2)  # it reports the size of what it compiles
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rules.tsv"
        file.write_text("".join(f"{_codes(a)}\t{_codes(b)}\n" for a, b in sorted(table.items())), encoding="utf-8")
        compiler = sentencepiece.SentencePieceNormalizer(rule_tsv=str(file))
    model = ModelProto.FromString(compiler.serialized_model_proto())
    return bytes(model.normalizer_spec.precompiled_charsmap)


def build_tokenizer(pieces: Pieces, charsmap: bytes) -> Tokenizer:
    """The pipeline of xlm-roberta-base: normalize, split at spaces, unigram, ``<s> A </s>``."""
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=SPECIALS.index("<unk>"), byte_fallback=False))
    tokenizer.normalizer = normalizers.Precompiled(charsmap)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always")]
    )
    tokenizer.decoder = decoders.Metaspace(replacement=SPACE, prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[(token, SPECIALS.index(token)) for token in ("<s>", "</s>")],
    )
    special = [AddedToken(token, special=True, normalized=False) for token in SPECIALS]
    tokenizer.add_special_tokens([*special, AddedToken("<mask>", special=True, normalized=False, lstrip=True)])
    return tokenizer


def needed_ids(tokenizer: Tokenizer, pieces: Pieces, files: Sequence[Path]) -> list[int]:
    """Ids, ascending, of the special tokens, of one-character pieces and of the pieces that the files' text uses."""
    kept = {*range(len(SPECIALS)), len(pieces) - 1}
    kept |= {i for i, (piece, _) in enumerate(pieces) if len(piece.removeprefix(SPACE)) <= 1}
    for prefix in PREFIXES:
        kept.update(tokenizer.encode(prefix).ids)
    for path in files:
        texts = _texts(path)
        while some := list(islice(texts, _TEXTS_AT_ONCE)):
            kept.update(*(encoding.ids for encoding in tokenizer.encode_batch(some)))
    return sorted(kept)


def save_tokenizer(tokenizer: Tokenizer, folder: Path, longest: int) -> None:
    """Write the files from which ``AutoTokenizer`` makes an ``XLMRobertaTokenizer``."""
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "cls_token": "<s>", "eos_token": "</s>", "sep_token": "</s>"}
    names |= {"unk_token": "<unk>", "pad_token": "<pad>"}
    mask = {"content": "<mask>", "lstrip": True, "normalized": False, "rstrip": False, "single_word": False}
    write_json_atomic(folder / "special_tokens_map.json", {**names, "mask_token": mask})
    settings = {"tokenizer_class": "XLMRobertaTokenizer", "model_max_length": longest, **names}
    write_json_atomic(folder / "tokenizer_config.json", {**settings, "mask_token": {"__type": "AddedToken", **mask}})


def _codes(text: str) -> str:
    """Code points in hexadecimal, as SentencePiece reads rules."""
    return " ".join(f"{ord(character):X}" for character in text)


def _texts(path: Path) -> Iterator[str]:
    """Texts of a plain, JSON-lines or TSV file (also .gz): every string value of a JSON line, else the line itself."""
    for _, line in numbered_lines(path, "text"):
        try:
            values = _strings(parse_json(line)) if line.startswith(("{", "[")) else [line]
        except ValueError:
            values = [line]
        yield from (value for value in values if value.strip())


def _strings(value: Any) -> Iterator[str]:
    pending = [value]
    while pending:
        value = pending.pop()
        if isinstance(value, str):
            yield value.encode(errors="replace").decode()  # half a surrogate pair is no text
        elif isinstance(value, dict | list):
            pending.extend(value.values() if isinstance(value, dict) else value)
