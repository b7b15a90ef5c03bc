"""Step 0: the passages of MIRACL languages, or of a collection of one's own, into an index on disk."""

from __future__ import annotations

from FlagEmbedding.collections.source import sources
from FlagEmbedding.evaluation.arguments import EmbedOptions
from FlagEmbedding.indexing.encoding import build_index, finish, merge, work
from FlagEmbedding.indexing.modes import build_modes
from FlagEmbedding.indexing.planning import plan
from FlagEmbedding.inference.heads import with_heads
from FlagEmbedding.inference.text_encoder import TextEncoder
from FlagEmbedding.retrieval.index import index_folder
from FlagEmbedding.utils.logging import get_logger
from FlagEmbedding.utils.processes import on_main, processes

logger = get_logger(__name__)


def embed_collections(options: EmbedOptions) -> None:
    """An index of every language's corpus, shared out over the processes that torchrun started.

    Raises:
        UserError: options, corpus, shard or disk that cannot be used.
    """
    collection, share = options.collection, options.share
    languages = sources(collection.languages, collection.split, collection.data_dir, options.encoder.cache_dir)
    folders = {lang: index_folder(collection.index_save_dir, options.encoder.encoder, lang) for lang in languages}
    if share.finish:
        for lang, folder in folders.items():
            merge([index_folder(place, options.encoder.encoder, lang) for place in share.merge_from], folder)
            finish(folder)
        return
    if share.shards is not None:
        encoder = TextEncoder(options.encoder)
        for lang, source in languages.items():
            own = plan(source.corpus(), encoder, folders[lang], lang, options.index)
            if own is not None:
                work(own, encoder, *share.part, share.help_others)
                logger.info("%s: done; once all workers are, --finish joins the shards", lang)
        return
    with processes():
        # The main process fetches what is not on disk; the others then find it there.
        files = on_main(lambda: {lang: source.corpus() for lang, source in languages.items()})
        parts = options.storing.parts
        encoder = TextEncoder(on_main(lambda: with_heads(options.encoder, parts)))
        for lang, folder in folders.items():
            if "dense" in parts:
                build_index(encoder, files[lang], folder, lang, options.index)
            build_modes(encoder, files[lang], folder, lang, options.index, options.storing, parts)
