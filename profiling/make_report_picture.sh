#!/bin/sh
# The picture of the report in the README: a run with one slow rank, explained, photographed by headless Chromium.
#   profiling/make_report_picture.sh [RUN_DIR] [light|dark]     without a run, the demo is trained first
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
run=${1:-}
if [ -z "$run" ]; then
    "$python" -m trainsys launch train/demo --on local train.steps=60 telemetry.out="$work/runs" \
        telemetry.capture_every=25 telemetry.console=plain
    run=$work/runs/latest
fi
"$python" -m trainsys explain "$run" --html "$work/report.html" > /dev/null
chromium --headless=new --no-sandbox --disable-gpu --hide-scrollbars --force-device-scale-factor=1 \
    --user-data-dir="$work/profile" --window-size=1200,1480 \
    --screenshot="$work/report.png" "file://$work/report.html?theme=${2:-light}" 2> /dev/null
mkdir -p docs/images
cp "$work/report.png" docs/images/report.png
ls -l docs/images/report.png
