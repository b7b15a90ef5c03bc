"""Index and search: vectors on disk shard by shard, a faiss file out of them, exact and approximate top-k."""
