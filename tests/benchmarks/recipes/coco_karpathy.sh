#!/usr/bin/env bash
# Result F. Trains a `small` decoder from scratch on a frozen DINOv2-small: 10 epochs on a part of COCO 2014
# (1,251 training images, Karpathy splits).
# Takes about as long as coco_dir.sh: minutes on one core of an AMD EPYC (Zen 5).
# Ends with CIDEr-D 0.753 on validation and 0.687 on test.
# Usage: coco_karpathy.sh COCO2014 [ENCODER: folder or hub id] [OUT: a folder]
set -euo pipefail
usage="usage: coco_karpathy.sh COCO2014 [ENCODER] [OUT]; COCO2014 holds dataset_coco.json, train2014/ and val2014/"
coco=${1:?$usage} encoder=${2:-facebook/dinov2-small} out=${3:-.}
root=$(cd "$(dirname "$0")/../../.." && pwd)

python "$root/dataloader.py" --karpathy_json "$coco/dataset_coco.json" --image_dir "$coco" --limit_data 0 \
  --encoder "$encoder" --decoder small --save_path "$out/karpathy"
python "$root/train.py" --data_path "$out/karpathy" --output_dir "$out/run-karpathy" --freeze_encoder --cache_features \
  --epochs 10
