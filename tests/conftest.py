"""Fixtures shared by all rooms: tiny random encoders built on the spot, the sample data, the real demo base.

The tiny checkpoints need no download: two layers, width 32, and a byte-level tokenizer trained here, so that
any script can be encoded. The demo base is real (pretrained, four layers) and costs a few seconds a session.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("WANDB_DISABLED", "true")

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
    XLMRobertaConfig,
    XLMRobertaModel,
)

REPOSITORY = Path(__file__).resolve().parents[1]
SAMPLE = REPOSITORY / "data" / "sample"
TEXTS = [
    "The Han river runs through Seoul and reaches the Yellow Sea.",
    "한강은 서울을 지나 서해로 흘러든다. 길이는 약 오백 킬로미터이다.",
    "رود کارون پرآب‌ترین رود ایران است و از زاگرس سرچشمه می‌گیرد.",
    "गंगा नदी हिमालय से निकलकर बंगाल की खाड़ी में गिरती है।",
    "How long is the river, and where does it end?",
    "Fermentation turns cabbage into kimchi within several days.",
]


def build_tokenizer(bert: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 400 pieces with XLM-R's (or BERT's) special tokens."""
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] if bert else ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    first, last = ("[CLS]", "[SEP]") if bert else ("<s>", "</s>")
    tokenizer = Tokenizer(models.BPE(unk_token=specials[1] if bert else "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}",
        pair=f"{first} $A {last} $B {last}",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (first, last)],
    )
    names = {"cls_token": first, "sep_token": last, "unk_token": "[UNK]" if bert else "<unk>"}
    names |= {"pad_token": "[PAD]", "mask_token": "[MASK]"} if bert else {"pad_token": "<pad>", "mask_token": "<mask>"}
    if not bert:
        names |= {"bos_token": first, "eos_token": last}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=128, **names)


def write_tiny(folder: Path, kind: str, **changes: object) -> Path:
    """Write a random tiny encoder of ``kind`` (xlmr, roberta or bert) with its tokenizer into ``folder``."""
    tokenizer = build_tokenizer(bert=kind == "bert")
    settings: dict[str, object] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,  # heads of 16, which the compiled kernels take
        "intermediate_size": 48,
        "max_position_embeddings": 130,
        "type_vocab_size": 1,
        "pad_token_id": tokenizer.pad_token_id,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        # Wider than the default 0.02, so that random layers move the hidden states visibly.
        "initializer_range": 0.2,
        **changes,
    }
    if kind != "bert":
        settings |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config_class, model_class = {
        "xlmr": (XLMRobertaConfig, XLMRobertaModel),
        "roberta": (RobertaConfig, RobertaModel),
        "bert": (BertConfig, BertModel),
    }[kind]
    torch.manual_seed(7)
    model = model_class(config_class(**settings), add_pooling_layer=False)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer XLM-R of width 32, dropout 0."""
    return write_tiny(tmp_path_factory.mktemp("tiny") / "tiny-xlmr", "xlmr")


@pytest.fixture(scope="session")
def tiny_dropout_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with the usual dropout of 0.1."""
    path = tmp_path_factory.mktemp("tiny") / "tiny-dropout"
    return write_tiny(path, "xlmr", hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)


@pytest.fixture(scope="session")
def tiny_roberta_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer RoBERTa of width 32."""
    return write_tiny(tmp_path_factory.mktemp("tiny") / "tiny-roberta", "roberta")


@pytest.fixture(scope="session")
def tiny_bert_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer BERT of width 32."""
    return write_tiny(tmp_path_factory.mktemp("tiny") / "tiny-bert", "bert")


@pytest.fixture(scope="session")
def tiny_moe_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny XLM-R upcycled to two experts in ``intermediate``, experts then told apart, and saved."""
    from transformers import AutoTokenizer

    from FlagEmbedding.modeling.backbone import load_backbone, moe_layers, save_checkpoint
    from FlagEmbedding.modeling.moe import MoEConfig

    torch.manual_seed(11)
    model = load_backbone(str(tiny_model_dir), moe=MoEConfig(moe="intermediate", num_experts=2))
    with torch.no_grad():
        for layer in moe_layers(model):
            for parameter in layer.experts.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    folder = tmp_path_factory.mktemp("tiny") / "tiny-moe"
    save_checkpoint(model, folder, tokenizer=AutoTokenizer.from_pretrained(tiny_model_dir))
    return folder


@pytest.fixture(scope="session")
def tiny_heads_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny XLM-R with random heads saved as upstream saves them; colbert vectors of width 16."""
    folder = tmp_path_factory.mktemp("tiny") / "tiny-m3"
    shutil.copytree(tiny_model_dir, folder)
    torch.manual_seed(5)
    torch.save(torch.nn.Linear(32, 16).state_dict(), folder / "colbert_linear.pt")
    torch.save(torch.nn.Linear(32, 1).state_dict(), folder / "sparse_linear.pt")
    return folder


@pytest.fixture(scope="session")
def sample_dir() -> Path:
    """The sample data of the repository."""
    return SAMPLE


@pytest.fixture(scope="session")
def demo_base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real pretrained four-layer base, its vocabulary cut to the Korean sample's text."""
    from FlagEmbedding.demo import build_base_model

    files = sorted((SAMPLE / "miracl-corpus-v1.0-ko").glob("*.gz")) + sorted((SAMPLE / "train").glob("ko_*.jsonl"))
    files += sorted((SAMPLE / "miracl-v1.0-ko/topics").glob("*.tsv"))
    folder = tmp_path_factory.mktemp("demo") / "demo-base"
    return Path(build_base_model(folder, layers=4, vocab_from=files))


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Every number of threads that torch is told to use while a test runs."""
    told: set[int] = set()
    tell = torch.set_num_threads

    def listen(count: int) -> None:
        told.add(count)
        tell(count)

    monkeypatch.setattr(torch, "set_num_threads", listen)
    return told


@pytest.fixture
def forwards() -> Iterator[list[str]]:
    """The class of each model of transformers that is called while a test runs (by the padded engine), in order."""
    called: list[str] = []

    def note(module: torch.nn.Module, _: object) -> None:
        if isinstance(module, PreTrainedModel):
            called.append(type(module).__name__)

    handle = torch.nn.modules.module.register_module_forward_pre_hook(note)
    yield called
    handle.remove()
