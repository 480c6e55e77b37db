"""`uhd-jax cost`: the published figures from the full-size configurations, the tables, the plot, the errors."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from command_line import assert_one_line, call
from PIL import Image

ROOT = Path(__file__).parents[1]
V1, V2, V4 = (ROOT / "configs" / f"uhd_{name}.py" for name in ("v1", "v2", "v4"))
COMPRESSOR = "--config.model.compressor"


def costs(capsys, *argv):
    status, out, err = call(capsys, "cost", *argv, "--json")
    assert status == 0, err
    return json.loads(out)


@pytest.mark.parametrize(
    ("overrides", "gflops"),
    [
        ((f"{COMPRESSOR}.kind=none", "--config.model.connector.rounds=2"), 3555.1),
        ((), 1573.1),
        ((f"{COMPRESSOR}.kind=average_pool",), 1368.7),
        ((f"{COMPRESSOR}.kind=unshuffle_mlp",), 1401.2),
        ((f"{COMPRESSOR}.kind=reused_mlp",), 1490.2),
        ((f"{COMPRESSOR}.kind=cross_attention_top_left",), 1402.0),
        ((f"{COMPRESSOR}.kind=cross_attention_mean",), 1402.0),
        ((f"{COMPRESSOR}.kind=window_attention_mlp",), 1484.1),
        ((f"{COMPRESSOR}.after_layer=3",), 1245.1),
        ((f"{COMPRESSOR}.after_layer=9",), 1901.1),
        ((f"{COMPRESSOR}.after_layer=15",), 2557.0),
        (("--mode=4x",), 3555.1),
    ],
)
def test_every_figure_of_v4s_paper(capsys, overrides, gflops):
    """Tables 4, 5 and A3: one view of 70 x 70 patches, the tower alone."""
    cost = costs(capsys, f"--config={V4}", "--view=980x980", "--convention=paper", *overrides)
    assert round(cost["tower_gflops"], 1) == gflops
    assert [figure["gflops"] for figure in cost["published"]] == [gflops]
    assert cost["connector_gflops"] is cost["decoder_gflops"] is cost["total_gflops"] is None
    assert cost["visual_tokens"] == (1225 if "--mode=4x" in overrides else None)  # 35 x 35 do not merge once more


def test_figures_of_v1s_paper(capsys):
    """LLaVA-1.5 with Vicuna-13B, and the 94 % that v1 with 64 queries is said to take of it (here 96 %)."""
    llava = costs(capsys, f"--config={V1}:mlp", "--view=336x336", "--convention=paper")
    assert llava["total_gflops"] == pytest.approx(15_500, rel=0.005)
    uhd = costs(capsys, f"--config={V1}:arxiv", "--image-size=672x1008", "--convention=paper")
    assert 0.93 < uhd["total_gflops"] / llava["total_gflops"] < 0.97
    assert uhd["total_gflops"] == pytest.approx(14_630, rel=0.02)
    argv = (f"--config={V1}", "--image-size=672x1008", "--convention=paper", "--text-tokens=6")  # separators
    released = costs(capsys, *argv)
    assert released["total_gflops"] == pytest.approx(30_700, rel=0.005)  # twice LLaVA-1.5's: the 94 % is of 64 queries
    figures = {cost["published"][0]["system"]: cost["published"][0]["gflops"] for cost in (llava, uhd)}
    assert figures == {"LLaVA-1.5 13B": 15_500, "LLaVA-UHD 13B": 14_630}


def test_v1s_ablations_fit_attention_counted_half(capsys):
    """Spec v1-v2 section 7.2, which takes every view for a square."""
    for options, published, rel in (("mlp", 113_650, 0.015), ("mlp,fixed_2x2", 80_100, 0.06)):
        cost = costs(capsys, f"--config={V1}:{options}", "--image-size=672x1008")
        assert cost["total_gflops"] == pytest.approx(published, rel=rel)


@pytest.mark.parametrize(("options", "tflops"), [("7b", 17.5), ("13b", 26.4), ("qwen2", 14.3)])
def test_v2s_column_stands_beside_ours_with_a_caveat(capsys, options, tflops):
    argv = (f"--config={V2}:{options}", "--image-size=1008x672", "--convention=paper")
    (figure,) = costs(capsys, *argv)["published"]
    assert figure["gflops"] == 1e3 * tflops and "informative only" in figure["note"]
    out = " ".join(call(capsys, "cost", *argv)[1].split())
    assert f"{1e3 * tflops:,.1f}" in out and "informative only" in out


PAGE = (ROOT / "docs" / "cost.md").read_text()


def shown():
    """Command and output of every example on the page."""
    blocks = re.findall(r"```\n\$ uhd-jax (.*?)```", PAGE, re.DOTALL)
    pairs = [block.replace("\\\n", " ").split("\n", 1) for block in blocks]
    return [(command.split(), out) for command, out in pairs]


def steady(out):
    """Without activations, the last four words of a stage's line, which another version of JAX may trace otherwise."""
    return [line.rsplit(None, 4)[0] if re.match(r"stage\d", line) else line for line in out.splitlines()]


