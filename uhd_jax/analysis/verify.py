"""Does an imported model answer as its source does? Both run on the same ids and patches, logits are compared.

The source runs in PyTorch through the class that transformers has for it, in float32 with plain attention; both
packages are needed for this alone and are imported only here. What is compared is the network: ids and patches are
made once, by this package, and given to both. Where the source's processor can be loaded too, its ids are compared.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from uhd_jax.config import ModelConfig
from uhd_jax.generation.assistant import Assistant, Prepared, load
from uhd_jax.slicing.pixels import merge_order

PROMPTS = ("What is shown here? Answer in one sentence.", "Read all the text.")
_CLASSES = {"minicpmv4_6": "AutoModelForImageTextToText"}  # model_type -> transformers' class


MAX_KL = 1e-4  # nats at any position, beyond which two models in float32 are not the same


class VerifyError(RuntimeError):
    """The two differ, or cannot be compared: a package is missing, or transformers cannot run the source."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One prompt. Arrays have one value per position, T of them."""

    prompt: str
    images: int
    max_abs: np.ndarray  # float64[T]: largest difference of a logit
    kl: np.ndarray  # float64[T]: divergence of ours from the source's distribution, in nats
    same_top: np.ndarray  # bool[T]: the likeliest token is the same
    same_ids: bool | None  # whether the source's processor makes the same ids; None: it cannot be loaded here

    def to_json(self) -> dict[str, Any]:
        """JSON types only, every position."""
        return dataclasses.asdict(self) | {
            "max_abs": self.max_abs.tolist(),
            "kl": self.kl.tolist(),
            "same_top": self.same_top.tolist(),
        }


@dataclasses.dataclass(frozen=True)
class Report:
    """What `verify` found, prompt by prompt."""

    source: str
    directory: str
    comparisons: tuple[Comparison, ...]

    def to_json(self) -> dict[str, Any]:
        """JSON types only: the summary, and for each prompt every position."""
        return self.summary() | {"prompts": [comparison.to_json() for comparison in self.comparisons]}

    def summary(self) -> dict[str, Any]:
        """Over all positions of all prompts."""
        max_abs, kl, same_top = (
            np.concatenate([getattr(comparison, name) for comparison in self.comparisons])
            for name in ("max_abs", "kl", "same_top")
        )
        return {
            "source": self.source,
            "directory": self.directory,
            "positions": len(max_abs),
            "max_abs": float(max_abs.max()),
            "max_kl": float(kl.max()),
            "mean_kl": float(kl.mean()),
            "top1_agreement": float(same_top.mean()),
            "same": self.problem is None,
        }

    @property
    def problem(self) -> str | None:
        """Why the two are not the same model, or None."""
        for c in self.comparisons:
            if not (np.isfinite(c.kl).all() and np.isfinite(c.max_abs).all()):
                return f"logits of {c.prompt!r} are not finite on one side"
            if c.kl.max() > MAX_KL:
                place = int(c.kl.argmax())
                return f"logits of {c.prompt!r} differ at position {place}: KL {c.kl[place]:.1e}, above {MAX_KL:.0e}"
            if c.same_ids is False:
                return f"the source's processor makes other ids of {c.prompt!r}"
        return None

    def __str__(self) -> str:
        lines = [
            f"{'prompt':<34}{'images':>7}{'positions':>10}{'max |diff|':>12}{'mean KL':>11}{'max KL':>11}{'top-1':>8}"
        ]
        for c in self.comparisons:
            name = c.prompt if len(c.prompt) <= 32 else c.prompt[:29] + "..."
            figures = f"{len(c.kl):>10}{c.max_abs.max():>12.2e}{c.kl.mean():>11.1e}{c.kl.max():>11.1e}"
            lines.append(f"{name:<34}{c.images:>7}{figures}{c.same_top.mean():>8.1%}")
        checked = [c.same_ids for c in self.comparisons if c.same_ids is not None]
        ids = "not compared (it needs torchvision, or has no chat template)"
        if checked:
            ids = "the same" if all(checked) else "DIFFERENT"
        return "\n".join([*lines, f"ids of the source's own processor: {ids}"])


def verify(
    source: str | Path, directory: str | Path, images: Sequence[Any] = (), prompts: Sequence[str] = ()
) -> Report:
    """Runs a checkpoint in PyTorch and the model made of it here, and compares the logits at every position.

    Args:
      source: the checkpoint's folder.
      directory: what `uhd_jax.load` reads: the folder an import wrote, or an exported folder.
      images: as of `Assistant.prepare`; every prompt is asked about all of them. None given: two are made.
      prompts: questions; none given: `PROMPTS`, and the first once more without images.

    Raises:
      VerifyError: torch or transformers is missing, or transformers has no class for the source.
      CheckpointError, ConvertError, ImageRefused, PromptError: as of `uhd_jax.load` and `Assistant.prepare`.
    """
    model = _torch_model(Path(source))
    assistant = load(directory)
    ours = Assistant(dataclasses.replace(assistant.config, dtype="float32"), assistant.params, assistant.tokenizer)
    images = list(images) or made_images()
    cases = [(prompt, images) for prompt in prompts or PROMPTS]
    if not prompts:
        cases.append((PROMPTS[0], []))
    processor = _processor(Path(source))
    comparisons = tuple(_compare(model, processor, ours, prompt, own) for prompt, own in cases)
    return Report(str(source), str(directory), comparisons)


