"""ji.trace: functions, linen, NNX; named axes; what is refused."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxinfer as ji


def dense(params, x):
    return jax.nn.relu(x @ params["w"])


PARAMS = {"w": jnp.ones((12, 5))}


def test_a_function():
    program = ji.trace(dense, PARAMS, ji.spec("batch 12"))
    assert program.verify().output_axes == ("batch", 5)
    assert program.axes == ("batch",)
    assert program.parameter_count == 60
    assert "dot_general" in program.show()
    assert "test_tracing.py" in program.show()  # provenance
    assert "float32[batch 5]" in str(program)


def test_shapes_are_enough_to_trace():
    program = ji.trace(dense, {"w": jax.ShapeDtypeStruct((12, 5), jnp.float32)}, ji.spec("batch 12"))
    assert program.output_axes == ("batch", 5)
    with pytest.raises(ji.RequestError, match="shapes only"):
        ji.compile(program, buckets={"batch": [1]})


def test_one_trace_for_each_size():
    calls = []

    def counted(params, x):
        calls.append(x.shape)
        return dense(params, x)

    program = ji.trace(counted, PARAMS, ji.spec("batch 12"))
    for _ in range(2):
        for batch in (1, 8):
            program.at({"batch": batch})
    _ = program.jaxpr, program.fingerprint, program.output_axes
    assert len(calls) == program.trace_count == 3  # analysis, 1 and 8


def test_merged_dims_are_named():
    program = ji.trace(lambda p, x: x.reshape(-1, 3), (), ji.spec("batch time 6"))
    assert program.verify().output_axes == ("2*batch*time", 3)


def test_a_dim_that_is_no_product_is_found():
    program = ji.trace(lambda p, x: jnp.concatenate([x, x[:1]]), (), ji.spec("batch 6"))
    with pytest.raises(ji.TraceError, match="output 0"):
        program.verify()


def test_linen_with_static_keywords():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return nn.Dropout(0.5, deterministic=not train)(nn.BatchNorm(use_running_average=not train)(nn.Dense(3)(x)))

    net = Net()
    x = np.ones((2, 4), np.float32)
    variables = net.init(jax.random.key(0), x, train=False)
    program = ji.trace(net, variables, ji.spec("batch 4"), train=False)
    np.testing.assert_array_equal(program.function(variables, x), net.apply(variables, x, train=False))
    with pytest.raises(ji.TraceError, match="draws random bits or changes its own state"):
        ji.trace(net, variables, ji.spec("batch 4"), train=True)


def test_nnx_and_its_methods():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first, self.second = nnx.Linear(4, 3, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)

        def __call__(self, x):
            return self.first(x)

        def other(self, x):
            return self.second(x)

    net = Net(nnx.Rngs(0))
    assert ji.trace(net, ji.spec("batch 4")).output_axes == ("batch", 3)
    assert ji.trace(net, ji.spec("batch 4"), method="other").output_axes == ("batch", 2)


@pytest.mark.parametrize("layer", ["dropout", "batchnorm"])
def test_nnx_in_training_mode_is_refused(layer: str):
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.layer = nnx.Dropout(0.5, rngs=rngs) if layer == "dropout" else nnx.BatchNorm(4, rngs=rngs)

        def __call__(self, x):
            return self.layer(x)

    net = Net(nnx.Rngs(0))
    with pytest.raises(ji.TraceError, match=r"model\.eval\(\)"):
        ji.trace(net, ji.spec("batch 4"))
    net.eval()
    assert ji.trace(net, ji.spec("batch 4")).output_axes == ("batch", 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ji.trace(dense), "params come first"),
        (lambda: ji.trace(dense, PARAMS), "no inputs"),
        (lambda: ji.trace(dense, PARAMS, np.ones(3)), "ji.spec"),
        (
            lambda: ji.trace(dense, PARAMS, ji.spec("batch 13")),
            r"dense can't be traced with inputs float32\[batch 13\]",
        ),
        (lambda: ji.trace(dense, PARAMS, ji.spec("batch 12"), train=True), "train: only modules"),
        (lambda: ji.trace(3, ji.spec("batch 12")), "a function or Flax module is wanted, got int"),
        (lambda: ji.trace(dense, PARAMS, ji.spec("batch 12")).at({"rows": 3}), "named dims"),
    ],
)
def test_refusals(call, message: str):
    with pytest.raises(ji.TraceError, match=message):
        call()
