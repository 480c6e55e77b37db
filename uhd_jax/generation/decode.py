"""The compiled programs of generation: reading prompts into rows of a cache, and one more token for every row.

Dimension letters: R rows of the running batch, B prompts, T room for prompt tokens, D decoder width, V vocabulary,
N likeliest tokens that are told. L, S, K, H as in `models.decoder`.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from uhd_jax.config import ModelConfig
from uhd_jax.generation.sampling import Draws, choose, penalised
from uhd_jax.models import uhd
from uhd_jax.models.stacks import Apart, apart
from uhd_jax.sharding.rules import BATCH_AXES

STACKED = ("layers", "delta_layers")
LIKELIEST = 20  # as many as OpenAI's interface can ask for, and enough for 5 beams with 3 ids that end an answer


class State(NamedTuple):
    """What stays on the device between steps; every program donates it."""

    cache: dict[str, jax.Array]  # `models.decoder.Cache` of R rows
    tokens: jax.Array  # int32[R], chosen last
    seen: jax.Array  # bool[R, V], tokens of the prompt and of the answer but for the one chosen last


class Prompts(NamedTuple):
    """Prompts to be read, as arrays."""

    tokens: Any  # int32[B, T]
    lengths: Any  # int32[B]; 0 where there is none
    visual: Any  # float[B, T, D], visual tokens at their places
    is_visual: Any  # bool[B, T]
    rows: Any  # int32[B], where in the running batch each goes; R where there is none


class Step(NamedTuple):
    """What the host says about each row before a step."""

    tokens: Any  # int32[R], of rows whose token the host chose; -1: the one chosen last on the device
    index: Any  # int32[R], the token's place in the cache; 0 for rows that are free
    parents: Any  # int32[R], the row whose past it continues; looked at with `likeliest` only


class Chosen(NamedTuple):
    """What a program tells the host; the last three are None unless asked for."""

    tokens: jax.Array  # int32[.]
    log_probability: jax.Array | None  # float32[.], of the token, at temperature 1 and without a penalty
    likeliest: jax.Array | None  # int32[., N], the likeliest first
    log_probabilities: jax.Array | None  # float32[., N], those of beams with their penalty


def as_computed(params: Any, config: ModelConfig) -> Any:
    """Parameters with the decoder's matrices in the dtype of the computation; the same ones where that is float32.

    Every step would otherwise read them in float32 to cast them. What is computed stays the same bit for bit, as all
    that is only multiplied is cast, and nothing else.
    """

    if config.dtype == "float32":
        return params

    def cast(path, leaf):
        return leaf.astype(config.dtype) if path[-1].key in ("kernel", "embedding", "head") else leaf

    return {**params, "decoder": jax.tree_util.tree_map_with_path(cast, params["decoder"])}


def as_read(params: Any) -> Any:
    """Parameters with the decoder's layers apart where they lie on a CPU, which copies what it takes out of a stack.

    One row through four layers of 1,024 x 7,168 x 1,024 took 115 ms out of a stack and 43 ms so. The decoder is then
    twice in memory, as the stack stays with its owner, and its programs take longer to compile. Parameters whose layers
    are apart stay as they are.
    """
    decoder = params["decoder"]
    if any(isinstance(decoder.get(name), Apart) for name in STACKED):
        return params
    if {device.platform for device in jnp.asarray(jax.tree.leaves(decoder)[0]).devices()} != {"cpu"}:
        return params
    return {**params, "decoder": decoder | {name: apart(decoder[name]) for name in decoder if name in STACKED}}


@functools.partial(jax.jit, static_argnames=("config", "rows", "length", "mesh"))
def start(config: ModelConfig, rows: int, length: int, mesh: Mesh | None = None) -> State:
    """An empty running batch, its rows over the mesh as those of a training batch, its heads as the layers' kernels."""
    decoder, dtype = config.decoder, jnp.dtype(config.dtype)
    full = decoder.layers // decoder.full_attention_interval
    shapes = dict.fromkeys(("key", "value"), (full, rows, length, decoder.kv_heads, decoder.head_dim))
    if full < decoder.layers:
        delta, keys = decoder.layers - full, decoder.delta_key_heads * decoder.delta_key_dim
        channels = 2 * keys + decoder.delta_value_heads * decoder.delta_value_dim
        shapes["conv"] = (delta, rows, decoder.delta_conv - 1, channels)
        shapes["state"] = (delta, rows, decoder.delta_value_heads, decoder.delta_key_dim, decoder.delta_value_dim)
    kinds = {"state": jnp.promote_types(dtype, jnp.float32)}
    cache = {name: jnp.zeros(shape, kinds.get(name, dtype)) for name, shape in shapes.items()}
    return pinned(State(cache, jnp.zeros(rows, jnp.int32), jnp.zeros((rows, decoder.vocab_size), bool)), mesh)


