"""A checkpoint, or as much of it as transformers has classes for, in PyTorch: float32, plain attention, on CPU.

The tensors go into transformers' classes under the names they have in the checkpoint, without `convert`'s tables: those
are what `verify` looks at. Where a layout has other names than transformers' class, they are changed by the few rules
here.
"""

from __future__ import annotations

import contextlib
import importlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from uhd_jax.convert import llava_uhd
from uhd_jax.convert.family import settings
from uhd_jax.convert.source import Source
from uhd_jax.convert.tables import ConvertError
from uhd_jax.convert.transfer import Recognised

TowerRun = Callable[[np.ndarray, tuple[int, int]], np.ndarray]  # float32[P, patch_dim] in raster order, grid -> [P, D]
DecoderRun = Callable[[np.ndarray], np.ndarray]  # int[T] -> float32[T, V]

_WHOLE = "minicpm_v_4_6"
_RESEARCH = "llava_uhd_v4_research"
# family -> what its tower's and its decoder's names begin with
_TOWERS = {
    **{kind: "vision_model." for kind in ("clip", "siglip", "siglip2")},
    **{f"{kind}_bare": "" for kind in ("clip", "siglip", "siglip2")},
    **dict.fromkeys(("llava_uhd_v1", "llava_uhd_v2"), llava_uhd.TOWER),
}
_DECODERS = {
    **dict.fromkeys(("llama", "qwen2", "qwen3", "qwen3_5", "llava_uhd_v1", "llava_uhd_v2"), "model."),
    "qwen3_5_with_vision": "model.language_model.",
}
# The research layout's names -> those of MiniCPM-V 4.6, which is the same model.
_RESEARCH_NAMES = (
    (r"vpm\.", "model.vision_tower."),
    (r"vit_merger\.", "model.vision_tower.vit_merger."),
    (r"resampler\.mlp\.(\d)\.mlp\.0\.", r"model.merger.mlp.\1.linear_1."),
    (r"resampler\.mlp\.(\d)\.mlp\.2\.", r"model.merger.mlp.\1.linear_2."),
    (r"resampler\.mlp\.", "model.merger.mlp."),
    (r"llm\.model\.", "model.language_model."),
    (r"llm\.lm_head\.", "lm_head."),
)
# Of config.json, what is not about sizes; and what a class of the language model alone must not be told.
_NOT_SIZES = (
    "architectures",
    "model_type",
    "torch_dtype",
    "dtype",
    "auto_map",
    "transformers_version",
    "_name_or_path",
)
_NOT_TEXT = ("text_config", "vision_config", "quantization_config", "slice_config")


class VerifyError(RuntimeError):
    """The two differ, or cannot be compared: a package is missing, or transformers cannot run the source."""


def runs(family: str) -> tuple[str, ...]:
    """Parts of a family that PyTorch can run: "model" for all of it, "tower", "decoder"."""
    if family in (_WHOLE, _RESEARCH):
        return ("model",)
    return ("tower",) * (family in _TOWERS) + ("decoder",) * (family in _DECODERS)


def whole(source: Source, found: Recognised, placeholder: int) -> Any:
    """The whole model, as transformers' MiniCPM-V 4.6; `placeholder` is the id of an image's tokens.

    Raises:
      VerifyError: transformers cannot load it.
    """
    _, transformers = packages()
    if found.family.name == _WHOLE and source.path.is_dir():
        with _loading(source, transformers):
            return _from(transformers.AutoModelForImageTextToText, source.path, source, found.config.decoder.tied_head)
    tower, config = found.config.tower, found.config
    vision = {"hidden_size": tower.width, "intermediate_size": tower.mlp_width, "num_hidden_layers": tower.layers}
    vision |= {"num_attention_heads": tower.heads, "patch_size": tower.patch_size, "layer_norm_eps": tower.norm_eps}
    inserted = config.compressor.kind != "none"
    with _loading(source, transformers):
        fields = transformers.MiniCPMV4_6Config(
            text_config={"model_type": _text_type(source, found)} | _text_fields(source),
            vision_config=vision | {"image_size": tower.table_side * tower.patch_size},
            insert_layer_id=config.compressor.after_layer if inserted else 0,
            image_token_id=placeholder,
            merger_times=config.connector.rounds,
            tie_word_embeddings=config.decoder.tied_head,
        )
        tensors = {_renamed(name): array for name, array in _tensors(source, found, "").items()}
        unused = () if inserted else ("model.vision_tower.vit_merger.",)
        return _made(transformers.MiniCPMV4_6ForConditionalGeneration, fields, tensors, source, unused)


