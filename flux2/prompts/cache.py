"""Encoded prompts on disk: one safetensors file each, named by the digest of everything that decides its content.

  cache = PromptCache(folder, limit=2 * 2**30)
  cache.write(key, conditioning, notes)      # key: any JSON value; conditioning as CLIPTextEncode gives it
  cache.read(key)                            # (conditioning, notes), or None

Nothing in a file is executable and nothing is believed: header, key and a digest of the content are checked, and what
does not fit is a miss that the next write replaces. Files appear whole (written beside, then renamed), so processes
share a folder without locks. Above the limit the entries that were used least recently go. Only files named like
entries are ever removed. Needs torch and safetensors alone.
"""

import hashlib
import json
import os
import re
import time
import uuid
from pathlib import Path

import safetensors.torch
import torch

from ..checkpoints.header import CheckpointError, read_header, read_small

FORMAT = "1"
ENTRY = re.compile(r"[0-9a-f]{64}\.safetensors")
UNFINISHED = re.compile(r"[0-9a-f]{64}\.[0-9a-f]{32}\.part")
ABANDONED = 3600  # seconds after which an unfinished file has no writer any more
MAIN = "cond"


class PromptCache:
    """A folder of encoded prompts, at most `limit` bytes in all."""

    def __init__(self, folder, limit):
        self.folder, self.limit = Path(folder), int(limit)

    def path(self, key):
        return self.folder / f"{name_of(key)}.safetensors"

    def read(self, key):
        """(conditioning, notes) of an entry, or None when it is absent, damaged or not what its name says. Marks the
        entry as used.
        """
        path = self.path(key)
        try:
            entry = self._checked(path, name_of(key))
        except (CheckpointError, OSError, ValueError, KeyError, TypeError, RecursionError, safetensors.SafetensorError):
            return None
        _mark_used(path)
        return entry

    def _checked(self, path, name):
        """(conditioning, notes) of a file. Raises one of many errors for what is no entry of this name."""
        _, metadata = read_header(path)
        data = read_small(path, self.limit)
        tensors = safetensors.torch.load(data)
        plain, notes = json.loads(metadata["plain"]), json.loads(metadata["notes"])
        cond = tensors[MAIN]
        whole = (
            metadata.get("format") == FORMAT
            and metadata.get("key") == name
            and metadata.get("digest") == digest_of(tensors, metadata["plain"], metadata["notes"])
            and isinstance(plain, dict)
            and all(value is None or isinstance(value, (bool, int, float, str)) for value in plain.values())
            and isinstance(notes, list)
            and all(isinstance(note, str) for note in notes)
            and cond.is_floating_point()
            and cond.ndim == 3
            and bool(cond.isfinite().all())
        )
        if not whole:
            raise ValueError("not an entry of this name")
        del tensors[MAIN]
        return [[cond, {**plain, **tensors}]], notes

    def write(self, key, conditioning, notes=()):
        """Keep an encoded prompt; returns its size in bytes. ValueError when it cannot be kept, OSError when the disk
        refuses.
        """
        data = packed(name_of(key), conditioning, notes)
        if len(data) > self.limit:
            raise ValueError(
                f"it takes {len(data) / 2**20:.1f} MiB and the cache may hold {self.limit / 2**20:.1f} MiB"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self.folder / f"{name_of(key)}.{uuid.uuid4().hex}.part"
        try:
            part.write_bytes(data)
            os.replace(part, self.path(key))
        finally:
            part.unlink(missing_ok=True)
        self.trim()
        return len(data)

    def entries(self):
        """[(last use in seconds, bytes, path)], least recently used first."""
        return sorted(_described(self.folder, ENTRY))

    def size(self):
        """(number of entries, bytes)."""
        found = self.entries()
        return len(found), sum(size for _, size, _ in found)

    def trim(self):
        """Remove the least recently used entries until the rest fits, and what killed processes left unfinished."""
        found = self.entries()
        total = sum(size for _, size, _ in found)
        for _, size, path in found:
            if total <= self.limit:
                break
            _remove(path)
            total -= size
        for used, _, path in _described(self.folder, UNFINISHED):
            if time.time() - used > ABANDONED:
                _remove(path)

    def clear(self):
        """Remove every entry; returns how many could be removed, and their bytes."""
        removed = [size for _, size, path in self.entries() if _remove(path)]
        return len(removed), sum(removed)


def name_of(key):
    """The digest that names an entry."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()


def packed(name, conditioning, notes):
    """An entry as bytes. ValueError when the conditioning holds what cannot be kept as numbers and text."""
    if len(conditioning) != 1:
        raise ValueError(f"it has {len(conditioning)} parts")
    cond, extra = conditioning[0]
    tensors = {MAIN: cond} | {name: value for name, value in extra.items() if torch.is_tensor(value)}
    plain = {name: value for name, value in extra.items() if not torch.is_tensor(value)}
    strange = [
        name for name, value in plain.items() if not (value is None or isinstance(value, (bool, int, float, str)))
    ]
    if strange or MAIN in extra:
        raise ValueError(f"it carries {', '.join(strange) or MAIN}, which cannot be kept")
    tensors = {name: value.detach().to("cpu").contiguous().clone() for name, value in tensors.items()}
    texts = {"plain": json.dumps(plain), "notes": json.dumps(list(notes))}
    metadata = {"format": FORMAT, "key": name, "digest": digest_of(tensors, *texts.values()), **texts}
    return safetensors.torch.save(tensors, metadata)


def digest_of(tensors, *texts):
    """Hexadecimal digest of texts and named tensors: names, formats, shapes and bytes."""
    digest = hashlib.sha256(json.dumps(texts).encode())
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data if value.numel() else b"")
    return digest.hexdigest()


def _described(folder, pattern):
    """(time of last use, bytes, path) of the files in a folder whose names match; files that vanish meanwhile are left
    out.
    """
    try:
        names = [
            entry.name
            for entry in os.scandir(folder)
            if pattern.fullmatch(entry.name) and entry.is_file(follow_symlinks=False)
        ]
    except (FileNotFoundError, NotADirectoryError):
        return
    for name in names:
        try:
            about = os.stat(folder / name)
        except OSError:
            continue
        yield about.st_mtime, about.st_size, folder / name


def _mark_used(path):
    """The time of modification is the time of last use: times of access are switched off on many systems."""
    try:
        os.utime(path)
    except OSError:
        pass


def _remove(path):
    """Whether a file was removed; another process may have been faster, or hold it open on Windows."""
    try:
        path.unlink()
        return True
    except OSError:
        return False
