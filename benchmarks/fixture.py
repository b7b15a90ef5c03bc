"""What the benchmarks run on: a model, texts of known lengths, training rows. Nothing is downloaded.

    python benchmarks/fixture.py OUT [--size small|m3] [--scripts ko fa hi en]

The text is real: sentences of ``data/sample``, drawn and joined until a passage has the length it should have
(log-normal, median 80 tokens, as MIRACL's passages are spread). ``small`` is the real multilingual-e5-small of the
``demo`` extra (12 layers, 384/1,536) with its vocabulary cut to the sample; ``m3`` has BGE-M3's shape (24 layers,
1,024/4,096) with random weights, for a GPU. Both are saved with CLS pooling and sparse and colbert heads, so that
every library here loads them.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[1]
SAMPLE = REPOSITORY / "data" / "sample"
LANGUAGES = ("ko", "fa", "hi", "en")
SIZES = {"small": None, "m3": {"hidden_size": 1024, "intermediate_size": 4096, "layers": 24, "heads": 16}}
SEED = 13


def sample_files() -> list[Path]:
    """Everything whose pieces the vocabulary must keep."""
    return sorted([*SAMPLE.glob("miracl-corpus-*/docs-*.jsonl.gz"), *SAMPLE.glob("train/*.jsonl")])


def sentences(language: str) -> list[str]:
    """All sentences of a language's sample passages."""
    found: list[str] = []
    for path in sorted(SAMPLE.glob(f"miracl-corpus-v1.0-{language}/docs-*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                found += [part for part in re.split(r"(?<=[.!?।؟])\s+", json.loads(line)["text"]) if part]
    return found


def queries(language: str) -> list[str]:
    """All training queries of a language's sample."""
    rows = (SAMPLE / "train" / f"{language}_CLPL_train_data.jsonl").read_text("utf-8").splitlines()
    return [json.loads(row)["query"] for row in rows]


class Writer:
    """Draws passages and queries of the chosen languages."""

    def __init__(self, tokenizer: Any, languages: list[str], seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.sentences = [sentences(language) for language in languages]
        self.counts = [[len(ids) - 2 for ids in tokenizer(each, verbose=False)["input_ids"]] for each in self.sentences]
        self.queries = [queries(language) for language in languages]

    def passage(self) -> str:
        """Sentences of one language, about as many tokens as one log-normal draw says."""
        target = float(np.clip(self.random.lognormal(np.log(80), 0.6), 12, 500))
        language = int(self.random.integers(len(self.sentences)))
        parts: list[str] = []
        tokens = 0
        while tokens < target:
            place = int(self.random.integers(len(self.sentences[language])))
            parts.append(self.sentences[language][place])
            tokens += self.counts[language][place]
        return " ".join(parts)

    def query(self) -> str:
        """A query of one language."""
        own = self.queries[int(self.random.integers(len(self.queries)))]
        return own[int(self.random.integers(len(own)))]


def make_model(folder: Path, size: str, experts: int) -> Any:
    """Save the model of this size, dense or with ``experts`` experts in ``intermediate``; give back its tokenizer."""
    import torch
    from transformers import AutoTokenizer, XLMRobertaConfig, XLMRobertaModel

    from FlagEmbedding import BGEM3Model
    from FlagEmbedding.demo.builder import build_base_model

    shape = SIZES[size]
    with tempfile.TemporaryDirectory() as scratch:
        base = build_base_model(Path(scratch) / "base", layers=12 if shape is None else 1, vocab_from=sample_files())
        tokenizer = AutoTokenizer.from_pretrained(str(base))
        if shape is not None:
            torch.manual_seed(SEED)
            config = XLMRobertaConfig(
                vocab_size=len(tokenizer),
                hidden_size=shape["hidden_size"],
                intermediate_size=shape["intermediate_size"],
                num_hidden_layers=shape["layers"],
                num_attention_heads=shape["heads"],
                max_position_embeddings=514,
                type_vocab_size=1,
                layer_norm_eps=1e-5,
            )
            XLMRobertaModel(config, add_pooling_layer=False).save_pretrained(base)
        torch.manual_seed(SEED)
        moe = {"moe": "intermediate", "num_experts": experts, "num_experts_per_tok": 1} if experts > 1 else {}
        BGEM3Model(str(base), unified_finetuning=True, **moe).save(str(folder))
    return tokenizer


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """JSON lines."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--texts", type=int, default=1000, help="passages in texts_mixed.jsonl and texts_one.jsonl")
    parser.add_argument("--rows", type=int, default=400, help="training rows")
    parser.add_argument("--negatives", type=int, default=4, help="negatives a row")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    tokenizer = make_model(arguments.out / "dense", arguments.size, experts=1)
    make_model(arguments.out / "moe", arguments.size, experts=2)
    for name, languages in (("mixed", list(LANGUAGES)), ("one", ["ko"])):
        writer = Writer(tokenizer, languages, SEED)
        passages = [writer.passage() for _ in range(arguments.texts)]
        write_lines(arguments.out / f"texts_{name}.jsonl", [{"text": text} for text in passages])
        lengths = np.array([len(ids) for ids in tokenizer(passages, verbose=False)["input_ids"]])
        spread = {"mean": lengths.mean(), "median": np.median(lengths), "p95": np.quantile(lengths, 0.95)}
        print(f"{name}: {len(passages)} passages,", ", ".join(f"{k} {v:.0f}" for k, v in spread.items()), "tokens")
    writer = Writer(tokenizer, list(LANGUAGES), SEED + 1)
    rows = []
    for _ in range(arguments.rows):
        row = {"query": writer.query(), "pos": [writer.passage()]}
        row["neg"] = [writer.passage() for _ in range(arguments.negatives)]
        row["neg_q"] = [writer.query() for _ in range(arguments.negatives)]
        rows.append(row)
    for name, keys in (("train_clp", ("query", "pos", "neg", "neg_q")), ("train", ("query", "pos", "neg"))):
        folder = arguments.out / name
        folder.mkdir(exist_ok=True)
        write_lines(folder / "rows.jsonl", [{key: row[key] for key in keys} for row in rows])
    return 0


if __name__ == "__main__":
    sys.exit(main())
