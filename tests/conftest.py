"""Eight host devices for every test, programs that compile quickly, parsed flags for Grain's processes, files."""

import os

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from absl import flags
from command_line import CONFIG
from jax.experimental.compilation_cache import compilation_cache
from PIL import Image
from processes import Processes

# Tests compare numbers made on CPU, also where an accelerator is present.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])

# Tests compile much and compute little; this halves the time they take. Read when the first device is asked for, and
# inherited by the processes that tests start.
if "XLA_FLAGS" not in os.environ:
    xla_flags = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
    if jax.__version_info__ < (0, 11):  # later versions refuse this flag
        xla_flags.append("--xla_cpu_use_fusion_emitters=false")
        # Eight devices on two busy cores wait for each other for long, which XLA takes for a deadlock after 40 seconds.
        xla_flags.append("--xla_cpu_collective_call_terminate_timeout_seconds=300")
    os.environ["XLA_FLAGS"] = " ".join(xla_flags)

jax.config.update("jax_num_cpu_devices", 8)
# What several devices hold is written by one of them where it is small; else each slice would be a program of its own.
ocp.type_handlers.get_type_handler(jax.Array)._min_slice_bytes_for_replica_parallel = 2**20
flags.FLAGS.mark_as_parsed()


@pytest.fixture(scope="module")
def unoptimised():
    """For modules with many large programs and no tight tolerances: compiles three times faster still."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory):
    """For modules that compile the same programs again and again: keeps them in a folder, which it returns.

    All modules share it, those that other workers run too. What one that is killed has half written is compiled again.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "programs"
    folder.mkdir(exist_ok=True)
    before = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    compilation_cache.reset_cache()
    yield str(folder)
    jax.config.update("jax_compilation_cache_dir", before[0])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before[1])
    compilation_cache.reset_cache()


@pytest.fixture
def together(tmp_path, compiled_once):
    """Starts `uhd-jax train` in several processes."""
    processes = Processes(tmp_path, compiled_once)
    yield processes
    processes.kill()


@pytest.fixture
def config_file(tmp_path):
    """A tiny configuration, for the command line."""
    path = tmp_path / "plain.py"
    path.write_text(CONFIG)
    return str(path)


@pytest.fixture
def image_file(tmp_path):
    """A noisy image of 600 x 900 pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (600, 900, 3), np.uint8)
    path = tmp_path / "image.png"
    Image.fromarray(pixels).save(path)
    return str(path)
