#!/usr/bin/env bash
# All tests that need no GPU (and those that do, where there is one).
# usage: launchers/test.sh [PYTEST OPTIONS …]                e.g. launchers/test.sh tests/parallel -k fsdp
#        launchers/test.sh --cuda-build [PYTEST OPTIONS …]   those of tests/cuda_build, on a CUDA build of torch, with or
#                                                            without a GPU; exit code 77: it cannot be installed here
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
if [ "${1:-}" = --cuda-build ]; then
  shift
  . "$here/environment.sh" --cuda-build
  exec env PYTHONPATH="$root" "$venv/bin/python" -m pytest -o cache_dir=.pytest_cache/cuda tests/cuda_build "$@"
fi
. "$here/environment.sh" test
exec .venv/bin/python -m pytest "$@"
