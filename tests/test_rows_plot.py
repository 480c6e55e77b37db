"""Packed rows as a picture: every kept sample in one row, and what the picture counts."""

import json

import numpy as np
from command_line import call

from uhd_jax.analysis import rows_plot
from uhd_jax.analysis.data_stats import StageFit
from uhd_jax.config import BucketConfig


def made_fit():
    tokens = np.array([60, 40, 100, 0, 30, 170])
    views = np.array([2, 1, 3, 0, 1, 4])
    largest = np.array([16, 16, 64, 0, 16, 64])
    zeros = np.zeros(6, np.int64)
    buckets = (BucketConfig(slots=4, tokens=128, patches=16), BucketConfig(slots=5, tokens=192, patches=64))
    limits = (tokens > 0).astype(np.int64)
    return StageFit(limits, zeros, tokens, tokens // 4, views, largest, views * largest, {}, {}, buckets)


def test_every_kept_sample_is_in_one_row():
    rows = rows_plot.packed_rows(made_fit(), range(6))
    assert sorted(one for row in rows for one in row.samples) == [0, 1, 2, 4, 5]
    for row in rows:
        assert sum(row.tokens) <= row.bucket.tokens and sum(row.views) <= row.bucket.slots
    assert [row.bucket.patches for row in rows] == sorted(row.bucket.patches for row in rows)
    first = rows[0]
    assert first.tokens == tuple(made_fit().tokens[list(first.samples)])
    assert first.trained == tuple(tokens // 4 for tokens in first.tokens)


def test_the_picture_shows_each_sample_and_says_what_is_filled():
    rows = rows_plot.packed_rows(made_fit(), range(6))
    figure = rows_plot.draw(rows, 7, "made")
    left, right = figure.axes
    filled = 100 * (60 + 40 + 100 + 30 + 170) / sum(row.bucket.tokens for row in rows)
    assert left.get_title(loc="left") == f"tokens: {filled:.1f} % filled"
    assert len(left.patches) == len(rows) + 2 * 5 and len(right.patches) == len(rows) + 5
    assert f"{len(rows)} of 7 rows" in figure.get_suptitle()


def test_the_command(config_file, tmp_path, capsys):
    argv = ["data", "rows", f"--config={config_file}", "--source=digit_pages", "--option", "samples=12", "--workers=1"]
    status, out, err = call(capsys, *argv, "--option", "task=page", f"--out={tmp_path}/rows.png", "--json")
    assert status == 0, err
    found = json.loads(out)
    assert found["of"] >= len(found["rows"]) > 0 and (tmp_path / "rows.png").stat().st_size > 5000
