"""The command line: what it prints, its exit statuses, and that every mistake is answered by one clear line."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import uhd_jax
from uhd_jax.cli import COMMANDS, configs, main
from uhd_jax.cli.common import UsageError, whole_file
from uhd_jax.config import ConfigError

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


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "plain.py"
    path.write_text(CONFIG)
    return str(path)


@pytest.fixture
def image_file(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (600, 900, 3), np.uint8)
    path = tmp_path / "image.png"
    Image.fromarray(pixels).save(path)
    return str(path)


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


# --- the frame ---------------------------------------------------------------------------------------------------


def test_help_lists_every_command(capsys):
    for argv in ((), ("--help",)):
        status, out, _ = call(capsys, *argv)
        assert status == 0
        assert [line.split()[0] for line in out.splitlines() if line.startswith("  ") and "--" not in line] == list(
            COMMANDS
        )


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_exists_and_explains_itself(capsys, command):
    status, out, _ = call(capsys, command, "--help")
    assert status == 0
    assert out.startswith(f"usage: uhd-jax {command}")


def test_version(capsys):
    assert call(capsys, "--version") == (0, f"uhd-jax {uhd_jax.__version__}\n", "")


def test_unknown_command(capsys):
    status, _, err = call(capsys, "dance")
    assert status == 2
    assert_one_line(err, "'dance'", "slices")


def test_unknown_flag(capsys):
    status, _, err = call(capsys, "slices", "--size=100x100", "--colour=red")
    assert status == 2
    assert_one_line(err, "--colour=red")


def test_flags_are_not_abbreviated(capsys):
    assert call(capsys, "slices", "--siz=100x100")[0] == 2


def test_light_commands_do_not_import_jax():
    """Measured on two cores: 0.2 s instead of 2 s and more."""
    code = (
        "import sys, uhd_jax; from uhd_jax.cli import main; "
        "main(['--help']); main(['slices', '--size=800x600']); "
        "sys.exit(sorted({'jax', 'flax', 'orbax', 'matplotlib', 'transformers'} & set(sys.modules)) or 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_errors_of_the_project_are_one_line_and_others_keep_their_traceback(capsys, monkeypatch):
    from uhd_jax.cli import slices

    def run(arguments, config):
        raise ConfigError("first\nsecond")

    monkeypatch.setattr(slices, "run", run)
    status, _, err = call(capsys, "slices", "--size=1x1")
    assert status == 1
    assert_one_line(err, "uhd-jax: error: first second")
    status, _, err = call(capsys, "slices", "--size=1x1", "--traceback")
    assert status == 1 and "Traceback" in err

    def bug(arguments, config):
        raise ZeroDivisionError

    monkeypatch.setattr(slices, "run", bug)
    with pytest.raises(ZeroDivisionError):
        main(["slices", "--size=1x1"])


def test_interrupt(capsys, monkeypatch):
    from uhd_jax.cli import slices

    def run(arguments, config):
        raise KeyboardInterrupt

    monkeypatch.setattr(slices, "run", run)
    assert call(capsys, "slices", "--size=1x1")[0] == 130


def test_a_reader_that_leaves_is_no_error():
    command = f"{sys.executable} -m uhd_jax slices --help | head -n 1"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("usage") and "Traceback" not in done.stderr


# --- slices ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (
            ["--size=1344x896"],
            {"grid": [3, 2], "thumbnail": [560, 392], "slice": [448, 448], "views": 7, "patches": 7264},
        ),
        (["--size", "300x400"], {"grid": [0, 0], "slice": None, "views": 1, "visual_tokens": 63}),
        (["--size=640x480", "--mode=4x"], {"grid": [2, 1], "slice": [364, 560], "visual_tokens": 772}),
        (["--size=3024x4032", "--max-slices=2"], {"grid": [1, 2], "views": 3}),
    ],
)
def test_slices_as_json(capsys, flags, expected):
    status, out, _ = call(capsys, "slices", "--json", *flags)
    assert status == 0
    plan = json.loads(out)
    assert {key: plan[key] for key in expected} == expected


def test_slices_as_a_table(capsys, image_file):
    status, out, _ = call(capsys, "slices", image_file)
    assert status == 0
    assert "600x900" in out.splitlines()[0]
    assert [line.split()[0] for line in out.splitlines()[2:]] == ["thumbnail", "slice", "together"]


def test_slices_follow_the_configuration(capsys, config_file):
    argv = ("slices", "--size=224x336", "--json", f"--config={config_file}")
    plan = json.loads(call(capsys, *argv)[1])
    assert (plan["grid"], plan["visual_tokens"]) == ([2, 3], 28)
    plan = json.loads(call(capsys, *argv, "--config.model.slicing.max_slices=4")[1])
    assert plan["grid"] == [2, 2]


def test_slices_draws(capsys, image_file, tmp_path):
    out = tmp_path / "slices.png"
    assert call(capsys, "slices", image_file, f"--out={out}")[0] == 0
    with Image.open(out) as picture:
        assert picture.format == "PNG" and picture.width > 300
    assert sorted(path.name for path in tmp_path.iterdir()) == ["image.png", "slices.png"]


@pytest.mark.parametrize(
    ("argv", "status", "part"),
    [
        ([], 2, "IMAGE or --size"),
        (["a.png", "--size=3x3"], 2, "IMAGE or --size"),
        (["--size=3x3", "--out=a.png"], 2, "IMAGE"),
        (["--size=3by3"], 2, "HEIGHTxWIDTH"),
        (["--size=3x3", "--max-slices=0"], 2, "'0'"),
        (["--size=3x3", "--mode=2x"], 2, "'2x'"),
        (["--size=20000x20"], 1, "20000x20"),
        (["--size=0x20"], 1, "0x20"),
        (["missing.png"], 1, "missing.png"),
        (["--size=3x3", "--config"], 2, "--config needs a value"),
        (["--size=3x3", "--config=missing.py"], 1, "missing.py"),
        (["--size=3x3", "--config.model.mode=4x"], 2, "no --config=FILE.py"),
    ],
)
def test_slices_refuses(capsys, argv, status, part):
    got, out, err = call(capsys, "slices", *argv)
    assert (got, out) == (status, "")
    assert_one_line(err, part)


@pytest.mark.parametrize("content", [b"", b"not an image", None])
def test_slices_refuses_files(capsys, tmp_path, image_file, content):
    path = tmp_path / "bad.png"
    with open(image_file, "rb") as file:
        path.write_bytes(file.read()[:2000] if content is None else content)
    status, _, err = call(capsys, "slices", str(path), f"--out={tmp_path / 'out.png'}")
    assert status == 1
    assert_one_line(err, "bad.png")
    assert not (tmp_path / "out.png").exists()


# --- configuration -----------------------------------------------------------------------------------------------


def test_values_are_replaced_and_typed(config_file):
    config = configs.load(
        [
            f"--config={config_file}:other",
            "--config.train.stages[0].steps=7",
            "--config.train.stages[0].learning_rate=1",
            "--config.train.stages[0].trainable=('decoder',)",
            "--config.train.stages[0].data.options.task=page",
            "--config.train.seed=5",  # not mentioned in the file
            "--config.model.scan_layers=false",
        ]
    )
    stage = config.train.stages[0]
    assert (config.name, stage.steps, stage.trainable, stage.data.options["task"]) == ("other", 7, ("decoder",), "page")
    assert (stage.learning_rate, type(stage.learning_rate)) == (1.0, float)
    assert (config.train.seed, config.model.scan_layers) == (5, False)


def test_without_replacements_the_configuration_is_that_of_the_file(config_file):
    plain = configs.load([f"--config={config_file}"])
    assert plain == configs.load([f"--config={config_file}", "--config.train.seed=0"])
    assert plain.train.stages[0].steps == 3


@pytest.mark.parametrize(
    ("replacement", "error", "parts"),
    [
        ("--config.train.sed=1", UsageError, ("--config.train.sed", "'sed'", "seed")),
        ("--config.train.stages[1].steps=1", UsageError, ("stages[1]", "known here: 0")),
        ("--config.train.stages.steps=1", UsageError, ("'steps'",)),
        ("--config.train.seed.x=1", UsageError, ("'x'",)),
        ("--config.train.seed=many", UsageError, ("config.train.seed", "many")),
        ("--config.model.scan_layers=perhaps", UsageError, ("config.model.scan_layers", "perhaps")),
        ("--config.a b=1", UsageError, ("--config.a b",)),
        ("--config.model.mode=2x", ConfigError, ("config.model.mode", "2x")),
        ("--config.model.tower.heads=5", ConfigError, ("config.model.tower.heads", "5")),
    ],
)
def test_bad_replacements_name_their_key(config_file, replacement, error, parts):
    with pytest.raises(error) as caught:
        configs.load([f"--config={config_file}", replacement])
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("source", "part"),
    [
        ("def get_config(): return {'name': 'x', 'modell': {}}", "config.modell: unknown key"),
        ("def get_config(): return {'name': 'x', 'model': {}}", "config.train: missing"),
        ("def get_config(): return 3", "expected a mapping"),
        ("def get_config(): return 1 / 0", "ZeroDivisionError"),
        ("x = 1", "get_config"),
        ("def get_config(: pass", "SyntaxError"),
    ],
)
def test_bad_configuration_files(tmp_path, source, part):
    path = tmp_path / "bad.py"
    path.write_text(source)
    with pytest.raises(ConfigError, match=part):
        configs.load([f"--config={path}"])


def test_a_bad_variant_names_the_file(config_file):
    with pytest.raises(ConfigError, match=r"plain\.py:stage9.*KeyError.*stage9"):
        configs.load([f"--config={config_file}:stage9"])


def test_split_takes_both_spellings():
    config, others = configs.split(["a.png", "--config", "x.py", "--json", "--config.train.seed", "-1", "--configs=1"])
    assert config == ["--config=x.py", "--config.train.seed=-1"]
    assert others == ["a.png", "--json", "--configs=1"]


def test_a_result_is_whole_or_absent(tmp_path):
    path = tmp_path / "result.json"
    with pytest.raises(ZeroDivisionError), whole_file(path) as partial:
        partial.write_text("half")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    with whole_file(path) as partial:
        partial.write_text("whole")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("result.json", "whole")]


# --- report ------------------------------------------------------------------------------------------------------


@pytest.fixture
def finished_run(tmp_path):
    def write(name, value):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(value if isinstance(value, str) else json.dumps(value))

    losses = [("cells", 1, 2.0), ("cells", 2, None), ("pages", 3, 1.5), ("pages", 4, 0.5)]
    records = [
        {"stage": stage, "step": step, "stage_step": (step - 1) % 2 + 1, "loss": loss, "compilations": 1}
        for stage, step, loss in losses
    ]
    write("metrics.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    trained = {"name": "d", "seed": 3, "steps": 4, "train_seconds": 9.5, "devices": "1 x cpu", "versions": {}}
    write("trained.json", trained)
    write("evaluation.json", {"accuracy_with_slices": 0.9, "accuracy_thumbnail_only": 0.1, "chance": 0.125, "pages": 7})
    return write, tmp_path


def test_report(capsys, finished_run):
    write, directory = finished_run
    write("elapsed.txt", "install 20\ntrain 50\ntrain 30\nevaluate 5\n")
    status, out, _ = call(capsys, "report", str(directory), "--json")
    assert status == 0
    report = json.loads(out)
    assert report == json.loads((directory / "report.json").read_text())
    assert {key: report[key] for key in ("seed", "accuracy_with_slices", "accuracy_thumbnail_only", "chance")} == {
        "seed": 3,
        "accuracy_with_slices": 0.9,
        "accuracy_thumbnail_only": 0.1,
        "chance": 0.125,
    }
    assert (report["train_seconds"], report["total_seconds"]) == (80, 105)
    assert "accuracy_thumbnail_trained" not in report
    assert report["stages"][1] == {"name": "pages", "first_loss": 1.5, "last_loss": 0.5, "steps": 2, "compilations": 1}
    with Image.open(directory / "loss.png") as picture:
        assert picture.format == "PNG" and np.asarray(picture).std() > 1


def test_report_counts_the_step_in_progress_and_the_control(capsys, finished_run, monkeypatch):
    write, directory = finished_run
    monkeypatch.setattr("time.time", lambda: 1000.5)
    write("elapsed.txt", "train 50\n")
    write("running.txt", "report 990\n")
    write("control/evaluation.json", {"accuracy_thumbnail_only": 0.07})
    report = json.loads(call(capsys, "report", str(directory), "--json")[1])
    assert (report["total_seconds"], report["seconds"]) == (60, {"train": 50, "report": 10})
    assert report["accuracy_thumbnail_trained"] == 0.07


def test_report_without_the_quickstart_has_the_time_of_training_only(capsys, finished_run):
    report = json.loads(call(capsys, "report", str(finished_run[1]), "--json")[1])
    assert report["train_seconds"] == 9.5 and "total_seconds" not in report


@pytest.mark.parametrize(
    ("file", "content", "part"),
    [
        ("trained.json", None, "missing"),
        ("evaluation.json", None, "missing"),
        ("evaluation.json", "{", "not JSON"),
        ("metrics.jsonl", None, "missing"),
        ("metrics.jsonl", "", "no records"),
        ("metrics.jsonl", '{"stage": 1', "line 1"),
        ("elapsed.txt", "train soon\n", "train soon"),
    ],
)
def test_report_refuses(capsys, finished_run, file, content, part):
    write, directory = finished_run
    (directory / file).unlink(missing_ok=True)
    if content is not None:
        write(file, content)
    status, _, err = call(capsys, "report", str(directory))
    assert status == 1
    assert_one_line(err, file, part)
    assert not (directory / "report.json").exists()


# --- cost and generate -------------------------------------------------------------------------------------------


def test_cost(capsys, config_file):
    argv = ("cost", f"--config={config_file}", "--image-size=224x336")
    costs = json.loads(call(capsys, *argv, "--json")[1])
    assert costs["plan"]["visual_tokens"] == 28
    assert costs["parameters"]["total"] == sum(v for k, v in costs["parameters"].items() if k != "total")
    assert costs["forward_flops"]["total"] == sum(v for k, v in costs["forward_flops"].items() if k != "total")
    assert costs["stages"][0]["train_flops"] > costs["forward_flops"]["total"] > 0
    longer = json.loads(call(capsys, *argv, "--json", "--text-tokens=100", "--mode=4x")[1])
    assert longer["plan"]["visual_tokens"] == 111
    assert longer["forward_flops"]["decoder"] > costs["forward_flops"]["decoder"]
    status, out, _ = call(capsys, *argv)
    assert status == 0 and f"{costs['parameters']['total']:,}" in out


def test_commands_that_need_a_configuration_say_so(capsys):
    for argv in (("cost", "--image-size=3x3"), ("train", "--workdir=nowhere")):
        status, _, err = call(capsys, *argv)
        assert status == 2
        assert_one_line(err, "--config")


@pytest.mark.parametrize(
    ("flag", "part"),
    [
        ("--temperature=-1", "'-1'"),
        ("--temperature=nan", "'nan'"),
        ("--top-p=0", "'0'"),
        ("--top-p=1.5", "'1.5'"),
        ("--top-k=-1", "'-1'"),
        ("--max-new-tokens=0", "'0'"),
        ("--seed=x", "'x'"),
        ("--config=x.py", "--config=x.py"),
    ],
)
def test_generate_refuses_senseless_values(capsys, flag, part):
    status, _, err = call(capsys, "generate", "--checkpoint=none", "--prompt=x", flag)
    assert status == 2
    assert_one_line(err, part)


class Echo:
    """Stands in for a loaded model."""

    def generate(self, prompt, images, stream, **options):
        for word in ("four", " two"):
            if stream:
                stream(word)
        self.seen = (prompt, images, options)
        return "four two"


def test_generate_streams_or_prints_json(capsys, monkeypatch, tmp_path):
    echo = Echo()
    monkeypatch.setitem(vars(uhd_jax), "load", lambda directory: echo)
    argv = ("generate", "--checkpoint=c", "--prompt=What?", "--image=a.png", "--image", "b.png", "--top-k=3")
    assert call(capsys, *argv) == (0, "four two\n", "")
    assert echo.seen[:2] == ("What?", ["a.png", "b.png"]) and echo.seen[2]["top_k"] == 3
    out = call(capsys, *argv, "--json", f"--out={tmp_path / 'answer.json'}")[1]
    assert json.loads(out) == {"prompt": "What?", "images": ["a.png", "b.png"], "answer": "four two"}
    assert json.loads((tmp_path / "answer.json").read_text()) == json.loads(out)


# --- the whole way -----------------------------------------------------------------------------------------------


def test_train_then_answer(capsys, config_file, image_file, tmp_path):
    workdir = tmp_path / "run"
    argv = ("train", f"--config={config_file}", f"--workdir={workdir}", "--config.model.dtype=float32")
    assert call(capsys, *argv)[0] == 0
    trained = json.loads((workdir / "trained.json").read_text())
    assert (trained["name"], trained["steps"], trained["seed"]) == ("plain", 3, 0)

    # Another configuration is refused and leaves the finished run as it was.
    status, _, err = call(capsys, *argv, "--config.train.seed=1")
    assert status == 1 and "train.seed" in err.splitlines()[-1]
    assert json.loads((workdir / "trained.json").read_text()) == trained

    # More steps continue the run.
    assert call(capsys, *argv, "--config.train.stages[0].steps=4")[0] == 0
    assert json.loads((workdir / "trained.json").read_text())["steps"] == 4

    ask = ("generate", f"--checkpoint={workdir}", "--prompt=?", "--max-new-tokens=3", "--max-slices=1")
    status, out, _ = call(capsys, *ask, f"--image={image_file}", "--json")
    assert status == 0
    assert set(json.loads(out)) == {"prompt", "images", "answer"}

    status, _, err = call(capsys, *ask, "--image=missing.png")
    assert status == 1 and "missing.png" in err.splitlines()[-1]


def test_generate_without_a_model(capsys, tmp_path):
    status, _, err = call(capsys, "generate", f"--checkpoint={tmp_path}", "--prompt=?")
    assert status == 1
    assert_one_line(err, str(tmp_path))


def test_train_names_a_source_that_does_not_exist(capsys, config_file, tmp_path):
    argv = ("train", f"--config={config_file}", f"--workdir={tmp_path / 'run'}")
    status, _, err = call(capsys, *argv, "--config.train.stages[0].data.source=dreams")
    assert status == 1 and "'dreams'" in err.splitlines()[-1]


def test_a_result_never_replaces_what_is_no_regular_file(tmp_path):
    from uhd_jax.cli.common import write_json

    target, link = tmp_path / "real.json", tmp_path / "link.json"
    target.write_text("old")
    link.symlink_to(target)
    write_json(link, {"a": 1})
    assert link.is_symlink() and json.loads(target.read_text()) == {"a": 1}
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDWR)  # so that writing does not wait for a reader
    write_json(pipe, {"a": 1})
    assert pipe.is_fifo() and json.loads(os.read(reader, 100)) == {"a": 1}
    os.close(reader)
