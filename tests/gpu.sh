#!/usr/bin/env bash
# Everything that wants a GPU: the cells that need one, the benchmarks with their figure, one training of real size on a generated fleet.
# Usage: [OUT=folder] tests/gpu.sh [-w WHEELS] [cells|benchmarks|fleet|all]
#   -w   a folder of wheels, installed without a network beside what python3 has (PYTHON names another); without it, everything is installed already
#   OUT  gets JSON, figures and logs, side by side; by default runs/gpu
# Parts can be run one after the other; what a part installed or made, the next one finds. Without CUDA it ends with code 2.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3} OUT=${OUT:-runs/gpu} WHEELS=
if [ "${1:-}" = -w ]; then WHEELS=${2:?"-w needs a folder of wheels"}; shift 2; fi
PART=${1:-all}
case $PART in cells|benchmarks|fleet|all) ;; *) echo "unknown part '$PART': cells, benchmarks, fleet or all" >&2; exit 2;; esac
"$PYTHON" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' 2>/dev/null || { echo "tests/gpu.sh needs a CUDA device; torch in $PYTHON sees none" >&2; exit 2; }

if [ -n "$WHEELS" ]; then
    SITE=${SITE:-${TMPDIR:-/tmp}/shipnb-site}
    [ -f "$SITE/done" ] || { "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --find-links "$WHEELS" --target "$SITE" "$WHEELS"/*.whl && touch "$SITE/done"; }
    export PYTHONPATH="$PWD:$SITE" PATH="$SITE/bin:$PATH"
else
    export PYTHONPATH="$PWD"
fi
export MPLBACKEND=agg PYTHONUNBUFFERED=1
mkdir -p "$OUT"
shipnb() { "$PYTHON" -W ignore -c 'from shipnb.runs import main; main()' "$@"; }
"$PYTHON" -c 'import json, platform, torch, torchvision, segmentation_models_pytorch, shipnb.runs
print(json.dumps(dict(gpu=torch.cuda.get_device_name(), torch=torch.__version__, cuda=torch.version.cuda, python=platform.python_version())))' | tee "$OUT/machine.json"

cells() {       # the notebooks that have cells for a GPU, but not the benchmarks
    local path
    for path in $(grep -l '"#| cuda' nbs/*.ipynb); do
        "$PYTHON" -c 'import sys; from nbdev.test import nbdev_test; nbdev_test(path=sys.argv[1], flags="cuda", n_workers=1, do_print=True)' "$path"
    done 2>&1 | tee "$OUT/cells.log"
}
benchmarks() {  # a minute of the processor's rows, then the GPU's
    shipnb run benchmarks --out runs/gpu/benchmarks --force -p publish true 2>&1 | tee "$OUT/benchmarks.log"
    cp figures/benchmarks.json figures/benchmarks.png "$OUT"
}
fleet() {       # train, choose an operating point, predict: 2,000 windows at their own 768 pixels
    [ -d data/gpu-fleet ] || shipnb sample data/gpu-fleet --images 2000 --seed 1
    shipnb study --name gpu-fleet --data data/gpu-fleet -f nbs/params/gpu-fleet.yaml 2>&1 | tee "$OUT/fleet.log"
    cp runs/gpu-fleet/30_thresholds/results.json "$OUT/fleet.json"
    cp runs/gpu-fleet/20_training/log.jsonl "$OUT/fleet-log.jsonl"
}
if [ "$PART" = all ]; then cells; benchmarks; fleet; else "$PART"; fi
echo "results are in $OUT"
