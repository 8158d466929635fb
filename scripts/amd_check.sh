#!/usr/bin/env bash
# Ten minutes on an AMD card: try and time everything of this pack that can run there, and write amd-check.json and amd-check.md to attach to an issue.
# Needs PyTorch for ROCm in the Python that runs ComfyUI (FLUX2_PYTHON names another one), no model and no ComfyUI. Nothing is downloaded or sent.
# bash scripts/amd_check.sh [--out FOLDER] [--minutes 10] [--seq 4608] [--any-gpu]
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${FLUX2_PYTHON:-$(command -v python || command -v python3 || true)}
[ -n "$python" ] || { echo "amd_check: no Python was found. Set FLUX2_PYTHON to the one that runs ComfyUI." >&2; exit 1; }
"$python" -c "import torch" 2>/dev/null || { echo "amd_check: $python has no PyTorch. Set FLUX2_PYTHON to the Python that runs ComfyUI." >&2; exit 1; }
exec "$python" "$root/benchmarks/amd_check.py" "$@"
