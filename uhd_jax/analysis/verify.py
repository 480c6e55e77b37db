"""Does an imported model answer as its source does? Both run on the same input, what comes out is compared.

The source runs in PyTorch through the classes of transformers, in float32 with plain attention; both packages are
needed for this alone. What is compared is the network: ids and patches are made once, by this package, and given to
both. Of a checkpoint that transformers has no class for, the parts are compared that it has classes for. Where the
source's processor can be loaded too, its ids are compared.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from uhd_jax.analysis import originals
from uhd_jax.analysis.comparison import Comparison, Report, compare_features, compare_logits
from uhd_jax.analysis.originals import VerifyError
from uhd_jax.batch import Bucket, empty_batch
from uhd_jax.checkpoint import load_model
from uhd_jax.config import ModelConfig
from uhd_jax.convert import sentencepiece
from uhd_jax.convert.source import Source, open_source
from uhd_jax.convert.tables import load, unflatten
from uhd_jax.convert.transfer import Recognised, recognise
from uhd_jax.data.tokenizer import Tokenizer
from uhd_jax.generation.assistant import Assistant, Prepared, foreign_tokenizer
from uhd_jax.generation.assistant import load as load_assistant
from uhd_jax.models import uhd
from uhd_jax.models.patches import normalise_patches
from uhd_jax.slicing.image_io import open_image
from uhd_jax.slicing.memory import pixels_of
from uhd_jax.slicing.pixels import merge_order

PROMPTS = ("What is shown here? Answer in one sentence.", "Read all the text.")
MADE_IDS = 75  # random ids given to a language model: more than a chunk of the delta rule, and no multiple
_TOWER_SIZES = ("kind", "width", "mlp_width", "layers", "heads", "patch_size", "table_shape", "skipped_layers")
_WITHOUT_CLASS = {
    "connector": "the connector ({kind}): transformers has no class for it; its import is exact, as the tests show",
    "model": "the whole model: transformers has no class that puts these parts together",
}


def verify(
    source: str | Path,
    directory: str | Path,
    images: Sequence[Any] = (),
    prompts: Sequence[str] = (),
    allow_pickle: bool = False,
) -> Report:
    """Runs a checkpoint in PyTorch and the model made of it here, and compares them at every position.

    Args:
      source: the checkpoint: a folder or one file of weights.
      directory: what an import, `convert combine` or a training wrote, or an exported folder. Of a checkpoint of a
        tower or a language model alone, a model that took it over.
      images: as of `Assistant.prepare`; every prompt is asked about all of them. None given: two are made.
      prompts: questions; none given: `PROMPTS`, and the first once more without images.
      allow_pickle: also read .bin, .pt, .pth and .ckpt.

    Raises:
      VerifyError: torch or transformers is missing, transformers can run no part of the source, or the model has other
        sizes.
      CheckpointError, ConvertError, ImageRefused, PromptError: as of `open_source`, `uhd_jax.load` and
        `Assistant.prepare`.
    """
    with open_source(source, allow_pickle) as opened:
        found = recognise(opened, _abstract_of)
        parts = originals.runs(found.family.name)
        if not parts:
            raise VerifyError(
                f"{source}: transformers has no class for {found.family.name}; import and export are exact, as the "
                "tests of its layout show"
            )
        originals.packages()
        found.moves(opened)
        images = list(images) or made_images()
        if parts == ("model",):
            comparisons, missing = _whole(opened, found, directory, images, prompts), ()
        else:
            comparisons, missing = _parts(opened, found, directory, images, prompts)
    return Report(str(source), str(directory), tuple(comparisons), tuple(missing))


def made_images() -> list[np.ndarray]:
    """Two pictures, always the same: a wide one that is sliced, of smooth colours, and a small one of noise."""
    height, width = 420, 980
    y, x = np.mgrid[:height, :width] / np.array([height, width]).reshape(2, 1, 1)
    smooth = np.stack([x, y, (np.sin(20 * x) * np.cos(15 * y) + 1) / 2], axis=-1)
    noise = np.random.default_rng(0).integers(0, 256, (150, 100, 3), np.uint8)
    return [np.round(255 * smooth).astype(np.uint8), noise]


def packed_pixels(views: Sequence[np.ndarray], grids: Sequence[Any], levels: int, config: ModelConfig) -> np.ndarray:
    """Patches of `cut_views` to transformers' form: float32[1, 3, patch_size, patch_size * patches], raster order."""
    side = config.tower.patch_size
    raster = []
    for view, grid in zip(views, grids, strict=True):
        own = np.empty_like(view)
        own[merge_order(grid, levels)] = view
        raster.append(own)
    pixels = np.concatenate(raster).reshape(-1, side, side, 4)[..., :3].transpose(3, 1, 0, 2).reshape(1, 3, side, -1)
    return (pixels / np.float32(127.5) - 1).astype(np.float32)