def made_images() -> list[np.ndarray]:
    """Two pictures, always the same: a wide one that is sliced, of smooth colours, and a small one of noise."""
    height, width = 420, 980
    y, x = np.mgrid[:height, :width] / np.array([height, width]).reshape(2, 1, 1)
    smooth = np.stack([x, y, (np.sin(20 * x) * np.cos(15 * y) + 1) / 2], axis=-1)
    noise = np.random.default_rng(0).integers(0, 256, (150, 100, 3), np.uint8)
    return [np.round(255 * smooth).astype(np.uint8), noise]


def compare_logits(ours: np.ndarray, theirs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per position of logits [T, V]: largest absolute difference, KL(theirs || ours) in nats, same likeliest token."""
    ours, theirs = (np.asarray(logits, np.float64) for logits in (ours, theirs))
    log_ours, log_theirs = _log_softmax(ours), _log_softmax(theirs)
    kl = np.sum(np.exp(log_theirs) * (log_theirs - log_ours), axis=-1)
    return np.abs(ours - theirs).max(axis=-1), kl, ours.argmax(-1) == theirs.argmax(-1)


def packed_pixels(views: Sequence[np.ndarray], grids: Sequence[Any], levels: int, config: ModelConfig) -> np.ndarray:
    """Patches in merge order to transformers' form: float32[1, 3, patch_size, patch_size * patches], raster order."""
    side = config.tower.patch_size
    raster = []
    for view, grid in zip(views, grids, strict=True):
        own = np.empty_like(view)
        own[merge_order(grid, levels)] = view
        raster.append(own)
    pixels = np.concatenate(raster).reshape(-1, 3, side, side).transpose(1, 2, 0, 3).reshape(1, 3, side, -1)
    return (pixels / np.float32(127.5) - 1).astype(np.float32)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def _compare(model: Any, processor: Any, ours: Assistant, prompt: str, images: list[Any]) -> Comparison:
    prepared = ours.prepare(prompt, images)
    here, there = ours.logits(prepared.token_ids, images), _torch_logits(model, prepared, ours.config)
    if here.shape != there.shape:
        raise VerifyError(f"not the same model: {there.shape[-1]} tokens in the source, {here.shape[-1]} in the import")
    figures = compare_logits(here, there)
    same_ids = None
    if processor is not None:
        same_ids = _processor_ids(processor, prompt, len(images), ours, images) == prepared.token_ids.tolist()
    return Comparison(prompt, len(images), *figures, same_ids)


def _torch_logits(model: Any, prepared: Prepared, config: ModelConfig) -> np.ndarray:
    """float32[T, V]."""
    torch = importlib.import_module("torch")
    inputs = {"input_ids": torch.tensor(prepared.token_ids[None].astype(np.int64))}
    views = [view for plan in prepared.plans for view in plan.views]
    if views:
        grids = [view.patch_grid for view in views]
        pixels = packed_pixels(prepared.views, grids, config.merge_levels(), config)
        inputs["pixel_values"] = torch.tensor(pixels)
        inputs["target_sizes"] = torch.tensor(np.array(grids, np.int32))
        inputs["downsample_mode"] = config.mode
    try:
        with torch.no_grad():
            return model(**inputs).logits[0].float().numpy()
    except (ValueError, IndexError, RuntimeError) as error:
        raise VerifyError(
            f"the source cannot take what the import made of a prompt: not the same model ({error})"
        ) from error


def _torch_model(source: Path) -> Any:
    """The source in PyTorch, float32, on CPU."""
    try:
        kind = json.loads((source / "config.json").read_text()).get("model_type")
    except FileNotFoundError:
        raise VerifyError(f"{source / 'config.json'}: no such file; transformers cannot load this checkpoint") from None
    except json.JSONDecodeError as error:
        raise VerifyError(f"{source / 'config.json'}: not JSON ({error})") from None
    if kind not in _CLASSES:
        raise VerifyError(
            f"{source / 'config.json'}: transformers has no class that runs model_type {kind!r} with images; "
            f"only {', '.join(_CLASSES)} can be compared. Import and export are exact, as the tests of its layout show"
        )
    try:
        torch, transformers = (importlib.import_module(name) for name in ("torch", "transformers"))
    except ImportError as error:
        raise VerifyError(f"verify runs the source in PyTorch: pip install torch transformers ({error})") from None
    loader = getattr(transformers, _CLASSES[kind])
    try:
        model = loader.from_pretrained(source, dtype=torch.float32, attn_implementation="eager")
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise VerifyError(f"{source}: transformers {transformers.__version__} cannot load it ({error})") from error
    return model.eval()


def _processor(source: Path) -> Any:
    """The source's processor, or None where transformers cannot make it (its video part needs torchvision)."""
    try:
        processor = importlib.import_module("transformers").AutoProcessor.from_pretrained(source)
    except Exception:  # whatever is missing or damaged, the logits can be compared without
        return None
    return processor if processor.chat_template else None


def _processor_ids(processor: Any, prompt: str, count: int, ours: Assistant, images: list[Any]) -> list[int]:
    content = [{"type": "image"}] * count + [{"type": "text", "text": prompt}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    opened = ours._open(images) or None
    return processor(text=[text], images=opened, return_tensors="np")["input_ids"][0].tolist()
