#!/usr/bin/env bash
# The members of the shipped family that see tiles, from the finished miniature: a tower that has met close-ups, then NeXT's stage 2
# (tower unfrozen at a lower rate, spatial_unpad), from print alone to all questions. About three hours on 2 CPU cores.
# The shipped ones came by detours: dev/LOG.md.
#   bash runs/tiny-next.sh [OUT]      (default: build/tiny, made by runs/tiny.sh; finished steps are skipped, stopped stages resume)
set -euo pipefail
out=${1:-build/tiny}
released=1x2,2x1,2x2,3x1,1x3

step() { printf '\n== %s\n' "$*" >&2; }
draw() { # NAME words...: scenes that neither the tower nor the miniature has seen
  [ -f "$out/$1/benchmark.jsonl" ] || llava scenes export "$out/$1" "${@:2}"
}
tune() { # NAME DATA RATE words...: stage 2; RATE is the tower's share of the rate, null freezes it
  llava train finetune placement=as_data data="$out/$2/finetune.json" images="$out/$2/images" out="$out/$1" optimizer=muon betas=[0.9,0.98] \
    batch_size=16 accumulation=1 workers=1 group=16 "rates=[[\"vision_tower\\\\..*\",$3]]" "${@:4}"
}

step "1 tower: half of its pictures are close-ups of small print, half of the rest are squashed as AnyRes shows the whole"
[ -f "$out/tower-next/model.safetensors" ] || llava miniature tower out="$out/tower-next" tokenizer="$out/tokenizer" start="$out/tower" \
  scenes=40000 steps=1200 rate=1.5e-3 warmup=100 close_ups=0.5 squashed=true

step "2 what small print says: close-ups as pictures, one view, tower frozen"
draw close --count 19500 --seed 3000000 --close-ups 0.69
tune next-close close null start="$out/finetune-more" tower="$out/tower-next" aspect=pad lr=2e-3 steps=700

step "3 where it is: tiles"
draw print --count 24000 --seed 2000000 --small-print 0.75 --turns 3 --described 0.15
tune next-print print 0.2 start="$out/next-close" aspect=anyres tiles=$released lr=2e-3 steps=200

step "4 all questions again"
draw mixed --count 24000 --seed 4000000 --small-print 0.6 --turns 5 --described 0.2
tune next-mixed mixed 0.05 start="$out/next-print" aspect=anyres tiles=$released lr=2.5e-3 steps=900
draw whole --count 20000 --seed 6000000 --small-print 0.45 --turns 8 --described 0.3
tune next-whole whole 0.05 start="$out/next-mixed" aspect=anyres tiles=$released lr=2e-3 steps=700
tune next-scenes scenes null start="$out/next-whole" aspect=anyres tiles=$released lr=2e-3 steps=1000
draw numbers --count 25000 --seed 8000000 --numbers 0.5
tune next numbers null start="$out/next-scenes" aspect=anyres tiles=$released lr=2.5e-3 steps=1400

step "5 tiny-hd: a padded base and up to six tiles"
tune hd whole 0.05 start="$out/next-whole" aspect=anyres tiles=hd base=pad lr=2e-3 steps=600

step "6 scores"
llava scenes score --model "$out/next"
llava scenes score --model "$out/hd"
