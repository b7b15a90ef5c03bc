"""Step 0: the passages of MIRACL languages, or of a collection of one's own, into an index on disk."""

from __future__ import annotations

from FlagEmbedding.collections.source import sources
from FlagEmbedding.evaluation.arguments import EmbedOptions
from FlagEmbedding.indexing.encoding import build_index
from FlagEmbedding.indexing.modes import build_modes
from FlagEmbedding.inference.heads import with_heads
from FlagEmbedding.inference.text_encoder import TextEncoder
from FlagEmbedding.retrieval.index import index_folder
from FlagEmbedding.utils.processes import on_main, processes


def embed_collections(options: EmbedOptions) -> None:
    """An index of every language's corpus, shared out over the processes that torchrun started.

    Raises:
        UserError: options, corpus, shard or disk that cannot be used.
    """
    collection = options.collection
    languages = sources(collection.languages, collection.split, collection.data_dir, options.encoder.cache_dir)
    with processes():
        # The main process fetches what is not on disk; the others then find it there.
        files = on_main(lambda: {lang: source.corpus() for lang, source in languages.items()})
        encoder = TextEncoder(on_main(lambda: with_heads(options.encoder, options.storing.parts)))
        for lang in languages:
            folder = index_folder(collection.index_save_dir, options.encoder.encoder, lang)
            if "dense" in options.storing.parts:
                build_index(encoder, files[lang], folder, lang, options.index)
            build_modes(encoder, files[lang], folder, lang, options.index, options.storing, options.storing.parts)
