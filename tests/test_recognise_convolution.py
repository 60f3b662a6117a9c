"""Long convolutions by FFT, found and run: against their sum, term by term."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.scipy.signal import fftconvolve
from numpy_graph import computed, run
from recognise_helpers import assert_same_values, assert_xla_agrees, found, graphs, make, uniform

from jaxinfer.axes.factors import describe, factors_of

pytestmark = pytest.mark.jax_defaults  # the forwards here are written as users write them


def convolution(x, h, rows=None):
    """y[t] = sum over s <= t of x[s] h[t - s] along the last dim, term by term."""
    x, h = np.asarray(x, np.complex128), np.asarray(h, np.complex128)
    rows = x.shape[-1] if rows is None else rows
    y = np.zeros((*np.broadcast_shapes(x.shape[:-1], h.shape[:-1]), rows), np.complex128)
    for t in range(rows):
        for s in range(min(t + 1, x.shape[-1])):
            if t - s < h.shape[-1]:
                y[..., t] += x[..., s] * h[..., t - s]
    return y


def hyena(u, k, d):
    """As in the Hyena and Safari sources: normalised on one side, a skip of D u outside."""
    rows = u.shape[-1]
    k_f = jnp.fft.rfft(k, n=2 * rows) / (2 * rows)
    return jnp.fft.irfft(jnp.fft.rfft(u, n=2 * rows) * k_f, n=2 * rows, norm="forward")[..., :rows] + u * d[:, None]


def time_first(x, h):  # [batch, time, channels] and [time, channels]
    n = 2 * x.shape[1]
    y = jnp.fft.irfft(jnp.fft.rfft(h, n, axis=0) * jnp.fft.rfft(x, n, axis=1), n, axis=1)
    return y[:, : x.shape[1]]


def padded_first(x, h):
    rows = x.shape[-1]
    x, h = (jnp.pad(v, [(0, 0)] * (v.ndim - 1) + [(0, rows)]) for v in (x, h))
    return jnp.fft.irfft(jnp.fft.rfft(x) * jnp.fft.rfft(h))[..., :rows]


def by_fft(x, h):
    rows = x.shape[-1]
    x = jnp.concatenate([x, jnp.zeros_like(x)], -1)
    return jnp.fft.ifft(jnp.fft.fft(h, n=2 * rows) * jnp.fft.fft(x)).real[..., :rows]


def s4_kernel(x, a, c):
    """S4D: the filter is made from weights, as complex exponentials."""
    rows = x.shape[-1]
    h = jnp.einsum("n,nt->t", c, jnp.exp(a[:, None] * jnp.arange(rows))).real * 2
    return jnp.fft.irfft(jnp.fft.rfft(x, 2 * rows) * jnp.fft.rfft(h, 2 * rows), 2 * rows)[..., :rows]


def scaled(x, h):
    rows = x.shape[-1]
    y = jnp.fft.irfft(jnp.fft.rfft(x, 2 * rows) * jnp.fft.rfft(h, 2 * rows) * 3.0, 2 * rows)
    return (0.5 * y)[..., :rows]


CONVOLUTIONS = {
    "hyena": (hyena, lambda t: [uniform(2, 3, t), uniform(3, t, seed=1), uniform(3)]),
    "time first": (time_first, lambda t: [uniform(2, t, 3), uniform(t, 3, seed=1)]),
    "padded first": (padded_first, lambda t: [uniform(2, t), uniform(t, seed=1)]),
    "fft": (by_fft, lambda t: [uniform(2, t), uniform(t, seed=1)]),
    "complex filter": (by_fft, lambda t: [uniform(2, t), uniform(t, seed=1, dtype=np.complex64)]),
    "s4": (s4_kernel, lambda t: [uniform(2, t), -uniform(4) + 1j * uniform(4), uniform(4, dtype=np.complex64)]),
    "scaled": (scaled, lambda t: [uniform(2, t), uniform(t, seed=1)]),
    "fftconvolve": (lambda x, h: fftconvolve(x, h)[: len(x)], lambda t: [uniform(t), uniform(t, seed=1)]),
    "vmap": (jax.vmap(hyena, (0, None, None)), lambda t: [uniform(4, 2, 3, t), uniform(3, t, seed=1), uniform(3)]),
    "vmap of an inner dim": (
        jax.vmap(hyena, (2, None, None), 1),
        lambda t: [uniform(2, 3, 4, t), uniform(3, t, seed=1), uniform(3)],
    ),
    "vmap of fftconvolve": (
        jax.vmap(lambda x, h: fftconvolve(x, h)[: len(x)], (0, None)),
        lambda t: [uniform(4, t), uniform(t, seed=1)],
    ),
    "filters of channels": (
        lambda x, h: padded_first(x[:, None], jnp.broadcast_to(h, (1, *h.shape))),
        lambda t: [uniform(2, t), uniform(3, t, seed=1)],
    ),
    "short filter": (
        lambda x, h: jnp.fft.irfft(jnp.fft.rfft(x, 2 * len(x)) * jnp.fft.rfft(h, 2 * len(x)), 2 * len(x))[: len(x)],
        lambda t: [uniform(t), uniform(3, seed=1)],
    ),
    "data for a filter": (lambda x: padded_first(x, jnp.tanh(x)), lambda t: [uniform(2, t)]),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_are_recognised(name: str):
    (function, make_inputs), rows = CONVOLUTIONS[name], 4 + len(name) % 6
    inputs = make_inputs(rows)
    graph, new = graphs(function, *inputs)
    (conv,) = found(new, "long_convolution")
    assert not [e for e in new.equations if e.name == "fft" and e.params["fft_type"].name.startswith("I")]
    assert conv.outputs[0].shape[conv.params["time"]] == rows
    assert_same_values(new, graph, inputs, rtol=1e-4)


@pytest.mark.parametrize("name", ["hyena", "s4", "vmap of fftconvolve"])
def test_xla_agrees(name: str):
    function, inputs = CONVOLUTIONS[name]
    assert_xla_agrees(function, inputs(7), rtol=1e-4)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_run_at_other_lengths(name: str):
    function, inputs = CONVOLUTIONS[name]
    (conv,) = found(graphs(function, *inputs(8))[1], "long_convolution")
    p = conv.params
    for rows in (1, 2, 11):
        sides = []
        for i, (node, dims) in enumerate(zip(conv.inputs, (p["x_dims"], p["h_dims"]), strict=True)):
            value = make(node, dims.index(p["time"]), rows, i)
            squeezed = np.squeeze(value, tuple(d for d, to in enumerate(dims) if to is None))
            kept = [to for to in dims if to is not None]
            placed = np.transpose(squeezed, np.argsort(kept))
            sides.append((value, np.expand_dims(placed, [d for d in range(p["rank"]) if d not in kept])))
        (got,) = run(functools.partial(conv.primitive.bind, **p), *(v for v, _ in sides))
        np.testing.assert_allclose(got, convolution(*(v for _, v in sides)), rtol=1e-4, atol=1e-5)


@given(rows=st.integers(1, 12), filter_rows=st.integers(1, 12), n=st.integers(3, 30), swap=st.booleans())
@settings(max_examples=40, deadline=None)
def test_room_for_every_product(rows: int, filter_rows: int, n: int, swap: bool):
    """Recognised exactly where nothing wraps around; never where the first rows hold an end of the input."""

    def function(x, h):
        x_f, h_f = jnp.fft.rfft(x, n), jnp.fft.rfft(h, n)
        return jnp.fft.irfft(h_f * x_f if swap else x_f * h_f, n)[: max(rows, filter_rows)]

    if max(rows, filter_rows) >= n:  # nothing is padded, or something is cut off
        return
    x, h = uniform(rows), uniform(filter_rows, seed=1)
    new = graphs(function, x, h)[1]
    assert len(found(new, "long_convolution")) == (rows + filter_rows - 1 <= n)
    if found(new, "long_convolution"):
        expected = convolution(x, h, max(rows, filter_rows))
        (got,) = computed(new, [x, h])
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def spectrum(x, n=20):
    return jnp.fft.rfft(x, n)


NOT_CAUSAL = {
    "circular": lambda x, h: jnp.fft.irfft(jnp.fft.rfft(x) * jnp.fft.rfft(h), x.shape[-1]),
    "circular, padded too little": lambda x, h: jnp.fft.irfft(spectrum(x, 18) * spectrum(h, 18), 18)[..., :10],
    "later rows": lambda x, h: jnp.fft.irfft(spectrum(x) * spectrum(h), 20)[..., 1:11],
    "every second row": lambda x, h: jnp.fft.irfft(spectrum(x) * spectrum(h), 20)[..., :20:2],
    "correlation": lambda x, h: jnp.fft.irfft(spectrum(x) * spectrum(h).conj(), 20)[..., :10],
    "all rows": lambda x, h: jnp.fft.irfft(spectrum(x) * spectrum(h), 20),
    "padded in front": lambda x, h: jnp.fft.irfft(spectrum(jnp.pad(x, ((0, 0), (10, 0)))) * spectrum(h), 20)[..., :10],
    "padded with ones": lambda x, h: jnp.fft.irfft(
        spectrum(jnp.pad(x, ((0, 0), (0, 10)), constant_values=1.0)) * spectrum(h), 20
    )[..., :10],
    "a phase": lambda x, h: jnp.fft.irfft(spectrum(x) * spectrum(h) * 1j, 20)[..., :10],
    "sum of spectra": lambda x, h: jnp.fft.irfft(spectrum(x) + spectrum(h), 20)[..., :10],
    "filtered spectrum": lambda x, h: jnp.fft.irfft(
        spectrum(x) * spectrum(h) * jnp.exp(1j * jnp.arange(11)).astype(jnp.complex64), 20
    )[..., :10],
    "unlike lengths": lambda x, h: jnp.fft.irfft(spectrum(x) * spectrum(h)[..., :11], 19)[..., :10],
}


@pytest.mark.parametrize("name", NOT_CAUSAL)
def test_other_transforms_are_left_alone(name: str):
    graph, new = graphs(NOT_CAUSAL[name], uniform(2, 10), uniform(10, seed=1))
    assert new is graph


def test_factors_of_convolutions():
    def told(name):
        function, inputs = CONVOLUTIONS[name]
        return describe(factors_of(found(graphs(function, *inputs(9))[1], "long_convolution")[0]))

    assert told("hyena") == "ab_,b_->ab_"
    assert told("time first") == "ab_,b_->ab_"  # h, transposed in front of its transform
    assert told("padded first") == "a_,_->a_"
    assert told("filters of channels") in ("a__,_b_->ab_", "_b_,a__->ab_")
