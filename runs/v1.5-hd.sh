#!/usr/bin/env bash
# LLaVA-1.5-HD: a first stage at 224 pixels, then up to six tiles and a padded base (spec 2.9).
#   bash runs/v1.5-hd.sh DATA TOWER DECODER [OUT] [key=value ...]      TOWER: clip-vit-large-patch14 (224 pixels); GPUS=8
set -euo pipefail
data=$1 tower=$2 decoder=$3 out=${4:-runs/v1.5-hd}
train() { torchrun --nproc-per-node "${GPUS:-8}" -m llavakit train "$@" shard="${SHARD:-full}" workers=4 gradient_checkpointing=true; }

train pretrain tower="$tower" decoder="$decoder" data=lcs-558k images="$data" out="$out/pretrain"
train hd start="$out/pretrain" data=llava-1.5-665k images="$data" out="$out/finetune" group=64 "${@:5}"
