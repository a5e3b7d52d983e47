#!/usr/bin/env bash
# The first run: a small Llama learns Python's own standard library on four CPU processes, with its MFU.
# usage: launchers/quickstart.sh [--short] [OVERRIDES …]     e.g. launchers/quickstart.sh parallel.tp=4
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh" ""
if [ "${1:-}" = --short ]; then
  shift
  set -- train.steps=30 "$@"
fi
exec .venv/bin/trainsys launch configs/train/demo.yaml --on local "$@"
