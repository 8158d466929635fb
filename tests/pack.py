"""Import the pack as `flux2_pack` without ComfyUI's loader: an empty module whose path is the checkout. `import pack`
first, then `from flux2_pack.attention import registry`. The checkout itself must not be on sys.path: its nodes/ would
hide ComfyUI's nodes.py.
"""

from pathlib import Path
import sys
import types

ROOT = Path(__file__).resolve().parent.parent

if "flux2_pack" not in sys.modules:
    module = types.ModuleType("flux2_pack")
    module.__path__ = [str(ROOT)]
    sys.modules["flux2_pack"] = module