def _abstract_of(config: ModelConfig) -> Any:
    return jax.eval_shape(lambda: uhd.init_params(config, jax.random.key(0)))


# The whole model.


def _whole(
    source: Source, found: Recognised, directory: str | Path, images: list[Any], prompts: Sequence[str]
) -> list[Comparison]:
    assistant = load_assistant(directory)
    ours = Assistant(dataclasses.replace(assistant.config, dtype="float32"), assistant.params, assistant.tokenizer)
    model = originals.whole(source, found, ours.tokenizer.special(ours.config.chat.placeholder))
    cases = [(prompt, images) for prompt in prompts or PROMPTS]
    if not prompts:
        cases.append((PROMPTS[0], []))
    processor = _processor(source.path)
    return [_compare(model, processor, ours, prompt, own) for prompt, own in cases]


def _compare(model: Any, processor: Any, ours: Assistant, prompt: str, images: list[Any]) -> Comparison:
    prepared = ours.prepare(prompt, images)
    here, there = ours.logits(prepared.token_ids, images), _torch_logits(model, prepared, ours.config)
    if here.shape != there.shape:
        raise VerifyError(f"not the same model: {there.shape[-1]} tokens in the source, {here.shape[-1]} in the import")
    same_ids = None
    if processor is not None:
        same_ids = _processor_ids(processor, prompt, len(images), ours, images) == prepared.token_ids.tolist()
    return Comparison("model", prompt, len(images), **compare_logits(here, there), same_ids=same_ids)


def _torch_logits(model: Any, prepared: Prepared, config: ModelConfig) -> np.ndarray:
    """float32[T, V]."""
    torch, _ = originals.packages()
    inputs = {"input_ids": torch.tensor(prepared.token_ids[None].astype(np.int64))}
    views = [view for plan in prepared.plans for view in plan.views]
    if views:
        grids = [view.patch_grid for view in views]
        pixels = packed_pixels(prepared.views, grids, config.merge_levels(), config)
        inputs["pixel_values"] = torch.tensor(pixels)
        inputs["target_sizes"] = torch.tensor(np.array(grids, np.int32))
        inputs["downsample_mode"] = config.mode if config.compressor.kind != "none" else "4x"  # "4x" means without it
    try:
        with torch.no_grad():
            return model(**inputs).logits[0].float().numpy()
    except (ValueError, IndexError, RuntimeError) as error:
        raise VerifyError(
            f"the source cannot take what the import made of a prompt: not the same model ({error})"
        ) from error


def _processor(source: Path) -> Any:
    """The source's processor, or None where transformers cannot make it (its video part needs torchvision)."""
    try:
        processor = importlib.import_module("transformers").AutoProcessor.from_pretrained(source)
    except Exception:  # whatever is missing or damaged, the logits can be compared without
        return None
    return processor if getattr(processor, "chat_template", None) else None


