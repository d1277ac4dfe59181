#!/usr/bin/env bash
# The shipped model from nothing: words, a tiny CLIP, a text-only decoder, then LLaVA's two stages. Under two hours on 2 CPU cores.
#   bash runs/tiny.sh [OUT]      (default: build/tiny; finished steps are skipped, stopped stages resume)
set -euo pipefail
out=${1:-build/tiny}

step() { printf '\n== %s\n' "$*" >&2; }

step "1 tokenizer"
[ -f "$out/tokenizer/tokenizer.json" ] || llava miniature tokenizer out="$out/tokenizer"

step "2 tower: a tiny CLIP on short statements with near misses"
if [ ! -f "$out/tower/model.safetensors" ]; then
  # shapes, colours and places first, then print letter by letter as well (dev/LOG.md says why)
  [ -f "$out/tower-first/clip.safetensors" ] ||
    llava miniature tower out="$out/tower-first" tokenizer="$out/tokenizer" letters=false steps=3600 stop=1850 rate=1.5e-3 warmup=200 true_statements=8 false_statements=8
  llava miniature tower out="$out/tower" tokenizer="$out/tokenizer" start="$out/tower-first" warmup=100
fi

step "3 decoder: text only"
[ -f "$out/decoder/model.safetensors" ] || llava miniature decoder out="$out/decoder" tokenizer="$out/tokenizer"

step "4 scenes"
[ -f "$out/scenes/benchmark.jsonl" ] || llava scenes export "$out/scenes" --count 40000 --split train

step "5 stage 1: the projector alone"
llava train pretrain tower="$out/tower" decoder="$out/decoder" data="$out/scenes/pretrain.json" images="$out/scenes/images" \
  aspect=pad out="$out/pretrain" batch_size=64 accumulation=1 steps=250 lr=2e-3 workers=1

step "6 stage 2: projector and decoder"
llava train finetune start="$out/pretrain/step-250" data="$out/scenes/finetune.json" images="$out/scenes/images" \
  out="$out/finetune" batch_size=32 accumulation=1 steps=2000 lr=1e-3 workers=1 group=8 save_every=500

step "7 score"
llava scenes score --model "$out/finetune/step-2000"
