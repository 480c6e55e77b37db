"""uhd-jax convert: what is printed, and in which words it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from command_line import assert_one_line, call
from safetensors.numpy import load_file, save_file

from uhd_jax.checkpoint import SavedModel
from uhd_jax.convert.source import Source

GOLDEN = Path(__file__).parent / "golden" / "v4_full_qwen3_16x"


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    for file in GOLDEN.iterdir():
        if file.suffix == ".json" or file.name == "model.safetensors":
            shutil.copyfile(file, folder / file.name)
    return str(folder)


def test_inspect_reads_no_data(checkpoint, capsys, monkeypatch):
    monkeypatch.delattr(Source, "read")
    status, out, err = call(capsys, "convert", "inspect", checkpoint)
    assert (status, err) == (0, "")
    assert "source: minicpm_v_4_6\n143 tensors in 1 file: float32 0.8 MB\n" in out
    assert "compressor           32,912 parameters: kind window_attention_reused_mlp" in out
    assert "total               202,860 parameters" in out
    assert "slices by rule v4, at most 9, views of 112 pixels; layout v4, template chatml" in out
    facts = json.loads(call(capsys, "convert", "inspect", checkpoint, "--json")[1])
    assert facts["family"] == "minicpm_v_4_6" and facts["problem"] is None and facts["dropped"] == []
    assert facts["parameters"] == {
        "tower": 56_700, "compressor": 32_912, "connector": 22_960, "decoder": 90_288, "total": 202_860,
    }  # fmt: skip
    assert facts["bytes"] == 4 * 202_860 and facts["dtypes"] == {"float32": 4 * 202_860}
    assert facts["model"]["decoder"]["layers"] == 3


def test_inspect_tells_what_would_be_left_out_and_what_does_not_fit(checkpoint, capsys):
    file = Path(checkpoint, "model.safetensors")
    tensors = load_file(file)
    config = json.loads(Path(checkpoint, "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True
    Path(checkpoint, "config.json").write_text(json.dumps(config))
    bias = tensors.pop("model.merger.mlp.0.linear_1.bias")
    save_file(tensors | {"extra.weight": bias}, file)
    status, out, err = call(capsys, "convert", "inspect", checkpoint)
    assert status == 1
    assert "left out: lm_head.weight, 13,824 numbers: " in out
    assert err.splitlines() == [
        "uhd-jax: error: the checkpoint does not fit the model:",
        "  missing model.merger.mlp.0.linear_1.bias (for connector/round_0/linear_1/bias (128,))",
        "  unexpected extra.weight (128,)",
    ]
    status, out, _ = call(capsys, "convert", "inspect", checkpoint, "--json")
    facts = json.loads(out)
    assert status == 1 and "unexpected extra.weight" in facts["problem"]
    assert [(one["tensors"], one["parameters"]) for one in facts["dropped"]] == [(["lm_head.weight"], 13_824)]


def test_import_and_export(checkpoint, tmp_path, capsys):
    made, out = str(tmp_path / "made"), str(tmp_path / "out")
    status, printed, err = call(capsys, "convert", "import", checkpoint, made, "--dtype=bfloat16", "--json")
    facts = json.loads(printed)
    assert (status, err) == (0, "") and facts["tokenizer"] and facts["stored_dtype"] == "bfloat16"
    assert facts["bytes_moved"] == facts["bytes"] and facts["mb_per_second"] > 0
    assert {str(leaf.dtype) for leaf in SavedModel(made).tree["decoder"]["layers"]["mlp"]["gate"].values()} == {
        "bfloat16"
    }
    status, printed, err = call(capsys, "convert", "export", made, out)
    assert (status, err) == (0, "")
    assert printed == f"wrote {out}: minicpm_v_4_6, 143 tensors in float32\n"
    assert json.loads(Path(out, "config.json").read_text())["dtype"] == "float32"
    names = load_file(GOLDEN / "model.safetensors").keys()
    assert load_file(Path(out, "model.safetensors")).keys() == names
    status, _, err = call(capsys, "convert", "import", out, made)
    assert status == 1
    assert_one_line(err, "made is not empty; choose a new folder")


def test_an_import_without_a_tokenizer_says_so(checkpoint, tmp_path, capsys):
    made, out, again = (str(tmp_path / name) for name in ("made", "out", "again"))
    call(capsys, "convert", "import", checkpoint, made)
    status, _, _ = call(capsys, "convert", "export", made, out, "--family=llava_uhd_v4_research")
    assert status == 0
    Path(out, "tokenizer.json").unlink()
    _, printed, _ = call(capsys, "convert", "import", out, again)
    assert printed.endswith("no tokenizer.json there: uhd_jax.load needs DST/tokenizer/tokenizer.json\n")


@pytest.mark.parametrize(
    ("name", "change", "problem"),
    [
        ("chat_template.jinja", lambda text: "{% if %}", "the tokenizer's chat template is no Jinja: line 1"),
        ("tokenizer.json", lambda text: text.replace('"model"', '"medal"'), "not a tokenizer.json ("),
    ],
)
def test_a_broken_tokenizer_stops_an_import(checkpoint, tmp_path, capsys, name, change, problem):
    file = Path(checkpoint, name)
    file.write_text(change(file.read_text() if file.exists() else ""))
    status, out, err = call(capsys, "convert", "import", checkpoint, str(tmp_path / "made"))
    assert (status, out) == (1, "") and problem in err, err
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "arguments, status, words",
    [
        ((), 2, ("arguments are required: COMMAND",)),
        (("import", "a"), 2, ("arguments are required: DST", "uhd-jax convert import --help")),
        (("import", "a", "b", "--dtype=int8"), 2, ("invalid choice: 'int8'",)),
        (("inspect", "a", "--config=c.py"), 1, ("there is no file c.py",)),
        (("combine", "b", "--tower=t", "--decoder=d"), 2, ("combine needs --config=FILE.py",)),
        (("inspect", "nowhere"), 1, ("nowhere: no such file or folder",)),
        (("export", "nowhere", "b"), 1, ("nowhere holds no model",)),
    ],
)
def test_wrong_use(arguments, status, words, capsys):
    found, _, err = call(capsys, "convert", *arguments)
    assert found == status
    assert_one_line(err, *words)


def test_a_config_is_for_combine(config_file, checkpoint, capsys):
    status, _, err = call(capsys, "convert", "inspect", checkpoint, f"--config={config_file}")
    assert status == 2
    assert_one_line(err, "--config is for combine alone")


def test_the_current_folder_stays(checkpoint, tmp_path, capsys, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    status, out, err = call(capsys, "convert", "import", checkpoint, ".")
    assert status == 1 and "tokenizer" not in out
    assert_one_line(err, "here is the current folder and cannot be replaced; choose a new folder in it")
    status, out, _ = call(capsys, "convert", "import", checkpoint, "made")
    assert status == 0 and "no tokenizer" not in out and Path("made", "tokenizer", "tokenizer.json").is_file()


def test_pickles_need_leave(tmp_path, capsys):
    (tmp_path / "pytorch_model.bin").write_bytes(b"anything")
    status, _, err = call(capsys, "convert", "inspect", str(tmp_path))
    assert status == 1
    assert_one_line(err, "pytorch_model.bin is a pickle", "--allow-pickle")


def test_an_unknown_model(checkpoint, capsys):
    Path(checkpoint, "config.json").write_text('{"model_type": "gpt2"}')
    status, _, err = call(capsys, "convert", "inspect", checkpoint)
    assert status == 1
    assert_one_line(err, "model_type 'gpt2'", "known families: minicpm_v_4_6, llava_uhd_v1")


def test_a_checkpoint_where_a_model_should_be(checkpoint, tmp_path, capsys):
    status, _, err = call(capsys, "convert", "export", checkpoint, str(tmp_path / "out"))
    assert status == 1
    assert_one_line(err, "holds no model", "uhd-jax convert import makes a model of it")


def test_combine_is_called_with_what_was_asked(config_file, tmp_path, capsys, monkeypatch):
    calls = []

    def combine(config, destination, **options):
        calls.append((config.decoder.vocab_size, str(destination), options))
        return {"tower": "clip", "new_rows": 3}

    monkeypatch.setattr("uhd_jax.training.start.combine", combine)
    arguments = (f"--config={config_file}", "--tower=t", "--decoder=d", "--upsampler=u", "--seed=5", "--allow-pickle")
    status, out, _ = call(capsys, "convert", "combine", str(tmp_path / "start"), *arguments)
    assert (status, out) == (0, f"tower: clip\nnew_rows: 3\nwrote {tmp_path / 'start'}\n")
    options = dict(tower="t", decoder="d", upsampler="u", seed=5, allow_pickle=True)
    assert calls == [(300, str(tmp_path / "start"), options)]


def test_verify_is_called_with_what_was_asked(capsys, monkeypatch):
    class Report:
        problem = None

        def to_json(self):
            return {"max_abs": 0.5}

        def __str__(self):
            return "a table"

    calls = []
    monkeypatch.setattr("uhd_jax.analysis.verify.verify", lambda *arguments: calls.append(arguments) or Report())
    status, out, _ = call(capsys, "convert", "verify", "a", "b", "--image=x.png", "--image=y.png", "--prompt=Why?")
    assert (status, out) == (0, "a table\n")
    assert calls == [("a", "b", ["x.png", "y.png"], ["Why?"], False)]
    assert call(capsys, "convert", "verify", "a", "b", "--json")[1] == '{"max_abs": 0.5}\n'
