#!/usr/bin/env bash
# LLaVA-1.5, both stages as published (spec 4.2): 558K captions, then 665K conversations. 8 x A100-80G: 3.5 + 10 hours (7B), 5.5 + 20 (13B).
#   bash runs/v1.5.sh DATA TOWER DECODER [OUT] [key=value ...]
#     DATA      folder of lcs-558k and llava-1.5-665k: files and pictures (llava data mixture NAME --images DATA says what is missing)
#     TOWER     folder of clip-vit-large-patch14-336         DECODER   folder of vicuna-7b-v1.5 or -13b-v1.5
#   GPUS=8 sets the number of devices; the batches stay 256 and 128 on any number. SHARD=none|full (13B on 40 GB: full).
set -euo pipefail
data=$1 tower=$2 decoder=$3 out=${4:-runs/v1.5}
train() { torchrun --nproc-per-node "${GPUS:-8}" -m llavakit train "$@" shard="${SHARD:-full}" workers=4 gradient_checkpointing=true; }

train pretrain tower="$tower" decoder="$decoder" data=lcs-558k images="$data" out="$out/pretrain"
train finetune start="$out/pretrain" data=llava-1.5-665k images="$data" out="$out/finetune" group=64 "${@:5}"
