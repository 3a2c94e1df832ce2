#!/usr/bin/env bash
# The benchmark on a GPU, in parts of at most 9 minutes, each useful alone:
#
#   bench/gpu.sh speed [RESULTS] [OPTIONS OF PYTEST]
#   bench/gpu.sh MODEL [RESULTS] [FLAGS OF python -m bench]
#
# speed times all models as `pytest bench` does; MODEL trains one model and measures its quality.
# RESULTS [bench/results/gpu] gets speed.json, or quality.json and pictures. Of several MODELs with
# one RESULTS the rows are in one file; one-step starts from the run of diffusion. DATA names an .npz
# of bench.pack, else the data are the built-in digits; COMMIT names the commit where there is no
# git.
set -euo pipefail
part=${1:?which part}
results=$(realpath -m "${2:-$(dirname "$0")/results/gpu}")
shift $(($# > 1 ? 2 : 1))
[ -n "${DATA:-}" ] && DATA=$(realpath "$DATA")
cd "$(dirname "$0")/.."
mkdir -p "$results"
if [ "$part" = speed ]; then
  timeout -s INT 540 python -m pytest bench/test_speed.py ${DATA:+--data "$DATA"} \
    --benchmark-json "$results/speed.json" "$@"
else
  timeout 540 python -m bench --models "$part" ${DATA:+--data "$DATA"} --out "$results" "$@"
fi
