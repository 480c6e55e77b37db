"""Look at data, plan for it, pack it.

  uhd-jax data index --config=FILE.py                  sizes and lengths of all samples, from headers and texts alone
  uhd-jax data stats --config=FILE.py --out=data.png   lengths, views, what each stage drops and why, padding
  uhd-jax data plan --config=FILE.py                   buckets: the shapes to compile, and what they waste
  uhd-jax data rows --config=FILE.py --out=rows.png    which samples share a row, and what of it stays empty
  uhd-jax data show 17 --config=FILE.py --out=17.png   one sample as the model will see it
  uhd-jax data pack DST --source=records --option path=train.jsonl      any source to ArrayRecord shards

`uhd-jax data COMMAND --help` explains one of them. An index is kept beside the data and used again until that changes.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from uhd_jax.cli.common import UsageError, file_to_write, folder, not_negative, positive, whole_file
from uhd_jax.cli.configs import literal
from uhd_jax.config import ChatConfig, DataConfig, ImageLimits, RunConfig, StageConfig

if TYPE_CHECKING:
    from uhd_jax.analysis.data_stats import StageData
    from uhd_jax.data.index import DataIndex

CONFIG = "optional"
_EXAMPLES = 5  # of samples in trouble that `index` names
COMPARED = (1, 2, 4)  # numbers of programs whose bucket lists `stats` compares


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the commands of `uhd-jax data`."""
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, summary: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=summary, description=summary)
        made.add_argument("--stage", action="append", metavar="NAME", help="a stage; may be repeated (default: all)")
        made.add_argument("--source", metavar="KIND", help="data instead of the stage's: the kind of source")
        made.add_argument(
            "--option",
            action="append",
            default=[],
            metavar="KEY=VALUE",
            help="an option of --source: path=a.jsonl",
        )
        made.add_argument("--json", action="store_true", help="print JSON instead of text")
        made.add_argument("--traceback", action="store_true", help="show where an error comes from")
        return made

    index = add("index", "read sizes and lengths of all samples, from headers and texts alone")
    stats = add("stats", "lengths, views, what each stage drops and why, padding by list of buckets")
    plan = add("plan", "choose buckets: the static shapes, each one compiled program")
    rows = add("rows", "draw packed rows: which samples share one, and what of it stays empty")
    rows.add_argument("--rows", type=positive, default=24, metavar="N", help="drawn (default: %(default)s)")
    rows.add_argument("--out", type=file_to_write, required=True, metavar="F.png", help="the picture")
    for one in (index, stats, plan, rows):
        one.add_argument(
            "--index", type=file_to_write, metavar="F.npz", help="where the index is kept (default: beside the data)"
        )
    index.add_argument("--anew", action="store_true", help="make it in any case, as after changes of images")
    stats.add_argument("--out", type=file_to_write, metavar="F.png", help="draw it")
    plan.add_argument("--programs", type=positive, metavar="N", help="at most (default: the stage's bucket_budget)")
    show = add("show", "one sample as the model will see it: views, and text with the trained tokens apart")
    show.add_argument("sample", type=not_negative, metavar="N", help="its number, from 0")
    show.add_argument(
        "--epoch",
        type=not_negative,
        default=0,
        metavar="E",
        help="of the stage, from 0 (default); chance differs in each",
    )
    show.add_argument("--out", type=file_to_write, metavar="F.png", help="draw it")
    show.add_argument(
        "--colour",
        choices=("auto", "always", "never"),
        default="auto",
        help="auto: on a terminal without NO_COLOR",
    )
    pack = add("pack", "any source to ArrayRecord shards, images byte for byte; goes on where it was interrupted")
    pack.add_argument("destination", type=folder, metavar="DST", help="a new folder, or one that was begun")
    pack.add_argument(
        "--shard-samples", type=positive, default=1024, metavar="N", help="samples per shard (default: %(default)s)"
    )
    for one in (index, stats, plan, rows, pack):
        one.add_argument("--workers", type=positive, metavar="N", help="processes (default: one per core)")


