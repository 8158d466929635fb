#!/usr/bin/env bash
# Everything from nothing: environment, small FLUX.2 models, ComfyUI, two pictures. Options and output: scripts/demo.py.
set -euo pipefail
scripts=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
command -v python3 >/dev/null || { echo "demo: python3 (3.10 or newer) is needed; on Debian: apt-get install python3" >&2; exit 1; }
where=$(python3 "$scripts/environment.py" --where)
python=$(sed -n 's/^PYTHON=//p' <<<"$where")
exec "$python" "$scripts/demo.py" "$@"
