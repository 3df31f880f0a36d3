#!/usr/bin/env bash
# When does SLM pay? A base that has learnt all that its size allows from real text (PlanetMath,
# with its metadata), then on more of it: CLM, random, an oracle, and SLM of references of rising
# strength, at several k. How far a reference is ahead of where CLM ends explains much of what SLM
# gains, but not all (docs/results.md).
#
#   bash runs/when_it_pays.sh                        # downloads public text, checksummed
#   DATA=folder bash runs/when_it_pays.sh            # no network: planetmath.jsonl(.zst) is there
#   SEEDS="0" REFERENCES="twice clm" bash runs/when_it_pays.sh      # a part of it
#   SEEDS="3 4" FIRST=0 bash runs/when_it_pays.sh    # more students of the same references
#   THREADS=1 bash runs/when_it_pays.sh              # beside others; each training run is a process
#
# Run in part (docs/results.md); all of it is about 8 hours on one thread. Interrupted, the same
# command goes on; what is done is not done again. Results are added to results/when-it-pays.json,
# and the table is printed. The figure at the end needs matplotlib (requirements-dev.txt).
#
# References, all fine-tuned on clean bodies at 2e-3 and with seed 0:
#   quarter   from the base, two epochs of a quarter of the curated set
#   once, twice, six   from the base, so many epochs of all of it
#   smaller, larger    two epochs, from a base of 0.2M or 2.2M parameters (the others: 0.9M)
#   clm       two epochs, from where CLM of the seed FIRST ends, by default the first one
# Made again on the way (seed by seed): SLM of "twice" stops at half of its steps; from there a
# reference is made again (two epochs), the corpus is scored again, and SLM goes on with it. Beside
# it: the same stop and a new start with the old reference.
set -euo pipefail
kit=$(cd "$(dirname "$0")/.." && pwd)

# The setting: everything is an environment variable.
python=${PYTHON:-python}
sets=${SETS:-data/pays} out=${OUT:-out/pays}
model=${MODEL:---n-layer 3 --d-model 128 --n-head 4}
smaller=${SMALLER:---n-layer 2 --d-model 64 --n-head 4}
larger=${LARGER:---n-layer 4 --d-model 192 --n-head 6}
vocab=${VOCAB:-2048} window=${WINDOW:-256} batch=${BATCH:-8}
base_steps=${BASE_STEPS:-5000}          # 10M tokens
steps=${STEPS:-1400}                    # of a student: once over the corpus; an even number
every=${EVAL_EVERY:-70}
seeds=${SEEDS:-0 1 2}                   # of the students; bases and references have seed 0
references=${REFERENCES:-quarter once twice six smaller larger clm}
ks=${KS:-0.6}                           # shares that each reference is tried at
more_ks=${MORE_KS:-0.4 0.8}             # ... and these two references:
more=${MORE:-twice clm}
again=${AGAIN:-yes}                     # the reference made again from the student

run() {
    printf '$'; printf ' %q' "$@"; echo
    "$@"
}
stage() {                               # a stage of the kit
    local script=$1
    shift
    run "$python" "$kit/$script" "$@"
}
first=${FIRST:-${seeds%% *}}
threads=${THREADS:+--threads $THREADS}
size=(--seq-len "$window" --batch-size "$batch" $threads)
train=(--val "$sets/val" --eval-every "$every" "${size[@]}")

# 1. Data: the corpus has its own vocabulary, the other sets take it over.
if [ -z "${DATA:-}" ]; then
    DATA=$sets/raw
    stage runs/planetmath.py fetch --out "$DATA"
fi
stage runs/planetmath.py sets --data "$DATA" --out "$sets"
stage prepare.py --source "$sets/corpus.jsonl" --train-vocab "$vocab" --out "$sets/corpus"
for set in base bodies curated quarter val; do
    stage prepare.py --source "$sets/$set.jsonl" --tokenizer "$sets/corpus" --out "$sets/$set"
done

