"""Llama (Touvron et al. 2023, arXiv:2302.13971) after the reference code: rotary positions as complex numbers, keys and
values of a group repeated by broadcasting, an additive -inf mask, SwiGLU."""

import jax
import jax.numpy as jnp
import numpy as np

VOCAB, WIDTH, HEADS, GROUPS, DIM, LAYERS = 67, 32, 4, 2, 8, 2


def make(seed=0):
    rng = np.random.default_rng(seed)

    def dense(*shape):
        return jnp.asarray(rng.standard_normal(shape) / np.sqrt(shape[0]), jnp.float32)

    def layer():
        return {
            "attention_norm": 1 + 0.1 * dense(WIDTH),
            "wq": dense(WIDTH, HEADS * DIM),
            "wk": dense(WIDTH, GROUPS * DIM),
            "wv": dense(WIDTH, GROUPS * DIM),
            "wo": dense(HEADS * DIM, WIDTH),
            "ffn_norm": 1 + 0.1 * dense(WIDTH),
            "w1": dense(WIDTH, 88),
            "w2": dense(88, WIDTH),
            "w3": dense(WIDTH, 88),
        }

    params = {
        "tok_embeddings": jnp.asarray(rng.standard_normal((VOCAB, WIDTH)), jnp.float32),
        "layers": [layer() for _ in range(LAYERS)],
        "norm": 1 + 0.1 * dense(WIDTH),
        "output": dense(WIDTH, VOCAB),
    }
    return forward, params


def rms_norm(x, weight):
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-5) * weight


def precompute_freqs_cis(end):
    freqs = 1.0 / (10000.0 ** (jnp.arange(0, DIM, 2)[: DIM // 2] / DIM))
    angles = jnp.outer(jnp.arange(end), freqs)
    return jnp.cos(angles) + 1j * jnp.sin(angles)


def apply_rotary_emb(x, freqs_cis):
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    rotated = jax.lax.complex(pairs[..., 0], pairs[..., 1]) * freqs_cis[None, :, None, :]
    return jnp.stack([jnp.real(rotated), jnp.imag(rotated)], axis=-1).reshape(x.shape)


def repeat_kv(x):
    batch, time, groups, dim = x.shape
    x = jnp.broadcast_to(x[:, :, :, None, :], (batch, time, groups, HEADS // GROUPS, dim))
    return x.reshape(batch, time, HEADS, dim)


def forward(params, tokens):
    batch, time = tokens.shape
    h = params["tok_embeddings"][tokens]
    freqs_cis = precompute_freqs_cis(time)
    mask = jnp.triu(jnp.full((time, time), -jnp.inf), k=1)
    for p in params["layers"]:
        x = rms_norm(h, p["attention_norm"])
        q = (x @ p["wq"]).reshape(batch, time, HEADS, DIM)
        k = (x @ p["wk"]).reshape(batch, time, GROUPS, DIM)
        v = (x @ p["wv"]).reshape(batch, time, GROUPS, DIM)
        q, k = apply_rotary_emb(q, freqs_cis), apply_rotary_emb(k, freqs_cis)
        k, v = repeat_kv(k), repeat_kv(v)
        q, k, v = (a.transpose(0, 2, 1, 3) for a in (q, k, v))
        scores = jnp.matmul(q, k.transpose(0, 1, 3, 2)) / np.sqrt(DIM)
        scores = jax.nn.softmax(scores + mask, axis=-1)
        output = jnp.matmul(scores, v).transpose(0, 2, 1, 3).reshape(batch, time, -1)
        h = h + output @ p["wo"]
        x = rms_norm(h, p["ffn_norm"])
        h = h + (jax.nn.silu(x @ p["w1"]) * (x @ p["w3"])) @ p["w2"]
    return rms_norm(h, params["norm"]) @ params["output"]
