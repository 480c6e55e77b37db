"""The launchers below launch/: lint, dry runs against tests/golden/launch, and what they do with stand-in programs.

`python tests/test_launch_ways.py` writes the golden files anew.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from command_line import call

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
GOLDEN = ROOT / "tests" / "golden" / "launch"
WAYS = ("gke", "gpu_host", "local", "slurm", "tpu_vm")
SCRIPTS = sorted(LAUNCH.rglob("*.sh"))

DEMO = ("--", "--config=configs/demo.py", "--workdir=runs/demo", "--config.train.stages[0].steps=4")
SHARED = ("--", "--config=configs/uhd_v4.py", "--workdir=/data/runs/v4", "--config.name=it's mine")
POD = ("--name=uhd", "--zone=us-west4-a", "--type=v5litepod-16", "--version=v2-alpha-tpuv5-lite")
DRY_RUNS = {
    "gke.yaml": ("gke", "--name=uhd", "--image=registry/uhd:1", "--claim=data", *SHARED),
    "gke_slices.yaml": (
        *("gke", "--name=uhd", "--image=registry/uhd:1", "--claim=data", "--accelerator=tpu-v5p-slice"),
        *("--topology=4x4x4", "--slices=2", "--queue=train", "--spot", "--restarts=9", *SHARED),
    ),
    "gke_tpu7x.yaml": (
        *("gke", "--name=uhd", "--image=registry/uhd:1", "--claim=data", "--accelerator=tpu7x", "--topology=2x2x2"),
        *SHARED,
    ),
    "gpu_host.txt": ("gpu_host", "--gpus", "0,1", *DEMO),
    "local.txt": ("local", "--processes=4", "--devices-each=2", *DEMO),
    "slurm.sh": ("slurm", *DEMO),
    "slurm_nodes.sh": ("slurm", "--nodes=4", "--gpus-per-node=4", "--time=2:00:00", "--sbatch=--partition=h100", *DEMO),
    "tpu_vm.txt": ("tpu_vm", *POD, *SHARED),
    "tpu_vm_spot.txt": (
        "tpu_vm",
        *POD,
        "--spot",
        "--project=p",
        "--chips=16",
        "--setup=sudo mount a:/b /data",
        *SHARED,
    ),
}


def launch(way, *argv, environ=(), **options):
    """Runs a launcher to its end."""
    environment = {key: value for key, value in os.environ.items() if key not in ("VENV_DIR", "TMPDIR")} | dict(environ)
    command = ["bash", str(LAUNCH / way / "run.sh"), *argv]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, **options)


def dry_run(way, *argv):
    return launch(way, "--dry-run", *argv, cwd="/").stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(LAUNCH)))
def test_shell_is_linted(script):
    subprocess.run(["bash", "-n", script], check=True)
    if not (shellcheck := shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")):
        pytest.skip("no shellcheck")
    subprocess.run([shellcheck, "--external-sources", script], check=True)


@pytest.mark.parametrize("path", [*LAUNCH.rglob("*.yaml"), *GOLDEN.glob("*.yaml")], ids=lambda path: path.name)
def test_yaml_is_linted(path):
    """But for the length of lines, which a command may have."""
    pytest.importorskip("yamllint")
    rules = "{extends: default, rules: {line-length: disable, document-start: disable}}"
    done = subprocess.run([sys.executable, "-m", "yamllint", "-s", "-d", rules, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("way", WAYS)
def test_each_way_is_a_folder_with_one_script_and_ten_lines_of_readme(way):
    assert [path.name for path in (LAUNCH / way).glob("*.sh")] == ["run.sh"]
    assert os.access(LAUNCH / way / "run.sh", os.X_OK)
    readme = (LAUNCH / way / "README.md").read_text()
    assert len(readme.splitlines()) <= 11 and "--dry-run" in readme and "docs/launch.md" in readme
    shown = launch(way, "--help")
    assert shown.returncode == 0 and shown.stdout.startswith(f"usage: launch/{way}/run.sh") and not shown.stderr
    # Every flag that the script takes is explained, and no other.
    script = (LAUNCH / way / "run.sh").read_text()
    taken = {line.split(")")[0].strip() for line in script.splitlines() if line.startswith("    --")}
    assert all(flag in shown.stdout for flag in taken) and "--dry-run" in taken


@pytest.mark.parametrize("name", DRY_RUNS)
def test_dry_runs_are_golden(name):
    assert dry_run(*DRY_RUNS[name]) == (GOLDEN / name).read_text()


@pytest.mark.parametrize("name", [name for name in DRY_RUNS if name.endswith(".sh")])
def test_slurm_jobs_are_shell_with_a_task_for_every_gpu(name):
    path = GOLDEN / name
    test_shell_is_linted(path)
    options = dict(
        line.removeprefix("#SBATCH --").split("=", 1)
        for line in path.read_text().splitlines()
        if line.startswith("#SBATCH --") and "=" in line
    )
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    tasks = int(options["nodes"]) * int(options["ntasks-per-node"])
    assert f"--processes={tasks} --devices={tasks}" in path.read_text()
    assert options["signal"].startswith("TERM@")  # to the tasks; with B: only the script would get it


def container(name):
    (job,) = yaml.safe_load((GOLDEN / name).read_text())["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    return job["replicas"], spec, spec["template"]["spec"]["containers"][0]


@pytest.mark.parametrize(
    ("name", "slices", "nodes", "cores"),
    [("gke.yaml", 1, 4, 1), ("gke_slices.yaml", 2, 16, 1), ("gke_tpu7x.yaml", 1, 2, 2)],
)
def test_jobsets_are_yaml_with_a_pod_for_every_node(tmp_path, name, slices, nodes, cores):
    replicas, spec, train = container(name)
    assert (replicas, spec["parallelism"], spec["completions"]) == (slices, nodes, nodes)
    assert train["resources"]["limits"] == {"google.com/tpu": 4}
    assert f"--processes={slices * nodes} --devices={slices * nodes * 4 * cores}" in train["command"][2]
    script = tmp_path / "command.sh"
    script.write_text("#!/usr/bin/env bash\n" + train["command"][2])
    test_shell_is_linted(script)
    on_spot = "cloud.google.com/gke-spot" in spec["template"]["spec"]["nodeSelector"]
    assert on_spot == ("tolerations" in spec["template"]["spec"]) == (slices == 2)


def test_the_blueprint_uses_what_it_defines():
    blueprint = yaml.safe_load((LAUNCH / "gke" / "cluster.yaml").read_text())
    known = set()
    for module in blueprint["deployment_groups"][0]["modules"]:
        assert set(module.get("use", ())) <= known, module
        known.add(module["id"])
    text = (LAUNCH / "gke" / "cluster.yaml").read_text()
    used = {part.split(")")[0] for part in text.split("$(vars.")[1:]}
    assert used <= set(blueprint["vars"])


def test_the_image_gets_what_the_installation_reads():
    lines = (LAUNCH / "gke" / "Dockerfile").read_text().splitlines()
    copied = [word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]]
    assert all((ROOT / word).exists() for word in copied)
    assert {"requirements.txt", "pyproject.toml", "README.md", "LICENSE", "uhd_jax"} <= set(copied)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (("local",), "after -- come the arguments of uhd-jax train"),
        (("local", "--", "--config=configs/demo.py"), "a --workdir=DIR is needed"),
        (("local", "--processes=0", *DEMO), "--processes needs a number from 1, not '0'"),
        (("local", "--processes"), "after -- come"),
        (("local", "--proceses=2", *DEMO), "unknown argument: --proceses"),
        (("gpu_host", *DEMO), "name them, --gpus 0,1"),
        (("slurm", *DEMO), "sbatch is not there"),
        (("tpu_vm", "--name=uhd", *SHARED), "--zone is needed"),
        (("tpu_vm", *POD, *SHARED), "gcloud is not there"),
        (("gke", "--name=uhd", "--image=i", "--claim=c", *DEMO), "--workdir=runs/demo is not below /data"),
        (("gke", "--name=uhd", "--image=i", "--claim=c", "--chips-per-node=3", *SHARED), "nodes of 3 do not divide"),
        (("gke", "--name=uhd", "--image=a b", "--claim=c", *SHARED), "--image needs an image, not 'a b'"),
        (("gke", "--name=uhd", "--image=i", "--claim=c", *SHARED), "kubectl is not there"),
    ],
)
def test_what_cannot_work_is_said_in_a_line(tmp_path, argv, expected):
    for program in ("bash", "dirname", "cat", "python3"):
        (tmp_path / program).symlink_to(shutil.which(program))
    ended = launch(*argv, environ={"PATH": str(tmp_path)})
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].startswith("error: ") and expected in ended.stderr.splitlines()[-1]


# --- with stand-in programs -----------------------------------------------------------------------------------------


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Makes programs of a few lines of shell, first in PATH; `calls()` lists what was run."""
    folder = tmp_path / "programs"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.chdir(tmp_path)

    def make(name, text, where=folder):
        path = where / name
        path.write_text(f'#!/bin/bash\necho "{name} $*" >> "$CALLS"\n{text}\n')
        path.chmod(0o755)

    make.calls = lambda: (tmp_path / "calls").read_text().splitlines()
    return make


