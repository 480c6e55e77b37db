"""The walk of docs/finetune.md in short: a checkpoint, images of one's own, training, export, the same answer there."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import source_files
from command_line import assert_one_line, call
from golden_v4 import GOLDEN

import uhd_jax
from uhd_jax.cli import configs, main
from uhd_jax.config import PARTS, ConfigError, DataConfig
from uhd_jax.data.pack import pack
from uhd_jax.data.sources import make_source

FEWER = ("--config.train.log_every=1", "--config.train.stages[0].bucket_budget=1")  # programs to compile
ROOT = Path(__file__).parents[1]
ALONE = {"PYTHONPATH": str(ROOT), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # a process with one device, as a user's
FILE = ROOT / "configs" / "finetune.py"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the page's photographs and an imported model."""
    pytest.importorskip("skimage")
    folder = tmp_path_factory.mktemp("finetune")
    program, *_ = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "finetune.md").read_text(), re.DOTALL)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        exec(compile(program, "docs/finetune.md", "exec"), {})
        assert main(["convert", "import", str(GOLDEN / "v4_full_qwen3_16x"), "start"]) == 0
    return folder


def test_the_page_makes_what_it_says(place):
    for name, count in (("train", 200), ("test", 16)):
        records = json.loads((place / "photos" / f"{name}.json").read_text())
        assert len(records) == count and all((place / "photos" / record["image"]).is_file() for record in records)


@pytest.mark.usefixtures("unoptimised")
def test_from_a_checkpoint_to_the_same_answer_in_transformers(place, capsys, monkeypatch):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from hf46 import torch_inputs

    monkeypatch.chdir(place)
    config = f"--config={FILE}:start,photos/train.json,steps=12,rows=2,length=256,rate=5e-3"
    status, out, _ = call(capsys, "data", "index", config, "--workers=1")
    assert status == 0 and "200 samples, 200 images" in out
    command = [sys.executable, "-m", "uhd_jax", "train", config, "--workdir=tuned", *FEWER]
    done = subprocess.run(command, env=os.environ | ALONE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    losses = [json.loads(line)["loss"] for line in Path("tuned/metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 12 and losses[-1] < 0.8 * losses[0]
    status, _, err = call(capsys, "convert", "export", "tuned", "exported")
    assert (status, err) == (0, "")

    ours = uhd_jax.load("tuned")
    image = sorted(Path("photos").glob("*.jpg"))[-1]
    answer = ours.generate("What is this?", images=[image], max_new_tokens=6)
    prepared = ours.prepare("What is this?", images=[image])
    theirs = transformers.MiniCPMV4_6ForConditionalGeneration.from_pretrained("exported").eval()
    with torch.no_grad():
        inputs = torch_inputs(prepared, ours.config)
        tokens = theirs.generate(**inputs, max_new_tokens=6, do_sample=False)[0, len(prepared.token_ids) :]
    assert ours.tokenizer.decode(tokens.tolist()) == answer and answer


def test_options(place, monkeypatch):
    monkeypatch.chdir(place)
    assert configs.load([f"--config={FILE}:start,photos/train.json"]).train.stages[0].trainable == PARTS
    config = configs.load([f"--config={FILE}:start,photos,images=photos,train=language,steps=30,rows=16,rate=2e-5"])
    (stage,) = config.train.stages
    assert stage.trainable == ("connector", "connector_positions", "decoder")
    assert (stage.steps, stage.warmup_steps, stage.rows, stage.packed_length) == (30, 3, 16, 4900)
    assert (stage.learning_rate, stage.learning_rate_min) == (2e-5, pytest.approx(2e-6))
    assert stage.data.source == "json" and stage.data.options == {"path": "photos", "image_root": "photos"}
    assert config.model.decoder.width == 48 and Path(config.model.chat.tokenizer) == Path("start/tokenizer")
    assert config.train.init_from == "start"
    parts = configs.load([f"--config={FILE}:start,photos/train.json,train=tower+compressor"]).train.stages[0].trainable
    assert parts == ("tower", "compressor")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("", "name a model and data after the colon"),
        ("start", "name a model and data after the colon"),
        ("start,photos/train.json,step=3", "option 'step=3' is not one of images=, train=, steps="),
        ("start,photos/train.json,steps=many", "steps=many: must be a number"),
        ("start,photos/train.json,train=eyes", "trainable: 'eyes' is not one of"),
        ("start,photos/train.csv", r"photos/train.csv: no file named \*.arrayrecord, "),
        ("start,x.tar,images=photos", "images=photos: data of the kind 'tar' holds its images itself"),
    ],
)
def test_what_is_wrong_is_said(place, monkeypatch, argument, message):
    monkeypatch.chdir(place)
    with pytest.raises(ConfigError, match=message):
        configs.load([f"--config={FILE}:{argument}"])


def write_packed(folder):
    lines = source_files.write_lines(folder.with_name("lines"), source_files.llava)
    pack(DataConfig("json", lines), folder)


def write_parquet(folder):
    source_files.write_parquet(folder, source_files.rows_with_bytes())
    (folder / "dataset_infos.json").write_text("{}")


def write_arrow(folder):
    source_files.write_arrow(folder, source_files.rows_with_bytes())
    (folder / "dataset_info.json").write_text("{}")


def write_tar(folder):
    source_files.write_tar(folder)
    (folder / "stats.json").write_text("{}")


def write_jsonl(folder):
    source_files.write_lines(folder, source_files.llava)
    (folder / "infos.json").write_text("{}")


@pytest.mark.parametrize(
    ("write", "kind"),
    [
        (write_packed, "array_record"),
        (write_parquet, "parquet"),
        (write_arrow, "arrow"),
        (write_tar, "tar"),
        (write_jsonl, "json"),
        (source_files.write_pretty, "json"),  # data.json
    ],
)
def test_every_folder_that_is_taken_can_be_opened(tmp_path, write, kind):
    (tmp_path / "data").mkdir()
    write(tmp_path / "data")
    data_of = runpy.run_path(str(FILE))["_data"]
    inside = kind not in ("arrow", "array_record")  # which name their files themselves
    for place in (tmp_path / "data", tmp_path) if inside else (tmp_path / "data",):
        data = data_of(str(place), "")
        source = make_source(DataConfig(**data))
        assert (data["source"], len(source)) == (kind, 8) and source.files(5)


def test_what_lies_deeper_comes_second(tmp_path):
    source_files.write_pretty(tmp_path)
    (tmp_path / "older").mkdir()
    source_files.write_tar(tmp_path / "older")
    assert runpy.run_path(str(FILE))["_data"](str(tmp_path), "")["source"] == "json"


def test_splits_of_a_dataset_on_disk_are_asked_for(tmp_path):
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train"]}')
    data = runpy.run_path(str(FILE))["_data"](str(tmp_path), "")
    with pytest.raises(ValueError, match="has the splits train; name one"):
        make_source(DataConfig(**data))


def test_a_model_that_is_not_there_is_said(place, capsys, monkeypatch):
    monkeypatch.chdir(place)
    status, _, err = call(capsys, "data", "index", f"--config={FILE}:nowhere,photos/train.json")
    assert status != 0
    assert_one_line(err, "nowhere", "holds no model")
