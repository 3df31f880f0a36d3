#!/usr/bin/env bash
# Does the default run tell the same story on every processor? The demo's default run, several
# seeds, each under several roundings: other thread counts, other kernels, another PyTorch. What
# differs between two roundings of a seed is the order in which floating-point numbers are added.
#
#   bash runs/roundings.sh                                    # seeds 0 to 2, all that can run here
#   bash runs/roundings.sh --seeds "0" --roundings "1-thread aten-avx2"
#   PYTHON2=/path/to/another/venv/bin/python bash runs/roundings.sh       # another PyTorch, too
#
# About 4 minutes for each seed and rounding on a core of its own. Interrupted, the same command
# goes on. Results are added to results/roundings.json run by run, what this machine cannot run is
# listed there as well; the tables: python -m tools.results.
set -euo pipefail
cd "$(dirname "$0")/.."
KIT=$PWD
PYTHON=${PYTHON:-$(command -v python)} PYTHON2=${PYTHON2:-}
SEEDS="0 1 2"
ROUNDINGS="1-thread aten-avx2 other-torch 2-threads avx2 aten-default mkl-avx2 onednn-avx2"
ROUNDINGS+=" intel intel-mkl-avx2"      # MKL multiplies in another order there, and heeds its limit
while [ $# -gt 0 ]; do
  case $1 in
    --seeds) SEEDS=$2; shift 2 ;;
    --roundings) ROUNDINGS=$2; shift 2 ;;
    *) echo "$0: unknown argument $1; known: --seeds \"0 1\" --roundings \"1-thread avx2\"" >&2
       exit 2 ;;
  esac
done
OUT=out/roundings

settings() {                            # of a rounding, for env; 1-thread is the machine's own
  case $1 in
    1-thread|other-torch|intel) echo OMP_NUM_THREADS=1 ;;
    2-threads) echo OMP_NUM_THREADS=2 ;;
    aten-avx2) echo OMP_NUM_THREADS=1 ATEN_CPU_CAPABILITY=avx2 ;;
    aten-default) echo OMP_NUM_THREADS=1 ATEN_CPU_CAPABILITY=default ;;
    mkl-avx2|intel-mkl-avx2) echo OMP_NUM_THREADS=1 MKL_ENABLE_INSTRUCTIONS=AVX2 ;;
    onednn-avx2) echo OMP_NUM_THREADS=1 ONEDNN_MAX_CPU_ISA=AVX2 ;;
    avx2) echo OMP_NUM_THREADS=1 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 \
               ONEDNN_MAX_CPU_ISA=AVX2 ;;
    *) echo "$0: no rounding is called $1" >&2; exit 2 ;;
  esac
}
lacking() {                             # why a rounding cannot run here; nothing where it can
  if grep -qw GenuineIntel /proc/cpuinfo && [[ $1 != intel* && $1 != other-torch ]]; then
    echo "of an AMD processor; on Intel's: intel and intel-mkl-avx2"
    return
  fi
  case $1 in
    intel*) grep -qw GenuineIntel /proc/cpuinfo || echo "the processor is not Intel's" ;;
    *avx2) grep -qw avx2 /proc/cpuinfo || echo "the processor has no AVX2" ;;
    2-threads) [ "$(nproc)" -ge 2 ] || echo "the machine has one core" ;;
    other-torch) [ -n "$PYTHON2" ] || echo "PYTHON2 names no second PyTorch" ;;
  esac
}

one() {                                 # seed, rounding
  local S=$1 rounding=$2 python=$PYTHON seed="" suffix="" run
  [ "$S" = 0 ] || { seed="--seed $S"; suffix=-seed$S; }
  [ "$rounding" != other-torch ] || python=$PYTHON2
  local folder=$OUT/$rounding
  local environment; environment=$(settings "$rounding")
  mkdir -p "$folder"
  ln -sfn "$KIT/$OUT/data" "$folder/data"     # the text does not depend on any rounding
  ( cd "$folder" && env $environment "$python" "$KIT/train_slm.py" --k 0.6 $seed )
  local runs=()
  for run in base ref clm slm; do runs+=(--run "$run=$folder/out/demo$suffix/$run"); done
  # The same interpreter and environment as the run: they are recorded with it.
  env $environment "$python" -m tools.results --add roundings \
    --command "bash runs/roundings.sh" --variant "$rounding" "${runs[@]}"
}

for rounding in $ROUNDINGS; do
  settings "$rounding" > /dev/null
done
mkdir -p $OUT/data
for S in $SEEDS; do
  suffix=""
  [ "$S" = 0 ] || suffix=-seed$S
  OMP_NUM_THREADS=1 "$PYTHON" prepare.py --source demo --seed "$S" --out "$OUT/data/demo$suffix" \
    --workers 1
done
LOG=""
trap 'code=$?; [ $code = 0 ] || [ -z "$LOG" ] || tail -n 5 "$LOG" >&2' EXIT
# A rounding of all seeds first: two roundings already tell something.
for rounding in $ROUNDINGS; do
  why=$(lacking "$rounding")
  if [ -n "$why" ]; then
    "$PYTHON" -m tools.results --add roundings --command "bash runs/roundings.sh" \
      --not-run "$rounding: $why"
    continue
  fi
  for S in $SEEDS; do
    LOG=$OUT/$rounding-seed$S.log
    echo "seed $S, $rounding: log in $LOG"
    ( one "$S" "$rounding" ) > "$LOG" 2>&1
  done
done
LOG=""
