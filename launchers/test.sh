#!/usr/bin/env bash
# All tests that need no GPU (and those that do, where there is one).
# usage: launchers/test.sh [PYTEST OPTIONS …]                e.g. launchers/test.sh tests/parallel -k fsdp
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh" test
exec .venv/bin/python -m pytest "$@"
