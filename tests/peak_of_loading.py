"""How much memory of its own a process takes at most while it loads a diffusers folder, and how large the model is, in
bytes: one JSON line.

A process of its own, run by test_memory.py: in a long one, memory that earlier tests left behind is used again, or
given back meanwhile.
"""

import ctypes
import gc
import json
import os
import sys
import threading
import time

import torch

import pack  # noqa: F401


class PeakOfAnonymousMemory:
    """with PeakOfAnonymousMemory() as peak: ...; peak.bytes: how much this process' own memory grew at most. Mapped
    files do not count.
    """

    def __enter__(self):
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # so that what earlier tests left behind is not used again unseen
        self.done, self.start, self.most = threading.Event(), resident(), 0
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self):
        while not self.done.is_set():
            self.most = max(self.most, resident())
            time.sleep(0.0005)

    def __exit__(self, *_):
        self.most = max(self.most, resident())
        self.done.set()
        self.thread.join()
        self.bytes = self.most - self.start


def resident():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


def main():
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    folder, sys.argv = sys.argv[1], sys.argv[:1]  # ComfyUI reads the command line at import
    import comfy.options

    comfy.options.enable_args_parsing(False)
    from comfy.cli_args import args

    args.cpu = not torch.cuda.is_available()
    from flux2_pack.flux2.loading import load

    with torch.inference_mode(), PeakOfAnonymousMemory() as peak:
        model = load.load_model(folder, "bf16", disable_dynamic=True)
    print(json.dumps({"peak": peak.bytes, "model": model.model_size()}))


if __name__ == "__main__":
    main()
