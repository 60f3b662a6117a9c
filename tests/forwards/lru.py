"""Linear recurrent unit (Orvieto et al. 2023, arXiv:2303.06349): a complex diagonal recurrence by `associative_scan`,
for ONE sequence [time], mapped over the batch with vmap."""

import jax
import jax.numpy as jnp
import numpy as np

VOCAB, WIDTH, STATE, LAYERS = 37, 24, 16, 2


def make(seed=0):
    rng = np.random.default_rng(seed)

    def normal(*shape, fan_in=1.0):
        return jnp.asarray(rng.standard_normal(shape) / np.sqrt(fan_in), jnp.float32)

    def layer():
        radius, phase = rng.uniform(0.8, 0.99, STATE), rng.uniform(0, np.pi, STATE)
        return {
            "nu_log": jnp.asarray(np.log(-np.log(radius)), jnp.float32),
            "theta_log": jnp.asarray(np.log(phase), jnp.float32),
            "gamma_log": jnp.asarray(np.log(np.sqrt(1 - radius**2)), jnp.float32),
            "B_re": normal(STATE, WIDTH, fan_in=2 * WIDTH),
            "B_im": normal(STATE, WIDTH, fan_in=2 * WIDTH),
            "C_re": normal(WIDTH, STATE, fan_in=STATE),
            "C_im": normal(WIDTH, STATE, fan_in=STATE),
            "D": normal(WIDTH),
            "glu": normal(WIDTH, 2 * WIDTH, fan_in=WIDTH),
        }

    return forward, {"embed": normal(VOCAB, WIDTH), "layers": [layer() for _ in range(LAYERS)]}


def binary_operator_diag(element_i, element_j):
    a_i, bu_i = element_i
    a_j, bu_j = element_j
    return a_j * a_i, a_j * bu_i + bu_j


def lru(p, inputs):
    """inputs [time, WIDTH]"""
    diag_lambda = jnp.exp(-jnp.exp(p["nu_log"]) + 1j * jnp.exp(p["theta_log"]))
    b_norm = (p["B_re"] + 1j * p["B_im"]) * jnp.exp(p["gamma_log"])[:, None]
    elements = jnp.repeat(diag_lambda[None], inputs.shape[0], axis=0)
    driven = jax.vmap(lambda u: b_norm @ u)(inputs)
    _, hidden = jax.lax.associative_scan(binary_operator_diag, (elements, driven))
    c = p["C_re"] + 1j * p["C_im"]
    return jax.vmap(lambda h, u: (c @ h).real + p["D"] * u)(hidden, inputs)


def sequence(params, tokens):
    x = params["embed"][tokens]
    for p in params["layers"]:
        y = jax.nn.gelu(lru(p, x / (1e-3 + jnp.std(x, axis=-1, keepdims=True))))
        a, b = jnp.split(y @ p["glu"], 2, axis=-1)
        x = x + a * jax.nn.sigmoid(b)
    return x @ params["embed"].T / np.sqrt(WIDTH)


def forward(params, tokens):
    return jax.vmap(sequence, in_axes=(None, 0))(params, tokens)
