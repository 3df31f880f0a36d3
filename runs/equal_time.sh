#!/usr/bin/env bash
# What pruning the backward pass is worth: exact and pruned selective training, and plain training,
# after equal tokens and after equal time. Base, reference, learning rate and order of the windows
# are the same.
#
#   bash runs/equal_time.sh demo                    # seeds 21 to 25
#   bash runs/equal_time.sh real                    # seeds 0 to 2, on the data of runs/real_text.sh
#   bash runs/equal_time.sh real --seeds "0 1" --jobs 1
#
# On a shared machine seconds say little, so the time of a step is measured first as a ratio, for a
# model of this very shape (tools.bench: all forms by turns in one process, median of 15 rounds).
# The fastest form then gets one pass over the corpus, the others as many steps as fit into the same
# time, each with its own whole schedule of the learning rate.
#
# Interrupted, the same command goes on; delete out/equal-time/NAME.json to measure the step again.
set -euo pipefail
cd "$(dirname "$0")/.."
. runs/seeds.sh
NAME=${1:-} JOBS=2
case $NAME in
  demo) SEEDS="21 22 23 24 25" PRESET=demo FULL=1200 ;;
  real) SEEDS="0 1 2" PRESET=real-text FULL=368 ;;
  *) echo "runs/equal_time.sh: got '$NAME', wanted demo or real" >&2; exit 2 ;;
esac
shift
parse_seeds "$@"
if [ "$NAME" = real ] && [ ! -f out/real/ref_loss.json ]; then
  echo "runs/equal_time.sh: out/real/ref_loss.json does not exist; run runs/real_text.sh first" >&2
  exit 2
fi
OUT=out/equal-time
mkdir -p $OUT
ROWS=clm_chunked,slm_kept,slm_pruned                    # what the default head makes of each
[ -f $OUT/$NAME.json ] ||
  python -m tools.bench train --preset $PRESET --rows $ROWS --repeats 15 --json $OUT/$NAME.json

steps() {                               # row of the bench: steps in the fastest's time
  python -c 'import json, sys
rows = json.load(open(sys.argv[1]))["train"]
fastest = min(row["step_s"] for row in rows.values())
print(round(int(sys.argv[3]) * fastest / rows[sys.argv[2]]["step_s"]))' $OUT/$NAME.json "$1" "$FULL"
}
CLM=$(steps clm_chunked) SLM=$(steps slm_kept) PRUNED=$(steps slm_pruned)
export NAME OUT FULL CLM SLM PRUNED

student() {                             # method, steps
  local select="--k 0.6 --ref-loss $O/ref_loss.bin"
  case $1 in
    clm) select="--k 1.0" ;;
    pruned) select="$select --backward pruned" ;;
  esac
  python train_slm.py --data $D/corpus --val $D/val --init $O/base $select $STUDENT --steps $2 \
    --seed $S --threads 1 $MORE --out $OUT/$NAME/$1-$2-seed$S
}
one_seed() {
  S=$1
  if [ $NAME = demo ]; then
    roots $S
    MORE=""
    python train_ref.py --seed $S --threads 1           # data, base, reference
    python score.py --model $O/ref --data $D/corpus --out $O/ref_loss.bin --threads 1
  else
    D=data/real O=out/real MORE="--lr 4e-3 --seq-len 256 --eval-every 60"
  fi
  for steps in $FULL $CLM; do student clm $steps; done
  for steps in $FULL $SLM; do student slm $steps; done
  for steps in $FULL $PRUNED; do student pruned $steps; done
}
export -f student
each_seed $OUT/$NAME

lines() {                               # method, steps: the runs of all seeds
  local runs=""
  for s in $SEEDS; do runs="$runs,$OUT/$NAME/$1-$2-seed$s"; done
  echo "${runs#,}"
}
compare() {                             # what is equal, steps of each method
  printf '\nafter equal %s, seeds %s\n' "$1" "$SEEDS"
  python -m tools.explore curves --baseline "CLM, $2 steps" \
    --run "CLM, $2 steps=$(lines clm $2)" --run "SLM exact, $3 steps=$(lines slm $3)" \
    --run "SLM pruned, $4 steps=$(lines pruned $4)" --out $OUT/$NAME-$1
}
compare tokens $FULL $FULL $FULL
compare time $CLM $SLM $PRUNED
