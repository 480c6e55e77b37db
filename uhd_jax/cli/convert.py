"""Read and write checkpoints of other frameworks.

  uhd-jax convert inspect SRC                  what it is, without reading its data
  uhd-jax convert import SRC DST               a model for uhd-jax generate, train.init_from and uhd_jax.load
  uhd-jax convert export SRC DST               a folder that transformers and others load
  uhd-jax convert combine --config=FILE.py --tower=SRC --decoder=SRC DST      weights to start training from
  uhd-jax convert verify SRC DST               does the import answer as the original does?

`uhd-jax convert COMMAND --help` explains one of them. DST is a new or empty folder; it is there when all of it is.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from uhd_jax.cli.common import UsageError, folder, not_negative
from uhd_jax.config import RunConfig, to_dict

CONFIG = "optional"
DTYPES = ("float32", "bfloat16", "as-is")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the commands of `uhd-jax convert`."""
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, summary: str, source: str | None, destination: str | None) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=summary, description=summary)
        if source:
            made.add_argument("source", metavar="SRC", help=source)
        if destination:
            made.add_argument("destination", type=folder, metavar="DST", help=destination)
        made.add_argument("--json", action="store_true", help="print JSON instead of text")
        made.add_argument("--traceback", action="store_true", help="show where an error comes from")
        return made

    checkpoint = "a folder with safetensors and config.json, or one file of weights"
    inspect = add("inspect", "what a checkpoint is, without reading its data", checkpoint, None)
    to_import = add("import", "a checkpoint of another framework to a model of ours", checkpoint, "a new folder")
    to_import.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of the parameters on disk (default: %(default)s)"
    )
    to_export = add("export", "a model of ours to a checkpoint", "the folder of a run or of a model", "a new folder")
    to_export.add_argument(
        "--family", metavar="NAME", help="its layout (default: the first whole one with room for it)"
    )
    to_export.add_argument(
        "--dtype", choices=DTYPES[:2], help="of the tensors (default: what the model computes in, its `dtype`)"
    )
    combine = add("combine", "weights to start training from, out of a tower and a decoder", None, "a new folder")
    combine.add_argument("--tower", required=True, metavar="SRC", help=f"of the tower: {checkpoint}")
    combine.add_argument("--decoder", required=True, metavar="SRC", help="of the language model, with tokenizer.json")
    combine.add_argument("--upsampler", metavar="SRC", help="of v2's pyramid: VDIM's file, or a whole v2")
    combine.add_argument("--seed", type=not_negative, default=0, metavar="N", help="of what no checkpoint holds")
    verify = add("verify", "a checkpoint in PyTorch against its import here", "the checkpoint", None)
    verify.add_argument("directory", metavar="DST", help="the folder of an import, an export or a model")
    verify.add_argument("--image", action="append", default=[], metavar="F", help="an image file; may be repeated")
    verify.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="a question; may be repeated")
    for one in (inspect, to_import, combine, verify):
        one.add_argument("--allow-pickle", action="store_true", help="also read .bin, .pt, .pth and .ckpt; needs torch")


def run(arguments: argparse.Namespace, config: RunConfig | None) -> None:
    """Runs one of the commands."""
    if (config is None) == (arguments.command == "combine"):
        raise UsageError("combine needs --config=FILE.py" if config is None else "--config is for combine alone")
    {"inspect": _inspect, "import": _import, "export": _export, "combine": _combine, "verify": _verify}[
        arguments.command
    ](arguments, config)


def _inspect(arguments: argparse.Namespace, _: None) -> None:
    from uhd_jax.convert.source import open_source
    from uhd_jax.convert.tables import ConvertError
    from uhd_jax.convert.transfer import recognise

    with open_source(arguments.source, arguments.allow_pickle) as source:
        found = recognise(source, _abstract_of)
        try:
            found.moves(source)
            problem = None
        except ConvertError as error:
            problem = error
        facts = _facts(source, found) | {"problem": str(problem) if problem else None}
    print(json.dumps(facts) if arguments.json else _text(facts))
    if problem:
        raise problem


def _import(arguments: argparse.Namespace, _: None) -> None:
    from uhd_jax.convert.source import open_source
    from uhd_jax.convert.transfer import bytes_read, import_model, recognise
    from uhd_jax.data.tokenizer import load_tokenizer

    with open_source(arguments.source, arguments.allow_pickle) as source:
        found = recognise(source, _abstract_of)
        facts = _facts(source, found)
        if source.has("tokenizer.json"):
            load_tokenizer(source.folder, found.config.chat)  # a broken one is told now, not when the model is loaded
        with _bar("import", bytes_read(source, found.moves(source))) as (progress, timing):
            import_model(source, arguments.destination, found, arguments.dtype, progress)
        tokenizer = (arguments.destination / "tokenizer").is_dir()
    facts |= {"destination": str(arguments.destination), "stored_dtype": arguments.dtype, "tokenizer": tokenizer}
    facts |= timing
    note = "" if tokenizer else "\nno tokenizer.json there: uhd_jax.load needs DST/tokenizer/tokenizer.json"
    print(json.dumps(facts) if arguments.json else f"{_text(facts)}\nwrote {arguments.destination}{note}")


