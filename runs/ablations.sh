#!/usr/bin/env bash
# Every claim of the papers that can be tried without their weights, in miniature: about twenty arms, three seeds each, on a CPU.
#   bash runs/ablations.sh [WORK] [RESULTS]      (default: build/ablations ablations/results; finished runs are skipped)
#   PROCESSES=2                                  so many series at once, each on its part of the cores
# The table and its plots: docs/ablations.md. To run everything anew, give another RESULTS.
set -euo pipefail
cd "$(dirname "$0")/.."
work=${1:-build/ablations} results=${2:-ablations/results} python=${PYTHON:-python}
"$python" -m ablations.run --work "$work" --results "$results" --processes "${PROCESSES:-1}"
"$python" -m ablations.table --results "$results" ${OUT:+--out "$OUT"}
