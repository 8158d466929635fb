"""The worker is ../parallel/workers/worker.py. This file stays because it stands in users' torchrun commands."""

from pathlib import Path
import runpy

if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).resolve().parents[1] / "parallel" / "workers" / "worker.py"), run_name="__main__")
