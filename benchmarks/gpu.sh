#!/bin/sh
# All that is to be tried and measured on a machine with a GPU: the tests that concern one, and speed on the geometry of real
# models in bfloat16, with random weights. Ends with one table.
#
#   benchmarks/gpu.sh                 # qfbench is installed there
#   benchmarks/gpu.sh WHEELS          # a folder to install it from, without a network; made by: pip wheel -w WHEELS '.[test]'
#   MODELS=tiny DEVICE=cpu EDITS=12 benchmarks/gpu.sh      # to try it without a GPU
#
# Taken from the environment: PYTHON, MODELS, DEVICE, EDITS, and FOLDER, a real model in Hugging Face form that is to be asked.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
if [ $# -gt 0 ]; then
    "$python" -m pip install --quiet --no-index --find-links "$1" 'qfbench[test]'
fi
export PYTHONPATH="$PWD"
"$python" -m pytest -m gpu tests/test_gpu.py
if [ -n "${FOLDER:-}" ]; then
    "$python" benchmarks/asking.py "$FOLDER"
fi
# shellcheck disable=SC2086 # names of models are words
exec "$python" -W ignore benchmarks/gpu.py ${MODELS:-qwen2.5-1.5b qwen2.5-7b} --device "${DEVICE:-cuda}" --edits "${EDITS:-100}"
