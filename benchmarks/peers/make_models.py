"""Writes one set of weights in the formats that the peers read. Runs in the peers' interpreter.

    python benchmarks/peers/make_models.py language MODEL.gguf FOLDER
        FOLDER/F32.gguf, FOLDER/Q8_0.gguf  the dequantised weights, rewritten with the `gguf` package
        FOLDER/transformers/               the same as safetensors, float32, with config
    python benchmarks/peers/make_models.py encoder MODEL_FOLDER FOLDER
        FOLDER/encoder.onnx                mean pooling and normalisation are in the graph

What exists already is left as it is.
"""

import argparse
from collections.abc import Callable
from pathlib import Path


def write_gguf(source: Path, target: Path, kind: str) -> None:
    """A copy of `source` with every matrix as `kind` ("F32", "Q8_0") and the rest as F32."""
    import gguf

    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, architecture)
    file_type = {"F32": gguf.LlamaFileType.ALL_F32, "Q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}[kind]
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        value = int(file_type) if name == "general.file_type" else field.contents()
        inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, value, field.types[0], inner)
    for tensor in reader.tensors:
        dense = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype("float32")
        stored = gguf.GGMLQuantizationType[kind] if dense.ndim > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(tensor.name, gguf.quants.quantize(dense, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# Llama's tensors: llama.cpp's name -> transformers' name; a layer's come after "blk.N." and "model.layers.N.".
NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}


def write_transformers(source: Path, target: Path) -> None:
    """The dequantised weights as a LlamaForCausalLM folder. transformers' own GGUF reader would ask for accelerate."""
    import gguf
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    reader = gguf.GGUFReader(source)
    read = {name: field.contents() for name, field in reader.fields.items() if name.startswith("llama.")}
    heads, groups = read["llama.attention.head_count"], read["llama.attention.head_count_kv"]
    weights = {}
    for tensor in reader.tensors:
        dense = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype("float32")
        block, _, rest = tensor.name.partition(".")
        layer, _, name = rest.partition(".") if block == "blk" else ("", "", tensor.name)
        if name in ("attn_q.weight", "attn_k.weight"):  # llama.cpp rotates neighbours, transformers halves
            n = heads if name == "attn_q.weight" else groups
            dense = dense.reshape(n, -1, 2, dense.shape[-1]).swapaxes(1, 2).reshape(dense.shape)
        prefix = f"model.layers.{layer}." if layer else ""
        weights[prefix + NAMES[name]] = torch.tensor(dense)
    config = LlamaConfig(
        vocab_size=read["llama.vocab_size"],
        hidden_size=read["llama.embedding_length"],
        intermediate_size=read["llama.feed_forward_length"],
        num_hidden_layers=read["llama.block_count"],
        num_attention_heads=heads,
        num_key_value_heads=groups,
        max_position_embeddings=read["llama.context_length"],
        rms_norm_eps=read["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": read["llama.rope.freq_base"]},
        tie_word_embeddings="lm_head.weight" not in weights,
        dtype="float32",
    )
    model = LlamaForCausalLM(config)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise ValueError(f"tensors missing: {missing}, unexpected: {unexpected}")
    model.save_pretrained(target)


def write_onnx(source: Path, target: Path) -> None:
    """BERT, mean pooling over the mask and L2 normalisation as one graph with dynamic batch and length."""
    import torch
    from transformers import AutoModel

    class Embedder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert = AutoModel.from_pretrained(source, dtype=torch.float32, attn_implementation="eager").eval()

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            mask = attention_mask[..., None].to(hidden.dtype)
            pooled = (hidden * mask).sum(1) / mask.sum(1)
            return torch.nn.functional.normalize(pooled, dim=-1)

    ids, mask = torch.ones(2, 16, dtype=torch.int64), torch.ones(2, 16, dtype=torch.int64)
    dims = {0: torch.export.Dim("batch", min=1, max=1024), 1: torch.export.Dim("length", min=2, max=512)}
    torch.onnx.export(
        Embedder(),
        (ids, mask),
        target,
        input_names=["input_ids", "attention_mask"],
        output_names=["embeddings"],
        dynamic_shapes={"input_ids": dims, "attention_mask": dims},
        dynamo=True,
        external_data=False,
    )


def once(target: Path, write: Callable[[Path], None]) -> None:
    """Has `write` make the file or folder under a temporary name and moves it into place, unless it is there."""
    if target.exists():
        return
    temporary = target.with_name(f".partial-{target.name}")
    write(temporary)
    temporary.rename(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["language", "encoder"])
    parser.add_argument("source", type=Path)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.kind == "encoder":
        once(args.folder / "encoder.onnx", lambda target: write_onnx(args.source, target))
        return
    for kind in ("F32", "Q8_0"):
        once(args.folder / f"{kind}.gguf", lambda target, kind=kind: write_gguf(args.source, target, kind))
    once(args.folder / "transformers", lambda target: write_transformers(args.source, target))


if __name__ == "__main__":
    main()
