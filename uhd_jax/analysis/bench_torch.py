"""The same shapes through transformers' classes on PyTorch: the other side of `uhd-jax bench --against=torch`."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from uhd_jax.analysis.bench import FORWARD, Case, full_batch
from uhd_jax.analysis.verify import packed_pixels
from uhd_jax.config import DecoderConfig, ModelConfig
from uhd_jax.generation.assistant import Prepared


class BenchError(RuntimeError):
    """Something that the comparison needs is not there."""


@dataclasses.dataclass(frozen=True)
class Counterpart:
    """A part on PyTorch's side."""

    described: str  # class, and whether it is compiled
    call: Callable[[], Any]


def counterpart(case: Case, name: str, kind: str, compiled: bool) -> Counterpart | None:
    """What does the work of a part and pass there; None where transformers has no class for it.

    Args:
      case: model and shapes.
      name: of the part, as of `bench.parts_of`.
      kind: FORWARD or TRAINING.
      compiled: try `torch.compile` first; where it fails the class runs as it is, and the description says so.

    Raises:
      BenchError: torch or transformers is not installed.
    """
    import_both()
    import torch

    made = _made(case, name)
    if made is None:
        return None
    module, run, title = made
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[case.model.dtype]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    module = module.to(device, dtype)

    def call_with(function: Callable[[Any], Any]) -> Callable[[], None]:
        def call():
            if kind == FORWARD:
                with torch.no_grad():
                    function(module)
            else:
                module.zero_grad(set_to_none=True)
                function(module).float().sum().backward()
            if device == "cuda":
                torch.cuda.synchronize()

        return call

    run = run(device, dtype)
    if compiled:
        fast = torch.compile(run)
        try:
            call_with(fast)()
            return Counterpart(f"{title}, compiled", call_with(fast))
        except Exception as error:  # of many kinds, from its compilers
            print(f"torch.compile of {title} fails, it runs as it is: {type(error).__name__}", file=sys.stderr)
            torch._dynamo.reset()
    return Counterpart(title, call_with(run))


def import_both() -> None:
    """Raises BenchError where torch or transformers is not installed."""
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise BenchError(f"--against=torch needs {error.name}: pip install torch transformers") from error


def generator(folder: Path, config: ModelConfig) -> Callable[[Prepared, int, int], np.ndarray]:
    """transformers' `generate` on a folder in MiniCPM-V 4.6's layout, called as `bench_generation.Answering` is.

    Args:
      folder: what an export wrote.
      config: of the model that was exported.

    Raises:
      BenchError: torch or transformers is not installed.
    """
    import_both()
    import torch
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[config.dtype]
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    model = model.to(device).eval()

    def answer(prepared: Prepared, rows: int, tokens: int) -> np.ndarray:
        ids = torch.tensor(prepared.token_ids[None].astype(np.int64), device=device).repeat(rows, 1)
        inputs: dict[str, Any] = {"input_ids": ids, "downsample_mode": config.mode}
        if prepared.plans:
            grids = [view.patch_grid for plan in prepared.plans for view in plan.views]
            pixels = packed_pixels(prepared.views, grids, config.merge_levels(), config)
            inputs["pixel_values"] = torch.tensor(pixels, device=device, dtype=dtype)
            inputs["target_sizes"] = torch.tensor(np.array(grids, np.int32))
        with torch.no_grad():
            said = model.generate(
                **inputs, do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens, pad_token_id=0
            )
        return said[:, ids.shape[1] :].cpu().numpy()

    return answer


def _made(case: Case, name: str) -> tuple[Any, Any, str] | None:
    if name == "decoder":
        return _decoder(case)
    if case.model.tower.kind != "siglip2":
        return None
    if name == "tower, no compressor" or (name == "tower" and case.model.compressor.kind == "none"):
        return _siglip(case)
    released = case.model.compressor.kind == "window_attention_reused_mlp" and case.model.connector.rounds == 1
    if not released or case.model.connector.kind != "merging_mlp":
        return None
    return _compressed(case) if name == "tower" else _merger(case)


def _sizes(case: Case) -> dict[str, Any]:
    tower = case.model.tower
    return {
        "hidden_size": tower.width,
        "intermediate_size": tower.mlp_width,
        "num_hidden_layers": tower.layers,
        "num_attention_heads": tower.heads,
        "patch_size": tower.patch_size,
        "layer_norm_eps": tower.norm_eps,
    }


