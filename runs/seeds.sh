# Read by what runs the demo over several seeds. JOBS of them side by side.
#   parse_seeds "$@"         --seeds "1 2 3" and --jobs N in place of SEEDS and JOBS
#   roots S                  sets D and O, the folders of the demo's data and results of a seed
#   each_seed PREFIX         calls one_seed S for every seed, with its output in PREFIX-seedS.log
# The demo's recipe, as demo/chain.py has it:
BASE="--init scratch --rope-theta 100 --qk-norm --steps 600 --lr 6e-3"
REFERENCE="--steps 250 --lr 2e-3"
STUDENT="--steps 1200 --lr 2e-3"
export BASE REFERENCE STUDENT
# One thread for each seed: two side by side do more than one with two threads.
export OMP_NUM_THREADS=1

parse_seeds() {
  while [ $# -gt 0 ]; do
    case $1 in
      --seeds) SEEDS=$2; shift 2 ;;
      --jobs) JOBS=$2; shift 2 ;;
      *) echo "$0: unknown argument $1; known: --seeds \"1 2 3\" --jobs N" >&2; exit 2 ;;
    esac
  done
}

roots() {                               # demo/folders.py: those of the default seed have no number
  D=data/demo-seed$1 O=out/demo-seed$1
  [ "$1" != 0 ] || { D=data/demo; O=out/demo; }
}

each_seed() {
  export PREFIX=$1
  export -f one_seed logged_seed roots
  echo "logs:$(printf " $PREFIX-seed%s.log" $SEEDS)"
  echo $SEEDS | tr ' ' '\n' | xargs -P "$JOBS" -I{} bash -c 'logged_seed {}'
}

logged_seed() {
  local log=$PREFIX-seed$1.log
  # A shell of its own: left of || this one would go on after a command that fails.
  bash -euo pipefail -c 'one_seed "$1"' bash "$1" > "$log" 2>&1 || {
    tail -n 5 "$log" >&2
    exit 255    # xargs starts no other seed
  }
}