def _export(arguments: argparse.Namespace, _: None) -> None:
    import numpy as np

    from uhd_jax.checkpoint import SavedModel
    from uhd_jax.convert.tables import flatten
    from uhd_jax.convert.transfer import export_model

    leaves = flatten(SavedModel(arguments.source).tree).values()
    nbytes = sum(int(np.prod(leaf.shape, dtype=np.int64)) * leaf.dtype.itemsize for leaf in leaves)
    with _bar("export", nbytes) as (progress, timing):
        done = export_model(arguments.source, arguments.destination, arguments.family, arguments.dtype, progress)
    facts = {
        "source": arguments.source,
        "destination": str(arguments.destination),
        "family": done.family,
        "dtype": done.dtype,
        "tensors": done.tensors,
        "rounded": done.rounded,
    }
    note = f", {done.rounded} of them rounded (--dtype=float32 keeps them)" if done.rounded else ""
    text = f"wrote {arguments.destination}: {done.family}, {done.tensors} tensors in {done.dtype}{note}"
    print(json.dumps(facts | timing) if arguments.json else text)


def _combine(arguments: argparse.Namespace, config: RunConfig) -> None:
    from uhd_jax.training.start import combine

    facts = combine(
        config.model,
        arguments.destination,
        tower=arguments.tower,
        decoder=arguments.decoder,
        upsampler=arguments.upsampler,
        seed=arguments.seed,
        allow_pickle=arguments.allow_pickle,
    )
    lines = [f"{key}: {value}" for key, value in facts.items()]
    print(json.dumps(facts) if arguments.json else "\n".join([*lines, f"wrote {arguments.destination}"]))


def _verify(arguments: argparse.Namespace, _: None) -> None:
    from uhd_jax.analysis.verify import VerifyError, verify

    report = verify(arguments.source, arguments.directory, arguments.image, arguments.prompt, arguments.allow_pickle)
    print(json.dumps(report.to_json()) if arguments.json else report)
    if report.problem:
        raise VerifyError(f"{arguments.directory} is not what {arguments.source} is: {report.problem}")


def _abstract_of(model: Any) -> Any:
    import jax

    from uhd_jax.models import uhd

    return jax.eval_shape(lambda: uhd.init_params(model, jax.random.key(0)))


def _facts(source: Any, found: Any) -> dict[str, Any]:
    """What the headers say of a checkpoint, with JSON types only."""
    infos = source.tensors
    left, dtypes = [], Counter()
    for one, names in found.dropped(source).items():
        counts = [infos[name].nbytes // infos[name].dtype.itemsize for name in names]
        left.append({"reason": one.reason, "tensors": names, "parameters": sum(counts)})
    for info in infos.values():
        dtypes[info.dtype.name] += info.nbytes
    model = to_dict(found.config)
    kept = {part.split("/")[0] for part in found.family.parts}
    shown = [part for part in ("tower", "compressor", "connector", "decoder") if part in kept]
    shown += ["compressor", "slicing", "chat"] if len(shown) == 3 else []
    return {
        "source": str(source.path),
        "family": found.family.name,
        "files": len({info.file for info in infos.values()}),
        "tensors": len(infos),
        "bytes": sum(info.nbytes for info in infos.values()),
        "dtypes": dict(dtypes),
        "parameters": found.counts | {"total": sum(found.counts.values())},
        "model": {part: model[part] for part in shown} | {"mode": model["mode"], "dtype": model["dtype"]},
        "dropped": left,
    }


def _text(facts: dict[str, Any]) -> str:
    dtypes = ", ".join(f"{name} {nbytes / 1e6:,.1f} MB" for name, nbytes in facts["dtypes"].items())
    lines = [
        f"{facts['source']}: {facts['family']}",
        f"{facts['tensors']} tensors in {facts['files']} file{'s' * (facts['files'] > 1)}: {dtypes}",
    ]
    for part, count in facts["parameters"].items():
        lines.append(f"  {part:10}  {count:>15,} parameters{_sizes(part, facts['model'].get(part))}")
    if "slicing" in facts["model"]:
        slicing, chat = facts["model"]["slicing"], facts["model"]["chat"]
        lines += [
            f"slices by rule {slicing['rule']}, at most {slicing['max_slices']}, views of "
            f"{slicing['scale_resolution']} pixels; layout {chat['layout']}, template {chat['template']}",
            f"computes in {facts['model']['dtype']}",
        ]
    for one in facts["dropped"]:
        names = one["tensors"]
        shown = names[0] if len(names) == 1 else f"{len(names)} tensors ({names[0]}, ..)"
        lines.append(f"left out: {shown}, {one['parameters']:,} numbers: {one['reason']}")
    return "\n".join(lines)


def _sizes(part: str, config: dict[str, Any] | None) -> str:
    if not config:
        return ""
    shown = {
        key: config[key] for key in ("kind", "width", "layers", "heads", "vocab_size", "rounds") if config.get(key)
    }
    return ": " + ", ".join(f"{key} {value}" for key, value in shown.items()) if shown else ""


@contextlib.contextmanager
def _bar(name: str, nbytes: int) -> Iterator[tuple[Callable[[int], None], dict[str, Any]]]:
    """A bar that shows MB/s where someone looks; and figures, filled in at the end."""
    from tqdm import tqdm

    start, timing = time.monotonic(), {}
    with tqdm(total=nbytes, desc=name, unit="B", unit_scale=True, disable=None) as bar:
        done = []

        def progress(count: int) -> None:
            done.append(count)
            bar.update(count)

        yield progress, timing
    seconds = time.monotonic() - start
    timing |= {
        "bytes_moved": sum(done),
        "seconds": round(seconds, 3),
        "mb_per_second": round(sum(done) / 1e6 / seconds, 1),
    }
