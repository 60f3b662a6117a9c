"""The Flax (linen) classes of transformers 4.55.4, at tiny sizes, with random weights."""

from collections.abc import Callable
from typing import Any

VOCAB = 97
Given = tuple[Callable[..., Any], Any, tuple[tuple[str, str], ...], int]


def _lively(shapes: Any) -> Any:
    """Random weights of ordinary size: the classes start at a deviation of 0.02, at which attention hardly matters."""
    from flax.core import unfreeze
    from forwards import weights

    return weights.like(unfreeze(shapes), 0)


def _causal_lm(name: str, **config: Any) -> Given:
    import transformers

    model = getattr(transformers, f"Flax{name}ForCausalLM", None) or getattr(transformers, f"Flax{name}LMHeadModel")
    model = model(model.config_class(vocab_size=VOCAB, **config), _do_init=False)
    forward = lambda params, tokens: model(tokens, params=params).logits  # noqa: E731
    return forward, _lively(model.params_shape_tree), (("batch time", "int32"),), VOCAB


def gpt2() -> Given:
    return _causal_lm("GPT2", n_positions=64, n_embd=32, n_layer=2, n_head=4)


def llama() -> Given:
    return _causal_lm("Llama", **_LLAMA, max_position_embeddings=64)


def mistral() -> Given:
    return _causal_lm("Mistral", **_LLAMA, max_position_embeddings=64, sliding_window=7)


def gemma() -> Given:
    return _causal_lm("Gemma", **_LLAMA, max_position_embeddings=64, head_dim=8)


def gpt_neo() -> Given:
    """Every other layer sees a local window."""
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "intermediate_size": 64}
    kinds = {"attention_types": [[["global", "local"], 1]], "window_size": 6}
    return _causal_lm("GPTNeo", max_position_embeddings=64, **sizes, **kinds)


def gptj() -> Given:
    return _causal_lm("GPTJ", n_positions=64, n_embd=32, n_layer=2, n_head=4, rotary_dim=4)


def opt() -> Given:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 64}
    return _causal_lm("OPT", max_position_embeddings=64, word_embed_proj_dim=32, **sizes)


def bloom() -> Given:
    return _causal_lm("Bloom", hidden_size=32, n_layer=2, n_head=4)


def xglm() -> Given:
    sizes = {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 64}
    return _causal_lm("XGLM", max_position_embeddings=64, **sizes)


def bart() -> Given:
    """forward(params, tokens, source): the decoder's tokens first, as in any seq2seq Program.

    (Its T5 calls `jnp.clip` by a name that JAX 0.10 has dropped, and can't run there at all.)
    """
    import transformers

    layers = {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    heads = {"d_model": 32, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    config = transformers.BartConfig(vocab_size=VOCAB, max_position_embeddings=64, **layers, **heads)
    model = transformers.FlaxBartForConditionalGeneration(config, _do_init=False)
    forward = lambda params, tokens, source: model(source, decoder_input_ids=tokens, params=params).logits  # noqa: E731
    return forward, _lively(model.params_shape_tree), (("batch time", "int32"), ("batch source", "int32")), VOCAB


_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
PROGRAMS = {f.__name__: f for f in (gpt2, llama, mistral, gemma, gpt_neo, gptj, opt, bloom, xglm, bart)}
