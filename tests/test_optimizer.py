"""Schedules against numbers worked out by hand, and what is decayed, scaled and clipped."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from uhd_jax.config import OptimizerConfig
from uhd_jax.training.optimizer import make_optimizer, make_schedule

STAGE_1 = dict(learning_rate=1e-4, learning_rate_min=5e-5, steps=2000, warmup_steps=1000, schedule="timm_cosine")
STAGE_4 = dict(learning_rate=1e-5, learning_rate_min=1e-6, steps=10_000, warmup_steps=1000, schedule="timm_cosine")


@pytest.mark.parametrize(
    ("changes", "step", "rate"),
    [
        (STAGE_1, 0, 1e-8),
        (STAGE_1, 500, 5.0005e-5),  # 1e-8 + 500 * (1e-4 - 1e-8) / 1000
        (STAGE_1, 1000, 1e-4),
        (STAGE_1, 1500, 9.267766953e-5),  # 5e-5 + 2.5e-5 * (1 + cos(pi / 4))
        (STAGE_1, 2000, 7.5e-5),  # where the stage ends: half of the cosine
        (STAGE_4, 1000, 1e-5),
        (STAGE_4, 10_000, 1.2202456766718091e-6),  # 90 % of the cosine: 1e-6 + 4.5e-6 * (1 + cos(0.9 pi))
        (STAGE_1 | {"schedule": "cosine"}, 1000, 1e-4),
        (STAGE_1 | {"schedule": "cosine"}, 1999, 5e-5),
        (STAGE_1 | {"schedule": "cosine", "warmup_steps": 0}, 0, 1e-4),
        (STAGE_1 | {"schedule": "constant"}, 500, 5.0005e-5),
        (STAGE_1 | {"schedule": "constant"}, 1999, 1e-4),
    ],
)
def test_learning_rate(changes, step, rate):
    schedule = make_schedule(tiny.stage(**changes))
    assert float(schedule(jnp.int32(step))) == pytest.approx(rate, rel=2e-6)


def test_the_cosine_of_the_scripts_is_cut_short():
    rates = [float(make_schedule(tiny.stage(**STAGE_1))(jnp.int32(step))) for step in range(1000, 2001, 100)]
    assert rates == sorted(rates, reverse=True)
    assert min(rates) > 7.4999e-5


def first_update(config, stage, params, grads):
    optimizer = make_optimizer(config, stage)
    return jax.jit(lambda grads, params: optimizer.update(grads, optimizer.init(params), params)[0])(grads, params)


def test_decay_spares_names_with_bias_only():
    params = jax.tree.map(np.ones_like, tiny.params())
    zero = jax.tree.map(np.zeros_like, params)
    updates = first_update(OptimizerConfig(weight_decay=0.25), tiny.stage(), params, zero)
    seen = {"bias": 0, "other": 0}
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        kind = "bias" if "bias" in jax.tree_util.keystr(path) else "other"
        seen[kind] += 1
        np.testing.assert_array_equal(update, 0.0 if kind == "bias" else 0.25)
    assert min(seen.values()) > 5
    np.testing.assert_array_equal(updates["tower"]["final_norm"]["scale"], 0.25)
    np.testing.assert_array_equal(updates["tower"]["position_table"], 0.25)


def test_tower_factor_scales_the_tower_but_not_the_compressor():
    params = tiny.params()
    grads = jax.tree.map(np.ones_like, params)
    full = first_update(OptimizerConfig(), tiny.stage(), params, grads)
    scaled = first_update(OptimizerConfig(), tiny.stage(tower_learning_rate_factor=0.2), params, grads)
    for name, factor in [("layers", 0.2), ("patch_embedding", 0.2), ("position_table", 0.2), ("compressor", 1.0)]:
        expected = jax.tree.map(lambda update, factor=factor: factor * update, full["tower"][name])
        jax.tree.map(np.testing.assert_allclose, scaled["tower"][name], expected)
    jax.tree.map(np.testing.assert_array_equal, scaled["decoder"], full["decoder"])


def test_two_steps_of_adam_with_clipping_by_hand():
    config = OptimizerConfig(weight_decay=0.0)
    optimizer = make_optimizer(config, tiny.stage())
    params = {"connector": {"kernel": jnp.zeros(2)}}
    state = optimizer.init(params)
    m = v = 0.0
    pairs = [([3.0, 4.0], [0.6, 0.8]), ([0.3, -0.4], [0.3, -0.4])]  # gradients of norm 5 and 0.5, and clipped to 1
    for count, (gradient, clipped) in enumerate(pairs, 1):
        updates, state = optimizer.update({"connector": {"kernel": jnp.asarray(gradient)}}, state, params)
        clipped = np.array(clipped)
        m, v = 0.9 * m + 0.1 * clipped, 0.98 * v + 0.02 * clipped**2
        expected = (m / (1 - 0.9**count)) / (np.sqrt(v / (1 - 0.98**count)) + 1e-8)
        np.testing.assert_allclose(updates["connector"]["kernel"], expected, rtol=1e-5)
