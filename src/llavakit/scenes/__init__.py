"""Drawn scenes: a seeded world that knows the truth about its own pictures.

world       what stands where (pure values, no pixels)
draw        a scene -> a picture
statements  what is true of a scene in words: captions, short statements, near misses
questions   questions with one right answer, by type
export      folders of pictures with COCO files, LLaVA JSON and a benchmark
"""
