#!/usr/bin/env bash
# Weak to strong: a 1B reference selects the tokens of a 7B student (Rho-1, section 3). Expected:
# 44.4 on average against 43.5 for CLM (K=1.0).
#
# Both must have one vocabulary, so the student is Llama-2-7B, whose tokenizer TinyLlama has; that
# is our reading, Mistral's differs. Llama-2 is gated: accept its licence at
# https://huggingface.co/meta-llama/Llama-2-7b-hf, then `hf auth login`. Corpus and reference are
# those of runs/rho_math_1b.sh: what is not there yet is made first, by that file's own commands.
# Or name others, both of one token set: CORPUS=folder REF_LOSS=file bash runs/weak_to_strong_7b.sh
set -euo pipefail
cd "$(dirname "$0")/.."
. runs/common.sh

K=${K:-0.7}                                       # paper: 70 % for 7B
TOKENS=${TOKENS:-$(pick 15000000000 16384)}       # not in our notes: ours, as in the math one
BASE=meta-llama/Llama-2-7b-hf
RUN=slm-k$K-$(amount $TOKENS)
[ -n "${CORPUS:-}${REF_LOSS:-}" ] && made=no || made=yes
CORPUS=${CORPUS:-${D%/*}/rho_math_1b/corpus} REF_LOSS=${REF_LOSS:-${O%/*}/rho_math_1b/ref_loss.bin}
WINDOW=$(pick 2048 128)                           # the reference's: losses hold for its windows
BATCH=$(pick 512 8) MICRO=${MICRO:-$(pick 2 4)}   # paper: 1M tokens a step for its 7B
RANK=${RANK:-$(pick 2 4)}                         # ours: ranked together; MICRO only sets speed
SHARD=$(pick "--parallel fsdp --save-minutes 20" "")  # ours: 7B in fp32 with AdamW are 108 GB

# 0. to 2. The same commands as there, with its own micro-batch; what is finished is used again.
[ $made = no ] ||
    TOKENS=$(pick 15000000000 16384) UNTIL=scores env -u MICRO -u EXTRA bash runs/rho_math_1b.sh
# 3. The student: rate of the 7B math experiment.
launch train_slm.py --k $K --data $CORPUS --init $BASE --ref-loss $REF_LOSS \
    --steps $((TOKENS / (BATCH * WINDOW))) --lr 2e-5 --warmup $(pick 200 2) --seq-len $WINDOW \
    --batch-size $BATCH --micro-batch-size $MICRO --rank-windows $RANK $EXTRA $SHARD --out $O/$RUN
# 4. The nine tasks; the paper's averages are over a part of them.
launch eval_math.py --model $O/$RUN $EVAL \
    --tasks $(pick "gsm8k math svamp asdiv mawps tabmwp mathqa mmlu_stem sat" "gsm8k")
