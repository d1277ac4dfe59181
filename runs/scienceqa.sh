#!/usr/bin/env bash
# LLaVA v1 on ScienceQA: twelve epochs from v1's first stage, lecture and solution before the answer (spec 6.4). 8 x A100: 4 hours (13B).
#   bash runs/scienceqa.sh DATA START [OUT] [key=value ...]
#     DATA: train/ID/image.png, and train.json beside it: llava data scienceqa FOLDER DATA/train.json
#     START: runs/v1/pretrain; GPUS=8
set -euo pipefail
data=$1 start=$2 out=${3:-runs/scienceqa}
torchrun --nproc-per-node "${GPUS:-8}" -m llavakit train v1-scienceqa start="$start" data="$data/train.json" images="$data" out="$out" \
  shard="${SHARD:-full}" workers=4 gradient_checkpointing=true "${@:4}"
