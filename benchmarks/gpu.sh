#!/usr/bin/env bash
# What one NVIDIA GPU gives, in about half an hour: the gpu tests, encoding and training by slab size, the peers.
#
#     bash benchmarks/gpu.sh FIXTURE [PEERS/bin/python]
#
# FIXTURE is made if it is not there (BGE-M3's shape, random weights); PEERS as benchmarks/README.md says. Figures go to
# FIXTURE/gpu.md. DEVICE=cpu with TESTS=tests/devices tries the script without a GPU, at small sizes.
set -euo pipefail
absolute() { case "$1" in /*) echo "$1" ;; *) echo "$PWD/$1" ;; esac; }
FIXTURE=$(absolute "${1:?a folder for the fixture}")
PEERS=${2:+$(absolute "$2")}
PYTHON=${PYTHON:-python}
DEVICE=${DEVICE:-cuda:0}
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
[ -d "$FIXTURE/dense" ] || "$PYTHON" benchmarks/fixture.py "$FIXTURE" --size m3
if [ "$DEVICE" = cpu ]; then
    SIZES=--quick
    uname -sm | tee "$FIXTURE/gpu.md"
else
    SIZES=
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | tee "$FIXTURE/gpu.md"
fi
# A test that fails is no reason not to measure.
"$PYTHON" -m pytest -q -m gpu ${TESTS:-tests} | tee -a "$FIXTURE/gpu.md" || echo "The gpu tests failed." | tee -a "$FIXTURE/gpu.md"
"$PYTHON" benchmarks/gpu_sweep.py --fixture "$FIXTURE" --device "$DEVICE" $SIZES | tee -a "$FIXTURE/gpu.md"
if [ -n "$PEERS" ]; then
    "$PYTHON" benchmarks/compare.py --fixture "$FIXTURE" --peer-python "$PEERS" --device "$DEVICE" --threads 0 \
        --cases encode_bf16_mixed train_bf16 --output "$FIXTURE/gpu.json"
    "$PYTHON" benchmarks/compare.py --table --output "$FIXTURE/gpu.json" | tee -a "$FIXTURE/gpu.md"
fi
