"""How far float32 alone brings logits of the stored Qwen3.5 checkpoints from the stored ones of float64.

    python tests/float32_noise.py --draws=24

In each draw a third of the weights, chosen at random, moves up to the next float32 and a third down, and transformers
and this project run with the same weights. Prints for each the largest difference at any position, over the draws, and
in how many it is above the tolerance of `test_parity_v4_full.py`. Moved weights are another model, a little, so a
control runs them in float64 as well.
"""

from __future__ import annotations

import argparse
import dataclasses

import jax
import numpy as np
import torch
import transformers
from golden_v4 import GOLDEN, load

import uhd_jax
from uhd_jax.analysis.verify import _torch_logits
from uhd_jax.convert import minicpmv
from uhd_jax.convert.tables import export_tensors
from uhd_jax.generation.assistant import Assistant

TOLERANCE = 5e-4


def main() -> None:
    """Measures both checkpoints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=24)
    draws = parser.parse_args().draws
    for folder in ("v4_full_qwen35_4x", "v4_full_qwen35_16x"):
        errors = np.array([_errors(folder, seed) for seed in range(draws + 1)])
        for name, (own, *noisy) in zip(("transformers", "uhd_jax", "uhd_jax in float64"), errors.T, strict=True):
            low, median, high = np.quantile(noisy, [0, 0.5, 1])
            above = sum(error > TOLERANCE for error in noisy)
            print(f"{folder} {name}: {own:.1e}; with noise {low:.1e} to {high:.1e}, median {median:.1e}, "
                  f"above {TOLERANCE:.0e} in {above} of {draws}", flush=True)  # fmt: skip


def _errors(folder: str, seed: int) -> tuple[float, ...]:
    """Of transformers and of this project, and of this project in float64; the weights as they are for seed 0."""
    random = np.random.default_rng(seed)
    model, io = uhd_jax.load(GOLDEN / folder), load(folder, "io")
    images = sorted((GOLDEN / folder).glob("image_*.png"))
    mode = folder[folder.rindex("_") + 1 :]

    def moved(leaf):
        leaf, direction = np.asarray(leaf), random.choice(np.array([-np.inf, np.nan, np.inf], np.float32), leaf.shape)
        return np.where(np.isnan(direction), leaf, np.nextafter(leaf, direction)) if seed else leaf

    params = jax.tree.map(moved, model.params)
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(GOLDEN / folder, dtype=torch.float32)
    tensors = export_tensors(minicpmv.table(model.config), params)
    state = {name: torch.from_numpy(np.array(tensor)) for name, tensor in tensors.items()}
    theirs.load_state_dict(state | {n: t for n, t in theirs.state_dict().items() if n not in state})
    prepared = model.prepare("What is this?", images, mode=mode)
    ids = io["input_ids"][0]
    outputs = [
        _torch_logits(theirs, prepared, dataclasses.replace(model.config, mode=mode)),
        Assistant(model.config, params, model.tokenizer).logits(ids, images, mode=mode),
    ]
    with jax.enable_x64(True):
        config, double = dataclasses.replace(model.config, dtype="float64"), jax.tree.map(np.float64, params)
        outputs.append(Assistant(config, double, model.tokenizer).logits(ids, images, mode=mode))
    return tuple(float(np.abs(logits - io["logits_f64"][0]).max()) for logits in outputs)


if __name__ == "__main__":
    main()
