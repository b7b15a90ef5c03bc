"""The same checkpoint in other runtimes: onnxruntime in float32 and int8, OpenVINO, and transformers as it is.

Needs ``pip install onnx onnxruntime openvino``; whatever is not installed is left out. The encoder is exported once, by
``torch.onnx``, with onnxruntime's own fusions for BERT (attention, GELU, residual with LayerNorm) on top; int8 is its
dynamic quantization of that file. Each engine is a function of padded ids and mask to first tokens' states ``[N, D]``.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

Run = Callable[[np.ndarray, np.ndarray], np.ndarray]
ENGINES = ("transformers", "onnxruntime", "onnxruntime-int8", "openvino")


def installed(engine: str) -> bool:
    """Whether this Python has what the engine needs."""
    needs = {"transformers": ["transformers"], "openvino": ["openvino", "onnx"]}.get(engine, ["onnxruntime", "onnx"])
    return all(importlib.util.find_spec(name) is not None for name in needs)


def load_model(folder: Path) -> Any:
    """The checkpoint as transformers computes it."""
    from transformers import AutoModel

    return AutoModel.from_pretrained(str(folder), dtype=torch.float32, trust_remote_code=True).eval()


class _States(torch.nn.Module):
    """Ids and mask in, last hidden states out, and nothing else."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        states: torch.Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return states


def export(folder: Path, out: Path) -> dict[str, Path]:
    """Files ``plain``, ``fused`` and ``int8`` of a checkpoint, made where they are not there yet."""
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.transformers import optimizer

    out.mkdir(parents=True, exist_ok=True)
    files = {name: out / f"{name}.onnx" for name in ("plain", "fused", "int8")}
    model = load_model(folder)
    if not files["plain"].is_file():
        ids = torch.arange(5, 17).view(2, 6)
        axes = {name: {0: "rows", 1: "tokens"} for name in ("input_ids", "attention_mask", "states")}
        torch.onnx.export(
            _States(model),
            (ids, torch.ones_like(ids)),
            str(files["plain"]),
            input_names=["input_ids", "attention_mask"],
            output_names=["states"],
            dynamic_axes=axes,
            opset_version=17,
            dynamo=False,
        )
    if not files["fused"].is_file():
        heads, hidden = model.config.num_attention_heads, model.config.hidden_size
        optimizer.optimize_model(
            str(files["plain"]), model_type="bert", num_heads=heads, hidden_size=hidden, opt_level=1
        ).save_model_to_file(str(files["fused"]))
    if not files["int8"].is_file():
        options = {"DefaultTensorType": 1}  # float: the fused operators are not among those whose types onnx infers
        quantize_dynamic(str(files["fused"]), str(files["int8"]), weight_type=QuantType.QInt8, extra_options=options)
    return files


def load(engine: str, folder: Path, out: Path, threads: int) -> Run:
    """An engine over the checkpoint in ``folder``; exports go to ``out``."""
    if engine == "transformers":
        model = load_model(folder)

        @torch.inference_mode()
        def run_torch(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
            found = model(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)).last_hidden_state
            states: np.ndarray = found[:, 0].numpy()
            return states

        return run_torch
    files = export(folder, out)
    if engine == "openvino":
        import openvino

        compiled = openvino.compile_model(
            str(files["plain"]), "CPU", {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        )
        request = compiled.create_infer_request()
        return lambda ids, mask: np.array(request.infer([ids, mask])[0][:, 0])
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    file = files["int8" if engine.endswith("int8") else "fused"]
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

    def run_onnx(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        states: np.ndarray = session.run(None, {"input_ids": ids, "attention_mask": mask})[0][:, 0]
        return states

    return run_onnx
