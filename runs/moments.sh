#!/usr/bin/env bash
# What it costs in learning to keep AdamW's moments in fewer bits: the demo's students, selective
# and plain, with float32, bfloat16 and int8 moments. Base, reference, batches and learning rates
# are the same; base and reference are trained with float32.
#
#   bash runs/moments.sh                            # seeds 21 to 25, about an hour on two slow cores
#   bash runs/moments.sh --seeds "1 2" --jobs 1
#   bash runs/moments.sh --seeds 1 --tiny           # a few steps: only whether it runs
#
# int8 needs torchao (pip install torchao). Interrupted, the same command goes on. Results are added
# to results/moments.json (with --tiny moments-tiny.json); the table: python -m tools.results.
set -euo pipefail
cd "$(dirname "$0")/.."
. runs/seeds.sh
SEEDS="21 22 23 24 25" JOBS=2 TINY=""
args=()
for arg in "$@"; do
  if [ "$arg" = --tiny ]; then TINY=1; else args+=("$arg"); fi
done
parse_seeds ${args[@]+"${args[@]}"}
FORMS="float32 bfloat16 int8"
STEPS=1200 NAME=moments
[ -z "$TINY" ] || { STEPS=4 NAME=moments-tiny; }
OUT=out/$NAME
export TINY FORMS STEPS OUT

before() {                              # data, base, reference and its losses
  if [ -z "$TINY" ]; then
    python train_ref.py --seed $S --threads 1
    python score.py --model $O/ref --data $C --out $O/ref_loss.bin --threads 1
    return
  fi
  local short="--steps 4 --eval-every 0 --seed $S --threads 1"
  python prepare.py --source demo --seed $S --out $D --workers 1
  python train_ref.py --data $D/base $BASE --out $O/base $short
  python train_ref.py --data $D/curated --init $O/base --out $O/ref $short
  python score.py --model $O/ref --data $C --out $O/ref_loss.bin --threads 1
}
student() {                             # method, form of the moments
  local select="--k 0.6 --ref-loss $O/ref_loss.bin"
  [ $1 = slm ] || select="--k 1.0"
  python train_slm.py --data $C --val $V --init $O/base $select $STUDENT --steps $STEPS \
    --seed $S --threads 1 --moments $2 --out $OUT/$2/$1-seed$S
  [ -n "$TINY" ] || python eval_math.py --model $OUT/$2/$1-seed$S --tasks $D/test.jsonl --threads 1
}
one_seed() {
  S=$1
  roots $S
  C=$D/corpus V=$D/val
  [ -z "$TINY" ] || { O=$OUT/demo-seed$S; C=$D/curated; V=$C; }
  before
  for form in $FORMS; do
    student slm $form
    student clm $form
  done
}
export -f before student
mkdir -p $OUT
each_seed $OUT/log
for form in $FORMS; do
  runs=()
  for S in $SEEDS; do
    runs+=(--run slm=$OUT/$form/slm-seed$S --run clm=$OUT/$form/clm-seed$S)
  done
  python -m tools.results --add $NAME --command "bash runs/moments.sh" --variant $form "${runs[@]}"
done
