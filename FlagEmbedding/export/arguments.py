"""Options of ``python -m FlagEmbedding.export``. Imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from FlagEmbedding.evaluation.arguments import DevArguments
from FlagEmbedding.inference.arguments import EncoderArguments, Pooling
from FlagEmbedding.modeling.options import POOLING_SPELLINGS
from FlagEmbedding.utils.cli import choice, option, positional, switch
from FlagEmbedding.utils.errors import UsageError

HEADS = ("dense", "sparse", "colbert")
PAYLOAD = ("title", "text")
StoreName = Literal["qdrant", "lancedb", "milvus", "parquet", "elasticsearch-json"]
_METHOD = re.compile(r"average|load|expert:(\d+)")


@dataclass(frozen=True)
class SourceArguments:
    """Checkpoint and result."""

    model: str = positional("folder or hub id of the checkpoint", "MODEL", nargs=None)
    output_dir: str = option(help="the exported folder")
    pooling_method: Pooling | None = choice(
        Pooling, None, "default: what the checkpoint says, else cls", spellings=POOLING_SPELLINGS
    )
    overwrite: bool = switch(False, "replace what this command wrote to --output_dir")
    cache_dir: str | None = option(None, "where the hub's files are kept")

    def encoder(self, folder: str | None = None, heads: bool = False) -> EncoderArguments:
        """How the checkpoint, or the one in ``folder``, is loaded: in float32 on the CPU, where kinds are compared."""
        return EncoderArguments(
            encoder=folder or self.model, pooling_method=self.pooling_method, cache_dir=self.cache_dir, dtype="fp32",
            device="cpu", workers=0, heads=heads,
        )  # fmt: skip


@dataclass(frozen=True)
class SampleArguments:
    """Sample texts."""

    data: list[str] = option(
        [], "texts to compare on: training rows (their queries and positives), or .txt files with one text a line; "
        "default: the dev collection's", "--check_texts", metavar="PATH",
    )  # fmt: skip
    samples: int = option(500, "how many queries, and how many passages at most")

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise UsageError(f"--samples must be at least 1, got {self.samples}")


@dataclass(frozen=True)
class FoldArguments:
    """Folding."""

    method: str = option(
        "load", "average: the mean of the experts; load: weighted by the share of tokens that the router sends to each "
        "expert, layer by layer; expert:K: expert K (from 0) alone",
    )  # fmt: skip

    def __post_init__(self) -> None:
        if not _METHOD.fullmatch(self.method):
            raise UsageError(f"--method must be average, load or expert:K, got {self.method!r}")

    @property
    def expert(self) -> int | None:
        """K of ``expert:K``."""
        found = _METHOD.fullmatch(self.method)
        return int(found[1]) if found and found[1] else None


@dataclass(frozen=True)
class FoldOptions:
    """Fold."""

    source: SourceArguments
    fold: FoldArguments
    sample: SampleArguments
    dev: DevArguments

    def __post_init__(self) -> None:
        if not self.sample.data and not self.dev.eval_data_dir:
            raise UsageError("texts are needed to see what folding costs: give --data or --eval_data_dir")


@dataclass(frozen=True)
class OnnxArguments:
    """ONNX."""

    heads: list[str] = option([], "outputs beside dense: sparse colbert; default: all that there are", metavar="HEAD")
    int8: bool = switch(False, "write a second graph with 8-bit weights, one scale per channel")

    def __post_init__(self) -> None:
        if unknown := [head for head in self.heads if head not in HEADS]:
            raise UsageError(f"--heads {unknown[0]}: choose from {' '.join(HEADS)}")


@dataclass(frozen=True)
class OnnxOptions:
    """ONNX."""

    source: SourceArguments
    onnx: OnnxArguments
    sample: SampleArguments
    dev: DevArguments


@dataclass(frozen=True)
class VectorArguments:
    """Index and vector store."""

    index: str = positional("folder of an index: {index_save_dir}/{encoder}/{lang}", "INDEX", nargs=None)
    to: StoreName = choice(
        StoreName, help="qdrant and lancedb are loaded; the others are written as files for their bulk loaders"
    )
    output_dir: str = option(help="export.json and the store, or its files, go here")
    url: str | None = option(None, "of a Qdrant server (http://…); default: Qdrant's local form in --output_dir")
    name: str = option("passages", "of the collection, table or index")
    payload: list[str] = option([], "what to keep of each passage beside its docid: title text", metavar="FIELD")
    data_dir: str | None = option(
        None, "folder of the corpus, as in step 0; needed for --payload, asked before the hub"
    )
    batch_rows: int | None = option(None, "passages per request or file; default: what suits the store")
    overwrite: bool = switch(False, "replace what this command wrote to --output_dir")
    cache_dir: str | None = option(None, "where the hub's files are kept")

    def __post_init__(self) -> None:
        if unknown := [field for field in self.payload if field not in PAYLOAD]:
            raise UsageError(f"--payload {unknown[0]}: choose from {' '.join(PAYLOAD)}")
        if self.data_dir is not None and not self.payload:
            raise UsageError("--data_dir is read for --payload alone: give both or neither")
        if self.batch_rows is not None and self.batch_rows < 1:
            raise UsageError(f"--batch_rows must be at least 1, got {self.batch_rows}")
        if self.url is not None and self.to != "qdrant":
            raise UsageError("--url belongs to --to qdrant")
        if not re.fullmatch(r"[a-z][a-z0-9_]*", self.name):
            raise UsageError(f"--name {self.name!r}: small letters, digits and _ suit every store, a letter first")
