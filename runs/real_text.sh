#!/usr/bin/env bash
# Real text: does SLM help a small model, started from scratch, on LaTeX mathematics mixed with
# grade-school problems?
#
#   bash runs/real_text.sh                        # downloads 11 MB of public files, checksummed
#   DATA=folder bash runs/real_text.sh            # no network: the two files are there
#   SEEDS="0 1 2" RATES="1e-3 2e-3 4e-3" bash runs/real_text.sh           # more of both
#   KS="0.4 0.5 0.7 0.8" bash runs/real_text.sh   # SLM at other shares, best rate, first seed
#
# GSM8K's test split is read only for the last report. It is found at DATA/../eval/gsm8k.jsonl, else
# downloaded. Interrupted, the same command goes on; what is done is not done again.
# What is verified: GSM8K's file by its sha256; of the Stacks project's archive (whose
# own checksum may change) the text that is taken from it, by its sha256.
set -euo pipefail
kit=$(cd "$(dirname "$0")/.." && pwd)

# The setting: a Llama of 2.2M parameters, 2,048 tokens a step. Everything is an environment
# variable.
python=${PYTHON:-python}
sets=${SETS:-data/real} out=${OUT:-out/real}
model=${MODEL:---n-layer 4 --d-model 192 --n-head 6}
vocab=${VOCAB:-2048} window=${WINDOW:-256} batch=${BATCH:-8}
latex_bytes=${LATEX_BYTES:-1900000}     # as many tokens of LaTeX as of GSM8K
base_steps=${BASE_STEPS:-240} ref_steps=${REF_STEPS:-240}
student=${STUDENT:---epochs 1}          # one pass over the corpus
every=${EVAL_EVERY:-60}
seeds=${SEEDS:-0}                       # of the students; base and reference have seed 0
rates=${RATES:-2e-3 4e-3}               # learning rates, all tried by every method, first seed
ks=${KS:-}                              # other shares for SLM, beside 0.6
options=${OPTIONS:-}                    # of each training and scoring command, such as --threads 8

# 1. Data: the corpus has its own vocabulary, the other sets take it over.
if [ -z "${DATA:-}" ]; then
    DATA=$sets/raw
    "$python" "$kit/runs/real_text.py" fetch --out "$DATA"
fi
"$python" "$kit/runs/real_text.py" split --data "$DATA" --out "$sets" --latex-bytes "$latex_bytes"
"$python" "$kit/prepare.py" --source "$sets/corpus.jsonl" --train-vocab "$vocab" --out "$sets/corpus"
for set in base curated val; do
    "$python" "$kit/prepare.py" --source "$sets/$set.jsonl" --tokenizer "$sets/corpus" \
        --out "$sets/$set"
done

# 2. The base, where reference and students start, sees a part of the same mixture that the students
#    never see. The reference is the base after curated problems. Its losses on the corpus are
#    stored once.
train=(--val "$sets/val" --seq-len "$window" --batch-size "$batch" --eval-every "$every"
    --save-every 60 $options)
"$python" "$kit/train_ref.py" --data "$sets/base" --init scratch $model --steps "$base_steps" \
    --lr 2e-3 --schedule constant --seed 0 --out "$out/base" "${train[@]}"
"$python" "$kit/train_ref.py" --data "$sets/curated" --init "$out/base" --steps "$ref_steps" \
    --lr 2e-3 --seed 0 --out "$out/ref" "${train[@]}"
"$python" "$kit/score.py" --model "$out/ref" --data "$sets/corpus" --out "$out/ref_loss.bin" \
    --seq-len "$window" --batch-size "$batch" $options

# 3. Students: the same windows in the same order, every token (clm), the best 60 % (slm), any 60 %
#    (random).
student_run() {     # method, rate, seed
    local select=(--k 0.6 --ref-loss "$out/ref_loss.bin")
    case $1 in
        clm) select=(--k 1.0) ;;
        random) select=(--k 0.6 --score random) ;;
        slm-k*) select=(--k "${1#slm-k}" --ref-loss "$out/ref_loss.bin") ;;
    esac
    "$python" "$kit/train_slm.py" --data "$sets/corpus" --init "$out/base" $student \
        "${select[@]}" --lr "$2" --seed "$3" --out "$out/$1-lr$2-seed$3" "${train[@]}"
}
best_rate() {       # method
    "$python" "$kit/runs/real_text.py" best --method "$1" --out "$out" --seeds "$first" --rates $rates
}
first=${seeds%% *}
for rate in $rates; do
    for method in clm slm random; do
        student_run $method "$rate" "$first"
    done
done
for seed in $seeds; do      # the other seeds take each method's best rate, by validation loss
    for method in clm slm random; do
        rate=$(best_rate $method)
        student_run $method "$rate" "$seed"
    done
done

if [ -n "$ks" ]; then
    rate=$(best_rate slm)
    for k in $ks; do
        student_run "slm-k$k" "$rate" "$first"
    done
fi

# 4. The last report, and only here the test split.
test=$("$python" "$kit/runs/real_text.py" test --data "$DATA")
"$python" "$kit/prepare.py" --source "$test" --prompt-field question --response-field answer \
    --tokenizer "$sets/corpus" --out "$sets/test"
for run in "$out"/base "$out"/ref "$out"/*-lr*-seed*; do
    [ -f "$run/summary.json" ] || continue
    "$python" "$kit/score.py" --model "$run" --data "$sets/test" --out "$run-test_loss.bin" \
        --seq-len "$window" --batch-size "$batch" $options
done
"$python" "$kit/runs/real_text.py" report --data "$sets" --out "$out" --seeds $seeds --rates $rates \
    | tee "$out/report.md"
