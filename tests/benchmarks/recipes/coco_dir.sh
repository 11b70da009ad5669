#!/usr/bin/env bash
# Result G. Trains a `small` decoder from scratch on a frozen DINOv2-small: 10 epochs on a part of COCO 2014
# (1,199 training images, splits of our own).
# Takes 2 min 12 s for training and 30 s for evaluations, on one core of an AMD EPYC (Zen 5), features not counted.
# Ends with CIDEr-D 0.819 on validation and 0.840 on test.
# Usage: coco_dir.sh COCO2014 [ENCODER: folder or hub id] [OUT: a folder]
set -euo pipefail
usage="usage: coco_dir.sh COCO2014 [ENCODER] [OUT]; COCO2014 holds annotations/, train2014/ and val2014/"
coco=${1:?$usage} encoder=${2:-facebook/dinov2-small} out=${3:-.}
root=$(cd "$(dirname "$0")/../../.." && pwd)

python "$root/dataloader.py" --coco_dir "$coco" \
  --encoder "$encoder" --decoder small --save_path "$out/coco"
python "$root/train.py" --data_path "$out/coco" --output_dir "$out/run-coco" --freeze_encoder --cache_features \
  --epochs 10