@pytest.fixture
def venv(tmp_path, monkeypatch):
    """A virtual environment that the launchers take for complete, so far without `uhd-jax`."""
    folder = tmp_path / "venv" / "bin"
    folder.mkdir(parents=True)
    (folder / "python").symlink_to(sys.executable)
    digest = 'source "$0" && for e in "" "[gpu]"; do install_digest "$e" >"$VENV_DIR/.installed${e//[^a-z]/-}"; done'
    environment = os.environ | {"VENV_DIR": str(folder.parent)}
    subprocess.run(["bash", "-c", digest, str(LAUNCH / "common.sh")], env=environment, check=True)
    return folder


RUN = ("--", "--config=c.py", "--workdir=run")


def start_local(venv, *argv):
    command = ["bash", str(LAUNCH / "local" / "run.sh"), *argv, *RUN]
    environment = os.environ | {"VENV_DIR": str(venv.parent)}
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=environment, start_new_session=True, **pipe)


def test_local_processes_get_numbers_and_devices(programs, venv):
    programs("uhd-jax", 'echo "$JAX_PLATFORMS $JAX_NUM_CPU_DEVICES"; echo bad >&2', where=venv)
    shown, _ = (process := start_local(venv, "--processes=3", "--devices-each=2", "--port=77")).communicate(timeout=60)
    assert process.returncode == 0, shown
    for number in range(3):
        assert f"[{number}] cpu 2" in shown.splitlines() and f"[{number}] bad" in shown.splitlines()
        found = f"--coordinator=localhost:77 --processes=3 --devices=6 --process={number}"
        assert f"uhd-jax train --config=c.py --workdir=run {found}" in programs.calls()