@pytest.mark.parametrize(("argv", "out"), shown(), ids=[" ".join(argv[1:]) for argv, _ in shown()])
def test_the_page_shows_what_the_command_prints(capsys, monkeypatch, argv, out):
    monkeypatch.chdir(ROOT)
    assert steady(call(capsys, *argv)[1]) == steady(out)


def test_the_page_has_its_examples():
    assert len(shown()) == 6


def test_one_configuration(capsys, config_file):
    argv = (f"--config={config_file}", "--image-size=224x336")
    cost = costs(capsys, *argv)
    assert cost["plan"]["visual_tokens"] == cost["visual_tokens"] == 28
    assert (cost["image"], cost["views"], cost["patches"]) == ([224, 336], 7, 448)
    for key in ("parameters", "forward_flops"):
        assert cost[key]["total"] == sum(value for part, value in cost[key].items() if part != "total")
    groups = [cost[f"{group}_gflops"] for group in ("tower", "connector", "decoder")]
    assert sum(groups) == pytest.approx(cost["total_gflops"]) == pytest.approx(cost["forward_flops"]["total"] / 1e9)
    assert cost["weight_bytes"]["bfloat16"] == 2 * cost["parameters"]["total"]
    assert cost["stages"][0]["train_flops"] > cost["forward_flops"]["total"] > 0
    longer = costs(capsys, *argv, "--text-tokens=100", "--mode=4x")
    assert longer["visual_tokens"] == 111
    assert longer["decoder_gflops"] > cost["decoder_gflops"]
    status, out, _ = call(capsys, "cost", *argv)
    assert status == 0 and f"{cost['parameters']['total']:,}" in out


def test_keys_are_those_of_the_page(capsys, config_file):
    rows = [line.split("|")[1] for line in PAGE.splitlines() if line.startswith("| `")]
    described = {key for row in rows for key in re.findall(r"`(\w+)`", row)}
    cost = costs(capsys, f"--config={config_file}", "--image-size=224x336")
    assert set(cost) | set(cost["stages"][0]) <= described


def test_each_stage_is_counted_with_its_own_slicing(capsys, config_file):
    argv = (f"--config={config_file}", "--image-size=224x336", "--text-tokens=9")
    cost = costs(capsys, *argv)
    (full,) = cost["stages"]
    assert (full["views"], full["visual_tokens"]) == (cost["views"], cost["visual_tokens"]) == (7, 28)
    for key, value, views, visual_tokens in (("max_slices", 1, 1, 4), ("scale_resolution", 168, 3, 26)):
        changed = costs(capsys, *argv, f"--config.train.stages[0].{key}={value}")
        assert changed["plan"] == cost["plan"] and changed["forward_flops"] == cost["forward_flops"]
        (stage,) = changed["stages"]
        assert (stage["views"], stage["visual_tokens"]) == (views, visual_tokens)
        assert stage["train_flops"] != full["train_flops"] and stage["state_bytes"] == full["state_bytes"]
        assert stage["activation_bytes"]["kept"] < full["activation_bytes"]["kept"]


def test_what_is_printed_says_how_it_is_counted(capsys, config_file):
    argv = (f"--config={config_file}", "--image-size=224x336")
    out = call(capsys, "cost", *argv)[1]
    heading = next(line for line in out.splitlines() if line.startswith("stage"))
    assert re.split(" {2,}", heading)[-5:] == ["parameters", "gradients", "moments", "kept", "worked on"]
    text = " ".join(out.split())
    assert "2 FLOPs per multiply-accumulate" in text and "causal pairs of a sample (half)" in text
    assert "all float32 and over all devices" in text and "remat policies" in text
    once, every = costs(capsys, *argv), costs(capsys, *argv, "--flops-per-mac=1", "--causal=full")
    assert every["tower_gflops"] == once["tower_gflops"] / 2
    assert every["decoder_gflops"] > once["decoder_gflops"] / 2
    assert every["stages"][0]["train_flops"] < once["stages"][0]["train_flops"]
    assert "1 FLOP per multiply-accumulate" in every["flops_convention"] and "(full)" in every["flops_convention"]