def run(arguments: argparse.Namespace, config: RunConfig | None) -> None:
    """Runs one of the commands."""
    if arguments.option and not arguments.source:
        raise UsageError("--option is for --source")
    if config is None and (arguments.command != "pack" or not arguments.source):
        raise UsageError("--config=FILE.py is needed" + (", or --source" if arguments.command == "pack" else ""))
    commands = {"index": _index, "stats": _stats, "plan": _plan, "rows": _rows, "show": _show, "pack": _pack}
    commands[arguments.command](arguments, config)


def _stages(arguments: argparse.Namespace, config: RunConfig) -> list[StageConfig]:
    """The stages asked for, with the data asked for."""
    known = {stage.name: stage for stage in config.train.stages}
    for name in arguments.stage or ():
        if name not in known:
            raise UsageError(f"--stage={name}: the configuration has {', '.join(known)}")
    stages = [known[name] for name in arguments.stage or known]
    if not arguments.source:
        return stages
    data = _given_data(arguments)
    return [dataclasses.replace(stage, data=data) for stage in stages]


def _given_data(arguments: argparse.Namespace) -> DataConfig:
    from uhd_jax.data.sources import check_data

    options = {}
    for option in arguments.option:
        key, equals, value = option.partition("=")
        if not equals:
            raise UsageError(f"--option {option}: write KEY=VALUE")
        options[key] = literal(value)
    data = DataConfig(arguments.source, options)
    check_data(data, "--source")
    return data


def _one(stages: Sequence[StageConfig], command: str) -> StageConfig:
    if len(stages) > 1:
        raise UsageError(f"{command} takes one stage: --stage=NAME of {', '.join(stage.name for stage in stages)}")
    return stages[0]


def _index(arguments: argparse.Namespace, config: RunConfig) -> None:
    from uhd_jax.data.index import index_path, parts_of
    from uhd_jax.data.sources import check_data

    facts = []
    for data, index, made in _indices(arguments, config, _stages(arguments, config)):
        troubles = [
            *index.troubles.items(),
            *(item for texts in index.texts.values() for item in texts.troubles.items()),
        ]
        parts = parts_of(check_data(data)) if data.source == "mixture" else [data]
        paths = [str(path) for part in parts if (path := arguments.index or index_path(part))]
        facts.append(
            {
                "source": data.source,
                "options": dict(data.options),
                "index": ", ".join(paths) or None,
                "made": made,
                "samples": len(index),
                "images": len(index.sizes),
                "prompt_forms": len(index.texts),
                "troubles": dict(Counter(trouble.counter for _, trouble in troubles)),
                "examples": [[sample, trouble.reason] for sample, trouble in troubles[:_EXAMPLES]],
            }
        )
    print(json.dumps({"indices": facts}) if arguments.json else "\n".join(map(_index_text, facts)))


def _index_text(facts: dict[str, Any]) -> str:
    kept = f"{'written to' if facts['made'] else 'unchanged in'} {facts['index']}" if facts["index"] else "not kept"
    counts = f"{facts['samples']:,} samples, {facts['images']:,} images"
    lines = [f"{facts['source']} {_options_text(facts['options'])}: {counts}; index {kept}"]
    lines += [f"  {count:>9,}  {name}" for name, count in facts["troubles"].items()]
    lines += [f"             sample {sample}: {reason}" for sample, reason in facts["examples"]]
    return "\n".join(lines)


def _options_text(options: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in options.items())


def _stats(arguments: argparse.Namespace, config: RunConfig) -> None:
    from uhd_jax.analysis.data_stats import stage_report

    found = []
    for data in _stage_data(arguments, config):
        report, fit = stage_report(data, COMPARED)
        found.append((data, fit, report))
    if arguments.out:
        from uhd_jax.analysis import data_plots

        figure = data_plots.stages(found, f"{config.name}: the data of its stages")
        with whole_file(arguments.out) as partial:
            figure.savefig(partial, format="png", dpi=110)
    reports = [report for _, _, report in found]
    print(json.dumps({"stages": reports}) if arguments.json else "\n\n".join(map(_stats_text, reports)))


