#!/usr/bin/env bash
# Trains a `small` decoder from scratch on a frozen CLIP ViT-B/16 and a frozen DINOv2-small side by side: 14 epochs on
# Flickr8k with 3 variants of each image, then 11 self-critical epochs.
# Takes a time that was not measured yet.
# Ends with scores that were not measured yet.
# Usage: flickr8k_two_encoders.sh FLICKR8K [ENCODER] [SECOND] [OUT]; encoders are folders or hub ids.
# FLICKR8K holds dataset_flickr8k.json and images/, and OUT is a folder
set -euo pipefail
usage="usage: flickr8k_two_encoders.sh FLICKR8K [ENCODER] [SECOND] [OUT]"
flickr8k=${1:?$usage} encoder=${2:-openai/clip-vit-base-patch16} second=${3:-facebook/dinov2-small} out=${4:-.}
source "$(dirname "$0")/prepare.bash"

prepare flickr-clip "$flickr8k/dataset_flickr8k.json" "$flickr8k/images" small

frozen=(--freeze_encoder --cache_features --augment 3)
python "$root/train.py" --data_path "$out/flickr-clip" --encoder "$encoder" "$second" \
  --output_dir "$out/run-flickr-two-14" "${frozen[@]}" --dropout 0.2 --epochs 14 --eval_delay 7
python "$root/train.py" --data_path "$out/flickr-clip" --model_path "$out/run-flickr-two-14" \
  --output_dir "$out/run-flickr-two-critical" "${frozen[@]}" --epochs 11 --self_critical_epochs 11 \
  --self_critical_lr 3e-4 --eval_delay 5
