#!/usr/bin/env bash
# The speed comparison on a GPU, in parts of at most 9 minutes, 25 together, each useful alone:
#
#   bench/gpu.sh PART [RESULTS]      PART: speed, correct, diffusion, gan, flow, vae,
#                                    hybrids, autoregressive
#
# On any machine with torch 2.11 or newer; no network. Data: $DATA, an .npz of bench.pack (full
# Fashion-MNIST below 32 MB, made beforehand by
#   python -m bench.pack /usr/share/datasets/fashion-mnist fashion.npz
#     --names "t-shirt,trouser,pullover,dress,coat,sandal,shirt,sneaker,bag,ankle boot"),
# else the built-in digits. A part writes JSON and PNG files into RESULTS, at most 8.
# TINY=1 runs the same commands on a CPU at a size that takes seconds: that is how this file is tested.
set -euo pipefail
part=${1:?which part}
DATA=${DATA:+$(realpath "$DATA")}
here=$(cd "$(dirname "$0")/.." && pwd)
results=${2:-${OUT:-$here/bench/results}/gpu}
mkdir -p "$results"
results=$(realpath "$results")
cd "$here"
runs=$(mktemp -d)
trap 'rm -rf "$runs"' EXIT
data=(${DATA:+--data "$DATA"})
# two to four times the CPU defaults' width, for a GPU would idle at theirs; large batches; more
# updates
size=(--width 128 --batch-size 512 --checkpoint-every 2000 --compile)
steps=8000 samples=500 seconds=0.5 tiny=()
models="vae flow gan vae-gan flow-gan diffusion-gan diffusion autoregressive"
if [ -n "${TINY:-}" ]; then
  size=(--width 32 --embedding 16 --batch-size 8)
  steps=2 samples=20 seconds=0.05 models="flow autoregressive" tiny=("${size[@]}")
fi

quality() { # NAME SCRIPT FLAGS...: trains, samples under three seeds, measures, evaluates
  local name=$1 script=$2
  shift 2
  python -m "$script" --train --train-steps "$steps" "${size[@]}" "${data[@]}" "$@" --out "$runs/$name"
  local files=()
  for seed in 0 1 2; do
    python -m "$script" --sample --n "$samples" --seed "$seed" --out "$runs/$name" \
      "$@" --npz "$runs/$name-$seed.npz"
    files+=("$runs/$name-$seed.npz")
  done
  python -m bench.quality "${files[@]}" "${data[@]}" --out "$results/quality-$name.json"
  cp "$runs/$name/samples.png" "$results/samples-$name.png"
  python -m "$script" --evaluate --out "$runs/$name" "$@" > "$results/bits-$name.json" ||
    rm "$results/bits-$name.json" # no likelihood
}

case $part in
  speed)
    for model in $models; do
      timeout $([ "$model" = diffusion ] && echo 150 || echo 55) python -m bench.throughput "$model" --seconds "$seconds" \
        ${TINY:+--quick --shape 1 8 8} --out "$results/throughput-$model.json" || echo "$model: the rows so far"
    done
    ;;
  correct) # are bf16, compiled and captured samples those of fp32? each model trained for a while
    for model in ${models/autoregressive/}; do
      script=$model flags=()
      case $model in *-gan) script=hybrids flags=(--model "$model") ;; esac
      python -m "$script" --train --train-steps $((steps / 20 + 1)) --n 4 "${tiny[@]}" "${flags[@]}" \
        "${data[@]}" --out "$runs/$model"
      python -m bench.correct "$model" "$runs/$model" --out "$results/correct-$model.json"
    done
    ;;
  diffusion | gan | flow | vae) quality "$part" "$part" ;;
  hybrids)
    steps=$(((steps + 3) / 4))
    for model in vae-gan flow-gan diffusion-gan; do quality "$model" hybrids --model "$model"; done
    ;;
  autoregressive) quality autoregressive bench.autoregressive ;;
  *) echo "bench/gpu.sh: error: no part $part" >&2; exit 2 ;;
esac
