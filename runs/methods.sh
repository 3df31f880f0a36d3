#!/usr/bin/env bash
# Every method of slm.py and methods.py, like for like, on the demo: one table and one
# figure, which needs matplotlib (requirements-dev.txt).
#
#   bash runs/methods.sh                                 # tune on two seeds, then five fresh ones
#   bash runs/methods.sh "excess dft mile"               # some of them; CLM is always there
#   TUNE_SEEDS="61 62" SEEDS="71 72 73" bash runs/methods.sh
#   TUNE_SEEDS= RATES=2e-3 bash runs/methods.sh          # no search: each as published, at one rate
#
# Each method's learning rate, and then its knob where it has one, are the best of three on
# TUNE_SEEDS, by the mean validation loss; CLM's rate likewise. They are written to CHOICES and then
# fixed. The search goes to results/methods-search.json, the fresh seeds to methods-tuned.json, or
# without a search to methods.json. A student takes one to two minutes on a slow core: 24 methods
# with 3 rates, 21 with 2 more values of a knob, make 228 runs for the search and 120 for the table.
# Interrupted, the same command goes on. A trial, in a folder of its own:
# mkdir trial && WHERE=trial KIT=$PWD KIT_RESULTS=$PWD/trial EVALUATE=0 RATES=1e-3 \
#     STEPS=20 BASE_STEPS=20 REF_STEPS=20 bash runs/methods.sh
set -euo pipefail
cd "${WHERE:-$(dirname "$0")/..}"
KIT=${KIT:-.}
source "$KIT/runs/seeds.sh"
export PYTHONPATH=$KIT
STEPS=${STEPS:-1200}                   # BASE_STEPS and REF_STEPS: in place of the recipe's
TUNE_SEEDS=${TUNE_SEEDS-"61 62"} SEEDS=${SEEDS:-"71 72 73 74 75"} EVALUATE=${EVALUATE:-1}
RATES=${RATES:-"1e-3 2e-3 4e-3"} CHOICES=${CHOICES:-out/methods.json}
NAMES=${1:-$(python -m runs.methods names)}

common() {                              # seed: data, base, reference, all stored losses
  roots "$1"
  S=$1 M=$O/methods$STEPS
  local trained="--val $D/val --eval-every 0 --seed $S --threads 1"
  [ -n "${WHERE:-}" ] && [ -e "$D/val/meta.json" ] ||      # a trial may have sets of its own
    python "$KIT/prepare.py" --source demo --out "$D" --seed "$S"
  python "$KIT/train_ref.py" --data "$D/base" $BASE ${BASE_STEPS:+--steps $BASE_STEPS} \
    --out "$O/base" $trained
  python "$KIT/train_ref.py" --data "$D/curated" --init "$O/base" $REFERENCE \
    ${REF_STEPS:+--steps $REF_STEPS} --out "$O/ref" $trained
  local scored="--data $D/corpus --threads 1"
  python "$KIT/score.py" --model "$O/ref" --out "$M/ref_loss.bin" --entropy $scored
  python "$KIT/score.py" --model "$O/base" --out "$M/base_loss.bin" $scored
  python "$KIT/score.py" --model "$O/base" --out "$M/short_loss.bin" --context 32 $scored
}
student() {                             # folder, flags of the method
  python "$KIT/train_slm.py" --data "$D/corpus" --val "$D/val" --init "$O/base" --steps "$STEPS" \
    --ref-loss "$M/ref_loss.bin" --base-loss "$M/base_loss.bin" --short-loss "$M/short_loss.bin" \
    --seed "$S" --threads 1 --out "$1" "${@:2}"
}

for stage in rates knobs; do
  search="--stage $stage --rates $RATES --out $CHOICES"
  for seed in $TUNE_SEEDS; do
    common "$seed"
    for name in clm $NAMES; do
      python -m runs.methods variants --name "$name" $search | while read -r folder flags; do
        student "$M/$folder" $flags < /dev/null
      done
    done
  done
  python -m runs.methods choose --names clm $NAMES --seeds $TUNE_SEEDS --steps "$STEPS" $search
done

for seed in $SEEDS; do
  common "$seed"
  for name in clm $NAMES; do
    read -r folder flags < <(python -m runs.methods chosen --name "$name" --out "$CHOICES")
    student "$M/$folder" $flags
    [ "$EVALUATE" = 0 ] ||
      python "$KIT/eval_math.py" --model "$M/$folder" --tasks "$D/test.jsonl" --threads 1
  done
done
python -m runs.methods table --names clm $NAMES --seeds $SEEDS --steps "$STEPS" --out "$CHOICES"
