#!/usr/bin/env bash
# What only a GPU can show, in one table (docs/speed.md): four parts of some minutes each.
#   bash runs/gpu_check.sh                   # goes on where it stopped
#   OUT=folder bash runs/gpu_check.sh --steps 50
#   bash runs/gpu_check.sh --preset demo --device cpu --steps 2     # its path, on a CPU
# Share of the kept tokens that rounding exchanges, where there are trained models:
#   MODEL=out/demo/base REFERENCE=out/demo/ref DATA=data/demo/corpus bash runs/gpu_check.sh
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
[ -z "${MODEL:-}" ] || : "${REFERENCE:?wanted beside MODEL}" "${DATA:?wanted beside MODEL}"
OUT=${OUT:-gpu_check}
for part in train numbers ranks stages; do
    "$PYTHON" -m tools.gpu_check --out "$OUT" --part "$part" "$@"
done
if [ -n "${MODEL:-}" ]; then
    "$PYTHON" -m tools.precision --model "$MODEL" --reference "$REFERENCE" --data "$DATA" \
        --json "$OUT/precision.json"
fi
