"""How a checkpoint is used: the one home of what a run prints at its end, its report and its model card say.

Each form gives the vectors that were trained; the folder itself says how they are made and what stands before a text.
"""

from __future__ import annotations

from dataclasses import dataclass

from FlagEmbedding.finetune.biencoder import BiEncoder


@dataclass(frozen=True)
class Usage:
    """The lines of code for one checkpoint.

    Args:
        place: its folder, or its name on the hub.
        model: what was trained.
    """

    place: str
    model: BiEncoder

    @property
    def _trust(self) -> str:
        return ", trust_remote_code=True" if self.model.has_experts else ""

    def printed(self) -> str:
        """The short form, for a terminal."""
        return f"Use it:\n{_indented(self.flag_embedding())}\nor\n  {self._sentence_transformer()}"

    def every(self) -> dict[str, str]:
        """The code for each library, by its name."""
        forms = {
            "FlagEmbedding": self.flag_embedding(),
            "FlagEmbedding, dense, sparse and multi-vector": self.three_in_one(),
            "sentence-transformers": self.sentence_transformers(),
            "transformers": self.transformers(),
        }
        return {name: code for name, code in forms.items() if code}

    def flag_embedding(self) -> str:
        """This package's published class."""
        instructions = "".join(
            f", {role}_instruction_for_retrieval={text!r}"
            for role, text in vars(self.model.instructions).items()
            if text is not None
        )
        return (
            "from FlagEmbedding import FlagModel\n"
            f"model = FlagModel({self.place!r}, pooling_method={self.model.pooling!r}, "
            f"normalize_embeddings={self.model.normalize}{instructions})\n"
            "model.encode_queries(['…']) @ model.encode_corpus(['…', '…']).T"
        )

    def three_in_one(self) -> str:
        """Dense, sparse and multi-vector outputs; empty without their heads."""
        if self.model.sparse_linear is None:
            return ""
        return (
            "from FlagEmbedding import BGEM3FlagModel\n"
            f"model = BGEM3FlagModel({self.place!r}, pooling_method={self.model.pooling!r}, "
            f"normalize_embeddings={self.model.normalize})\n"
            "model.encode(['…'], return_dense=True, return_sparse=True, return_colbert_vecs=True)"
        )

    def _sentence_transformer(self) -> str:
        return f"SentenceTransformer({self.place!r}{self._trust})"

    def sentence_transformers(self) -> str:
        """With its prompts for queries and documents."""
        return (
            "from sentence_transformers import SentenceTransformer\n"
            f"model = {self._sentence_transformer()}\n"
            "queries, documents = model.encode_query(['…']), model.encode_document(['…', '…'])\n"
            "model.similarity(queries, documents)"
        )

    def transformers(self) -> str:
        """Pooling by hand; empty where layers of another library lie between pooling and normalization."""
        if len(self.model.projections):
            return ""
        name = type(self.model.model).__name__
        name = name if name.endswith("EncoderModel") and not self.model.has_experts else "AutoModel"
        before = "".join(
            f"{role} = {text!r}  # stands before each {role}\n"
            for role, text in vars(self.model.instructions).items()
            if text
        )
        asked = "[query + '…']" if self.model.instructions.query else "['…']"
        pooled = {
            "cls": "vectors = states[:, 0]",
            "mean": "mask = batch['attention_mask'][..., None]\nvectors = (states * mask).sum(1) / mask.sum(1)",
            "last_token": "vectors = states[range(len(states)), batch['attention_mask'].sum(1) - 1]",
        }[self.model.pooling]
        side = ", padding_side='right'" if self.model.pooling == "last_token" else ""
        normalized = "\nvectors = torch.nn.functional.normalize(vectors, dim=-1)" if self.model.normalize else ""
        return (
            "import torch\n"
            f"from transformers import {name}, AutoTokenizer\n"
            f"tokenizer = AutoTokenizer.from_pretrained({self.place!r}{side})\n"
            f"model = {name}.from_pretrained({self.place!r}{self._trust}).eval()\n"
            f"{before}"
            f"batch = tokenizer({asked}, padding=True, truncation=True, max_length=512, return_tensors='pt')\n"
            "with torch.no_grad():\n"
            "    states = model(**batch).last_hidden_state\n"
            f"{pooled}{normalized}"
        )


def _indented(code: str) -> str:
    return "\n".join(f"  {line}" for line in code.splitlines())
