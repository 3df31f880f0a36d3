#!/usr/bin/env bash
# The demo's full comparison, over several seeds: CLM, SLM, random tokens, CLM with the curated set
# mixed in (once and eight times), the reference, and CLM and SLM fine-tuned afterwards as the
# reference was. Same base, same batches.
#
#   bash runs/demo.sh                       # seeds 21 to 25, about 40 minutes on two slow cores
#   bash runs/demo.sh --seeds "1 2" --jobs 1
#   bash runs/demo.sh --main                # CLM, SLM, random and the reference: half of the time
#
# Interrupted, the same command goes on. The table is printed at the end (python -m demo.table).
# Base, reference, CLM, SLM and random go into results/demo.json; their tables with intervals:
# python -m tools.results.
set -euo pipefail
cd "$(dirname "$0")/.."
. runs/seeds.sh
SEEDS="21 22 23 24 25" JOBS=2 MAIN=""
args=()
for arg in "$@"; do
  if [ "$arg" = --main ]; then MAIN=1; else args+=("$arg"); fi
done
parse_seeds ${args[@]+"${args[@]}"}
export MAIN

one_seed() {
  local S=$1 D O
  roots $S
  local tune="--data $D/curated --val $D/val $REFERENCE --seed $S --threads 1"
  local mix="--val $D/val --init $O/base $STUDENT --seed $S --threads 1"
  # The first makes data, base, reference, scores and CLM, too.
  python train_slm.py --k 0.6 --seed $S
  python train_slm.py --k 0.6 --score random --seed $S
  python eval_math.py --model $O/random --tasks $D/test.jsonl
  [ -z "$MAIN" ] || return 0
  python train_ref.py $tune --init $O/clm --out $O/clm-tuned
  python train_ref.py $tune --init $O/slm --out $O/slm-tuned
  python prepare.py --source $D/corpus $D/curated --out $D/mixed1
  python prepare.py --source $D/corpus $D/curated $D/curated $D/curated $D/curated \
                             $D/curated $D/curated $D/curated $D/curated --out $D/mixed8
  python train_ref.py --data $D/mixed1 $mix --out $O/mixed1
  python train_ref.py --data $D/mixed8 $mix --out $O/mixed8
  for run in base ref clm slm clm-tuned slm-tuned mixed1 mixed8; do
    python eval_math.py --model $O/$run --tasks $D/test.jsonl
  done
}

mkdir -p out
each_seed out/demo
runs=()
for S in $SEEDS; do
  roots $S
  for run in base ref clm slm random; do runs+=(--run $run=$O/$run); done
done
python -m tools.results --add demo --command "bash runs/demo.sh" "${runs[@]}"
[ -n "$MAIN" ] || python -m demo.table --seeds $SEEDS
