#!/usr/bin/env bash
# The paper's ablations, and some that it lacks, on the demo: one name, one table, one figure.
#
#   bash runs/ablations.sh k            # k from 0.3 to 1.0
#   bash runs/ablations.sh score        # excess, the reference's loss and entropy, random
#   bash runs/ablations.sh self         # the reference was trained on the corpus itself
#   bash runs/ablations.sh weak         # references of 80k, 52k and 28k parameters, a student of 271k
#   bash runs/ablations.sh narrow       # a reference that saw one kind of problem only
#   bash runs/ablations.sh scope        # micro-batches of 2, windows, the whole batch
#   bash runs/ablations.sh stale        # a reference made from a base of 200 steps in place of 600
#   bash runs/ablations.sh all --seeds "41 42"
#
# A student takes about a minute and a half on one slow core, its evaluation included; --steps 400
# makes shorter ones (in OUT/steps400), --no-exact-match leaves the evaluation out. Interrupted, the
# same command goes on; what is finished is not done again. The figures are
# figures/ablation-NAME.png and .svg; they need matplotlib (requirements-dev.txt).
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/seeds.sh
ALL="k score self weak narrow scope stale" SEEDS="41 42 43" NAMES="" STEPS=1200 EVALUATE=1
while [ $# -gt 0 ]; do
  case $1 in
    --seeds) SEEDS=$2; shift 2 ;;
    --steps) STEPS=$2; shift 2 ;;
    --no-exact-match) EVALUATE=0; shift ;;
    all) NAMES=$ALL; shift ;;
    k|score|self|weak|narrow|scope|stale) NAMES="$NAMES $1"; shift ;;
    *) echo "runs/ablations.sh: unknown argument $1;" \
            "known: $ALL all --seeds \"41 42\" --steps N --no-exact-match" >&2
       exit 2 ;;
  esac
done
[ -n "$NAMES" ] || { echo "runs/ablations.sh: name an ablation: $ALL all" >&2; exit 2; }

evaluate() {                            # folder of a model
  [ "$EVALUATE" = 0 ] || python eval_math.py --model "$1" --tasks "$D/test.jsonl" --threads 1
}
student() {                             # name, flags of train_slm.py
  local losses="--ref-loss $O/ref_loss.bin"
  [ "$1" != clm ] || losses=""
  python train_slm.py --data "$D/corpus" --val "$D/val" --init "$O/base" $losses $STUDENT \
    --steps "$STEPS" --seed "$S" --threads 1 --out "$A/$1" "${@:2}"
  evaluate "$A/$1"
}
reference() {                           # name, base, token set
  python train_ref.py --data "$3" --val "$D/val" --init "$2" $REFERENCE --eval-every 0 \
    --seed "$S" --threads 1 --out "$O/$1"
  python score.py --model "$O/$1" --data "$D/corpus" --out "$O/$1_ref_loss.bin" --threads 1
  evaluate "$O/$1"
}
base() {                                # name, other flags
  python train_ref.py --data "$D/base" --val "$D/val" $BASE --eval-every 0 --seed "$S" \
    --threads 1 --out "$O/$1" "${@:2}"
}

common() {                              # data ... scores; CLM and SLM
  python train_ref.py --seed "$S" --threads 1
  python score.py --model "$O/ref" --data "$D/corpus" --out "$O/ref_loss.bin" --threads 1
  evaluate "$O/ref"
  student clm --k 1.0 --snapshots 12
  student slm --snapshots 12
}

ablate() {
  case $1 in
    k) for k in 0.3 0.4 0.5 0.7 0.8 0.9; do student slm-k$k --k $k; done ;;
    score)
      python score.py --model "$O/ref" --data "$D/corpus" --out "$O/full_ref_loss.bin" --entropy \
        --threads 1
      for score in loss random ref_loss; do student $score --score $score; done
      for score in ref_entropy ref_and ref_or; do
        student $score --score $score --ref-loss "$O/full_ref_loss.bin"
      done ;;
    self)
      python score.py --model "$A/clm" --data "$D/corpus" --out "$A/self_ref_loss.bin" --entropy \
        --threads 1
      for score in excess ref_loss ref_and; do
        student self-$score --score $score --ref-loss "$A/self_ref_loss.bin"
      done ;;
    weak)
      for size in "80k 64" "52k 48" "28k 32"; do
        set -- $size
        base weak-$1-base --n-layer 1 --d-model $2 --n-head 4
        reference weak-$1 "$O/weak-$1-base" "$D/curated"
        student slm-weak-$1 --ref-loss "$O/weak-$1_ref_loss.bin"
      done ;;
    narrow)
      python -m runs.ablations narrow --seed "$S" --out "$D/narrow.jsonl"
      python prepare.py --source "$D/narrow.jsonl" --tokenizer "$D/base" --out "$D/narrow" \
        --workers 1
      reference narrow "$O/base" "$D/narrow"
      student slm-narrow --ref-loss "$O/narrow_ref_loss.bin" ;;
    scope)
      student slm-sequence --scope sequence
      student slm-micro2 --scope micro --micro-batch-size 2
      student slm-batch --scope batch --micro-batch-size 2 ;;
    stale)
      base stale-base --steps 200
      reference stale "$O/stale-base" "$D/curated"
      student slm-stale --ref-loss "$O/stale_ref_loss.bin" ;;
  esac
}

mkdir -p out
LOG=""
trap 'code=$?; [ $code = 0 ] || [ -z "$LOG" ] || tail -n 5 "$LOG" >&2' EXIT
for S in $SEEDS; do
  roots "$S"
  A=$O
  [ "$STEPS" = 1200 ] || A=$O/steps$STEPS
  for name in $NAMES; do
    LOG=out/ablations-$S-$name.log
    echo "seed $S, $name: log in $LOG"
    # Not `... || tail`: left of || a shell would go on after a command that fails.
    ( common; ablate "$name" ) > "$LOG" 2>&1
  done
done
LOG=""
for name in $NAMES; do
  python -m runs.ablations table --name "$name" --seeds $SEEDS --steps "$STEPS"
done
