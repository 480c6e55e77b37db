"""Eight host devices for every test, and parsed flags for Grain's worker processes."""

import os

# Before jax is first imported: tests compare numbers made on CPU, also where an accelerator is present.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
from absl import flags

jax.config.update("jax_num_cpu_devices", 8)
flags.FLAGS.mark_as_parsed()
