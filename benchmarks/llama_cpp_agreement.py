"""What llama.cpp and jaxinfer say of the same SmolLM2 prompts: how far greedy texts agree, and the first token's odds.

    python benchmarks/llama_cpp_agreement.py --gguf SHIPPED.gguf --f32 F32.gguf

Needs xllamacpp, gguf and tokenizers. jaxinfer's side is tests/data/smollm2_reference.npz, which its tests hold it to,
token by token.
llama.cpp runs the GGUF as shipped (Q4_1: it rounds activations to 8 bits for each product), and the same weights
dequantised to float32, where no such rounding remains.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tokenizers.decoders import ByteLevel

sys.path.insert(0, str(Path(__file__).parent / "peers"))
from llama_cpp_peer import Language


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("gguf", "f32"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "llama_cpp_agreement.json")
    arguments = parser.parse_args()
    with np.load(Path(__file__).parent.parent / "tests" / "data" / "smollm2_reference.npz") as file:
        reference = dict(file)
    cases = [
        (reference[f"ids{i}"], int(reference[f"prompt_length{i}"]), reference[f"largest{i}"], reference[f"lead{i}"])
        for i in range(len(reference["prompts"]))
    ]
    pieces = gguf.GGUFReader(arguments.gguf).fields["tokenizer.ggml.tokens"].contents()
    found = {
        name: compare(path, cases, pieces) for name, path in (("shipped", arguments.gguf), ("float32", arguments.f32))
    }
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


def compare(path: Path, cases: list[Any], pieces: list[str]) -> dict[str, Any]:
    """Leading tokens of each text that are jaxinfer's, and how far the best logit led where they part."""
    peer = Language()
    peer.prepare(str(path), 2, 1, 256)
    prompts = [ids[:n].tolist() for ids, n, _, _ in cases]
    texts = [peer.generate([p], 64)["texts"][0] for p in prompts]
    equal, partings = [], []
    for text, (ids, n, _, lead) in zip(texts, cases, strict=True):
        own = [ByteLevel().decode([pieces[i] for i in ids[n : n + k]]) for k in range(65)]
        agreed = max(k for k in range(65) if text.startswith(own[k]))
        equal.append(agreed)
        if agreed < 64:
            partings.append(round(float(lead[n - 1 + agreed]), 3))  # how sure float32 was of the token they part at
    return {"prompts": len(cases), "tokens": 64, "equal_tokens": equal, "lead_where_they_part": partings}


if __name__ == "__main__":
    main()
