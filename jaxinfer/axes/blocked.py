"""Primitives that have no factor rule on purpose, each with its reason; refusals quote it.

A test compares this table and the rules with the primitives of the JAX at hand, so that a new JAX release names what
neither knows. What is in none of them is blocked too.
"""

_DEVICES = "a collective: it combines values across devices"
_REFERENCE = "reads or writes a mutable array, whose contents no dataflow shows"
_OPAQUE = "a call of code that JAX doesn't see into"
_SIZES = "works on symbolic shapes, which a trace at concrete sizes doesn't have"
_AUTODIFF = "part of a derivative; it doesn't occur in a traced forward"
_RANDOM = "draws random numbers for the whole array from one state"
_KERNEL = "a fused kernel for one kind of device"
_TYPES = "converts types inside JAX; it doesn't occur in a traced forward"

BLOCKED: dict[str, str] = {
    **dict.fromkeys(
        (
            "all_gather", "all_gather_done", "all_gather_invariant", "all_gather_reduced",
            "all_gather_reduced_start", "all_gather_start", "all_to_all", "all_to_all_done", "all_to_all_start",
            "axis_index", "pbroadcast", "pbroadcast_done", "pbroadcast_dynamic", "pbroadcast_start", "pmax", "pmin",
            "ppermute", "ppermute_done", "ppermute_start", "precv", "preduced", "psend", "psum", "psum_done",
            "psum_invariant", "psum_invariant_start", "psum_start", "ragged_all_to_all", "reduce_scatter",
            "reduce_scatter_done", "reduce_scatter_start", "reduced_vary_cast", "reduced_vary_cast_p", "shard_map",
            "unreduced_pmax", "unreduced_pmin", "unreduced_psum", "unreduced_psum_start",
            "unreduced_reduce_scatter", "unreduced_reduce_scatter_start", "vary_unreduced_cast",
            "vary_unreduced_cast_p", "inspect_sharding", "with_memory_space_constraint", "relayout",
        ),
        _DEVICES,
    ),
    **dict.fromkeys(
        (
            "accum_grad_in_ref", "addupdate", "box_get", "box_set", "core_map", "dce_sink", "empty_ref", "free_ref",
            "freeze", "get", "log_extend", "log_read", "new_box", "new_log", "new_ref", "pin", "run_state", "swap",
            "unpin",
        ),
        _REFERENCE,
    ),
    **dict.fromkeys(
        (
            "call_exported", "call_hi_primitive", "call_hi_primitive_linearized", "custom_partitioning",
            "debug_callback", "debug_print", "ffi_call", "io_callback", "pure_callback", "stage",
        ),
        _OPAQUE,
    ),
    **dict.fromkeys(
        (
            "cudnn_fusion", "dot_product_attention_bwd", "dot_product_attention_bwd_wrapper",
            "dot_product_attention_fp8_bwd", "dot_product_attention_fp8_bwd_wrapper",
            "dot_product_attention_fp8_fwd", "dot_product_attention_fp8_fwd_wrapper", "dot_product_attention_fwd",
            "dot_product_attention_fwd_wrapper", "philox2x32", "philox4x32", "scaled_dot", "scaled_matmul",
            "scaled_matmul_wrapper", "threefry4x32",
        ),
        _KERNEL,
    ),
    **dict.fromkeys(("dim_as_value", "dimension_size", "shape_assertion"), _SIZES),
    **dict.fromkeys(
        (
            "create_linear", "custom_jvp_call_jaxpr", "custom_lin", "linear_call", "remat_opt", "tie", "unreachable",
            "zeros_like", "check",
        ),
        _AUTODIFF,
    ),
    **dict.fromkeys(("iota_2x32_shape", "random_gamma", "rng_bit_generator", "rng_uniform"), _RANDOM),
    **dict.fromkeys(("to_edtype", "from_edtype", "empty", "empty2", "broadcast_to"), _TYPES),
    **dict.fromkeys(("after_all", "create_token", "platform_index"), "orders side effects or picks a platform"),
    "cholesky_update": "updates one factorisation; JAX gives it no batch dims",
    "ragged_dot_general": "which rows belong to which group depends on the sizes of the groups before",
}  # fmt: skip
