#!/usr/bin/env bash
# Selective training on several nodes of a Slurm cluster: torchrun's own flags, no others.
#
#     sbatch --nodes 4 runs/slurm.sh --k 0.6 --data data/owm --init TinyLlama/TinyLlama_v1.1 \
#         --ref-loss out/owm/ref_loss.bin --out out/slm --lr 8e-5 --seq-len 2048 --batch-size 512 \
#         --micro-batch-size 4
#
# All nodes must see the same working folder. Ten minutes before the time limit the ranks are told:
# they end the step that they are in, save, and the job is queued again. It goes on on any number of
# nodes: the order of the windows does not depend on it. It starts one stage; another one:
# STAGE=score.py sbatch ...
#SBATCH --job-name=slm
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --requeue
#SBATCH --signal=B:TERM@600
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=540               # seconds for that; older versions give 30
stop() {
    scancel --signal=TERM "$SLURM_JOB_ID"               # its steps: srun itself would kill them
    wait "$run" || true
    scontrol requeue "$SLURM_JOB_ID"
}
trap stop TERM
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "${GPUS:-8}" --rdzv-id "$SLURM_JOB_ID" \
    --rdzv-backend c10d --rdzv-endpoint "$head:29500" "${STAGE:-train_slm.py}" "$@" &
run=$!
wait $run                                               # its exit code is the job's