def tower(source: Source, found: Recognised) -> TowerRun:
    """The tower: CLIP, whose positions are resized to the grid, SigLIP or SigLIP 2, for grids of its table's size.

    Raises:
      VerifyError: transformers cannot load it.
    """
    torch, transformers = packages()
    kind = found.family.name.removesuffix("_bare")
    kind, sizes = ("clip" if kind.startswith("llava") else kind), found.config.tower
    name = {"clip": "CLIP", "siglip": "Siglip", "siglip2": "Siglip2"}[kind]
    fields = {"hidden_size": sizes.width, "intermediate_size": sizes.mlp_width, "num_hidden_layers": sizes.layers}
    fields |= {"num_attention_heads": sizes.heads, "patch_size": sizes.patch_size, "layer_norm_eps": sizes.norm_eps}
    fields |= (
        {"num_patches": sizes.table_side**2}
        if kind == "siglip2"
        else {"image_size": sizes.table_side * sizes.patch_size}
    )
    fields |= {} if kind == "clip" else {"vision_use_head": False}
    with _loading(source, transformers):
        config = getattr(transformers, f"{name}VisionConfig")(**fields)
        tensors = _tensors(source, found, _TOWERS[found.family.name])
        model = _made(getattr(transformers, f"{name}VisionModel"), config, tensors, source)

    def run(patches: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
        (rows, cols), side = grid, sizes.patch_size
        cut = patches.reshape(rows, cols, 3, side, side)
        with torch.no_grad():
            if kind == "siglip2":
                flat = torch.tensor(cut.transpose(0, 1, 3, 4, 2).reshape(1, rows * cols, -1))
                ones = torch.ones(flat.shape[:2], dtype=torch.long)
                return model(flat, ones, torch.tensor([[rows, cols]])).last_hidden_state[0].numpy()
            picture = torch.tensor(cut.transpose(2, 0, 3, 1, 4).reshape(1, 3, rows * side, cols * side))
            if kind == "siglip":
                return model(picture).last_hidden_state[0].numpy()
            out = model(picture, interpolate_pos_encoding=True, output_hidden_states=True)
            return out.hidden_states[-1 - sizes.skipped_layers][0, 1:].numpy()

    return run


def decoder(source: Source, found: Recognised) -> DecoderRun:
    """The language model alone.

    Raises:
      VerifyError: transformers cannot load it.
    """
    torch, transformers = packages()
    with _loading(source, transformers):
        config = transformers.AutoConfig.for_model(_text_type(source, found), **_text_fields(source))
        named = _tensors(source, found, _DECODERS[found.family.name])
        tensors = {name if name.startswith("lm_head.") else f"model.{name}": array for name, array in named.items()}
        kind = transformers.AutoModelForCausalLM._model_mapping[type(config)]
        model = _made(kind, config, tensors, source)

    def run(ids: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return model(torch.tensor(ids[None].astype(np.int64))).logits[0].numpy()

    return run


def packages() -> tuple[Any, Any]:
    """torch and transformers.

    Raises:
      VerifyError: one is missing.
    """
    try:
        return importlib.import_module("torch"), importlib.import_module("transformers")
    except ImportError as error:
        raise VerifyError(f"verify runs the source in PyTorch: pip install torch transformers ({error})") from None


def _text_type(source: Source, found: Recognised) -> str:
    fields = settings(source)
    kind = (fields.get("text_config") or fields.get("llm_config") or fields).get("model_type")
    if found.family.name == _RESEARCH and kind not in ("llama", "qwen2", "qwen3"):
        # As the original code's class of the language model tells: by what its layers have.
        has = {name.rpartition("layers.0.self_attn.")[2] for name in source.tensors}
        kind = "qwen3" if "q_norm.weight" in has else "qwen2" if "q_proj.bias" in has else "llama"
    return {"qwen3_5": "qwen3_5_text"}.get(kind, llava_uhd.TEXT_KINDS.get(kind, kind))


def _text_fields(source: Source) -> dict[str, Any]:
    fields = dict(settings(source))
    fields |= fields.get("text_config") or fields.get("llm_config") or {}
    return {key: value for key, value in fields.items() if key not in _NOT_SIZES + _NOT_TEXT and value is not None}


def _tensors(source: Source, found: Recognised, prefix: str) -> dict[str, np.ndarray]:
    """float32 tensors of the names with a prefix, which is taken away, and the head; without what is left out."""
    left = {name for names in found.dropped(source).values() for name in names}
    others = (llava_uhd.PROJECTOR, llava_uhd.TOWER) if prefix == "model." else ()
    wanted = [n for n in source.tensors if n.startswith(prefix) and not n.startswith(others) and n not in left]
    tensors = {name.removeprefix(prefix): source.read(name).astype(np.float32) for name in wanted}
    if prefix.startswith("model.") and prefix != llava_uhd.TOWER and "lm_head.weight" not in left:
        tensors["lm_head.weight"] = source.read("lm_head.weight").astype(np.float32)
    return tensors


def _renamed(name: str) -> str:
    for pattern, theirs in _RESEARCH_NAMES:
        new, found = re.subn(f"^{pattern}", theirs, name)
        if found:
            return new
    return name


def _made(
    kind: Any, config: Any, tensors: Mapping[str, np.ndarray], source: Source, unused: tuple[str, ...] = ()
) -> Any:
    """A model of a class, with every parameter from the tensors; `unused` begin names of those that never run."""
    torch, _ = packages()
    state = {name: torch.from_numpy(array) for name, array in tensors.items()}
    return _from(
        kind, None, source, getattr(config, "tie_word_embeddings", False), unused, config=config, state_dict=state
    )


def _from(kind: Any, folder: Any, source: Source, tied: bool, unused: tuple[str, ...] = (), **given: Any) -> Any:
    """`from_pretrained`; strict, which it is not by itself."""
    torch, _ = packages()
    model, info = kind.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True, **given
    )
    unused += ("lm_head.weight",) if tied else ()
    problems = [f"missing {name}" for name in info["missing_keys"] if not unused or not name.startswith(unused)]
    problems += [f"unexpected {name}" for name in info["unexpected_keys"]]
    problems += [f"misshaped {name}" for name in info["mismatched_keys"]]
    if problems:
        raise VerifyError(f"{source.path}: in {kind.__name__} of transformers: {', '.join(sorted(problems)[:8])}")
    return model.eval()


@contextlib.contextmanager
def _loading(source: Source, transformers: Any) -> Iterator[None]:
    """Without bars and advice; whatever goes wrong is a VerifyError."""
    logs = transformers.logging
    verbosity, bars = logs.get_verbosity(), logs.is_progress_bar_enabled()
    logs.set_verbosity_error()
    logs.disable_progress_bar()
    try:
        yield
    except (VerifyError, ConvertError):
        raise
    except Exception as error:  # of whatever kind a damaged or unknown checkpoint leads to
        said = " ".join(str(error).split())[:300]
        raise VerifyError(f"{source.path}: transformers {transformers.__version__} cannot load it ({said})") from error
    finally:
        logs.set_verbosity(verbosity)
        if bars:
            logs.enable_progress_bar()