LOCAL = """
trap 'echo saved; exit 0' TERM
case "$*" in *--process=1) {one} ;; esac
for i in $(seq 600); do sleep 0.1; done
"""


def test_local_processes_end_when_one_dies(programs, venv):
    programs("uhd-jax", LOCAL.replace("{one}", "sleep 0.5; exit 7"), where=venv)
    shown, _ = (process := start_local(venv, "--processes=3", "--port=77")).communicate(timeout=60)
    assert process.returncode == 7
    assert "process 1 ended with status 7; the others have 30 seconds" in shown
    assert shown.count("saved") == 2 and "start the same command again" in shown


def test_local_processes_that_do_not_end_are_killed(programs, venv):
    programs("uhd-jax", LOCAL.replace("{one}", "exit 7").replace("exit 0", ":"), where=venv)
    shown, _ = (process := start_local(venv, "--grace=1", "--port=77")).communicate(timeout=50)
    assert process.returncode == 7


def test_a_signal_goes_to_all_local_processes(programs, venv):
    programs("uhd-jax", LOCAL.replace("{one}", ":"), where=venv)
    process = start_local(venv, "--processes=3", "--port=77")
    while not Path("calls").exists() or len(programs.calls()) < 3:
        time.sleep(0.05)
    time.sleep(0.5)  # for the traps
    process.send_signal(signal.SIGTERM)
    shown, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and shown.count("saved") == 3


FIRST_STEPS = """

whole = get_config

def get_config(arg=""):
    config = whole(arg)
    config.train.stages = config.train.stages[:1]
    config.train.stages[0]["steps"] = 3
    return config
"""


