"""Does one folder load right everywhere? Library × kind of checkpoint → the least cosine to this package's vectors.

    python benchmarks/load_table.py --upstream-python PEERS/bin/python --output benchmarks/results/load_table.md

``pip install 'FlagEmbedding[interop]'`` brings the libraries; PEERS holds FlagEmbedding 1.4.2, which has this package's
name and so a Python of its own. What is not installed is left out, with a line. Each library runs in a process of its
own. The checkpoints are made of the demo base (or ``--base``): dense (cls), with experts, dense with mean pooling and
instructions, and with the heads of BGE-M3. ``LIBRARIES`` shows how each library is called.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

KINDS = ("dense", "experts", "mean, instructions", "M3 heads")
QUERIES = ["How long is the river?", "한강은 어디로 흐르나요?", "गंगा"]
PASSAGES = [
    "The Han river runs through Seoul and reaches the Yellow Sea.",
    "한강은 서울을 지나 서해로 흘러든다. 길이는 약 오백 킬로미터이다.",
    "رود کارون پرآب‌ترین رود ایران است و از زاگرس سرچشمه می‌گیرد.",
    "Short.",
]
Pair = tuple[np.ndarray, np.ndarray]  # vectors of QUERIES and PASSAGES, [texts, D]


@dataclass(frozen=True)
class Case:
    """A checkpoint, and what a library that does not read all of its files must be told."""

    kind: str
    folder: str
    experts: bool = False
    pooling: str = "cls"
    query_instruction: str = ""
    passage_instruction: str = ""


def sentence_transformers(case: Case) -> Pair:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(case.folder, trust_remote_code=case.experts, device="cpu")
    return model.encode_query(QUERIES), model.encode_document(PASSAGES)


def transformers(case: Case) -> Pair:
    import torch
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(case.folder, trust_remote_code=case.experts).eval()
    tokenizer = AutoTokenizer.from_pretrained(case.folder)

    def vectors(texts: list[str]) -> np.ndarray:
        features = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        mask = features["attention_mask"][:, :, None]
        with torch.no_grad():
            states = model(**{name: features[name] for name in ("input_ids", "attention_mask")}).last_hidden_state
        pooled = states[:, 0] if case.pooling == "cls" else (states * mask).sum(1) / mask.sum(1)
        return torch.nn.functional.normalize(pooled, dim=-1).numpy()

    return vectors([case.query_instruction + text for text in QUERIES]), vectors(
        [case.passage_instruction + text for text in PASSAGES]
    )


def upstream(case: Case) -> Pair:
    from FlagEmbedding import FlagModel

    model = FlagModel(
        case.folder, use_fp16=False, devices="cpu", pooling_method=case.pooling, trust_remote_code=case.experts,
        query_instruction_for_retrieval=case.query_instruction or None,
    )  # fmt: skip
    return model.encode_queries(QUERIES), model.encode_corpus([case.passage_instruction + text for text in PASSAGES])


def langchain(case: Case) -> Pair:
    from langchain_huggingface import HuggingFaceEmbeddings

    model = HuggingFaceEmbeddings(
        model_name=case.folder, model_kwargs={"device": "cpu", "trust_remote_code": case.experts},
        encode_kwargs={"prompt_name": "document"}, query_encode_kwargs={"prompt_name": "query"},
    )  # fmt: skip
    return np.array([model.embed_query(text) for text in QUERIES]), np.array(model.embed_documents(PASSAGES))


def llama_index(case: Case) -> Pair:
    from llama_index.embeddings.huggingface import HuggingFaceEmbedding

    model = HuggingFaceEmbedding(
        case.folder, device="cpu", trust_remote_code=case.experts, query_instruction=case.query_instruction,
        text_instruction=case.passage_instruction,
    )  # fmt: skip
    queries = [model.get_query_embedding(text) for text in QUERIES]
    return np.array(queries), np.array(model.get_text_embedding_batch(PASSAGES))


def mteb(case: Case) -> Pair:
    import mteb
    from datasets import Dataset
    from mteb.types import PromptType
    from torch.utils.data import DataLoader

    from FlagEmbedding.evaluation.mteb_model import mteb_model

    model, task = mteb_model(case.folder, device="cpu"), mteb.get_task("NFCorpus")

    def vectors(texts: list[str], kind: PromptType) -> np.ndarray:
        inputs = DataLoader(Dataset.from_dict({"text": texts}), batch_size=4)
        return np.asarray(model.encode(inputs, task_metadata=task.metadata, hf_split="test", hf_subset="default", prompt_type=kind))  # fmt: skip  # noqa: E501

    return vectors(QUERIES, PromptType.query), vectors(PASSAGES, PromptType.document)


def pymilvus(case: Case) -> Pair:
    from pymilvus.model.hybrid import BGEM3EmbeddingFunction

    model = BGEM3EmbeddingFunction(case.folder, device="cpu", use_fp16=False)
    return np.array(model.encode_queries(QUERIES)["dense"]), np.array(model.encode_documents(PASSAGES)["dense"])


def txtai(case: Case) -> Pair:
    from txtai import Embeddings

    model = Embeddings(path=case.folder, gpu=False, vectors={"trust_remote_code": case.experts})
    return model.batchtransform(QUERIES, "query"), model.batchtransform(PASSAGES, "data")


@dataclass(frozen=True)
class Library:
    """How a library is called; ``module``: found where it is installed; ``kinds``: those it is made for."""

    package: str
    module: str
    vectors: Callable[[Case], Pair]
    kinds: Sequence[str] = KINDS

    @property
    def here(self) -> bool:
        try:
            return find_spec(self.module) is not None
        except ModuleNotFoundError:
            return False


LIBRARIES = {
    "sentence-transformers": Library("sentence-transformers", "sentence_transformers", sentence_transformers),
    "transformers": Library("transformers", "transformers", transformers),
    "FlagEmbedding (upstream)": Library(
        "FlagEmbedding", "FlagEmbedding", upstream, ("dense", "mean, instructions", "M3 heads")
    ),
    "LangChain": Library("langchain-huggingface", "langchain_huggingface", langchain),
    "LlamaIndex": Library("llama-index-embeddings-huggingface", "llama_index.embeddings.huggingface", llama_index),
    "mteb": Library("mteb", "mteb", mteb),
    "pymilvus (BGEM3)": Library("pymilvus.model", "pymilvus.model.hybrid", pymilvus, ("M3 heads",)),
    "txtai": Library("txtai", "txtai", txtai),
}


def make_cases(base: str, root: Path) -> list[Case]:
    """The checkpoints of all kinds, as this package saves them."""
    import torch
    from torch import nn
    from transformers import AutoTokenizer

    from FlagEmbedding.modeling.backbone import load_backbone, moe_layers, save_checkpoint
    from FlagEmbedding.modeling.encoder import M3Encoder
    from FlagEmbedding.modeling.interchange import Instructions
    from FlagEmbedding.modeling.moe import MoEConfig

    torch.manual_seed(0)
    experts = load_backbone(base, moe=MoEConfig(moe="intermediate", num_experts=2))
    with torch.no_grad():
        for layer in moe_layers(experts):
            for parameter in layer.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.02)
    width = experts.config.hidden_size
    said = Instructions("query: ", "passage: ")
    encoders = {
        "dense": M3Encoder(load_backbone(base)),
        "experts": M3Encoder(experts),
        "mean, instructions": M3Encoder(load_backbone(base), pooling="mean", instructions=said),
        "M3 heads": M3Encoder(load_backbone(base), nn.Linear(width, width), nn.Linear(width, 1)),
    }
    cases = []
    for kind, encoder in encoders.items():
        folder = root / kind.replace(", ", "-").replace(" ", "-")
        save_checkpoint(encoder, folder, tokenizer=AutoTokenizer.from_pretrained(base))
        own = encoder.instructions
        cases.append(Case(kind, str(folder), kind == "experts", encoder.pooling, own.query or "", own.passage or ""))
    return cases


def own_vectors(case: Case) -> Pair:
    """This package's, by the folder's path alone."""
    from FlagEmbedding import FlagModel

    model = FlagModel(case.folder, devices="cpu", use_fp16=False)
    return model.encode_queries(QUERIES), model.encode_corpus(PASSAGES)


def least_cosine(found: Pair, expected: Pair) -> float:
    """Over all texts, in double precision."""
    unit = [[v / np.linalg.norm(v, axis=1, keepdims=True) for v in map(np.float64, pair)] for pair in (found, expected)]
    return float(min((a * b).sum(axis=1).min() for a, b in zip(*unit, strict=True)))


def worker(name: str, cases: Sequence[Case]) -> dict[str, Any]:
    """Version of a library, and its vectors by kind, as JSON."""
    library = LIBRARIES[name]
    if not library.here:
        return {"problem": "not installed"}
    try:
        found = {case.kind: [np.asarray(v, np.float64).tolist() for v in library.vectors(case)] for case in cases if case.kind in library.kinds}  # fmt: skip  # noqa: E501
        return {"version": version(library.package), "vectors": found}
    except (PackageNotFoundError, ImportError) as error:
        return {"problem": f"{type(error).__name__}: {error}"}


def main() -> int:
    """Make the checkpoints, ask every library, print the table. Exit code 1 where a cosine is below 0.99999."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="an XLM-R-like checkpoint; default: the demo base")
    parser.add_argument("--python", default=sys.executable, help="that has the libraries")
    parser.add_argument("--upstream-python", help="that has FlagEmbedding 1.4.2")
    parser.add_argument("--output", type=Path, help="the table, as Markdown")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        place = Path(options.base)
        cases = [Case(**case) for case in json.loads((place / "cases.json").read_text("utf-8"))]
        (place / "vectors.json").write_text(json.dumps(worker(options.worker, cases)), "utf-8")
        return 0
    with tempfile.TemporaryDirectory() as root:
        place = Path(root)
        base = options.base or _demo_base(place / "base")
        cases = make_cases(base, place / "checkpoints")
        (place / "cases.json").write_text(json.dumps([asdict(case) for case in cases]), "utf-8")
        expected = {case.kind: own_vectors(case) for case in cases}
        rows, least = [], 1.0
        for name in LIBRARIES:
            found = _ask(name, options, place)
            if "problem" in found:
                print(f"{name}: {found['problem']}", file=sys.stderr)
                continue
            cosines = {kind: least_cosine(pair, expected[kind]) for kind, pair in found["vectors"].items()}
            least = min([least, *cosines.values()])
            shown = (f"{cosines[kind]:.7f}" if kind in cosines else "–" for kind in KINDS)
            rows.append(f"| {name} | {found['version']} | {' | '.join(shown)} |")
    head = f"| library | version | {' | '.join(KINDS)} |\n|---|---|{'---|' * len(KINDS)}\n"
    page = head + "\n".join(rows) + "\n"
    print(page, end="")
    if options.output:
        options.output.write_text(page, "utf-8")
    return int(least < 0.99999)


def _demo_base(folder: Path) -> str:
    from FlagEmbedding.demo import build_base_model

    sample = Path(__file__).resolve().parents[1] / "data/sample"  # its texts decide which tokens are kept
    return str(build_base_model(folder, layers=4, vocab_from=sorted(sample.glob("miracl-corpus-*/*.gz"))))


def _ask(name: str, options: argparse.Namespace, place: Path) -> dict[str, Any]:
    python = options.upstream_python if name.startswith("FlagEmbedding") else options.python
    if python is None:
        return {"problem": "no --upstream-python"}
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(place / "modules")}
    if name.startswith("FlagEmbedding"):
        environment.pop("PYTHONPATH", None)
    words = [python, str(Path(__file__).resolve()), "--worker", name, "--base", str(place)]
    done = subprocess.run(words, check=False, env=environment, capture_output=True, text=True, cwd=place)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no output"]
        return {"problem": lines[-1]}
    return dict(json.loads((place / "vectors.json").read_text("utf-8")))


if __name__ == "__main__":
    sys.exit(main())
