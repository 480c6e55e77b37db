"""Pickled weights (.bin, .pt, .pth, .ckpt) to safetensors, in a process of its own that does nothing else.

  python -m uhd_jax.convert.pickles FILE FOLDER

PyTorch reads them with weights_only=True, which refuses whatever is no tensor or plain value. This is the one place
where the package itself needs torch.
"""

from __future__ import annotations

import hashlib
import math
import re
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from shutil import disk_usage
from typing import Any

import numpy as np

from uhd_jax.convert.tables import ConvertError
from uhd_jax.convert.tensors import DTYPES, TensorInfo
from uhd_jax.convert.writer import write_safetensors


def to_safetensors(file: Path, folder: Path, *held: int) -> list[Path]:
    """Writes the tensors of a pickle as safetensors files into a new folder, and prints the pickle's sha256.

    `held` are file descriptors that the process of its own keeps open, with the locks on them.

    Raises:
      ConvertError: torch is missing; the file is damaged, holds anything that weights_only refuses, or no tensors.
    """
    folder.mkdir()
    command = [sys.executable, "-m", "uhd_jax.convert.pickles", str(file.resolve()), str(folder)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, pass_fds=held)
    if done.returncode:
        problem = done.stdout.strip() or f"reading it ended with status {done.returncode}"
        raise ConvertError(f"{file}: {problem}")
    return sorted(folder.glob("*.safetensors"))


def tensors_of(value: Any) -> tuple[dict[str, Any], list[str]]:
    """The state dict in what torch.load returned, and the names of what lay beside it.

    A state dict is a mapping of names to tensors, itself or as "state_dict" of a training checkpoint.

    Raises:
      ConvertError: there is none, or it holds something else too.
    """
    beside: list[str] = []
    if isinstance(value, Mapping) and isinstance(value.get("state_dict"), Mapping):
        beside = [str(key) for key in value if key != "state_dict"]
        value = value["state_dict"]
    if not isinstance(value, Mapping) or not value:
        raise ConvertError(f"holds no state dict, but {type(value).__name__}")
    if others := [str(key) for key, item in value.items() if not (isinstance(key, str) and hasattr(item, "numel"))]:
        raise ConvertError(f"its state dict holds what is no tensor: {', '.join(others[:8])}")
    return dict(value), beside


def _main(file: Path, folder: Path) -> None:
    with file.open("rb") as opened:
        print(f"sha256 {hashlib.file_digest(opened, 'sha256').hexdigest()}  {file}", file=sys.stderr, flush=True)
    try:
        import torch
    except ImportError:
        raise ConvertError(
            "reading a pickle needs PyTorch, here alone: pip install torch, or get safetensors"
        ) from None
    try:
        # Older files are one stream, which cannot be mapped.
        value = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # of whatever kind a damaged pickle leads to
        raise ConvertError(f"torch.load(weights_only=True) refuses it: {_reason(error)}") from None
    tensors, beside = tensors_of(value)
    if beside:
        print(f"left out of {file.name}: {', '.join(beside)}", file=sys.stderr)

    def as_numpy(tensor: Any) -> np.ndarray:
        tensor = tensor.detach().contiguous()
        if tensor.dtype == torch.bfloat16:  # which NumPy has not
            return tensor.view(torch.int16).numpy().view(DTYPES["BF16"])
        return tensor.numpy()

    known = {str(dtype): dtype for dtype in DTYPES.values()}
    items = []
    for name, tensor in tensors.items():
        kind = str(tensor.dtype).removeprefix("torch.")
        if kind not in known or tensor.layout != torch.strided:
            raise ConvertError(f"{name} is {kind}, {tensor.layout}; known are dense tensors of {', '.join(known)}")
        items.append((name, TensorInfo(tuple(tensor.shape), known[kind], file), lambda tensor=tensor: as_numpy(tensor)))
    needed, free = sum(math.prod(info.shape) * info.dtype.itemsize for _, info, _ in items), disk_usage(folder).free
    full = f"its tensors need {needed / 2**20:.1f} MiB in {folder.parent}; set TMPDIR to a folder with more room"
    if free < needed:
        raise ConvertError(f"{full} ({free / 2**20:.1f} MiB are free there)")
    try:
        write_safetensors(folder, items)
    except OSError as error:
        raise ConvertError(f"{full} ({error.strerror or error})") from None


def _reason(error: Exception) -> str:
    """What torch.load stumbled over, without its advice to read the file all the same."""
    text = str(error)
    if found := re.search(r"GLOBAL (\S+)", text):
        return f"it names {found[1]}, which is no tensor and could run a program; get a file of tensors alone"
    lines = [line.strip() for line in text.splitlines()]
    said = [line for line in lines if line and not re.search(r"weights_only|safe_globals|torch\.load", line)]
    return f"{type(error).__name__}: {said[0][:300] if said else 'the file is damaged'}"


if __name__ == "__main__":
    try:
        _main(Path(sys.argv[1]), Path(sys.argv[2]))
    except (ConvertError, OSError) as error:
        print(error)
        sys.exit(1)
