r"""The papers' claims in miniature: one claim is one value, tried with drawn scenes and the tiny family on a CPU.

    data -----> starts -----> run (arm, seed) -----> measure -----> results/ARM-seedN.json
                              \__ llavakit.train                          |
    claims ------------------------------------------------------------> table, plots: docs/ablations.md

``runs/ablations.sh`` does all of it; finished runs are skipped, stopped ones go on.
"""
