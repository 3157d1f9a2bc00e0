#!/usr/bin/env bash
# The demo on an embedded stack of its own: started, used, stopped, whatever happens in between.
set -euo pipefail
data=$1 epochs=$2
out=$PWD/.demo
mkdir -p "$out"
if [ -n "${ALVEARY_CONFIG:-}" ]; then
    echo "using the platform of $ALVEARY_CONFIG"
else
    export ALVEARY_HOME=$out/stack
    alveary up --detach --port 0
    trap 'alveary down' EXIT
    export ALVEARY_CONFIG=$ALVEARY_HOME/config.json
fi
python examples/hymenoptera/demo.py --data "$data" --epochs "$epochs" --out "$out"
