#!/usr/bin/env bash
# Why the first version failed. Trains ten times 8 epochs on a part of COCO 2014, nine times with usual mistakes.
# Takes a few minutes for each training, on one core of an AMD EPYC (Zen 5).
# Ends with a table: CIDEr-D 0.609 on test without a mistake, ROUGE-2 0.003 with all of them.
# Usage: mistakes.sh COCO2014 [ENCODER: folder or hub id] [OUT: a folder]
set -euo pipefail
usage="usage: mistakes.sh COCO2014 [ENCODER] [OUT]; COCO2014 holds dataset_coco.json, train2014/ and val2014/"
coco=${1:?$usage} encoder=${2:-facebook/dinov2-small} out=${3:-.}
source "$(dirname "$0")/prepare.bash"

prepare karpathy "$coco/dataset_coco.json" "$coco" small
python "$root/tests/benchmarks/ablate.py" mistakes --data_path "$out/karpathy" --output_dir "$out/mistakes" \
  -- --epochs 8
