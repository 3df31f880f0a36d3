#!/usr/bin/env bash
# Rho-1-General-1B: TinyLlama continued on 80B tokens, SlimPajama : StarCoderData : OpenWebMath 6 :
# 3 : 1 (Rho-1, section 3). Expected: 6.8 points more than CLM (K=1.0) on average over 15
# benchmarks. Paper's time on 32 H100: 19 h.
#
# StarCoderData is gated: agree to its terms at
# https://huggingface.co/datasets/bigcode/starcoderdata, then `hf auth login`.
#
#   bash runs/rho_general_1b.sh
#   K=1.0 bash runs/rho_general_1b.sh
#   python -m tools.plan runs/rho_general_1b.sh --n-gpus 32
set -euo pipefail
cd "$(dirname "$0")/.."
. runs/common.sh

K=${K:-0.6}                                       # paper: 60 %
TOKENS=${TOKENS:-$(pick 80000000000 16384)}       # paper: 80B
BASE=TinyLlama/TinyLlama_v1.1                     # paper: TinyLlama-1.1B; the version is our choice
WINDOW=$(pick 2048 128)                           # our choice, as in the math experiment
BATCH=$(pick 512 8) MICRO=${MICRO:-$(pick 4 4)}   # paper: 1M tokens a step
RANK=${RANK:-$(pick 4 4)}                         # ours: ranked together; MICRO only sets speed
D=$D/$(amount $TOKENS) O=$O/$(amount $TOKENS) RUN=slm-k$K
STEPS=$((TOKENS / (BATCH * WINDOW)))

# 0. Text to tokens. The paper's curated set is 1.9B tokens of Tulu-v2, OpenHermes-2.5 and more that
#    it does not name; ours is these two, of which only what the assistant says is a target.
run "$PYTHON" prepare.py --source hf:cerebras/SlimPajama-627B hf:bigcode/starcoderdata \
    hf:open-web-math/open-web-math --mix 6 3 1 --max-tokens $TOKENS --tokenizer $BASE \
    --out $D/corpus
if [ "$K" != 1.0 ]; then
    run "$PYTHON" prepare.py --source hf:allenai/tulu-v2-sft-mixture hf:teknium/OpenHermes-2.5 \
        --tokenizer $BASE --max-tokens $(pick 1900000000 20000) --out $D/curated
    # 1. The reference: 3 epochs (paper). Rate and batch are not stated here: as in the math
    #    experiment.
    launch train_ref.py --data $D/curated --init $BASE --epochs $(pick 3 0.5) --lr 5e-5 \
        --schedule cosine --warmup $(pick 50 2) --seq-len $WINDOW --batch-size $(pick 256 8) \
        --micro-batch-size $MICRO $EXTRA --out $O/ref
    # 2. Its loss on every token of the corpus, once.
    launch score.py --model $O/ref --data $D/corpus --seq-len $WINDOW \
        --batch-size $(pick 16 8) --out $O/ref_loss.bin
fi
# 3. The student: 1e-4 (paper); cosine to a tenth and the warm-up are our choice.
launch train_slm.py --k $K --data $D/corpus --init $BASE --ref-loss $O/ref_loss.bin \
    --steps $STEPS --lr 1e-4 --warmup $(pick 500 2) --seq-len $WINDOW --batch-size $BATCH \
    --micro-batch-size $MICRO --rank-windows $RANK $EXTRA --out $O/$RUN
# 4. Two of the 15 benchmarks with the paper's maths protocol, the others with lm-eval (pip install
#    lm-eval; names as in 0.4.13), which opens the checkpoint as it is. Its TydiQA is the
#    gold-passage task; MBPP and HumanEval run the model's code, for which it asks to be told so.
#    Numbers of shots: lm-eval's own, the paper's are not in our notes.
launch eval_math.py --model $O/$RUN --tasks $(pick "gsm8k math" "gsm8k") $EVAL
BENCHMARKS=mmlu,bbh,mbpp,humaneval,agieval_en,arc_challenge,arc_easy,boolq,piqa,hellaswag
BENCHMARKS=$BENCHMARKS,winogrande,openbookqa,tydiqa_goldp
if [ "$SCALE" = full ]; then
    run env HF_ALLOW_CODE_EVAL=1 lm_eval --model hf --model_args pretrained=$O/$RUN,dtype=bfloat16 \
        --tasks $BENCHMARKS --batch_size auto --confirm_run_unsafe_code \
        --output_path $O/$RUN/lm-eval
fi
