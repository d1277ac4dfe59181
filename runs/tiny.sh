#!/usr/bin/env bash
# The shipped model from nothing: words, a tiny CLIP, a text-only decoder, then LLaVA's two stages. Under two hours on 2 CPU cores.
#   bash runs/tiny.sh [OUT]      (default: build/tiny; finished steps are skipped, stopped stages resume)
set -euo pipefail
out=${1:-build/tiny}

step() { printf '\n== %s\n' "$*" >&2; }

step "1 tokenizer"
[ -f "$out/tokenizer/tokenizer.json" ] || llava miniature tokenizer out="$out/tokenizer"

step "2 tower: a tiny CLIP on short statements with near misses"
[ -f "$out/tower/model.safetensors" ] || llava miniature tower out="$out/tower" tokenizer="$out/tokenizer"

step "3 decoder: text only"
[ -f "$out/decoder/model.safetensors" ] || llava miniature decoder out="$out/decoder" tokenizer="$out/tokenizer"

step "4 scenes that the tower has not seen"
[ -f "$out/scenes/benchmark.jsonl" ] || llava scenes export "$out/scenes" --count 60000 --split train --seed 1000000

step "5 stage 1: the projector alone"
llava train pretrain tower="$out/tower" decoder="$out/decoder" data="$out/scenes/pretrain.json" images="$out/scenes/images" \
  aspect=pad out="$out/pretrain" batch_size=64 accumulation=1 steps=250 lr=2e-3 workers=1

step "6 stage 2: projector and decoder"
llava train finetune placement=as_data start="$out/pretrain" data="$out/scenes/finetune.json" images="$out/scenes/images" \
  out="$out/finetune" optimizer=muon lr=3e-3 betas=[0.9,0.98] batch_size=16 accumulation=1 steps=6000 workers=1 group=16

# Questions that name a place ("what is at the bottom left?") are learned last: a second, gentler run over the same samples in another order.
llava train finetune placement=as_data start="$out/finetune" data="$out/scenes/finetune.json" images="$out/scenes/images" \
  out="$out/finetune-more" optimizer=muon lr=1.5e-3 betas=[0.9,0.98] batch_size=16 accumulation=1 steps=1800 workers=1 group=16 seed=1

step "7 score"
llava scenes score --model "$out/finetune-more"
