#!/bin/sh
# Patch LMDeploy: apply_patches.sh [apply|revert|status] [--target DIR|installed]
# The same as `sagellm-ir patches`; see ../patches/lmdeploy/README.md.
set -eu
root=$(CDPATH= cd -- "$(dirname -- "$0")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
[ -x "$python" ] || command -v "$python" >/dev/null || python=python3
PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} exec "$python" -m sagellm_ir.runtime.engines.lmdeploy.patching "$@"
