#!/usr/bin/env bash
# Install what the tests need and run them. Arguments go to pytest:
#   bash scripts/test.sh                                        everything
#   bash scripts/test.sh -m quick                               every module in under 90 seconds on two cores
#   bash scripts/test.sh -m gpu                                 what only a GPU can show, on the GPUs that are here
#   bash scripts/test.sh tests/test_server.py -k clones -x      some tests, in one process
#   bash scripts/test.sh --summary FILE                         everything, and a JSON file that says what happened
# Everything is two runs where PyTorch sees a GPU: on the CPU, the GPUs hidden, and then -m gpu (see tests/devices.py).
# The whole folder is shared out among as many processes as there are cores, four at most (each takes 2 to 4 GB of
# memory), a file staying in one process; FLUX2_TEST_WORKERS sets their number. One process where tests use the GPU,
# whose memory would be shared too, and where -k, -x, a debugger or files are named.
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
targets=(tests) workers=${FLUX2_TEST_WORKERS:-} everything=yes before=
for argument in "$@"; do
  case $argument in
    -k* | -x | --exitfirst | --maxfail* | -n* | --numprocesses* | -s | --pdb* | --trace | --co* | --lf | --ff | --sw | --last-failed) workers=1 ;;
  esac
  case $before$argument in
    --summary[!=]*) ;;  # a file to write to, which may be there
    -m*gpu*) workers=1 everything= ;;
    -m*) everything= ;;
    *) [ -e "${argument%%::*}" ] && targets=() workers=1 everything= ;;  # a test file replaces the whole folder
  esac
  case $argument in -m | --summary) before=$argument ;; *) before= ;; esac
done
if [ -z "$workers" ]; then
  workers=$(nproc 2>/dev/null || sysctl -n hw.ncpu)
  [ "$workers" -le 4 ] || workers=4
fi
shared=()
if [ "$workers" -gt 1 ]; then
  if "$python" -c "import xdist" 2>/dev/null; then
    shared=(-n "$workers" --dist loadfile --no-loadscope-reorder)  # tests/conftest.py gives the order
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
  else
    echo "test: $python has no pytest-xdist, so the tests run in one process" >&2
  fi
fi
status=0
"$python" -m pytest "${targets[@]}" -ra --durations=10 "${shared[@]}" "$@" || status=$?
if [ -n "$everything" ] && "$python" -c "import torch; raise SystemExit(not torch.cuda.is_available())"; then
  "$python" -m pytest tests -ra --durations=10 "$@" -m gpu || status=$?
fi
exit "$status"