def within(mesh: Mesh | None) -> Any:
    """The context in which a program over a mesh is traced, for `sharding.activations`."""
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh) if mesh else contextlib.nullcontext()


def pinned(state: State, mesh: Mesh | None) -> State:
    """Keeps a state's arrays where they lie on the mesh."""
    if mesh is None:
        return state

    def pin(array, *axes):
        return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, PartitionSpec(*axes)))

    def heads(array, axis):
        return "tensor" if array.shape[axis] % mesh.shape["tensor"] == 0 else None

    axes = {"key": lambda a: (None, heads(a, 3)), "value": lambda a: (None, heads(a, 3))}
    axes |= {"conv": lambda a: (), "state": lambda a: (heads(a, 2),)}
    cache = {name: pin(array, None, BATCH_AXES, *axes[name](array)) for name, array in state.cache.items()}
    return State(cache, pin(state.tokens, BATCH_AXES), pin(state.seen, BATCH_AXES))


@functools.partial(jax.jit, static_argnames=("config", "mesh"), donate_argnames=("state",))
def prefill(
    params: Any, state: State, prompts: Prompts, draws: Draws, config: ModelConfig, mesh: Mesh | None = None
) -> tuple[State, Chosen]:
    """Reads prompts into their rows and chooses the first token of each answer.

    Args:
      params: the model's parameters.
      state: donated.
      prompts: see there; several may not go to one row.
      draws: of B rows.
      config: the model.
      mesh: where the parameters lie, or None.
    """
    length = prompts.tokens.shape[1]
    segments = (jnp.arange(length)[None] < prompts.lengths[:, None]).astype(jnp.int32)
    words = uhd.decoder(config).apply({"params": params["decoder"]}, prompts.tokens, method="embed")
    x = jnp.where(prompts.is_visual[..., None], prompts.visual.astype(words.dtype), words)
    with within(mesh):
        logits, fresh = uhd.read_prompts(params, x, segments, config)
    rows, cache = prompts.rows, dict(state.cache)
    for name, new in fresh.items():
        if name in ("key", "value"):
            cache[name] = cache[name].at[:, rows, :length].set(new, mode="drop")
        else:
            cache[name] = cache[name].at[:, rows].set(new.astype(cache[name].dtype), mode="drop")
    count, vocab_size = logits.shape
    read = jnp.where(segments > 0, prompts.tokens, vocab_size)
    seen = jnp.zeros(logits.shape, bool).at[jnp.arange(count)[:, None], read].set(True, mode="drop")
    tokens = choose(logits, draws, seen)
    state = State(cache, state.tokens.at[rows].set(tokens, mode="drop"), state.seen.at[rows].set(seen, mode="drop"))
    return pinned(state, mesh), _told(logits, tokens, True, draws, seen)


@functools.partial(jax.jit, static_argnames=("config", "window", "likeliest", "mesh"), donate_argnames=("state",))
def decode(
    params: Any,
    state: State,
    step: Step,
    draws: Draws,
    config: ModelConfig,
    window: int,
    likeliest: bool = False,
    mesh: Mesh | None = None,
) -> tuple[State, Chosen]:
    """One more token in every row.

    Args:
      params: the model's parameters.
      state: donated.
      step: see there.
      draws: of R rows.
      config: the model.
      window: so much of the cache is attended to, more than every index.
      likeliest: rows may continue the past of others, and the likeliest tokens are told.
      mesh: where the parameters lie, or None.
    """
    cache, seen = state.cache, state.seen
    if likeliest:
        cache, seen = _reordered((cache, seen), step.parents, window)
    tokens = jnp.where(step.tokens >= 0, step.tokens, state.tokens)
    with within(mesh):
        logits, cache = uhd.decode_step(params, tokens, step.index, cache, config, window)
    seen = seen.at[jnp.arange(len(tokens)), tokens].set(True)
    chosen = choose(logits, draws, seen)
    return pinned(State(cache, chosen, seen), mesh), _told(logits, chosen, likeliest, draws, seen)


def _reordered(past, parents, window):
    def move(past):
        cache, seen = past
        moved = {name: array[:, parents] for name, array in cache.items() if name in ("conv", "state")}
        for name in ("key", "value"):
            moved[name] = cache[name].at[:, :, :window].set(cache[name][:, parents, :window])
        return moved, seen[parents]

    return jax.lax.cond(jnp.any(parents != jnp.arange(len(parents))), move, lambda past: past, past)


def _told(logits, tokens, likeliest, draws, seen):
    if not likeliest:
        return Chosen(tokens, None, None, None)
    log_probabilities = jax.nn.log_softmax(logits)
    own = jnp.take_along_axis(log_probabilities, tokens[:, None], axis=-1)[:, 0]
    of_beams = penalised(log_probabilities, seen, draws.beam_penalty)
    best, ids = jax.lax.top_k(of_beams, min(LIKELIEST, logits.shape[-1]))
    return Chosen(tokens, own, ids, best)
