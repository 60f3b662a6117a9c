import numpy as np
import pytest

import jaxinfer as ji
from jaxinfer import specs
from jaxinfer.buckets import bucket_for, ladder


def test_dims_and_dtype():
    found = ji.spec("batch 224 224 3", "bfloat16")
    assert found.dims == ("batch", 224, 224, 3)
    assert found.dtype.name == "bfloat16"
    assert found.shape({"batch": 2}) == (2, 224, 224, 3)
    assert ji.spec("").dims == ()
    assert str(ji.spec("batch time", "int32")) == "int32[batch time]"


@pytest.mark.parametrize("dims", ["batch batch", "batch -1", "2x", "a,b"])
def test_bad_dims(dims: str):
    with pytest.raises(ji.TraceError, match="spec"):
        ji.spec(dims)


def test_bad_dtype():
    with pytest.raises(ji.TraceError, match="'float33' is not a dtype"):
        ji.spec("batch", "float33")


def test_a_tree_of_specs():
    tree = {"image": ji.spec("batch 8"), "scale": ji.spec("", "float32")}
    assert specs.names(tree) == ("batch",)
    with pytest.raises(ji.TraceError, match=r"ji\.spec"):
        specs.leaves({"image": np.zeros(3)})


def test_fresh_primes_divide_no_other_size():
    taken = [22, 26, 17 * 19, 1, 0]
    primes = specs.fresh_primes(4, taken)
    assert len(set(primes)) == 4
    assert all(t % p for t in taken if t > 1 for p in primes)


def test_ladder_and_bucket():
    assert ladder(100, 16) == [16, 32, 64, 100]
    assert ladder(8) == [1, 2, 4, 8]
    assert [bucket_for(n, [1, 8, 32]) for n in (1, 2, 8, 9, 32)] == [1, 8, 8, 32, 32]
    with pytest.raises(ji.RequestError, match="33 is over the largest bucket, 32"):
        bucket_for(33, [1, 8, 32])
    with pytest.raises(ji.RequestError):
        ladder(0)