def _stats_text(report: dict[str, Any]) -> str:
    data = report["data"]
    lines = [
        f"stage {report['stage']}: {data['source']} {_options_text(data['options'])}",
        f"{report['samples']:,} samples, {report['images']:,} images; {report['kept']:,} samples are trained on",
    ]
    for name, count in report["counters"].items():
        lines.append(f"  {count:>9,}  {name} ({100 * count / report['samples']:.1f} %)")
        lines += [f"             sample {sample}: {reason}" for sample, reason in report["examples"][name]]
    columns = ("min", "p5", "median", "p95", "p99", "max", "mean")
    lines += ["", " " * 22 + "".join(f"{column:>9}" for column in columns)]
    for key in ("image_height", "image_width", "tokens", "trained_tokens", "views", "largest_view_patches"):
        if report[key]:
            cells = "".join(f"{report[key][column]:>9,.{1 if column == 'mean' else 0}f}" for column in columns)
            lines.append(f"{key.replace('_', ' '):22}{cells}")
    return "\n".join([*lines, "", *_bucket_table(report["bucket_lists"])])


def _bucket_table(lists: Sequence[dict[str, Any]]) -> list[str]:
    """Lists of buckets, and beside each what padding it costs."""
    columns = f"{'tokens':>8}{'slots':>8}{'patches':>8}{'work':>8}{'dropped':>9}{'fewer slices':>14}{'turns cut':>11}"
    lines = [f"{'padding in %':24}{columns}"]
    for one in lists:
        shares = one["padding"].values()
        cells = "".join(f"{'-' if share is None else f'{100 * share:.1f}':>8}" for share in shares)
        lines.append(f"{one['name']:24}{cells}{one['dropped']:>9,}{one['fewer_slices']:>14,}{one['turns_cut']:>11,}")
        for b in one["buckets"]:
            lines.append(f"    rows of {b['tokens']} tokens, {b['slots']} views of {b['patches']} patches")
    return lines


def _plan(arguments: argparse.Namespace, config: RunConfig) -> None:
    from uhd_jax.analysis.data_stats import bucket_list

    plans = []
    for data in _stage_data(arguments, config):
        budget = arguments.programs or data.stage.bucket_budget
        lists = [
            bucket_list(f"{count} program{'s' * (count > 1)}", data, data.fit(data.plan(count)))
            for count in range(1, budget + 1)
        ]
        best = min(lists, key=_wasted)
        plans.append({"stage": data.stage.name, "bucket_lists": lists, "buckets": best["buckets"]})
    if arguments.json:
        print(json.dumps({"stages": plans}))
        return
    for plan in plans:
        written = ",\n".join(f"    {json.dumps(bucket)}" for bucket in plan["buckets"])
        print(f"stage {plan['stage']}", *_bucket_table(plan["bucket_lists"]), sep="\n")
        print(f'the one that wastes least, for the stage in the configuration:\n"buckets": [\n{written},\n],\n')


def _wasted(one: dict[str, Any]) -> tuple[float, ...]:
    """What speaks against a list of buckets: lost samples, then padded work, then programs to compile."""
    work = one["padding"]["work"]
    return (
        one["dropped"],
        one["turns_cut"],
        one["fewer_slices"],
        math.inf if work is None else work,
        len(one["buckets"]),
    )


def _rows(arguments: argparse.Namespace, config: RunConfig) -> None:
    from uhd_jax.analysis import rows_plot

    stage = _one(_stages(arguments, config), "rows")
    [data] = _stage_data(arguments, config)
    rows, total = rows_plot.rows_of(data, data.fit(), arguments.rows, config.train.packing_window)
    if not rows:
        raise UsageError(f"stage {stage.name}: no sample is trained on; uhd-jax data stats says why")
    figure = rows_plot.draw(rows, total, f"{config.name}, stage {stage.name}")
    with whole_file(arguments.out) as partial:
        figure.savefig(partial, format="png", dpi=110)
    if arguments.json:
        print(json.dumps({"rows": [dataclasses.asdict(row) for row in rows], "of": total}))
        return
    for row in rows:
        filled = (
            f"{sum(row.tokens):>6,} of {row.bucket.tokens:,} tokens, {sum(row.views):>3} of {row.bucket.slots} views"
        )
        print(f"{filled}: samples {', '.join(map(str, row.samples))}"[:160])