# 2. Bases, and the runs that need no reference. The oracle learns from the bodies of the corpus
#    alone: as many tokens, in more passes.
base() {                                # name, shape
    stage train_ref.py --data "$sets/base" --init scratch $2 --steps "$base_steps" --lr 4e-3 \
        --seed 0 --out "$out/$1" "${train[@]}" --eval-every $((10 * every))
}
student() {                             # folder's name, seed, its flags
    local name=$1 seed=$2
    shift 2
    stage train_slm.py --init "$out/base" --steps "$steps" --lr 2e-3 --seed "$seed" \
        --out "$out/$name-seed$seed" "${train[@]}" "$@"
}
tuned() {                               # where it starts, seed, data, epochs, folder
    stage train_ref.py --data "$sets/$3" --init "$1" --epochs "$4" --lr 2e-3 --seed "$2" \
        --out "$5" "${train[@]}"
}
base base "$model"
for seed in $seeds; do
    student clm "$seed" --k 1.0 --data "$sets/corpus" --snapshots 8
    student random "$seed" --k 0.6 --data "$sets/corpus" --score random
    student oracle "$seed" --k 1.0 --data "$sets/bodies"
    tuned "$out/clm-seed$seed" "$seed" curated 2 "$out/clm-tuned-seed$seed"
done

# 3. References, each with its losses on the corpus and on the validation set.
score() {                               # reference, file of losses
    stage score.py --model "$1" --data "$sets/corpus" --val "$sets/val" --out "$2" "${size[@]}"
}
reference() {                           # name
    local folder=$out/ref-$1
    case $1 in
        quarter) tuned "$out/base" 0 quarter 2 "$folder" ;;
        once) tuned "$out/base" 0 curated 1 "$folder" ;;
        twice) tuned "$out/base" 0 curated 2 "$folder" ;;
        six) tuned "$out/base" 0 curated 6 "$folder" ;;
        smaller) base base-smaller "$smaller"; tuned "$out/base-smaller" 0 curated 2 "$folder" ;;
        larger) base base-larger "$larger"; tuned "$out/base-larger" 0 curated 2 "$folder" ;;
        clm) tuned "$out/clm-seed$first" 0 curated 2 "$folder" ;;
        *) echo "$0: no reference is called $1" >&2; exit 2 ;;
    esac
    score "$folder" "$out/$1_ref_loss.bin"
}
# --snapshots 2 leaves the model at half of the steps.
slm() {                                 # reference, k, seed
    student "slm-$1-k$2" "$3" --k "$2" --data "$sets/corpus" \
        --ref-loss "$out/$1_ref_loss.bin" --snapshots 2
}
for name in $references; do
    reference "$name"
    for seed in $seeds; do
        for k in $ks; do
            slm "$name" "$k" "$seed"
        done
    done
done
for name in $more; do
    case " $references " in *" $name "*) ;; *) continue ;; esac
    for seed in $seeds; do
        for k in $more_ks; do
            slm "$name" "$k" "$seed"
        done
    done
done

# 4. The reference made again from the student. The second half starts with new moments, no
#    warm-up, another order of the windows, and the rate that the cosine has reached.
half=$((steps / 2))
go_on() {                               # name, seed, file of losses, start
    stage train_slm.py --k 0.6 --data "$sets/corpus" --init "$4" --ref-loss "$3" --steps "$half" \
        --warmup 0 --lr 1.1e-3 --min-lr 2e-4 --seed "$(($2 + 100))" \
        --out "$out/$1-seed$2" "${train[@]}"
}
case " $references " in *" twice "*) ;; *) again=no ;; esac
if [ "$again" = yes ]; then
    for seed in $seeds; do
        middle=$out/slm-twice-k0.6-seed$seed/step-$(printf %06d "$half")
        go_on old "$seed" "$out/twice_ref_loss.bin" "$middle"
        tuned "$middle" "$seed" curated 2 "$out/ref-again-seed$seed"
        score "$out/ref-again-seed$seed" "$out/again-seed${seed}_ref_loss.bin"
        go_on again "$seed" "$out/again-seed${seed}_ref_loss.bin" "$middle"
    done
fi

# 5. How the base's tokens change under plain training, beside the paper's shares (26, 51, 11 and
#    12 %); then the table and the figure.
run env PYTHONPATH="$kit" "$python" -m tools.explore dynamics --run "$out/clm-seed$first" \
    --data "$sets/val" --out "$out/dynamics" $threads
stage runs/when_it_pays.py --data "$sets" --out "$out" --seeds $seeds
