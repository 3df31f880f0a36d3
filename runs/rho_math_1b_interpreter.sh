#!/usr/bin/env bash
# Rho-1-Math-1B-Interpreter: fine-tuning on trajectories in which the model writes Python and reads
# what it prints. Expected, with tools: GSM8K 59.4, MATH 40.6 (table 2); from the CLM baseline 51.4
# / 38.4.
#
#   bash runs/rho_math_1b_interpreter.sh    # from the published Rho-1-Math-1B
#   BASE=out/rho_math_1b/slm-k0.6-15B bash runs/rho_math_1b_interpreter.sh    # from your own
set -euo pipefail
cd "$(dirname "$0")/.."
. runs/common.sh

BASE=${BASE:-microsoft/rho-math-1b-v0.1}
NAME=$(echo "$BASE" | tr / -)
# The paper fine-tunes on ToRA's 69k trajectories (16k by GPT-4, 53k augmented). We know of no
# public copy of all of them; our substitute is NuminaMath-TIR, 70k trajectories in the same format.
# Your own: TRAJECTORIES=tora.jsonl, with the fields messages, or prompt and completion. Prompts and
# tool outputs are no targets; problems of the tests are left out.
TRAJECTORIES=${TRAJECTORIES:-hf:AI-MO/NuminaMath-TIR}
WINDOW=$(pick 2048 128) MICRO=${MICRO:-4}

run "$PYTHON" prepare.py --source $TRAJECTORIES --tokenizer $BASE \
    --decontaminate $(pick "gsm8k math" gsm8k) $TESTS --max-tokens $(pick 50000000 20000) \
    --out $D/$NAME
# ToRA's recipe (Rho-1 does not state its own): 2e-5, linear, 3 epochs, windows of 2048, 128
# sequences a step; its 3 % of warm-up are 17 of the 573 steps that 50M tokens make. Packing several
# to a window is ours: a step holds more of them.
launch train_ref.py --data $D/$NAME --init $BASE --epochs $(pick 3 0.5) --lr 2e-5 --min-lr 0 \
    --schedule linear --warmup $(pick 17 1) --seq-len $WINDOW --batch-size $(pick 128 8) \
    --micro-batch-size $MICRO $EXTRA --out $O/$NAME
launch eval_math.py --model $O/$NAME --mode tool --tasks $(pick "gsm8k math" gsm8k) $EVAL
