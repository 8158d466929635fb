#!/usr/bin/env bash
# Install what the tests need and run them. Arguments go to pytest: bash scripts/test.sh tests/test_server.py -k clones -x
# The browser test wants Chromium, that of two hosts the program ip: on Debian and Ubuntu they are installed when this runs as root; otherwise those tests are
# skipped and say so.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
command -v python3 >/dev/null || { echo "test: python3 (3.10 or newer) is needed; on Debian: apt-get install python3" >&2; exit 1; }
where=$(python3 "$root/scripts/environment.py" --where)
python=$(sed -n 's/^PYTHON=//p' <<<"$where")
COMFYUI_PATH=$(sed -n 's/^COMFYUI=//p' <<<"$where")
export COMFYUI_PATH OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}  # waiting threads sleep: the cores may be shared

if ! command -v chromium >/dev/null || ! command -v chromedriver >/dev/null; then
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "test: installing chromium and chromium-driver" >&2
    { apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends chromium chromium-driver; } >&2 ||
      echo "test: they could not be installed; the browser test will be skipped" >&2
  else
    echo "test: chromium or chromedriver is missing and this is not root with apt-get; the browser test will be skipped" >&2
  fi
fi

if ! command -v ip >/dev/null && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  { apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends iproute2; } >&2 ||
    echo "test: iproute2 could not be installed; the test of two hosts will be skipped" >&2
fi

cd "$root"
targets=(tests)
for argument in "$@"; do [ -e "${argument%%::*}" ] && targets=(); done  # a test file among the arguments replaces the whole folder
exec "$python" -m pytest "${targets[@]}" -ra --durations=10 "$@"
