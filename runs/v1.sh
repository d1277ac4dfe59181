#!/usr/bin/env bash
# LLaVA v1: 595K captions at 2e-3, then three epochs of 158K conversations (spec 4.2). 8 x A100: 4 + 10 hours (13B).
#   bash runs/v1.sh DATA TOWER DECODER [OUT] [key=value ...]      TOWER: clip-vit-large-patch14; DECODER: Vicuna; GPUS=8
set -euo pipefail
data=$1 tower=$2 decoder=$3 out=${4:-runs/v1}
train() { torchrun --nproc-per-node "${GPUS:-8}" -m llavakit train "$@" shard="${SHARD:-full}" workers=4 gradient_checkpointing=true; }

train v1-pretrain tower="$tower" decoder="$decoder" data=cc3m-595k images="$data" out="$out/pretrain"
train v1-finetune start="$out/pretrain" data=llava-instruct-158k images="$data" out="$out/finetune" "${@:5}"