def test_a_stage_without_a_language_model_is_not_counted_as_if_it_had_one(capsys):
    argv = (f"--config={V2.with_name('uhd_v2_vdim.py')}", "--image-size=336x336")
    (stage,) = costs(capsys, *argv)["stages"]
    assert stage["train_flops"] is None and stage["activation_bytes"] is None
    assert stage["state_bytes"]["gradients"] == 4 * 1_062_066
    assert call(capsys, "cost", *argv)[1].count("not counted") == 4  # three cells, and the overhead


def test_configurations_and_sizes_side_by_side(capsys, config_file):
    argv = [f"--config={config_file}", f"--against={config_file}:other", f"--against={V2}", "--image-size=224x336"]
    sizes = ["--image-size=112x112"]
    found = costs(capsys, *argv, *sizes)["costs"]
    names = ["plain", "plain:other", "uhd_v2"]
    assert [(cost["name"], cost["image"]) for cost in found] == [
        (name, size) for size in ([224, 336], [112, 112]) for name in names
    ]
    twice = [f"--against={config_file}"] * 2
    names_of_two = [cost["name"] for cost in costs(capsys, *argv[:1], *twice, "--image-size=112x112")["costs"]]
    assert names_of_two == ["plain", "plain.py", str(config_file)]
    alone = costs(capsys, f"--config={config_file}", "--image-size=224x336")
    assert alone["stages"] and {**alone, "stages": []} == found[0]
    status, out, _ = call(capsys, "cost", *argv, *sizes)
    assert status == 0
    lines = [line.split() for line in out.splitlines()]
    assert [line[:2] for line in lines if line and line[0] in ("224x336", "112x112")] == [
        [size, name] for size in ("224x336", "112x112") for name in names
    ]
    assert "FLOPs of plain, plain:other, uhd_v2: 2 FLOPs" in out


def test_a_view(capsys, config_file):
    cost = costs(capsys, f"--config={config_file}", "--view=112x168")
    assert (cost["image"], cost["plan"], cost["view"]) == (None, None, [112, 168])
    assert (cost["views"], cost["patches"], cost["visual_tokens"]) == (1, 96, 6)
    assert [stage["views"] for stage in cost["stages"]] == [1]


def test_plot(capsys, config_file, tmp_path):
    path = tmp_path / "cost.png"
    argv = (f"--config={config_file}", f"--against={V2}", "--image-size=200x300", f"--plot={path}")
    assert call(capsys, "cost", *argv)[0] == 0
    pixels = np.asarray(Image.open(path).convert("RGB"))
    assert pixels.shape[0] > 500 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        ((), ("--image-size", "--view")),
        (("--image-size=9x9", "--view=56x56"), ("--image-size", "--view")),
        (("--image-size=9x9", "--convention=paper", "--causal=full"), ("--causal", "paper")),
        (("--image-size=9x9", "--convention=paper", "--flops-per-mac=1"), ("--flops-per-mac", "paper")),
        (("--image-size=9x9", "--convention=paper", "--plot=x.png"), ("--plot", "paper")),
        (("--view=56x56", "--plot=x.png"), ("--plot", "--image-size")),
        (("--image-size=9",), ("'9'",)),
        (("--image-size=9x9", "--flops-per-mac=3"), ("3",)),
    ],
)
def test_wrong_command_lines(capsys, config_file, argv, parts):
    status, _, err = call(capsys, "cost", f"--config={config_file}", *argv)
    assert status == 2
    assert_one_line(err, *parts)


def test_wrong_configurations(capsys, config_file):
    moonvit = "--config.model.tower.kind=moonvit"
    for argv, parts in (
        (("--view=56x60",), ("view 56x60", "multiples of 56")),
        (("--view=0x56",), ("view 0x56", "multiples of 56")),
        (("--view=56x60", "--convention=paper"), ("view 56x60", "multiples of 14")),
        (("--view=56x56", "--convention=paper", moonvit), ("tower.kind", "'moonvit'")),
        (("--image-size=9x9", "--against=nowhere.py"), ("nowhere.py",)),
    ):
        status, _, err = call(capsys, "cost", f"--config={config_file}", *argv)
        assert status == 1
        assert_one_line(err, *parts)