def _pixels(case: Case) -> np.ndarray:
    """float32[V, 3, height, width], the views as images; which patch stands where does not matter for speed."""
    patch, (rows, cols) = case.model.tower.patch_size, case.grid
    patches = full_batch(case).patches.reshape(case.views, -1, patch, patch, 4)[:, : rows * cols, ..., :3]
    patches = patches.reshape(case.views, rows, cols, patch, patch, 3)
    images = patches.transpose(0, 5, 1, 3, 2, 4).reshape(case.views, 3, rows * patch, cols * patch)
    return images.astype(np.float32) / 127.5 - 1


def _siglip(case: Case) -> tuple[Any, Any, str]:
    import torch
    from transformers import SiglipVisionConfig, SiglipVisionModel

    side = case.model.tower.table_side * case.model.tower.patch_size
    config = SiglipVisionConfig(**_sizes(case), image_size=side, vision_use_head=False)
    config._attn_implementation = "sdpa"
    pixels = torch.from_numpy(_pixels(case))

    def run(device, dtype):
        images = pixels.to(device, dtype)
        return lambda module: module(images, interpolate_pos_encoding=True).last_hidden_state

    return SiglipVisionModel(config), run, "SiglipVisionModel"


def _compressed(case: Case) -> tuple[Any, Any, str]:
    import torch
    from transformers.models.minicpmv4_6 import modeling_minicpmv4_6 as modeling

    tower = case.model.tower
    config = modeling.MiniCPMV4_6VisionConfig(
        **_sizes(case),
        image_size=tower.table_side * tower.patch_size,
        insert_layer_id=case.model.compressor.after_layer,
    )
    config._attn_implementation = "sdpa"
    grids = torch.tensor([case.grid] * case.views, dtype=torch.int32)
    patch = tower.patch_size
    pixels = torch.from_numpy(_pixels(case)).reshape(case.views, 3, case.grid[0], patch, -1)
    pixels = pixels.permute(1, 3, 0, 2, 4).reshape(1, 3, patch, -1)  # all views side by side, a patch high

    def run(device, dtype):
        images = pixels.to(device, dtype)
        return lambda module: module(images, target_sizes=grids).last_hidden_state

    return modeling.MiniCPMV4_6VisionModel(config), run, "MiniCPMV4_6VisionModel"


def _merger(case: Case) -> tuple[Any, Any, str]:
    import torch
    from transformers import MiniCPMV4_6Config
    from transformers.models.minicpmv4_6 import modeling_minicpmv4_6 as modeling

    config = MiniCPMV4_6Config(
        vision_config=_sizes(case), text_config={"model_type": "qwen3", "hidden_size": case.model.decoder.width}
    )
    grids = torch.tensor([[side // 2 for side in case.grid]] * case.views, dtype=torch.int32)
    features = torch.randn(1, int(grids.prod(1).sum()), case.model.tower.width)

    def run(device, dtype):
        tokens = features.to(device, dtype)
        return lambda module: torch.cat(module(tokens, grids))

    return modeling.MiniCPMV4_6Merger(config), run, "MiniCPMV4_6Merger"


def _decoder(case: Case) -> tuple[Any, Any, str] | None:
    import torch
    import transformers

    cfg: DecoderConfig = case.model.decoder
    if cfg.full_attention_interval > 1:
        return None
    kind = "Qwen3" if cfg.qk_norm else "Qwen2" if cfg.qkv_bias else "Llama"
    sizes = {
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.width,
        "intermediate_size": cfg.mlp_width,
        "num_hidden_layers": cfg.layers,
        "num_attention_heads": cfg.heads,
        "num_key_value_heads": cfg.kv_heads,
        "head_dim": cfg.head_dim,
        "tie_word_embeddings": cfg.tied_head,
    }
    config = getattr(transformers, f"{kind}Config")(**sizes)
    config._attn_implementation = "sdpa"
    ids = torch.from_numpy(full_batch(case).tokens.astype(np.int64))
    module = getattr(transformers, f"{kind}ForCausalLM")(config)

    def run(device, dtype):
        tokens = ids.to(device)
        return lambda module: module(input_ids=tokens, labels=tokens, use_cache=False).loss

    return module, run, f"{kind}ForCausalLM"
