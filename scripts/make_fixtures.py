"""Makes tiny random checkpoints and the oracle's outputs for them, under tests/fixtures (or --out).

Needs torch (CPU), transformers, tokenizers and gguf; the tests that read the fixtures need none of them:

    python scripts/make_fixtures.py --seed 0 --out tests/fixtures

Every checkpoint is written by transformers' own `save_pretrained`, read back from its folder, and run in float32; the
reference is what that gives. All norms and biases are random too: a weight that lands in the wrong place shows.
"""

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
NEW_TOKENS = 16
MARGIN = 1e-3  # between the two best logits of every greedy step: no rounding may decide a token
TEXT = """the quick brown fox jumps over the lazy dog . a river runs past the old stone mill and turns its wheel .
seven small boats carry apples , bread and letters to the islands in winter . who wrote the song about rain ?
reading slowly is no fault ; reading carelessly is . numbers 0 1 2 3 4 5 6 7 8 9 count steps on the long stairs ."""
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SENTENCES = ["the river", "who wrote the song about rain ?", "apples , bread and letters to the old mill", "7"]


def randomise(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Weights so large that attention and activations leave their linear range, embeddings of unit size."""
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        is_norm = "norm" in name.lower() and name.endswith("weight")
        scale = 1.0 if "embed" in name and not is_norm else 0.3
        parameter.data = 1 + 0.3 * noise if is_norm else scale * noise


def llama_tokenizer() -> Tokenizer:
    """Byte-level BPE with ChatML's special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT.split("\n"), trainer)
    return tokenizer


def bert_tokenizer() -> Tokenizer:
    """Lower-case WordPiece with [CLS] ... [SEP]."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=128, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(TEXT.split("\n"), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, **config: Any) -> None:
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))


def llama_reference(model: Any, rng: np.random.Generator) -> dict[str, np.ndarray] | None:
    """tokens [2, 12], logits [2, 12, vocab], prompts [2, 7] and their greedy continuations [2, 16]; None: too close."""
    tokens = rng.integers(3, model.config.vocab_size, (2, 12), dtype=np.int32)
    prompts = rng.integers(3, model.config.vocab_size, (2, 7), dtype=np.int32)
    with torch.no_grad():
        logits = model(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
        grown = torch.tensor(prompts, dtype=torch.long)
        for _ in range(NEW_TOKENS):
            best = model(grown, use_cache=False).logits[:, -1].topk(2)
            if (best.values[:, 0] - best.values[:, 1]).min() < MARGIN:
                return None
            grown = torch.cat([grown, best.indices[:, :1]], dim=1)
    return {"tokens": tokens, "logits": logits, "prompts": prompts, "greedy": grown[:, 7:].numpy().astype(np.int32)}


def old_rope(config: dict[str, Any]) -> None:
    """From transformers 5's spelling to the one before."""
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    config["torch_dtype"] = config.pop("dtype")


def make_llama(
    folder: Path,
    seed: int,
    *,
    tokenizer: bool = False,
    stored: torch.dtype = torch.float32,
    rewrite: Callable[[dict[str, Any]], None] | None = None,
    shard: str = "10GB",
    **options: Any,
) -> None:
    """One Llama folder. A seed whose greedy steps are too close to call is passed over for the next."""
    options = {"vocab_size": 320 if tokenizer else 128, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, **options}
    for attempt in range(seed, seed + 100):
        shutil.rmtree(folder, ignore_errors=True)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **options))
        randomise(model, torch.Generator().manual_seed(attempt))
        model.to(stored).save_pretrained(folder, max_shard_size=shard)
        if rewrite is not None:
            config = json.loads((folder / "config.json").read_text())
            rewrite(config)
            (folder / "config.json").write_text(json.dumps(config, indent=1))
        read = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        reference = llama_reference(read, np.random.default_rng(attempt))
        if reference is not None:
            break
    else:
        raise RuntimeError(f"no seed of 100 gives {folder.name} a margin of {MARGIN}")
    np.savez_compressed(folder / "reference.npz", allow_pickle=False, **reference)
    if tokenizer:
        save_tokenizer(llama_tokenizer(), folder, eos_token="<|im_end|>", bos_token="<|im_start|>", add_bos_token=False)
        (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def make_bert(folder: Path, seed: int, cls: Any, *, sentence: bool = False, **options: Any) -> None:
    """One BERT folder; `sentence` adds a tokenizer and what sentence-transformers writes."""
    sizes = {**SIZES, "vocab_size": 128, "max_position_embeddings": 24}
    model = cls(transformers.BertConfig(**sizes, **options))
    randomise(model, torch.Generator().manual_seed(seed))
    model.save_pretrained(folder)
    read = transformers.BertModel.from_pretrained(folder, add_pooling_layer=False, dtype=torch.float32).eval()
    rng = np.random.default_rng(seed)
    tokens = rng.integers(5, 128, (4, 16), dtype=np.int32)
    mask = np.ones_like(tokens)
    mask[1, 9:] = mask[2, :6] = mask[3, 1:] = 0  # right-padded, left-padded, one token
    tokens *= mask

    def hidden(tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return read(torch.tensor(tokens).long(), torch.tensor(mask)).last_hidden_state.numpy()

    reference = {"tokens": tokens, "mask": mask, "hidden": hidden(tokens, mask)}
    if sentence:
        tokenizer = bert_tokenizer()
        save_tokenizer(tokenizer, folder, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]")
        write_sentence_files(folder)
        vectors = []
        for text in SENTENCES:  # one at a time: no padding
            ids = np.array([tokenizer.encode(text).ids])
            mean = hidden(ids, np.ones_like(ids))[0].mean(axis=0)
            vectors.append(mean / np.linalg.norm(mean))
        reference |= {"texts": np.array(SENTENCES), "vectors": np.stack(vectors)}
    np.savez_compressed(folder / "reference.npz", allow_pickle=False, **reference)


def write_sentence_files(folder: Path) -> None:
    """Mean pooling, then L2 normalisation, of at most 20 tokens."""
    kinds = (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules, indent=1))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 20, "do_lower_case": False}))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    pooling = {"word_embedding_dimension": 32, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))


GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def gguf_name(name: str) -> str:
    if name.startswith("model.layers."):
        _, _, index, part = name.removesuffix(".weight").split(".", 3)
        return f"blk.{index}.{GGUF_NAMES[part]}.weight"
    whole = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    return f"{whole[name.removesuffix('.weight')]}.weight"


def permute(array: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of the rows of q and k."""
    return array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def make_gguf(source: Path, path: Path, kind: gguf.GGMLQuantizationType, seed: int) -> None:
    """The Llama in `source` as GGUF, matrices in `kind`; the reference is transformers on what they dequantise to."""
    model = transformers.LlamaForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    add_gguf_tokenizer(writer, json.loads((source / "tokenizer.json").read_text()))
    state = model.state_dict()
    for name, tensor in state.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = tensor.numpy()
        stored_as = kind if array.ndim == 2 else gguf.GGMLQuantizationType.F32
        tensor.copy_(torch.tensor(gguf.dequantize(gguf.quantize(array, stored_as), stored_as)))
        heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}.get(name.split(".")[-2][0])
        stored = permute(array, heads) if name.endswith(("q_proj.weight", "k_proj.weight")) else array
        writer.add_tensor(gguf_name(name), gguf.quantize(stored, stored_as), raw_dtype=stored_as)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tokens = np.random.default_rng(seed).integers(3, config.vocab_size, (2, 12), dtype=np.int32)
    with torch.no_grad():
        logits = model(torch.tensor(tokens).long()).logits.numpy()
    np.savez_compressed(path.with_suffix(".npz"), allow_pickle=False, tokens=tokens, logits=logits)


def add_gguf_tokenizer(writer: gguf.GGUFWriter, tokenizer: dict[str, Any]) -> None:
    vocab = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    special = {token["content"] for token in tokenizer["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(vocab)
    writer.add_token_types([gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token in vocab])
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(vocab.index("<|im_start|>"))
    writer.add_eos_token_id(vocab.index("<|im_end|>"))
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("tests/fixtures"))
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    out, seed = args.out, 1000 * args.seed
    llama3 = {"rope_type": "llama3", "rope_theta": 100.0, "factor": 4.0, "low_freq_factor": 1.0}
    llama3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 16}
    linear = {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.5}

    make_llama(out / "llama-tied", seed + 1, tie_word_embeddings=True, hidden_act="silu")
    make_llama(out / "llama-biases", seed + 101, attention_bias=True, mlp_bias=True)
    make_llama(out / "llama-gqa", seed + 201, num_key_value_heads=2, tokenizer=True, tie_word_embeddings=True)
    make_llama(out / "llama-rope-llama3", seed + 301, rope_parameters=dict(llama3), num_key_value_heads=1)
    make_llama(
        out / "llama-rope-llama3-old",
        seed + 401,
        rope_parameters=dict(llama3),
        rewrite=old_rope,
        num_key_value_heads=2,
        head_dim=12,
    )
    make_llama(out / "llama-rope-linear", seed + 501, rope_parameters=dict(linear), rewrite=old_rope)
    make_llama(out / "llama-sharded", seed + 601, shard="40KB", num_key_value_heads=2)
    make_llama(out / "llama-bf16", seed + 701, stored=torch.bfloat16, rewrite=old_rope)
    make_bert(out / "bert-sentence", seed + 801, transformers.BertModel, sentence=True)
    make_bert(out / "bert-gelu-new", seed + 802, transformers.BertForMaskedLM, hidden_act="gelu_new")
    (out / "llama-gguf").mkdir(parents=True, exist_ok=True)
    for kind in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.Q8_0):
        make_gguf(out / "llama-gqa", out / "llama-gguf" / f"{kind.name.lower()}.gguf", kind, seed + 901)


if __name__ == "__main__":
    main()
