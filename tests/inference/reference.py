"""One text at a time, by transformers and the formulas of BGE-M3 written out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModel, AutoTokenizer


class Reference:
    """A checkpoint with or without the two heads."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModel.from_pretrained(folder).eval()
        self.heads = {
            name: torch.load(folder / f"{name}_linear.pt", weights_only=True)
            for name in ("colbert", "sparse")
            if (folder / f"{name}_linear.pt").exists()
        }

    @torch.inference_mode()
    def states(self, text: str, max_length: int = 128) -> tuple[list[int], torch.Tensor]:
        features = self.tokenizer(text, truncation=True, max_length=max_length, return_tensors="pt")
        ids, mask = features["input_ids"], features["attention_mask"]
        return ids[0].tolist(), self.model(input_ids=ids, attention_mask=mask).last_hidden_state[0]

    def dense(self, text: str, pooling: str = "cls", max_length: int = 128) -> np.ndarray:
        hidden = self.states(text, max_length)[1]
        return F.normalize(hidden[0] if pooling == "cls" else hidden.mean(dim=0), dim=0).numpy()

    def lexical(self, text: str) -> dict[str, float]:
        ids, hidden = self.states(text)
        head = self.heads["sparse"]
        weights = torch.relu(hidden @ head["weight"].T + head["bias"])[:, 0].tolist()
        unused = set(self.tokenizer.all_special_ids) - {self.tokenizer.mask_token_id}
        row: dict[str, float] = {}
        for token, weight in zip(ids, weights, strict=True):
            if token not in unused and weight > 0:
                row[str(token)] = max(weight, row.get(str(token), 0.0))
        return row

    def colbert(self, text: str) -> np.ndarray:
        hidden = self.states(text)[1][1:]
        head = self.heads["colbert"]
        return F.normalize(hidden @ head["weight"].T + head["bias"], dim=-1).numpy()
