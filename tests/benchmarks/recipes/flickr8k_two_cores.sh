#!/usr/bin/env bash
# Result J. As C in less than an hour of two cores: a `small` decoder from scratch on a frozen CLIP ViT-B/16, one variant
# of each image, 8 epochs on Flickr8k and 3 self-critical ones at three times the usual rate. A process for each core.
# Usage: flickr8k_two_cores.sh FLICKR8K [ENCODER: folder or hub id] [OUT: a folder]
set -euo pipefail
usage="usage: flickr8k_two_cores.sh FLICKR8K [ENCODER] [OUT]; FLICKR8K holds dataset_flickr8k.json and images/"
flickr8k=${1:?$usage} encoder=${2:-openai/clip-vit-base-patch16} out=${3:-.}
source "$(dirname "$0")/prepare.bash"

prepare flickr-clip "$flickr8k/dataset_flickr8k.json" "$flickr8k/images" small

torchrun --nproc_per_node 2 "$root/train.py" --data_path "$out/flickr-clip" --output_dir "$out/run-flickr-two-cores" \
  --freeze_encoder --cache_features --dropout 0.2 --epochs 11 --self_critical_epochs 3 --self_critical_lr 3e-4 \
  --per_device_train_batch_size 8 --eval_delay 8
