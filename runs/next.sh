#!/usr/bin/env bash
# LLaVA-NeXT (1.6): stage 1 for the projector, then everything, the tower at 2e-6 (spec 4.1). The user-made part of its data was never
# published: next-760k names the public stand-in. Published times: 7B 20 hours on 8 A100, 13B 24 on 16, 34B 30 on 32.
#   bash runs/next.sh VARIANT DATA TOWER DECODER [OUT] [key=value ...]      VARIANT: next (Vicuna), next-mistral, next-34b; GPUS=8
# Vicuna's versions took 1.5's projector: give START=runs/v1.5/pretrain and stage 1 is not run.
set -euo pipefail
variant=$1 data=$2 tower=$3 decoder=$4 out=${5:-runs/$1}
train() { torchrun --nproc-per-node "${GPUS:-8}" -m llavakit train "$@" shard="${SHARD:-full}" workers=4 gradient_checkpointing=true; }

start=${START:-$out/pretrain}
[ -n "${START:-}" ] || train next-pretrain tower="$tower" decoder="$decoder" data=lcs-558k images="$data" out="$out/pretrain"
train "$variant" start="$start" data=next-760k images="$data" out="$out/finetune" group=64 "${@:6}"
