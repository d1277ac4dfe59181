#!/usr/bin/env bash
# LLaVA-1.5's second stage with LoRA (rank 128, alpha 256, 2e-4, the projector 2e-5), from a finished first stage.
#   bash runs/v1.5-lora.sh DATA START [OUT] [key=value ...]      START: runs/v1.5/pretrain; GPUS=8; RECIPE=lora|qlora
# Afterwards: llava convert OUT merged --base START
set -euo pipefail
data=$1 start=$2 out=${3:-runs/v1.5-lora}
torchrun --nproc-per-node "${GPUS:-8}" -m llavakit train "${RECIPE:-lora}" start="$start" data=llava-1.5-665k images="$data" out="$out" \
  workers=4 group=64 gradient_checkpointing=true "${@:4}"
