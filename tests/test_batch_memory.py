"""Memory of batches is used again when nobody looks at it any more, and then holds what a new batch would."""

import jax
import numpy as np
from pipelines import Numbered, iterator

from uhd_jax.data.batch_memory import BatchMemory


def address(array):
    return array.ctypes.data


def test_memory_comes_back_when_the_last_array_of_it_is_gone():
    memory = BatchMemory()
    first, used = memory.take((2, 3, 64))
    assert not used and not first.any() and first.dtype == np.uint8 and address(first) % 64 == 0
    first[:] = 7
    place, row = address(first), first[1]
    del first
    other, used = memory.take((2, 3, 64))
    assert not used and address(other) != place and (row == 7).all()
    del row
    small, used = memory.take((2, 3, 32))
    assert not used and not small.any()
    again, used = memory.take((3, 2, 64))
    assert used and address(again) == place and (again == 7).all() and again.shape == (3, 2, 64)


def test_what_jax_took_without_a_copy_is_not_used_again():
    memory = BatchMemory()
    array, _ = memory.take((4, 64))
    array[:] = 1
    place, there = address(array), jax.block_until_ready(jax.device_put(array))
    del array
    other, _ = memory.take((4, 64))
    other[:] = 2
    assert (np.asarray(there) == 1).all()
    if there.unsafe_buffer_pointer() == place:
        assert address(other) != place
        del there
        jax.block_until_ready(jax.device_put(0))  # lets go of what is no longer needed
        assert address(memory.take((4, 64))[0]) == place


def test_used_memory_holds_no_trace_of_the_batch_before():
    (kept, seen), places = (iterator(Numbered(), train={"prefetch": 0}) for _ in range(2)), set()
    batches = [next(kept)[0] for _ in range(6)]
    for batch in batches:
        other, _ = next(seen)
        np.testing.assert_array_equal(other.patches, batch.patches)
        places.add(address(other.patches))
        other.patches[:] = 255
        del other
    assert len(places) < len({address(batch.patches) for batch in batches}) == 6
    kept.close()
    seen.close()
