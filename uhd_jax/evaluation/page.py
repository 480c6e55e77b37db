"""A report to look at: one HTML file with the scores, and question by question image, prompt, answer and score."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

SHOWN = 200  # questions; more are only counted
_SIDE = 320  # pixels of a picture

# Nothing in the file is fetched or run: no script, and a policy that forbids both.
_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title><style>
body {{ font: 15px/1.45 system-ui, sans-serif; color: #1f2933; max-width: 76rem; margin: 2rem auto; padding: 0 1rem }}
h1 {{ font-size: 1.5rem }} h2 {{ font-size: 1.1rem; margin-top: 2rem }}
table {{ border-collapse: collapse }} td, th {{ padding: .2rem 1rem .2rem 0; text-align: left; vertical-align: top }}
td.number {{ text-align: right; font-variant-numeric: tabular-nums }}
article, .tables {{ display: flex; gap: 1.25rem; border-top: 1px solid #cbd2d9; padding: 1rem 0 }}
.tables {{ gap: 1rem 5rem; flex-wrap: wrap; border: 0; padding: 0 }}
.tables th {{ font-weight: normal; color: #616e7c }}
.images {{ flex: 0 0 {side}px }} figure {{ margin: 0 0 .75rem }} figure img {{ max-width: 100%; display: block }}
figcaption {{ font-size: .85rem; margin-top: .25rem }}
@media (max-width: 45rem) {{ article {{ flex-direction: column }} .images {{ flex: none }} }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; font: inherit }} .muted {{ color: #616e7c }}
.score {{ font-weight: 600; padding: 0 .5rem; border-radius: .25rem }}
.right {{ background: #bbf7d0 }} .partly {{ background: #fde68a }} .wrong {{ background: #fecaca }}
</style></head><body>
"""


def page(
    title: str,
    summary: Mapping[str, Any],
    settings: Mapping[str, Any],
    lines: Sequence[Mapping[str, Any]],
    images: Callable[[int], Sequence[np.ndarray]],
    shown: int = SHOWN,
) -> str:
    """The report as HTML.

    Args:
      title: what stands on top.
      summary: the scores.
      settings: under which they were made.
      lines: answers as `runner.finish` gives them.
      images: the pictures of a row, uint8[H, W, 3] each.
      shown: questions at most, evenly from the wrong and the right ones in the order of the data.
    """
    scores = {key: value for key, value in summary.items() if isinstance(value, int | float | str)}
    chosen = _chosen(lines, shown)
    counted = f"{len(chosen)} of {len(lines)} questions" if len(chosen) < len(lines) else f"All {len(lines)} questions"
    parts = [
        _HEAD.format(title=html.escape(title), side=_SIDE),
        f"<h1>{html.escape(title)}</h1>",
        '<div class="tables"><section><h2>Scores</h2>',
        _table(scores),
        "</section><section><h2>Settings</h2>",
        _table(settings, "the model's"),
        "</section></div>",
        f"<h2>{counted}</h2>",
        *(_article(line, images(line["index"])) for line in chosen),
        "</body></html>\n",
    ]
    return "\n".join(parts)


def _chosen(lines: Sequence[Mapping[str, Any]], shown: int) -> list[Mapping[str, Any]]:
    if len(lines) <= shown:
        return list(lines)
    wrong = [line for line in lines if line["score"] < 1]
    right = [line for line in lines if line["score"] >= 1]
    of_wrong = max(shown - len(right), min(len(wrong), shown // 2))
    chosen = _evenly(wrong, of_wrong) + _evenly(right, shown - of_wrong)
    return sorted(chosen, key=lambda line: line["index"])


def _evenly(lines: Sequence[Mapping[str, Any]], count: int) -> list[Mapping[str, Any]]:
    return [lines[number * len(lines) // count] for number in range(count)]


def _table(values: Mapping[str, Any], absent: str = "") -> str:
    """Numbers to the right, where nothing else stands among them; `absent` stands for None."""
    words = {None: absent, True: "yes", False: "no"}

    def cell(value: Any) -> str:
        if value is None or isinstance(value, bool):
            return f"<td>{html.escape(words[value])}</td>"
        text = html.escape(f"{value:.6g}" if isinstance(value, float) else str(value))
        return (
            f'<td class="number">{text}</td>' if isinstance(value, int | float) and not absent else f"<td>{text}</td>"
        )

    rows = "".join(f"<tr><th>{html.escape(str(key))}</th>{cell(value)}</tr>" for key, value in values.items())
    return f"<table>{rows}</table>"


def _article(line: Mapping[str, Any], images: Sequence[np.ndarray]) -> str:
    pictures = "".join(
        f'<figure><img alt="" src="data:image/jpeg;base64,{_jpeg(image)}">'
        f'<figcaption class="muted">{html.escape(_views(plan))}</figcaption></figure>'
        for image, plan in zip(images, line["views"], strict=False)
    )
    mark = "right" if line["score"] >= 1 else "partly" if line["score"] > 0 else "wrong"
    rows = {
        "prompt": line["prompt"],
        "answer": line["output"].strip("\n") or "(nothing)",
        "read as": line["parsed"] if line["parsed"] != line["output"].strip() else "",
        "expected": " | ".join(dict.fromkeys(line["expected"])),
    }
    body = "".join(
        f'<tr><th class="muted">{name}</th><td><pre>{html.escape(str(text))}</pre></td></tr>'
        for name, text in rows.items()
        if text
    )
    return (
        f'<article><div class="images">{pictures}</div><div>'
        f'<p><span class="score {mark}">{line["score"]:.3g}</span> '
        f'<span class="muted">{html.escape(str(line["id"]))} &middot; {html.escape(str(line["where"]))}</span></p>'
        f"<table>{body}</table></div></article>"
    )


def _views(plan: Mapping[str, Any]) -> str:
    height, width = plan["image"]
    rows, cols = plan["grid"]
    cut = f"{rows}x{cols} slices" if rows * cols else "not sliced"
    return f"{height}x{width} px, {cut}, {plan['visual_tokens']} visual tokens"


def _jpeg(image: np.ndarray) -> str:
    picture = Image.fromarray(image)
    picture.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=80)
    return base64.b64encode(buffer.getvalue()).decode()
