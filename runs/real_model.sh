#!/usr/bin/env bash
# A pretrained model on real text, for whoever has one GPU: SmolLM2-135M continued
# on LaTeX mathematics mixed with grade-school problems, by CLM, by SLM and by the controls (any
# 60 %, the reference itself, either one fine-tuned afterwards), with GSM8K's loss and few-shot
# accuracy before and after.
#
#   bash runs/real_model.sh                         # downloads the model and 12 MB of public text
#   MODEL=folder DATA=folder DATA_DIR=folder bash runs/real_model.sh     # no network: see below
#   TEXT=folder bash runs/real_model.sh             # your own corpus.jsonl, curated.jsonl, val.jsonl
#   NAME=mine MODEL=... TEXT=... bash runs/real_model.sh      # beside an earlier one
#   SEEDS="0 1 2" bash runs/real_model.sh           # more students; what is done is not done again
#   python -m tools.plan runs/real_model.sh --n-gpus 1
#   SCALE=tiny DATA_DIR=folder bash runs/real_model.sh      # all of it on a CPU, in a few steps
#
# MODEL: any Llama, Mistral or Qwen, a folder or a hub id. DATA: the two files of runs/real_text.sh.
# DATA_DIR: eval/ and prompts/ of the evaluation. NAME: of folders and of rows in the table. More variables: runs/common.sh. Interrupted, the
# same command goes on. Results are added to results/real-model.json (SCALE=tiny: to a folder of
# its own); the table is printed at the end.
set -euo pipefail
cd "$(dirname "$0")/.."
GPUS=${GPUS:-1}
[ "$GPUS" != 1 ] || LAUNCH=${LAUNCH:-${PYTHON:-python}}
. runs/common.sh

NAME=${NAME:-}
D=$D${NAME:+-$NAME} O=$O${NAME:+-$NAME}
MODEL=${MODEL:-HuggingFaceTB/SmolLM2-135M}
SEEDS=${SEEDS:-0}                                   # of the students; the reference has seed 0
WINDOW=${WINDOW:-$(pick 1024 64)} BATCH=${BATCH:-$(pick 32 4)}
MICRO=${MICRO:-$(pick 8 4)} RANK=${RANK:-$(pick 8 4)}
STUDENT=${STUDENT:-$(pick "--epochs 2" "--steps 4")}        # 6M tokens of text, read twice
REFERENCE=${REFERENCE:-$(pick "--epochs 3" "--steps 4")}    # the curated set, read three times
K=${K:-0.6}
TOKENS=${TOKENS:-$(pick 8000000 20000)}             # of the corpus at most: the public text has 6M
NEW_TOKENS=$(pick 512 8)                            # the longest answer; published scores have 1024
train="--val $D/val --seq-len $WINDOW --batch-size $BATCH --micro-batch-size $MICRO
    --eval-every $(pick 20 2) $EXTRA"

# 0. Text to tokens. Half of GSM8K's training problems is a part of the corpus, the other half is
#    the curated set (90 %) and the validation set (10 %). Its test split is only evaluated.
run "$PYTHON" runs/real_model.py sets --out $D ${DATA:+--data "$DATA"} ${TEXT:+--text "$TEXT"} \
    $TESTS $(pick "" --made)
for set in corpus curated val test; do
    tokens=$((TOKENS / 8))
    [ $set != corpus ] || tokens=$TOKENS
    run "$PYTHON" prepare.py --source $D/$set.jsonl --tokenizer "$MODEL" --out $D/$set \
        --max-tokens $tokens
done

# 1. The reference, and 2. its losses, those on the validation set among them.
run $LAUNCH train_ref.py --data $D/curated --init "$MODEL" $REFERENCE --lr 5e-5 --seed 0 \
    --out $O/ref $train
run $LAUNCH score.py --model $O/ref --data $D/corpus --val $D/val --seq-len $WINDOW \
    --batch-size $MICRO --out $O/ref_loss.bin

# 3. Students on the same windows in the same order; then two of them are fine-tuned as the
#    reference was.
names="ref"
for seed in $SEEDS; do
    for method in clm slm random; do
        case $method in
            clm) select="--k 1.0" ;;
            slm) select="--k $K --rank-windows $RANK --ref-loss $O/ref_loss.bin" ;;
            random) select="--k $K --rank-windows $RANK --score random" ;;
        esac
        run $LAUNCH train_slm.py $select --data $D/corpus --init "$MODEL" $STUDENT --lr 1e-4 \
            --seed $seed --out $O/$method-seed$seed $train
        names="$names $method-seed$seed"
    done
    for method in clm slm; do
        run $LAUNCH train_ref.py --data $D/curated --init $O/$method-seed$seed $REFERENCE --lr 5e-5 \
            --seed $seed --out $O/$method-tuned-seed$seed $train
        names="$names $method-tuned-seed$seed"
    done
done

# 4. GSM8K, before (base) and after: the mean loss on its test split, and the paper's few-shot
#    accuracy.
evaluate() {                                        # name, model
    run $LAUNCH score.py --model "$2" --data $D/test --seq-len $WINDOW --batch-size $MICRO \
        --out $O/$1-test_loss.bin
    run $LAUNCH eval_math.py --model "$2" --tasks gsm8k --max-new-tokens $NEW_TOKENS $EVAL \
        --out $O/$1-eval
}
evaluate base "$MODEL"
for name in $names; do
    evaluate $name $O/$name
done

# 5. The table.
[ "$SCALE" != tiny ] || export KIT_RESULTS=$O/results
run "$PYTHON" runs/real_model.py report --data $D --out $O --model "$MODEL" --name "$NAME" \
    --seeds $SEEDS
