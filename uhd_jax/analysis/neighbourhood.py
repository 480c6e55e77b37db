"""Measures ways to compute VDIM's sum over 7x7 neighbours of a map enlarged twice; the model uses `folded`.

    python -m uhd_jax.analysis.neighbourhood --side=24 --width=256 --level=2

All of them serve views of any patch grid in one compiled program, and give the same. Printed are the seconds of the
forward pass and of it with the gradients of map and kernel, and the temporary memory of the latter. One view of 24x24
patches, C = 1024, float32, on two busy CPU cores:

              level 1: forward, with gradient, memory      level 2
    taps           0.02 s      1.7 s      66 MiB                0.19 s      6.9 s     263 MiB
    rows           0.05 s      1.9 s     134 MiB                0.11 s     11.9 s     509 MiB
    windows        0.03 s      0.2 s      90 MiB                0.31 s      0.9 s     270 MiB
    folded         0.01 s      0.2 s      44 MiB                0.12 s      0.4 s      78 MiB

Dimension letters: V views, N cells of the small map, M = 4 N cells of the enlarged map, C width.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from uhd_jax.models.pyramid import DIAMETER, RADIUS, fold_kernel
from uhd_jax.ops import neighbourhood as nb
from uhd_jax.ops.resize import upsample_2x


def taps(source: jax.Array, kernel: jax.Array, grids: jax.Array, level: int) -> jax.Array:
    """The obvious way: 49 times, gather one neighbour of every cell and add it up.

    Args:
      source: float[V, N, C], the small map in raster order.
      kernel: float32[V, M, 49], in raster order of the enlarged map.
      grids: int32[V, 2], patch rows and columns.
      level: of the enlarged map.

    Returns:
      float[V, M, C] in raster order.
    """
    large = upsample_2x(source, grids * 2 ** (level - 1))
    height, width = (grids[:, axis] * 2**level for axis in (0, 1))
    index = jnp.arange(large.shape[1])[None]
    row, col = index // jnp.maximum(width, 1)[:, None], index % jnp.maximum(width, 1)[:, None]

    @jax.checkpoint
    def add(total, one):
        dy, dx, weight = one
        at = nb.reflected(row + dy, height) * width[:, None] + nb.reflected(col + dx, width)
        return total + weight[..., None] * nb.take_cells(large, at), None

    offsets = jnp.arange(-RADIUS, RADIUS + 1)
    ones = (jnp.repeat(offsets, DIAMETER), jnp.tile(offsets, DIAMETER), jnp.moveaxis(kernel, -1, 0))
    return jax.lax.scan(add, jnp.zeros(large.shape, jnp.float32), ones)[0].astype(source.dtype)


def rows(source: jax.Array, kernel: jax.Array, grids: jax.Array, level: int) -> jax.Array:
    """Rows with margins laid end to end: a neighbour is a shift by dy * stride + dx, the stride being the view's own.

    Arguments and result as of `taps`. The room for margins is that of a square view; to hold a view two cells high it
    would have to be four times the map, so the product could not use this as it stands.
    """
    large = upsample_2x(source, grids * 2 ** (level - 1))
    height, width = (grids[:, axis] * 2**level for axis in (0, 1))
    stride = (width + 2 * RADIUS)[:, None]
    cells = large.shape[1]
    side = int(cells**0.5)
    body = side * (side + 2 * RADIUS)
    room = (side + 2 * RADIUS) ** 2 + 2 * RADIUS
    place = jnp.arange(room)[None]
    row, col = (nb.reflected(at - RADIUS, size) for at, size in ((place // stride, height), (place % stride, width)))
    padded = nb.take_cells(large, row * width[:, None] + col)
    place = jnp.arange(body)[None]
    at = place // stride * width[:, None] + jnp.minimum(place % stride, width[:, None] - 1)
    weights = nb.take_cells(kernel, jnp.minimum(at, cells - 1))
    shift = jax.vmap(lambda view, start: jax.lax.dynamic_slice_in_dim(view, start, body + 2 * RADIUS))

    @jax.checkpoint
    def add(total, one):
        dy, weight = one
        slab = shift(padded, dy * stride[:, 0])
        for dx in range(DIAMETER):
            total += weight[..., dx, None] * jax.lax.slice_in_dim(slab, dx, dx + body, axis=1)
        return total, None

    weights = jnp.moveaxis(weights.reshape(*weights.shape[:2], DIAMETER, DIAMETER), 2, 0)
    start = jnp.zeros((len(large), body, large.shape[2]), jnp.float32)
    total = jax.lax.scan(add, start, (jnp.arange(DIAMETER), weights))[0]
    index = jnp.arange(cells)[None]
    back = index // width[:, None] * stride + index % width[:, None]
    return nb.take_cells(total, back).astype(source.dtype)


def windows(source: jax.Array, kernel: jax.Array, grids: jax.Array, level: int) -> jax.Array:
    """Per patch, the window of the enlarged map times the kernel written out over it.

    Arguments as of `taps`, but map and kernel are in patch order, as is the result.
    """
    views, count = len(source), source.shape[1] // 4 ** (level - 1)
    raster = nb.to_raster(source, grids, level - 1)
    large = upsample_2x(raster, grids * 2 ** (level - 1))
    side, offset = 2**level, jnp.arange(DIAMETER)
    line = jax.nn.one_hot(jnp.arange(side)[:, None] + offset, side + 2 * RADIUS)  # [cell, neighbour, window]
    kernel = kernel.reshape(views, count, side, side, DIAMETER, DIAMETER)
    weights = jnp.einsum("vpabyx,ayi,bxj->vpabij", kernel, line, line).reshape(views, count, side**2, -1)
    index = nb.window_cells(grids, count, level, RADIUS, nb.reflected)
    return nb.combine_windows(_to_patches(large, grids, level), index, weights).reshape(views, -1, source.shape[2])


def _to_patches(cells: jax.Array, grids: jax.Array, level: int) -> jax.Array:
    """The inverse of `to_raster`."""
    index = jnp.arange(cells.shape[1])[None]
    side, cols = 2**level, jnp.maximum(grids[:, 1:], 1)
    patch, inner = index // side**2, index % side**2
    row, col = patch // cols * side + inner // side, patch % cols * side + inner % side
    return nb.take_cells(cells, jnp.minimum(row * cols * side + col, cells.shape[1] - 1))


def folded(source: jax.Array, kernel: jax.Array, grids: jax.Array, level: int) -> jax.Array:
    """The model's: the kernel carried over to the small map, whose windows are gathered. As `windows`."""
    return fold_kernel(source, kernel, grids, level)


