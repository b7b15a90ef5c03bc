"""Run by test_interchange.py as a program of its own: load checkpoints with transformers and sentence-transformers.

Arguments: a folder that holds checkpoints, and the file to write. FlagEmbedding is never imported here.
"""

import json
import sys
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer

TEXTS = ["How long is the river?", "한강은 서울을 지나 서해로 흘러든다. 길이는 약 오백 킬로미터이다.", "गंगा नदी"]


def transformers_states(folder: Path, trust: bool) -> list:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, trust_remote_code=trust).eval()
    batch = tokenizer(TEXTS, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    return hidden[batch["attention_mask"].bool()].tolist()


def main(checkpoints: Path, output: Path) -> None:
    results = {}
    for folder in sorted(checkpoints.iterdir()):
        trust = (folder / "modeling_moe_encoder.py").is_file()
        entry = {"states": transformers_states(folder, trust)}
        sentences = SentenceTransformer(str(folder), trust_remote_code=trust, device="cpu")
        entry["vectors"] = sentences.encode(TEXTS).tolist()
        if trust:
            for name, load in (("AutoModel", AutoModel.from_pretrained), ("SentenceTransformer", SentenceTransformer)):
                try:
                    load(str(folder))
                    entry[name] = "loaded"
                except Exception as error:  # noqa: BLE001 - whatever is raised is what the test looks at
                    entry[name] = str(error)
            copied = output.parent / f"{folder.name}-copied"
            sentences.save(str(copied))
            again = SentenceTransformer(str(copied), trust_remote_code=True, device="cpu")
            entry["copied"] = again.encode(TEXTS).tolist()
            entry["copied_guard"] = json.loads((copied / "config.json").read_text("utf-8")).get("transformers_weights")
        results[folder.name] = entry
    results["imported"] = "FlagEmbedding" in sys.modules
    output.write_text(json.dumps(results), "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
