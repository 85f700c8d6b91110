#!/usr/bin/env bash
# Runs once on each node of cluster/aws.yaml, in the container: installs the package of this checkout at the
# tested versions, and downloads the models and data of a recipe.
#
#   bash setup_node.sh head|worker [RECIPE]
set -euo pipefail

kind=$1 recipe=${2:-}
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

torch=(python -m pip install -q "torch==$(sed -n 's/^torch==//p' constraints.txt)")
# The head has no GPU, and starts some minutes sooner without 3 GB of CUDA.
[[ $kind != head ]] || torch+=(--index-url https://download.pytorch.org/whl/cpu)
"${torch[@]}"
python -m pip install -q -c constraints.txt .

# A run would download them itself, so a failure or a timeout here only makes its start slower.
[[ -z $recipe ]] || timeout 600 python scripts/warm_cache.py "$recipe" ||
  echo "setup_node.sh: the cache was not filled for $recipe; the first run fetches the rest itself."
