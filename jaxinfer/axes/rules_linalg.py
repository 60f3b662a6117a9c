"""Factor rules of linear algebra and fft: leading dims are a batch of problems, the last ones are one problem."""

from jaxinfer.axes.factors import Factors, absent, rule
from jaxinfer.graph import Equation

# Dims that one problem has in the first operand; all operands and results have the same batch dims before theirs.
_CORE = {
    "cholesky": 2,
    "eig": 2,
    "eigh": 2,
    "geqp3": 2,
    "geqrf": 2,
    "hessenberg": 2,
    "householder_product": 2,
    "lu": 2,
    "lu_pivots_to_permutation": 1,
    "ormqr": 2,
    "qr": 2,
    "schur": 2,
    "svd": 2,
    "symmetric_product": 2,
    "tridiagonal": 2,
    "tridiagonal_solve": 1,
}


@rule(
    *_CORE,
    params="lower sort_eigenvalues subset_by_index algorithm implementation compute_left_eigenvectors "
    "compute_right_eigenvectors enable_eigvec_derivs pivoting full_matrices use_magma compute_uv perturb_singular "
    "compute_schur_vectors sort_eig_vals permutation_size alpha beta left transpose",
    select_callable=absent,
)
def _problems(equation: Equation) -> Factors | None:
    return _batched(equation, len(equation.inputs[0].shape) - _CORE[equation.name])


def _batched(equation: Equation, count: int) -> Factors | None:
    """The first `count` dims of everything are batch dims, the others needed whole."""
    nodes = (*equation.inputs, *equation.outputs)
    batch = equation.inputs[0].shape[:count]
    if count < 0 or any(n.shape[:count] != batch for n in nodes):
        return None
    dims = [(*range(count), *(None,) * (len(n.shape) - count)) for n in nodes]
    return Factors(tuple(dims[: len(equation.inputs)]), tuple(dims[len(equation.inputs) :]))


@rule("triangular_solve", params="left_side lower transpose_a conjugate_a unit_diagonal")
def _triangular_solve(equation: Equation) -> Factors | None:
    """Besides the batch dims, the right-hand sides are independent: columns of b, or its rows if a is on the right."""
    rank = len(equation.inputs[0].shape)
    found = _batched(equation, rank - 2)
    if found is None:
        return None
    side = rank - 1 if equation.params["left_side"] else rank - 2
    many = tuple(rank if d == side else f for d, f in enumerate(found.inputs[1]))
    return Factors((found.inputs[0], many), (many,))


@rule("fft", params="fft_type fft_lengths")
def _fft(equation: Equation) -> Factors | None:
    return _batched(equation, len(equation.inputs[0].shape) - len(equation.params["fft_lengths"]))
