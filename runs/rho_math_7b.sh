#!/usr/bin/env bash
# Rho-1-Math-7B: Mistral-7B continued on OpenWebMath with SLM, 15B tokens (Rho-1, section 3; table
# 1). Expected, few-shot: GSM8K 66.9, MATH 31.0, average of nine tasks 66.2; K=1.0 (CLM): 42.9,
# 22.2, 55.8. 10.5B of the 15B tokens are selected. Paper's time on 32 H100: 18 h. On 8 GPUs of 80
# GB it takes FSDP.
#
#   bash runs/rho_math_7b.sh
#   K=1.0 bash runs/rho_math_7b.sh
#   python -m tools.plan runs/rho_math_7b.sh --n-gpus 8
set -euo pipefail
cd "$(dirname "$0")/.."
. runs/common.sh

K=${K:-0.7}                                       # paper: 70 %
TOKENS=${TOKENS:-$(pick 15000000000 16384)}       # paper: 15B read, 10.5B of them selected
BASE=mistralai/Mistral-7B-v0.1                    # paper: Mistral-7B
WINDOW=$(pick 4096 128)                           # reference: paper; student: our choice, the same
BATCH=$(pick 256 8) MICRO=${MICRO:-$(pick 1 4)}   # paper: 1M tokens a step
RANK=${RANK:-$(pick 1 4)}                         # ours: ranked together; MICRO only sets speed
SHARD=$(pick "--parallel fsdp --save-minutes 20" "")  # ours: 7B in fp32 with AdamW are 116 GB
RUN=slm-k$K-$(amount $TOKENS)
STEPS=$((TOKENS / (BATCH * WINDOW)))
# Not stated, our choice: warm-up, AdamW (0.9, 0.95), weight decay 0.1, clipping at 1.
WARMUP=$(pick 200 2)

TASKS=$(pick "gsm8k math svamp asdiv mawps tabmwp mathqa mmlu_stem sat" "gsm8k")

# The curated set: the paper has 0.5B tokens of MetaMath, KPMath, MAmmoTH and more. We know of no
# public KPMath, so ours is MetaMathQA and MathInstruct (MAmmoTH), and smaller. Add what you have:
# CURATED="hf:meta-math/MetaMathQA mine.jsonl". Test problems are left out of both sets; the paper
# does not say whether it did.
CURATED=${CURATED:-hf:meta-math/MetaMathQA hf:TIGER-Lab/MathInstruct}
CLEAN="--decontaminate $TASKS $TESTS"

# 0. Text to tokens. Prompts of the curated set are targets, too: the reference will judge questions
#    on web pages.
run "$PYTHON" prepare.py --source hf:open-web-math/open-web-math --tokenizer $BASE \
    --max-tokens $(pick 15000000000 40000) $CLEAN --out $D/corpus
if [ "$K" != 1.0 ]; then
    run "$PYTHON" prepare.py --source $CURATED --tokenizer $BASE \
        --max-tokens $(pick 500000000 20000) $CLEAN --out $D/curated
    # 1. The reference: 3 epochs, 1e-5, cosine (paper). Its batch is not stated: 0.5M tokens is our
    #    choice.
    launch train_ref.py --data $D/curated --init $BASE --epochs $(pick 3 0.5) --lr 1e-5 \
        --schedule cosine --warmup $(pick 50 2) --seq-len $WINDOW --batch-size $(pick 128 8) \
        --micro-batch-size $MICRO $EXTRA $SHARD --out $O/ref
    # 2. Its loss on every token of the corpus, once.
    launch score.py --model $O/ref --data $D/corpus --seq-len $WINDOW \
        --batch-size $(pick 4 8) --out $O/ref_loss.bin
fi
# 3. The student: 2e-5 (paper); the schedule is not stated: cosine to a tenth is our choice.
launch train_slm.py --k $K --data $D/corpus --init $BASE --ref-loss $O/ref_loss.bin \
    --steps $STEPS --lr 2e-5 --warmup $WARMUP --seq-len $WINDOW --batch-size $BATCH \
    --micro-batch-size $MICRO --rank-windows $RANK $EXTRA $SHARD --snapshots $(pick 15 1) \
    --out $O/$RUN
# 4. The nine tasks.
launch eval_math.py --model $O/$RUN --tasks $TASKS $EVAL
