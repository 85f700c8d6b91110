#!/usr/bin/env bash
# What a node of cluster/aws.yaml gets once, in the container: this checkout's package at the tested
# versions, and the models and data of a recipe in its cache.
#
#   bash setup_node.sh head|worker [RECIPE]
set -euo pipefail

kind=$1 recipe=${2:-}
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

torch=(python -m pip install -q "torch==$(sed -n 's/^torch==//p' constraints.txt)")
# The head has no GPU, and is ready some minutes earlier without 3 GB of CUDA.
[[ $kind != head ]] || torch+=(--index-url https://download.pytorch.org/whl/cpu)
"${torch[@]}"
python -m pip install -q -c constraints.txt .

# A run would fetch them itself: what fails here, or takes 10 minutes, only makes it start later.
[[ -z $recipe ]] || timeout 600 python scripts/warm_cache.py "$recipe" ||
  echo "setup_node.sh: the cache was not filled for $recipe; the first run fetches the rest itself."