def _show(arguments: argparse.Namespace, config: RunConfig) -> None:
    from uhd_jax.analysis import sample_view
    from uhd_jax.data.prepare import Preparer
    from uhd_jax.data.sources import make_source
    from uhd_jax.data.tokenizer import load_tokenizer
    from uhd_jax.data.windows import stage_seed

    stage = _one(_stages(arguments, config), "show")
    model = config.model.for_stage(stage)
    source = make_source(stage.data, model.slicing.limits)
    if arguments.sample >= len(source):
        raise UsageError(f"{arguments.sample}: the source has {len(source)} samples, numbered from 0")
    tokenizer = load_tokenizer(model.chat.tokenizer, model.chat)
    preparer = Preparer(source, stage, model, tokenizer, stage_seed(stage, config.train))
    view = sample_view.view_sample(preparer, arguments.sample, arguments.epoch, tokenizer)
    if arguments.out:
        with whole_file(arguments.out) as partial:
            sample_view.draw(view).save(partial, format="PNG")
    automatic = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    colours = {"always": True, "never": False}.get(arguments.colour, automatic)
    print(json.dumps(view.to_json()) if arguments.json else sample_view.to_text(view, colours))


def _pack(arguments: argparse.Namespace, config: RunConfig | None) -> None:
    from uhd_jax.data.pack import pack
    from uhd_jax.data.workers import cores

    data, limits = (_given_data(arguments), ImageLimits()) if arguments.source else (None, None)
    if config:
        stages = _stages(arguments, config)
        data = _one(stages, "pack").data
        limits = config.model.slicing.limits
    with _bar("pack") as progress:
        summary = pack(
            data, arguments.destination, limits, arguments.shard_samples, arguments.workers or cores(), progress
        )
    if arguments.json:
        print(json.dumps(summary))
        return
    print(
        f"{arguments.destination}: {summary['samples']:,} samples, {summary['bytes'] / 1e6:,.1f} MB "
        f"in {summary['shards']} shard{'s' * (summary['shards'] != 1)}"
    )
    for name, count in summary["skipped"].items():
        print(f"  {count:>9,}  {name}: listed in {arguments.destination / 'skipped.jsonl'}")


def _stage_data(arguments: argparse.Namespace, config: RunConfig) -> Iterator[StageData]:
    """The stages asked for with the indices of their data."""
    from uhd_jax.analysis.data_stats import StageData

    stages = _stages(arguments, config)
    indices = [(data, index) for data, index, _ in _indices(arguments, config, stages)]
    for stage in stages:
        index = next(index for data, index in indices if data == stage.data)
        yield StageData(index, stage, config.model, config.train)


def _indices(
    arguments: argparse.Namespace, config: RunConfig, stages: Sequence[StageConfig]
) -> Iterator[tuple[DataConfig, DataIndex, bool]]:
    """The index of each source that stages name, with their prompt forms, and whether it had to be made."""
    from uhd_jax.data.index import index_path, open_index
    from uhd_jax.data.workers import cores

    sources: list[tuple[DataConfig, list[ChatConfig]]] = []
    for stage in stages:
        chat = config.model.for_stage(stage).chat
        chats = next((chats for data, chats in sources if data == stage.data), None)
        if chats is None:
            sources.append((stage.data, [chat]))
        elif chat not in chats:
            chats.append(chat)
    if arguments.index and any(data.source == "mixture" for data, _ in sources):
        raise UsageError("--index is one file; the parts of a mixture are kept beside their data")
    if arguments.index and len(sources) > 1:
        raise UsageError("--index is one file, but the stages have several sources; name one with --stage")
    limits = config.model.slicing.limits
    for data, chats in sources:
        path = arguments.index or index_path(data)
        with _bar(f"index {data.source}") as progress:
            anew = getattr(arguments, "anew", False)
            index, made = open_index(data, chats, limits, path, arguments.workers or cores(), progress, anew)
        yield data, index, made


@contextlib.contextmanager
def _bar(name: str) -> Iterator[Callable[[int, int], None]]:
    """A bar of samples, where someone looks; it appears with the first of them."""
    from tqdm import tqdm

    with tqdm(desc=name, unit=" samples", unit_scale=True, disable=None) as bar:

        def progress(done: int, count: int) -> None:
            bar.total = count
            bar.update(done - bar.n)

        yield progress
