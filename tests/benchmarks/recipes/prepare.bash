# What recipes share; they read it with `source`.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)

# prepare NAME KARPATHY_JSON IMAGE_DIR DECODER [FLAG...]
# Makes the data folder $out/NAME for $encoder, unless it is there: recipes share it and its cached features.
prepare() {
  if [ ! -e "$out/$1/dataset.json" ]; then
    python "$root/dataloader.py" --karpathy_json "$2" --image_dir "$3" --limit_data 0 \
      --encoder "$encoder" --decoder "$4" --save_path "$out/$1" "${@:5}"
  fi
}
