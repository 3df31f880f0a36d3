#!/usr/bin/env bash
# Other papers' scores and weights on real text, each as published: the setting, the base, CLM and
# the references of runs/when_it_pays.sh, which has to be done for these seeds and references.
#
#   REFERENCES="clm twice" MORE=none AGAIN=no bash runs/when_it_pays.sh
#   bash runs/methods_on_real_text.sh                    # six methods
#   bash runs/methods_on_real_text.sh "rho deft" --seeds "0 1"
#   bash runs/methods_on_real_text.sh "clm excess" --rate 5e-4      # all of them at another rate
#
# A method that looks at a reference runs with one that CLM hardly passes (clm) and with one that it
# leaves behind (twice). About five minutes a run on a core; interrupted, the same command goes on.
# Results are added to results/methods-real-text.json (methods-real-text-RATE.json), and the table is
# printed.
set -euo pipefail
kit=$(cd "$(dirname "$0")/.." && pwd)
names="ref_loss sigmoid_excess clean document ent deft" seeds="0 1 2" rate=2e-3
while [ $# -gt 0 ]; do
  case $1 in
    --seeds) seeds=$2; shift 2 ;;
    --rate) rate=$2; shift 2 ;;
    -*) echo "$0: unknown argument $1; known: \"METHOD ...\" --seeds \"0 1\" --rate 5e-4" >&2
        exit 2 ;;
    *) names=$1; shift ;;
  esac
done

# As runs/when_it_pays.sh has them.
python=${PYTHON:-python}
sets=${SETS:-data/pays} out=${OUT:-out/pays}
window=${WINDOW:-256} batch=${BATCH:-8} steps=${STEPS:-1400} every=${EVAL_EVERY:-70}
references=${REFERENCES:-clm twice}
size="--seq-len $window --batch-size $batch ${THREADS:+--threads $THREADS}"
export PYTHONPATH=$kit

"$python" "$kit/score.py" --model "$out/base" --data "$sets/corpus" --out "$out/base_loss.bin" $size
for name in $names; do
  "$python" -m runs.methods_on_real_text flags --out "$out" --name "$name" \
    --rate "$rate" --references $references | while read -r folder flags; do
    for seed in $seeds; do
      "$python" "$kit/train_slm.py" --init "$out/base" --data "$sets/corpus" --val "$sets/val" \
        --eval-every "$every" --steps "$steps" --seed "$seed" --out "$folder-seed$seed" \
        $flags $size < /dev/null
    done
  done
done
"$python" -m runs.methods_on_real_text table --data "$sets" --out "$out" --seeds $seeds \
  --rate "$rate"
