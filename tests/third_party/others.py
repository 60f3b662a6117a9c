"""Causal programs of other packages: a recurrent language model with local attention, a state space model in chunks,
and two filters that statisticians run over observations as they come."""

from typing import Any

import numpy as np
from forwards import weights

from third_party.hf_flax import Given


def griffin() -> Given:
    """RecurrentGemma's Griffin (linen): two recurrent blocks, then local attention; the layers remember by RG-LRU."""
    import jax
    import jax.numpy as jnp
    from recurrentgemma import common
    from recurrentgemma import jax as recurrentgemma

    kinds = (common.TemporalBlockType.RECURRENT, common.TemporalBlockType.RECURRENT, common.TemporalBlockType.ATTENTION)
    sizes = {"vocab_size": 61, "width": 32, "mlp_expanded_width": 48, "num_heads": 4, "lru_width": 32}
    config = common.GriffinConfig(
        **sizes,
        block_types=kinds,
        embeddings_scale_by_sqrt_dim=True,
        attention_window_size=6,
        logits_soft_cap=30.0,
        scan_type=common.ScanType.ASSOCIATIVE_NATIVE,
    )
    model = recurrentgemma.Griffin(config)

    def forward(params: Any, tokens: Any) -> Any:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        return model.apply(params, tokens, positions, return_cache=False)[0]

    tokens = jnp.zeros((1, 4), jnp.int32)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), tokens, jnp.arange(4)[None], return_cache=False))
    params = weights.like(shapes, 0)
    return forward, params, (("batch time", "int32"),), 61


def mamba2(chunk: int = 64) -> Given:
    """mamba2-jax's language model (NNX): one chunk as long as the sequence, so the quadratic form throughout."""
    import mamba2_jax
    from flax import nnx

    sizes = {"vocab_size": 53, "hidden_size": 32, "state_size": 8, "head_dim": 16, "num_hidden_layers": 2}
    model = mamba2_jax.Mamba2ForCausalLM(mamba2_jax.Mamba2Config(**sizes, chunk_size=chunk), rngs=nnx.Rngs(0))
    graph, state = nnx.split(model)
    forward = lambda params, tokens: nnx.merge(graph, params)(tokens)["logits"]  # noqa: E731
    return forward, state, (("batch time", "int32"),), 53


def mamba2_chunked() -> Given:
    """The same in chunks of 8: within a chunk quadratic, between chunks by their states."""
    return mamba2(chunk=8)


def hmm_filter() -> Given:
    """dynamax's forward filter of a hidden Markov model: each observation's log likelihoods in, beliefs out."""
    from dynamax.hidden_markov_model import hmm_filter as filter_observations

    random = np.random.default_rng(0)
    params = {
        "initial": random.dirichlet(np.ones(5)).astype(np.float32),
        "transition": random.dirichlet(np.ones(5), 5).astype(np.float32),
    }

    def forward(params: Any, log_likelihoods: Any) -> Any:
        return filter_observations(params["initial"], params["transition"], log_likelihoods).filtered_probs

    return forward, params, (("time 5", "float32"),), 0


def kalman_filter() -> Given:
    """dynamax's Kalman filter: positions seen through noise in, the state's mean out."""
    import jax
    import jax.numpy as jnp
    from dynamax.linear_gaussian_ssm import LinearGaussianSSM

    model = LinearGaussianSSM(state_dim=3, emission_dim=2)
    params, _ = model.initialize(jax.random.key(0), dynamics_weights=0.9 * jnp.eye(3) + 0.05)
    forward = lambda params, emissions: model.filter(params, emissions).filtered_means  # noqa: E731
    return forward, params, (("time 2", "float32"),), 0


PROGRAMS = {f.__name__: f for f in (griffin, mamba2, mamba2_chunked, hmm_filter, kalman_filter)}