@pytest.mark.usefixtures("unoptimised")
def test_the_demo_begins_alike_in_local_processes_and_in_one(programs, venv, capsys, compiled_once, monkeypatch):
    Path("demo.py").write_text((ROOT / "configs" / "demo.py").read_text() + FIRST_STEPS)
    programs("uhd-jax", f'exec {sys.executable} -m uhd_jax "$@"', where=venv)
    for key, value in {
        "VENV_DIR": str(venv.parent),
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": compiled_once,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }.items():
        monkeypatch.setenv(key, value)
    train = ("--config=demo.py", "--config.train.log_every=1", "--config.train.peak_flops=1e12")
    command = ["bash", str(LAUNCH / "local" / "run.sh"), "--processes=2", "--", *train, "--workdir=two"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "[0] cells step 3/3  loss " in ended.stdout and "[1] cells" not in ended.stdout
    assert call(capsys, "train", *train, "--workdir=one")[0] == 0
    losses = [
        [json.loads(line)["loss"] for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
        for run in ("two", "one")
    ]
    assert len(losses[0]) == 3 and losses[0] == pytest.approx(losses[1], rel=1e-6)


def job(*argv):
    """A SLURM job, to be run here."""
    Path("job.sh").write_text(dry_run("slurm", *argv, *RUN))
    environment = os.environ | {"SLURM_JOB_ID": "5"}
    return lambda **more: subprocess.run(
        ["bash", "job.sh"], env=environment | more, capture_output=True, text=True, timeout=60
    )


def test_a_slurm_job_queues_itself_again_until_trained(programs):
    programs("scontrol", "")
    run = job("--restarts=3")
    Path("run").mkdir()
    programs("srun", "exit 0")  # saved on a signal
    assert run().returncode == 0 and programs.calls()[-1] == "scontrol requeue 5"
    assert run(SLURM_RESTART_COUNT="3").returncode == 1 and not programs.calls()[-1].startswith("scontrol")
    programs("srun", "mkdir -p run/checkpoints/8; exit 9")  # failed, having saved
    assert run().returncode == 0 and programs.calls()[-1] == "scontrol requeue 5"
    failed = run()  # failed, having saved nothing
    assert failed.returncode == 1 and "not tried again" in failed.stdout
    programs("srun", "touch run/trained.json")
    assert run().returncode == 0 and programs.calls()[-1].startswith("srun --kill-on-bad-exit=1")


def test_a_pod_ends_well_only_when_trained(programs, tmp_path):
    script = container("gke.yaml")[2]["command"][2].replace("/data/runs/v4", str(tmp_path / "run"))
    programs("uhd-jax", "trap 'exit 0' TERM\ntouch started\nfor i in $(seq 600); do sleep 0.1; done")
    process = subprocess.Popen(["bash", "-c", script])
    while not Path("started").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) not in (0, -signal.SIGTERM)  # saved: the JobSet is to start again
    programs("uhd-jax", "exit 3")
    assert subprocess.run(["bash", "-c", script]).returncode == 3
    programs("uhd-jax", f"mkdir -p {tmp_path}/run; touch {tmp_path}/run/trained.json")
    assert subprocess.run(["bash", "-c", script]).returncode == 0


# The state of the VM is in a file; training ends at once, and at the first time by a preemption.
GCLOUD = """
all="$*"
case "$all" in
  *" describe "*) cat state 2>/dev/null || exit 1 ;;
  *" create "*) echo READY >state ;;
  *" delete "*) rm -f state commit ;;
  *"tar -xzf"*) if [ -e broken ]; then rm broken; exit 1; fi; echo "${all##*echo }" | cut -d" " -f1 >commit ;;
  *"cat uhd_jax/commit"*) test "${all##* = }" = "$(cat commit)" ;;
  *"uhd-jax train"*) if [ -e once ]; then touch trained; else touch once; echo PREEMPTED >state; exit 255; fi ;;
  *trained.json*) test -e trained ;;
esac
"""


def test_a_preempted_pod_is_made_again(programs):
    programs("gcloud", GCLOUD)
    programs("sleep", "")
    ended = launch("tpu_vm", *POD, "--spot", "--delete", *SHARED)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    verbs = [call.split()[4] for call in programs.calls() if call.startswith("gcloud") and " describe " not in call]
    assert verbs.count("create") == 2 and verbs.count("delete") == 2
    trained = [call for call in programs.calls() if "uhd-jax train" in call]
    assert len(trained) == 2 and all("--worker=all" in call for call in trained)
    assert "trained: /data/runs/v4" in ended.stdout


def test_a_pod_with_another_commit_gets_this_one_and_an_installation_that_fails_is_repeated(programs):
    programs("gcloud", GCLOUD)
    programs("sleep", "")
    for name, text in {"state": "READY", "commit": "0" * 40, "broken": "", "once": ""}.items():
        Path(name).write_text(text)
    argv = ("tpu_vm", *POD, *SHARED)
    assert launch(*argv).returncode == 0
    assert Path("commit").read_text() == subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True)
    tried = [call for call in programs.calls() if "tar -xzf" in call]
    assert len(tried) == 2 and all("--worker=all" in call for call in tried)
    assert len([call for call in programs.calls() if "uhd-jax train" in call]) == 1
    assert launch(*argv).returncode == 0  # all is there already
    assert len([call for call in programs.calls() if "tar -xzf" in call]) == 2


def test_a_pod_that_never_saves_is_given_up(programs):
    programs("gcloud", GCLOUD.replace("if [ -e once ]", "exit 1; if [ -e once ]"))
    programs("sleep", "")
    ended = launch("tpu_vm", *POD, "--attempts=2", *SHARED)
    assert ended.returncode == 1 and "2 starts without a new checkpoint" in ended.stderr
    assert len([call for call in programs.calls() if "uhd-jax train" in call]) == 2


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for name, argv in DRY_RUNS.items():
        (GOLDEN / name).write_text(dry_run(*argv))
