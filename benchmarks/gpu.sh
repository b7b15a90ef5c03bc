#!/usr/bin/env bash
# What one NVIDIA GPU gives, in about half an hour: the gpu tests, encoding and training by slab size, the peers.
#
#     bash benchmarks/gpu.sh FIXTURE [PEERS/bin/python]
#
# FIXTURE is made if it is not there (BGE-M3's shape, random weights); PEERS as benchmarks/README.md says. Figures go to
# FIXTURE/gpu.md.
set -eu
cd "$(dirname "$0")/.."
FIXTURE=${1:?a folder for the fixture}
PYTHON=${PYTHON:-python}
[ -d "$FIXTURE/dense" ] || "$PYTHON" benchmarks/fixture.py "$FIXTURE" --size m3
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | tee "$FIXTURE/gpu.md"
"$PYTHON" -m pytest -q -m gpu | tee -a "$FIXTURE/gpu.md"
"$PYTHON" benchmarks/gpu_sweep.py --fixture "$FIXTURE" | tee -a "$FIXTURE/gpu.md"
if [ -n "${2:-}" ]; then
    "$PYTHON" benchmarks/compare.py --fixture "$FIXTURE" --peer-python "$2" --device cuda:0 --threads 0 \
        --cases encode_bf16_mixed train_bf16 --output "$FIXTURE/gpu.json"
    "$PYTHON" benchmarks/compare.py --table --output "$FIXTURE/gpu.json" | tee -a "$FIXTURE/gpu.md"
fi