WAYS: dict[str, tuple[Callable[..., jax.Array], bool]] = {  # and whether in patch order
    "taps": (taps, False),
    "rows": (rows, False),
    "windows": (windows, True),
    "folded": (folded, True),
}


def main() -> None:
    """Prints one line per way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("side", 24), ("width", 256), ("level", 2), ("views", 1), ("repeat", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    views, level, patches = arguments.views, arguments.level, arguments.side**2
    grids = jnp.full((views, 2), arguments.side, jnp.int32)
    keys = jax.random.split(jax.random.key(0))
    source = jax.random.normal(keys[0], (views, patches * 4 ** (level - 1), arguments.width), arguments.dtype)
    kernel = jax.nn.softmax(jax.random.normal(keys[1], (views, patches * 4**level, DIAMETER**2)))
    expected = None
    for name, (way, patch_order) in WAYS.items():
        inputs = (source, kernel)
        if not patch_order:
            inputs = (nb.to_raster(source, grids, level - 1), nb.to_raster(kernel, grids, level))

        def forward(source, kernel, way=way):
            return way(source, kernel, grids, level)

        def both(source, kernel, forward=forward):
            out, pull = jax.vjp(forward, source, kernel)
            return pull(jnp.cos(out.astype(jnp.float32)).astype(out.dtype))

        out, seconds, _ = _measure(forward, inputs, arguments.repeat)
        _, trained, memory = _measure(both, inputs, arguments.repeat)
        out = (nb.to_raster(out, grids, level) if patch_order else out).astype(jnp.float32)
        expected = out if expected is None else expected
        difference = float(jnp.max(jnp.abs(out - expected)))
        print(
            f"{name:8} forward {seconds:8.3f} s  with gradient {trained:8.3f} s  memory {memory / 2**20:8.0f} MiB"
            f"  differs by {difference:.1e}",
            flush=True,
        )


def _measure(function: Callable[..., jax.Array], inputs: tuple, repeat: int) -> tuple[jax.Array, float, int]:
    """Result, seconds of the fastest run, and bytes of temporary memory."""
    program = jax.jit(function).lower(*inputs).compile()
    out = jax.block_until_ready(program(*inputs))
    seconds = []
    for _ in range(repeat):
        start = time.perf_counter()
        jax.block_until_ready(program(*inputs))
        seconds.append(time.perf_counter() - start)
    return out, min(seconds), program.memory_analysis().temp_size_in_bytes


if __name__ == "__main__":
    main()
