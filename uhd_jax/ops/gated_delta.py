"""The gated delta rule and the causal convolution before it, over packed rows (spec v4 section 4.4).

Source: Gated Delta Networks (arXiv 2412.06464), in its chunked form. Per head, with the state S float32[K, V]:

    S <- exp(log_decay) S;  S <- S + key (beta (value - S^T key))^T;  out = S^T query

A row may hold several samples: `segments` int32[B, T] numbers them, 0 is padding. A sample begins from an empty state;
padding, wherever it stands, leaves the state as it is, and what comes out at it means nothing.

Dimension letters: B rows, T tokens, C channels, W width of the convolution, H key heads, N value heads, K key size,
V value size, M chunks, L length of a chunk. All of it is computed in float32, products at full precision.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from uhd_jax.ops.precision import wide, wide_dtype

_product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def causal_convolution(x: jax.Array, kernel: jax.Array, segments: jax.Array) -> jax.Array:
    """Depthwise convolution over a token and the W - 1 before it in the same sample.

    Args:
      x: float[B, T, C].
      kernel: float[W, C], its last row for the token itself.
      segments: int32[B, T].

    Returns:
      float32[B, T, C].
    """
    x, width = wide(x), len(kernel)
    out = x * kernel[-1]
    for back in range(1, min(width, x.shape[1])):
        same = (segments[:, back:] == segments[:, :-back])[..., None]
        out = out.at[:, back:].add(jnp.where(same, x[:, :-back], 0) * kernel[width - 1 - back])
    return out


def convolution_tail(x: jax.Array, width: int, segments: jax.Array) -> jax.Array:
    """The last W - 1 inputs float[B, W - 1, C] of each row's last sample, zero before its beginning."""
    index = jnp.arange(x.shape[1])
    last = jnp.max(jnp.where(segments > 0, index, 0), axis=1, keepdims=True)
    places = last - jnp.arange(width - 2, -1, -1)  # [B, W - 1]
    at = jnp.maximum(places, 0)
    same = jnp.take_along_axis(segments, at, axis=1) == jnp.take_along_axis(segments, last, axis=1)
    kept = (same & (places >= 0))[..., None]
    return jnp.where(kept, jnp.take_along_axis(x, at[..., None], axis=1), 0)


