"""The table of full-size recipes on slices: its recipes can be compiled, and the page says what the files say."""

from pathlib import Path

import pytest
from test_aot import REPORT

from uhd_jax.analysis.aot_compile import bucket_of, stage_of
from uhd_jax.analysis.aot_targets import parse_target
from uhd_jax.analysis.pods import missing, read_reports
from uhd_jax.analysis.pods_page import page
from uhd_jax.analysis.pods_recipes import RECIPES
from uhd_jax.cli import configs

ROOT = Path(__file__).parents[1]
FIRST = RECIPES[0]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.title)
def test_recipes_suit_their_machines(recipe, monkeypatch):
    monkeypatch.chdir(ROOT)
    kinds = set()
    for topology in recipe.machines:
        command = recipe.command(topology)
        config = configs.load([argument for argument in command if argument.startswith("--config")])
        stage, target = stage_of(config, None), parse_target(topology)
        holders = target.devices // config.train.mesh.sequence  # of rows
        assert stage.rows % (stage.accumulation * holders) == 0, topology
        assert bucket_of(config.model, stage).slots > stage.max_slices
        kinds.add(target.chip_name)
    assert kinds == {"v5e", "v5p", "v6e", "h100"}


def test_what_is_missing_comes_in_order_of_importance(tmp_path):
    names = [recipe.file(topology) for recipe in RECIPES for topology in recipe.machines]
    assert len(set(names)) == len(names)
    assert {recipe.file(topology) for recipe, topology in missing(tmp_path)} == set(names)
    assert [recipe for recipe, _ in missing(tmp_path)][:4] == [FIRST] * 4
    (tmp_path / FIRST.file("v5e:8x8")).write_text("{}")
    assert (FIRST, "v5e:8x8") not in missing(tmp_path)


def test_the_page_says_what_was_compiled_and_what_was_not():
    text = page({FIRST.file("v5e:8x8"): REPORT})
    row = next(line for line in text.splitlines() if line.startswith("| v5e:8x8 | fsdp=64 | 64 x 1"))
    for part in ("4900, 54 x 1152", "fits: 12.00 of 15.75 GiB", "63.0 GB", "197.0", "40% to 79%", "200 s"):
        assert part in row
    assert "Not compiled: v5p:4x4x4, v6e:8x8, 8xh100." in text
    assert "(effort" not in row
    projected = [line for line in text.splitlines() if line.startswith("| v5e:8x8 |")][1:]
    assert [line.split(" | ")[1:3] for line in projected] == [
        ["64", "fsdp=64"],
        ["256", "data=2 x fsdp=128"],
        ["1024", "dcn_data=4 x data=2 x fsdp=128"],
    ]


def test_what_less_effort_changes():
    name = FIRST.file("v5e:8x8")
    quick = REPORT | {"effort": -1.0, "compile_seconds": 20.0, "peak_memory_bytes": 11 * 2**30}
    text = page({name: REPORT}, {name: quick})
    assert "| v4, stage 4 | v5e:8x8 | 12.00 | 11.00 | 63.0 | 63.0 | 200 s | 20 s |" in text
    assert "20 s (effort -1) |" in page({name: quick})


def test_the_page_in_docs_is_up_to_date():
    folder = ROOT / "docs" / "pods"
    assert (ROOT / "docs" / "pods.md").read_text() == page(read_reports(folder), read_reports(folder / "quick"))
