#!/usr/bin/env bash
# Speed and memory beside the recipe that is commonly copied. Measures prepare, train, infer and score; keeps nothing.
# Takes some minutes for each of the four, and up to 15 GB of memory, on two cores of a 2.5 GHz Intel Xeon.
# Ends with a table: 5.7 times the training speed, 13.5 times with cached features.
# Usage: speed.sh [ORACLE_PYTHON: a Python with pycocoevalcap, and Java]
set -euo pipefail
oracle=${1:-}
root=$(cd "$(dirname "$0")/../../.." && pwd)

python "$root/tests/benchmarks/bench.py" prepare
python "$root/tests/benchmarks/bench.py" train --batch 4 --seconds 45
python "$root/tests/benchmarks/bench.py" infer --seconds 40
python "$root/tests/benchmarks/bench.py" score ${oracle:+--oracle_python "$oracle"}
