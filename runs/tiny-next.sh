#!/usr/bin/env bash
# The members of the shipped family that see tiles, from the finished miniature: a tower that has met close-ups, then NeXT's stage 2
# (tower unfrozen at a lower rate, spatial_unpad). About an hour and a half on 2 CPU cores.
#   bash runs/tiny-next.sh [OUT]      (default: build/tiny, made by runs/tiny.sh; finished steps are skipped, stopped stages resume)
set -euo pipefail
out=${1:-build/tiny}

step() { printf '\n== %s\n' "$*" >&2; }
tune() { # OUT STEPS words...: stage 2 with the tower at a fifth of the rate
  llava train finetune data="$out/print/finetune.json" images="$out/print/images" out="$1" optimizer=muon betas=[0.9,0.98] \
    batch_size=16 accumulation=1 workers=1 group=16 aspect=anyres steps="$2" 'rates=[["vision_tower\\..*",0.2]]' "${@:3}"
}

step "1 tower: half of its pictures are close-ups of small print"
[ -f "$out/tower-next/model.safetensors" ] || llava miniature tower out="$out/tower-next" tokenizer="$out/tokenizer" start="$out/tower" \
  scenes=40000 steps=1200 rate=1.5e-3 warmup=100 close_ups=0.5

step "2 scenes, three in four with small print"
[ -f "$out/print/benchmark.jsonl" ] || llava scenes export "$out/print" --count 16000 --seed 2000000 --small-print 0.75 --turns 3

step "3 tiny-next: the released grid"
tune "$out/next" 1000 start="$out/finetune-more" tower="$out/tower-next" tiles=1x2,2x1,2x2,3x1,1x3 lr=2e-3

step "4 tiny-hd: a padded base and up to six tiles"
tune "$out/hd" 400 start="$out/finetune-more" tower="$out/tower-next" tiles=hd base=pad lr=2e-3

step "5 scores"
llava scenes score --model "$out/next"
llava scenes score --model "$out/hd"
