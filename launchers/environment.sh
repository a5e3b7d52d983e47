# Sourced by quickstart.sh and test.sh: makes the project's own virtual environment once.
# usage: . launchers/environment.sh EXTRAS          (EXTRAS as pip takes them, e.g. "test"; may be empty) makes .venv
#        . launchers/environment.sh --cuda-build    makes $CUDA_VENV (.venv-cuda) with a CUDA build of torch, which
#                                                   imports without a GPU; 4.5 GB. Exit code 77: it is not to be had
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
python=${PYTHON:-python3}
"$python" - <<'PY' || { echo "trainsys needs Python 3.11 or newer; set PYTHON=/path/to/python3.11" >&2; exit 2; }
import sys
sys.exit(sys.version_info < (3, 11))
PY
extras=${1:-}
if [ "$extras" = --cuda-build ]; then
  venv=${CUDA_VENV:-.venv-cuda}
  # Any clone may use it: what the project depends on is in it, the project itself is not. The oldest torch that the
  # project runs on, so that both ends are tested; the plain wheel is a CUDA build.
  want="torch==${TORCH_CUDA_VERSION:-2.11.0} $("$python" -c "import tomllib
deps = tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies']
print(*[d for d in deps if not d.startswith('torch')], 'pytest>=8', 'pytest-timeout>=2.3')")"
  if [ "$(cat "$venv/trainsys-wants" 2>/dev/null)" != "$want" ]; then
    echo "setting up $venv (once; 4.5 GB) ..." >&2
    [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
    # Not compiled: that takes a minute of CPU, and few of its modules are ever imported.
    # shellcheck disable=SC2086  # words are requirements
    if ! said=$(timeout "${CUDA_BUILD_PATIENCE_S:-1200}" "$venv/bin/python" -m pip install -q --no-compile $want 2>&1); then
      echo "skipped: the CUDA build of torch cannot be installed here: ${said##*$'\n'}" >&2
      exit 77
    fi
    printf '%s' "$want" >"$venv/trainsys-wants"
  fi
else
  venv=.venv
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
fi