def convolution_step(x: jax.Array, kernel: jax.Array, tail: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`causal_convolution` for the next token x float[B, 1, C] after the inputs `tail` float[B, W - 1, C].

    Returns:
      float32[B, 1, C], and the next tail.
    """
    seen = jnp.concatenate([tail, x.astype(tail.dtype)], axis=1)
    return jnp.sum(wide(seen) * kernel, axis=1, keepdims=True), seen[:, 1:]


def _prepared(query, key, value, log_decay, beta, segments):
    """All as float32, queries and keys normalised, one key head per value head; padding neither decays nor writes."""
    groups = value.shape[2] // key.shape[2]

    def normalised(x):
        x = wide(x)
        x = x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-6)
        return jnp.repeat(x, groups, axis=2)

    active = (segments > 0)[..., None]
    log_decay, beta = (jnp.where(active, wide(a), 0) for a in (log_decay, beta))
    scale = key.shape[-1] ** -0.5
    return normalised(query) * scale, normalised(key), wide(value), log_decay, beta


def _starts(segments):
    """bool[B, T]: first tokens of samples, but for the row's first token, which goes on from the state given."""
    changed = (segments[:, 1:] != segments[:, :-1]) & (segments[:, 1:] > 0)
    return jnp.pad(changed, ((0, 0), (1, 0)))


def _empty_state(key, value):
    return jnp.zeros((value.shape[0], value.shape[2], key.shape[-1], value.shape[-1]), wide_dtype(value))


def recurrent_delta(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    log_decay: jax.Array,
    beta: jax.Array,
    segments: jax.Array,
    state: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The rule token by token: for decoding, and the reference of `chunked_delta`. T may be 1.

    Args:
      query: float[B, T, H, K], not yet normalised.
      key: float[B, T, H, K], not yet normalised.
      value: float[B, T, N, V]; H divides N, and value head n reads key head n // (N / H).
      log_decay: float32[B, T, N], at most 0.
      beta: float32[B, T, N] in (0, 1).
      segments: int32[B, T].
      state: float32[B, N, K, V] before the first token; None for an empty one.

    Returns:
      float32[B, T, N, V], and the state after the last token.
    """
    state = _empty_state(key, value) if state is None else state
    tokens = (*_prepared(query, key, value, log_decay, beta, segments), _starts(segments))

    def step(state, token):
        query, key, value, log_decay, beta, start = token  # [B, N, ..], the last [B]
        decay = jnp.where(start[:, None], 0, jnp.exp(log_decay))
        state = state * decay[..., None, None]
        change = beta[..., None] * (value - _product("bnkv,bnk->bnv", state, key))
        state = state + key[..., None] * change[..., None, :]
        return state, _product("bnkv,bnk->bnv", state, query)

    state, out = jax.lax.scan(step, state, jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), tokens))
    return jnp.swapaxes(out, 0, 1), state


def chunked_delta(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    log_decay: jax.Array,
    beta: jax.Array,
    segments: jax.Array,
    state: jax.Array | None = None,
    *,
    chunk: int = 64,
) -> tuple[jax.Array, jax.Array]:
    """The same as `recurrent_delta`, a chunk of tokens at a time: matrix products, and one scan over the chunks.

    Inside a chunk the changes d_i = beta_i (value_i - (what the state holds at key_i)) depend on those before them
    linearly, so they solve a unit triangular system, in terms of the state at the chunk's beginning. All exponents are
    sums of log decays between two tokens of a sample, so none is above 0. `chunk` must be a power of two.
    """
    state = _empty_state(key, value) if state is None else state
    length = query.shape[1]
    room = (0, -length % chunk)
    ids = jnp.cumsum(_starts(segments), axis=1)  # of the sample last begun, 0 the one that goes on

    def in_chunks(a, **pad):
        """[B, T, N, ..] -> [M, B, N, L, ..]."""
        a = jnp.pad(a, ((0, 0), room) + ((0, 0),) * (a.ndim - 2), **pad)
        return jnp.moveaxis(a.reshape(a.shape[0], -1, chunk, *a.shape[2:]), (1, 3), (0, 2))

    query, key, value, log_decay, beta = map(in_chunks, _prepared(query, key, value, log_decay, beta, segments))
    ids = in_chunks(ids[..., None], mode="edge")  # [M, B, 1, L]
    entering = jnp.concatenate([jnp.zeros_like(ids[:1, ..., -1:]), ids[:-1, ..., -1:]])  # of the state that comes in

    lower = jnp.tri(chunk, dtype=bool)
    # Log decay from token j to i: the sum over what follows j up to i, not a difference of two large sums.
    between = jnp.cumsum(jnp.where(jnp.tri(chunk, k=-1, dtype=bool), log_decay[..., None], 0), axis=-2)
    same = lower & (ids[..., :, None] == ids[..., None, :])
    decay = jnp.exp(jnp.where(same, between, -jnp.inf))  # [M, B, N, L, L]
    from_state = jnp.exp(jnp.where(ids == entering, jnp.cumsum(log_decay, axis=-1), -jnp.inf))[..., None]

    scaled_key = key * beta[..., None]
    system = _product("...ik,...jk->...ij", scaled_key, key) * decay  # its diagonal is taken as 1
    inverse = _unit_lower_inverse(system)
    own = _product("...ij,...jv->...iv", inverse, value * beta[..., None])
    of_state = _product("...ij,...jk->...ik", inverse, scaled_key * from_state)
    chunks = (
        own,
        of_state,
        _product("...ik,...jk->...ij", query, key) * decay,
        query * from_state,
        key * decay[..., -1, :, None],  # decayed to the chunk's end
        from_state[..., -1:, :],
    )

    def step(state, inputs):
        own, of_state, attention, query, key, kept = inputs
        change = own - _product("bnik,bnkv->bniv", of_state, state)
        out = _product("bnik,bnkv->bniv", query, state) + _product("bnij,bnjv->bniv", attention, change)
        return state * kept + _product("bnik,bniv->bnkv", key, change), out

    state, out = jax.lax.scan(step, state, chunks)
    out = jnp.moveaxis(out, (0, 2), (1, 3))  # [B, M, L, N, V]
    return out.reshape(out.shape[0], -1, *out.shape[3:])[:, :length], state


def _unit_lower_inverse(matrix: jax.Array) -> jax.Array:
    """Inverse of the unit lower triangular matrices whose entries below the diagonal are those of float32[.., L, L].

    Inverses of diagonal blocks, doubled in size until one block is left:
    [[A, 0], [C, B]]^-1 = [[A^-1, 0], [-B^-1 C A^-1, B^-1]]. Products alone, which every device does well; the solver of
    the CPU moreover waits for threads that several devices in one process may hold for ever.
    """
    length = matrix.shape[-1]
    inverse = jnp.ones((*matrix.shape[:-1], 1, 1), matrix.dtype)  # [.., number of blocks, side, side]
    side = 1
    while side < length:
        pairs = length // (2 * side)
        corners = matrix.reshape(*matrix.shape[:-2], pairs, 2, side, pairs, 2, side)[..., 1, :, :, 0, :]
        corners = jnp.einsum("...pipj->...pij", corners)
        first, second = inverse[..., ::2, :, :], inverse[..., 1::2, :, :]
        corners = -_product("...ij,...jk,...kl->...il", second, corners, first)
        top = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
        inverse = jnp.concatenate([top, jnp.concatenate([corners, second], axis=-1)], axis=-2)
        side *= 2
    return inverse[..., 0, :, :]
