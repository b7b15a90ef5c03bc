"""``python -m FlagEmbedding.export COMMAND MODEL --output_dir OUT``: a checkpoint as other servers take it."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from FlagEmbedding.export.arguments import FoldOptions, OnnxOptions, VectorArguments
from FlagEmbedding.utils.cli import entry_point, parse, parse_whole, run_command

HELP = """usage: python -m FlagEmbedding.export COMMAND MODEL --output_dir OUT [options]

  fold     experts → one dense layer each: a plain encoder, with what that costs
  onnx     dense, sparse and colbert in one ONNX graph, also with 8-bit weights (--int8)
  vectors  an index of step 0 (in MODEL's place) into Qdrant, LanceDB, or files for Milvus, Elasticsearch, Parquet

python -m FlagEmbedding.export COMMAND --help lists a command's options."""


@entry_point
def fold(argv: Sequence[str] | None = None) -> int:
    """A checkpoint with experts as a dense one."""
    what = "Fold the experts of a checkpoint into dense layers, so that every library serves it."
    options = parse_whole(FoldOptions, argv, what)

    from FlagEmbedding.export.fold import fold as write
    from FlagEmbedding.export.measure import page

    print(f"{page(write(options))}\n\n{options.source.output_dir}")
    return 0


@entry_point
def onnx(argv: Sequence[str] | None = None) -> int:
    """A checkpoint as an ONNX graph."""
    what = "Write a checkpoint as an ONNX graph, compared with the checkpoint before it is put in place."
    options = parse_whole(OnnxOptions, argv, what)

    from FlagEmbedding.export.measure import page
    from FlagEmbedding.export.onnx import export

    print(f"{page(export(options))}\n\n{options.source.output_dir}")
    return 0


@entry_point
def vectors(argv: Sequence[str] | None = None) -> int:
    """An index as a collection of a vector store."""
    what = "Load an index into a vector store, or write it as files for the store's bulk loader."
    options: VectorArguments = parse([VectorArguments], argv, what)[0]

    from FlagEmbedding.export.vectors import export_vectors

    print(export_vectors(options))
    return 0


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Print the page, or run a command."""
    return run_command({"fold": fold, "onnx": onnx, "vectors": vectors}, HELP, argv)


if __name__ == "__main__":
    sys.exit(main())
