# Read by the recipes beside it; nothing of the experiments is in here.
#   GPUS=8 bash runs/X.sh            GPUs of this machine, under torchrun (default 8)
#   LAUNCH="torchrun --nnodes 4 --nproc-per-node 8 ..."     starts the stages that use GPUs instead
#   PLAN=1 bash runs/X.sh            prints the commands, runs none; python -m tools.plan reads them
#   K=1.0 bash runs/X.sh             the baseline: plain causal training (CLM), no reference
#   SCALE=tiny bash runs/X.sh        all of it on a CPU: tiny models, a local hub, a few steps
#   EXTRA="--checkpointing"          more flags of the training stages; MICRO=8: their micro-batch
#   RANK=2                           windows that are ranked together, a divisor of MICRO
#   DATA_DIR=folder                  the evaluation's files (eval/ and prompts/), else downloaded
#   PYTHON=python3                   the interpreter; TINY=out/tiny: where SCALE=tiny writes
# Interrupted, the same command goes on where it stopped.
SCALE=${SCALE:-full} PYTHON=${PYTHON:-python} GPUS=${GPUS:-8}
EXTRA=${EXTRA:-}
# On SIGTERM the ranks end their step and save: torchrun's 30 seconds are too few for 7B.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}
case ${K:-} in 1 | 1. | 1.00) K=1.0 ;; esac
RECIPE=$(basename "$0" .sh)
D=data/$RECIPE O=out/$RECIPE
case "${DATA_DIR:-}${TINY:-}${BASE:-}" in
    *[[:space:]]*) echo "$0: DATA_DIR, TINY and BASE are split at spaces; name others" >&2; exit 2 ;;
esac
LAUNCH=${LAUNCH:-torchrun --nproc-per-node $GPUS}
TESTS=${DATA_DIR:+--data-dir $DATA_DIR} EVAL=${DATA_DIR:+--data-dir $DATA_DIR}

# pick FULL TINY: a number of the paper, and what stands for it under SCALE=tiny
pick() { if [ "$SCALE" = tiny ]; then echo "$2"; else echo "$1"; fi; }

# amount TOKENS: 15B, or all digits: runs of different lengths have folders of their own
amount() { if (($1 % 1000000000)); then echo "$1"; else echo $(($1 / 1000000000))B; fi; }

run() {
    printf '$'; printf ' %q' "$@"; echo
    [ -n "${PLAN:-}" ] || "$@"
}

# launch STAGE.py ...: a stage that uses the GPUs
launch() { if [ "$SCALE" = tiny ]; then run "$PYTHON" "$@"; else run $LAUNCH "$@"; fi; }

start_hub() {
    rm -f "$TINY/hub/address"
    mkdir -p "$TINY/hub"
    "$PYTHON" -m tools.local_hub "$TINY/hub" &
    hub=$!
    trap 'kill $hub 2>/dev/null || true' EXIT
    until [ -s "$TINY/hub/address" ]; do
        kill -0 $hub 2>/dev/null || { echo "$0: the local hub did not start" >&2; exit 1; }
        sleep 0.2
    done
    HF_ENDPOINT=$(cat "$TINY/hub/address")
    export HF_ENDPOINT HF_HOME=$TINY/hub-cache HF_HUB_OFFLINE=0
}

if [ "$SCALE" = tiny ]; then
    : "${TINY:=out/tiny}"
    D=$TINY/data/$RECIPE O=$TINY/out/$RECIPE
    EVAL="$EVAL --limit 2 --max-new-tokens 8 --threads 1"
    [ -n "${PLAN:-}" ] || start_hub
fi
