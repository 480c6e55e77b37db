"""Speed of answers beside transformers' `generate`, on random models of two sizes, in one process.

  python tests/measure_generation.py [tiny] [reduced]

"reduced" is MiniCPM-V 4.6 with its widths, a tower of 6 layers, a decoder of 4 and a vocabulary of 65,536. Prints for
every model the seconds of one image and a question up to the first token, and of one further token, for one prompt and
for eight that go on together; the least of several runs, wall and processor time.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from hf46 import make_checkpoint, torch_inputs

import uhd_jax
from uhd_jax.generation.request import AnswerOptions
from uhd_jax.generation.visual import VisualCache

RUNS, TOKENS = 3, 33
SIZES = {
    "tiny": ({}, {}, 500),
    "reduced": (
        dict(
            hidden_size=1024,
            intermediate_size=3584,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=2,
            head_dim=256,
            linear_num_key_heads=16,
            linear_num_value_heads=16,
            linear_key_head_dim=128,
            linear_value_head_dim=128,
            vocab_size=65_536,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 1e7,
                "partial_rotary_factor": 0.25,
                "mrope_section": [11, 11, 10],
                "mrope_interleaved": True,
            },
        ),
        dict(
            hidden_size=1152,
            intermediate_size=4304,
            num_hidden_layers=6,
            num_attention_heads=16,
            image_size=980,
            patch_size=14,
        ),
        700,
    ),
}


def least(run) -> dict[str, float]:
    """Seconds of the best of several runs after one that is not counted."""
    times = []
    for _ in range(RUNS + 1):
        before = time.perf_counter(), time.process_time()
        run()
        times.append((time.perf_counter() - before[0], time.process_time() - before[1]))
    return dict(zip(("wall", "processor"), np.min(times[1:], axis=0).round(4).tolist(), strict=True))


def per_token(first: dict[str, float], all_of_them: dict[str, float]) -> dict[str, float]:
    """Of every token after the first."""
    return {name: round((all_of_them[name] - first[name]) / (TOKENS - 1), 5) for name in first}


def measure(name: str) -> dict:
    """One model, both sides."""
    text, vision, side = SIZES[name]
    with tempfile.TemporaryDirectory() as folder:
        theirs = make_checkpoint(Path(folder), "qwen3_5_text", insert=0 if name == "tiny" else 2, vision=vision, **text)
        ours = uhd_jax.load(folder)
    image = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    prepared = ours.prepare("What is this?", [image])
    found: dict = {"prompt_tokens": len(prepared.token_ids), "views": len(prepared.plans[0].views)}
    inputs = torch_inputs(prepared, ours.config)

    def torch_run(tokens: int, rows: int):
        given = {"input_ids": inputs["input_ids"].repeat(rows, 1), "downsample_mode": inputs["downsample_mode"]}
        if rows == 1:
            given = inputs
        with torch.no_grad():
            theirs.generate(**given, do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens, pad_token_id=0)

    def our_run(tokens: int, rows: int):
        ours.encoder.cache = VisualCache()
        ours.answer([prepared] * rows, [AnswerOptions(tokens)] * rows, ends=frozenset())

    for label, run in (("transformers", torch_run), ("uhd_jax", our_run)):
        first, whole = least(lambda r=run: r(1, 1)), least(lambda r=run: r(TOKENS, 1))
        found[label] = {"first_token": first, "per_token": per_token(first, whole)}
    text_only = ours.prepare("What is this, and what is it for?")
    inputs = torch_inputs(text_only, ours.config)
    prepared = text_only
    for label, run in (("transformers", torch_run), ("uhd_jax", our_run)):
        first, whole = least(lambda r=run: r(1, 8)), least(lambda r=run: r(TOKENS, 8))
        found[label]["per_step_of_8"] = per_token(first, whole)
    for key in ("first_token", "per_token", "per_step_of_8"):
        found[f"{key}_ratio"] = round(found["transformers"][key]["wall"] / found["uhd_jax"][key]["wall"], 2)
    return found


if __name__ == "__main__":
    print(json.dumps({name: measure(name) for name in sys.argv[1:] or SIZES}, indent=2))
