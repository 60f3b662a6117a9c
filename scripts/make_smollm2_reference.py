"""Makes tests/data/smollm2_reference.npz: transformers' view of SmolLM2-135M-Instruct's GGUF in float32.

Needs torch (CPU), transformers, accelerate and gguf; the test that reads the file needs none of them:

    python scripts/make_smollm2_reference.py path/to/SmolLM2-135M-Instruct.Q4_1.gguf

For each prompt: its token ids, 64 greedy tokens (the end token ignored), and at every position of prompt and answer the
logits of COLUMNS tokens spread over the vocabulary, with the largest logit and its lead over the second.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import transformers

PROMPTS = [
    "The capital of France is",
    "Once upon a time",
    "def fibonacci(n):",
    "The three laws of thermodynamics are",
    "Water boils at",
    "In 1969, humans",
    "List of prime numbers: 2, 3, 5,",
    "My favourite recipe for pancakes:",
    "The quick brown fox",
    "Quantum computing differs from classical computing because",
]
NEW_TOKENS, COLUMNS = 64, 96


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "tests" / "data")
    arguments = parser.parse_args()
    source = {"pretrained_model_name_or_path": arguments.gguf.parent, "gguf_file": arguments.gguf.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    model = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32).eval()
    columns = np.linspace(0, model.config.vocab_size - 1, COLUMNS).astype(np.int32)
    found: dict[str, np.ndarray] = {"columns": columns, "prompts": np.array(PROMPTS)}
    for number, prompt in enumerate(PROMPTS):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
            whole = model.generate(ids, **options)
            logits = model(whole).logits[0].numpy()
        ordered = np.sort(logits, axis=-1)
        found[f"ids{number}"] = whole[0].numpy().astype(np.int32)
        found[f"prompt_length{number}"] = np.int32(ids.shape[1])
        found[f"logits{number}"] = logits[:, columns]
        found[f"largest{number}"], found[f"lead{number}"] = ordered[:, -1], ordered[:, -1] - ordered[:, -2]
    np.savez_compressed(arguments.out / "smollm2_reference.npz", **found)


if __name__ == "__main__":
    main()