def _processor_ids(processor: Any, prompt: str, count: int, ours: Assistant, images: list[Any]) -> list[int]:
    content = [{"type": "image"}] * count + [{"type": "text", "text": prompt}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    opened = ours._open(images) or None
    return processor(text=[text], images=opened, return_tensors="np")["input_ids"][0].tolist()


# Towers and language models.


def _parts(
    source: Source, found: Recognised, directory: str | Path, images: list[Any], prompts: Sequence[str]
) -> tuple[list[Comparison], list[str]]:
    """Comparisons of the parts that transformers can run, and what it cannot."""
    params, config = _ours(Path(directory))
    config = dataclasses.replace(config, dtype="float32")
    parts = originals.runs(found.family.name)
    if lacking := [part for part in parts if part not in params]:
        raise VerifyError(f"{directory} has no {' and no '.join(lacking)} to compare with that of {source.path}")
    comparisons: list[Comparison] = []
    if "tower" in parts:
        comparisons += _compare_towers(source, found, params, config, images)
    if "decoder" in parts:
        comparisons += _compare_decoders(source, found, params, config, prompts)
    missing = []
    if "connector" in found.family.parts:
        kind = found.config.connector.kind
        missing = [_WITHOUT_CLASS[what].format(kind=kind) for what in ("connector", "model")]
    return comparisons, missing


def _ours(directory: Path) -> tuple[dict[str, Any], ModelConfig]:
    """Parameters and configuration of a model of ours, or of a foreign folder of whatever parts."""
    if not (directory / "config.json").exists():
        return load_model(directory)
    with open_source(directory) as source:
        found = recognise(source, _abstract_of)
        moves = found.moves(source)
        return unflatten({move.path: load(move, source.read, np.float32) for move in moves}), found.config


def _require_equal(part: str, theirs: Any, ours: Any, keys: Sequence[str]) -> None:
    differing = [key for key in keys if getattr(theirs, key) != getattr(ours, key)]
    if differing:
        shown = (f"{part}.{key}: {getattr(theirs, key)} in the source, {getattr(ours, key)} here" for key in differing)
        raise VerifyError(f"not the same {part}: {'; '.join(shown)}")


def _compare_towers(
    source: Source, found: Recognised, params: Any, config: ModelConfig, images: list[Any]
) -> list[Comparison]:
    """Each image as one view of the position table's size; of CLIP, which resizes its table, also half as high."""
    _require_equal("tower", found.config.tower, config.tower, _TOWER_SIZES)
    there, module = originals.tower(source, found), uhd.tower(config)
    here = jax.jit(lambda p, x, grid: module.apply({"params": p}, x, grid, levels=0, compress=False)[0])
    rows, cols = config.tower.table_shape
    grids = [(rows, cols)] + [(max(1, rows // 2), cols)] * (config.tower.kind == "clip")
    comparisons = []
    for number, image in enumerate(images):
        for grid in grids:
            patches = _view(open_image(image, config.slicing.limits), grid, config.tower.patch_size)
            pixels = np.asarray(normalise_patches(jnp.asarray(patches), config.tower))
            ours = np.asarray(here(params["tower"], pixels[None], jnp.array([grid])))[0]
            figures = compare_features(ours, there(pixels, grid))
            given = f"image {number + 1}, {grid[0]}x{grid[1]} patches"
            comparisons.append(Comparison("tower", given, 1, **figures))
    return comparisons


def _view(image: np.ndarray, grid: tuple[int, int], side: int) -> np.ndarray:
    """An image resized to a grid of patches: uint8[P, patch_bytes] in raster order."""
    rows, cols = grid
    resized = Image.fromarray(image).resize((cols * side, rows * side), Image.Resampling.BICUBIC)
    cut = pixels_of(resized).reshape(rows, side, cols, side, -1).swapaxes(1, 2)
    return cut.reshape(rows * cols, -1)


def _compare_decoders(
    source: Source, found: Recognised, params: Any, config: ModelConfig, prompts: Sequence[str]
) -> list[Comparison]:
    """Random ids, and prompts where there is a tokenizer; ids and logits that the source's tokenizer knows of."""
    theirs = found.config.decoder
    keys = [field.name for field in dataclasses.fields(theirs) if field.compare and field.name != "vocab_size"]
    _require_equal("decoder", theirs, config.decoder, keys)
    known = theirs.vocab_size
    if config.decoder.vocab_size < known:
        raise VerifyError(f"not the same decoder: {known} tokens in the source, {config.decoder.vocab_size} here")
    rows = {f"{MADE_IDS} random ids": None}
    if tokenizer := _tokenizer(source.folder):
        known = min(known, tokenizer.vocab_size)  # rows beyond, `convert combine` has given to new marks
        rows |= {prompt: np.array(tokenizer.encode(prompt)) for prompt in prompts or PROMPTS}
    there = originals.decoder(source, found)
    comparisons = []
    for given, ids in rows.items():
        ids = np.random.default_rng(0).integers(0, known, MADE_IDS) if ids is None else ids
        if not len(ids) or max(ids) >= known:
            made = f"id {max(ids)}, the decoder has {known}" if len(ids) else "no ids"
            raise VerifyError(f"{source.folder}: its tokenizer makes of {given!r} {made}")
        batch = empty_batch(Bucket(1, 0, len(ids), 4, config.tower.patch_bytes))
        batch.tokens[:], batch.positions[:], batch.segments[:] = ids, np.arange(len(ids)), 1
        ours = _logits({"decoder": params["decoder"]}, batch, config)
        figures = compare_logits(np.asarray(ours)[0, :, :known], there(ids)[:, :known])
        comparisons.append(Comparison("decoder", given, 0, **figures))
    return comparisons


_logits = jax.jit(uhd.logits, static_argnums=2)


def _tokenizer(folder: Path) -> Tokenizer | None:
    """The source's tokenizer, if it has one."""
    return foreign_tokenizer(folder) if sentencepiece.has_tokenizer(folder) else None
