"""The model inside lmms-eval, where that is installed: a local task with local data, no network, the same answers."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import pytest
from benchmark_files import parquet, picture

from uhd_jax.checkpoint import save_model
from uhd_jax.config import CompressorConfig, DecoderConfig, ModelConfig, SlicingConfig, TowerConfig
from uhd_jax.data.tokenizer import byte_tokenizer
from uhd_jax.generation.assistant import Assistant
from uhd_jax.models import uhd

CONFIG = ModelConfig(
    decoder=DecoderConfig(272, 16, 24, 1, 2, 1, 8),
    tower=TowerConfig(width=16, mlp_width=24, layers=2, heads=2, table_side=7),
    compressor=CompressorConfig(after_layer=0),
    slicing=SlicingConfig(scale_resolution=112),
    dtype="float32",
)
TASK = """
task: local_pages
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_visual: !function local_pages.visual
doc_to_text: !function local_pages.text
doc_to_messages: !function local_pages.messages
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 6
  temperature: 0
  do_sample: false
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
FUNCTIONS = """
import io

from PIL import Image


def visual(doc):
    return [Image.open(io.BytesIO(doc["image"]["bytes"])).convert("RGB")]


def text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]

def messages(doc, lmms_eval_specific_kwargs=None):
    content = [{"type": "image", "url": visual(doc)[0]}, {"type": "text", "text": doc["question"]}]
    return [{"role": "user", "content": content}]
"""


def test_the_entry_point_names_the_manifest():
    declared = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]["entry-points"]
    module, _, name = declared["lmms_eval.models"]["uhd_jax"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))


def test_a_local_task_gives_the_same_answers_without_a_network(tmp_path):
    pytest.importorskip("lmms_eval")
    params = jax.jit(uhd.init_params, static_argnums=0)(CONFIG, jax.random.key(3))
    params["decoder"]["head"] *= 40
    model, folder = Assistant(CONFIG, params, byte_tokenizer()), tmp_path / "model"
    save_model(folder, params, CONFIG)
    (folder / "tokenizer").mkdir()
    byte_tokenizer().save(folder / "tokenizer")
    questions = ["What is it?", "And this?", "A longer question about it?"]
    pages = [picture(seed, (120, 200)) for seed in range(3)]
    expected = model.generate(questions, [[page] for page in pages], max_new_tokens=6)
    rows = [
        {"question": question, "image": {"bytes": page, "path": None}, "answer": answer}
        for question, page, answer in zip(questions, pages, [*expected[:2], "another"], strict=True)
    ]
    task = tmp_path / "task"
    task.mkdir()
    data = parquet(tmp_path / "pages.parquet", rows)
    (task / "local_pages.yaml").write_text(TASK.format(data=data))
    (task / "local_pages.py").write_text(FUNCTIONS)

    command = [sys.executable, "-m", "lmms_eval", "--model", "uhd_jax", "--model_args", f"checkpoint={folder}"]
    command += ["--tasks", "local_pages", "--include_path", task, "--batch_size", "2", "--log_samples"]
    command += ["--output_path", tmp_path / "out"]
    if shutil.which("unshare") and subprocess.run(["unshare", "-rn", "true"], capture_output=True).returncode == 0:
        command = ["unshare", "-rn", *command]  # no network at all
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        list(map(str, command)), env=os.environ | offline, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0 and "Error during evaluation" not in done.stderr, done.stderr[-3000:]
    [samples] = (tmp_path / "out").rglob("*samples_local_pages.jsonl")
    found = [json.loads(line) for line in samples.read_text().splitlines()]
    found.sort(key=lambda line: line["doc_id"])
    assert [line["filtered_resps"] for line in found] == expected
    [results] = (tmp_path / "out").rglob("*results.json")
    assert json.loads(results.read_text())["results"]["local_pages"]["exact_match,none"] == pytest.approx(2 / 3)
