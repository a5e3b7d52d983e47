# Sourced by quickstart.sh and test.sh: makes the project's own virtual environment once, in .venv.
# usage: . launchers/environment.sh EXTRAS          (EXTRAS as pip takes them, e.g. "test"; may be empty)
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
python=${PYTHON:-python3}
"$python" - <<'PY' || { echo "trainsys needs Python 3.11 or newer; set PYTHON=/path/to/python3.11" >&2; exit 2; }
import sys
sys.exit(sys.version_info < (3, 11))
PY
extras=${1:-}
mark=.venv/trainsys-installed-${extras:-core}
if [ ! -e "$mark" ] || [ pyproject.toml -nt "$mark" ]; then
  [ -x .venv/bin/python ] || "$python" -m venv .venv
  echo "setting up .venv (once) ..." >&2
  # torch first and by version: a plain range would take a newer build with gigabytes of CUDA beside it.
  .venv/bin/python -c 'import torch' 2>/dev/null || .venv/bin/python -m pip install -q "torch==${TORCH_VERSION:-2.13.0}"
  # DeepSpeed comes as source; 0: nothing of it is compiled, now or later (its engine here needs nothing compiled).
  DS_BUILD_OPS=0 .venv/bin/python -m pip install -q -e ".${extras:+[$extras]}"
  touch "$mark"
fi
