#!/usr/bin/env bash
# What each ingredient gives. Trains 12 epochs on the first 2,000 training images of Flickr8k, once for each change.
# Takes about 15 min for each training on one core of an AMD EPYC (Zen 5); there are 25 rows, with two seeds.
# Ends with a table; its default scores CIDEr-D 0.613 on test. Rows that are finished are not trained again.
# Usage: ingredients.sh FLICKR8K [ENCODER: folder or hub id] [OUT: a folder] [GPT2_DECODER: a folder]
set -euo pipefail
usage="usage: ingredients.sh FLICKR8K [ENCODER] [OUT] [GPT2_DECODER]; FLICKR8K holds dataset_flickr8k.json and images/"
flickr8k=${1:?$usage} encoder=${2:-facebook/dinov2-small} out=${3:-.} pretrained=${4:-}
source "$(dirname "$0")/prepare.bash"

flickr=("$flickr8k/dataset_flickr8k.json" "$flickr8k/images")
compare() { # DATA OUTPUT [FLAG...]: one training for each row
  python "$root/tests/benchmarks/ablate.py" ingredients --data_path "$out/$1" --output_dir "$out/$2" \
    --train_images 2000 "${@:3}" -- --epochs 12 --eval_delay 5
}

prepare flickr "${flickr[@]}" small
compare flickr ablations --seeds 0 1
prepare flickr-cropped "${flickr[@]}" small --center_crop
compare flickr-cropped ablations-cropped --seeds 0 1 --only default
if [ -n "$pretrained" ]; then # a pretrained decoder in GPT-2's format, with GPT-2's tokenizer
  prepare flickr-gpt2 "${flickr[@]}" "$pretrained"
  compare flickr-gpt2 ablations-gpt2 --only default "cross-attention alone for two of the epochs"
fi
