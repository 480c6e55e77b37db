"""Calling the command line inside a test, and a tiny configuration file for it."""

from uhd_jax.cli import main

CONFIG = """
from ml_collections import ConfigDict

def get_config(variant="plain"):
    stage = dict(
        name="only", data=dict(source="digit_pages", options=dict(task="cell")), steps=3, rows=8, packed_length=64,
        learning_rate=1e-3, learning_rate_min=1e-4, trainable=("tower", "decoder"),
    )
    config = ConfigDict(dict(
        name={"plain": "plain", "other": "other"}[variant],
        model=dict(
            decoder=dict(vocab_size=300, width=32, mlp_width=64, layers=1, heads=2, kv_heads=1, head_dim=16),
            tower=dict(width=32, mlp_width=64, layers=2, heads=2),
            compressor=dict(after_layer=0),
            slicing=dict(scale_resolution=112),
        ),
        train=dict(stages=(stage,)),
    ))
    return config
"""


def call(capsys, *argv):
    """Exit status, standard output, standard error."""
    try:
        status = main(argv)
    except SystemExit as error:
        status = error.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def assert_one_line(text, *parts):
    assert text.count("\n") == 1 and text.endswith("\n"), text
    for part in parts:
        assert part in text
