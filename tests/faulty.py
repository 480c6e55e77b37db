"""Devices that hold something else than they should."""

import jax
import numpy as np

from uhd_jax.training.step import CompiledSteps


def spoiled(array, device):
    """The array with another first value on one device."""
    parts = []
    for shard in array.addressable_shards:
        part = np.array(shard.data)
        if shard.device == device:
            part.reshape(-1)[0] += 1
        parts.append(jax.device_put(part, shard.device))
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, parts)


def disagree_at(patch, step, index=2):
    """One device has other values in a parameter, from a step on."""
    call = CompiledSteps.__call__

    def stepping(self, state, batch):
        state, metrics = call(self, state, batch)
        if int(state.step) == step:
            norm = state.params["decoder"]["final_norm"]
            norm["scale"] = spoiled(norm["scale"], jax.devices()[index])
        return state, metrics

    patch.setattr(CompiledSteps, "__call__", stepping)
