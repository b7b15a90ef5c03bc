"""Checkpoints in the forms that other servers take: experts folded to dense layers, ONNX, int8."""
