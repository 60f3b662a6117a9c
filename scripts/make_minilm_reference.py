"""Makes tests/data/minilm_reference.npz: 100 sentences and what transformers makes of them with all-MiniLM-L6-v2.

Needs torch (CPU) and transformers, and the checkpoint's folder:

    python scripts/make_minilm_reference.py FOLDER

Each text is run alone, without padding, at most 256 tokens, mean-pooled and normalised, as the folder's files say.
"""

import argparse
import random
from pathlib import Path

import numpy as np
import torch
import transformers

WRITTEN = [
    "",
    "a",
    "Rain.",
    "42",
    "?!",
    "Hello, world!",
    "The quick brown fox jumps over the lazy dog.",
    "THE QUICK BROWN FOX JUMPS OVER THE LAZY DOG.",
    "Où est la bibliothèque ?",
    "Das Übermaß an Größe überrascht niemanden.",
    "El niño comió piñones en la montaña.",
    "Сколько стоит билет до Москвы?",
    "東京は夜になると静かになる。",
    "안녕하세요, 반갑습니다.",
    "مرحبا بالعالم",
    "I ❤️ machine learning 🚀🚀🚀",
    "def add(a, b):\n    return a + b",
    "E = mc^2 and F = ma; what is 3.14159 * 2?",
    "https://example.org/path?query=1&other=two#fragment",
    "naïve café résumé coöperate",
    "antidisestablishmentarianism pneumonoultramicroscopicsilicovolcanoconiosis",
    "tab\tseparated\tvalues\nand a second line",
    "     leading and trailing blanks     ",
    "[CLS] special tokens spelled out [SEP] [MASK] [PAD]",
    "zero\u200bwidth\u200bspaces and a combining e\u0301",
]
SUBJECTS = [
    "The river",
    "A patient engineer",
    "My neighbour",
    "The old library",
    "Nobody",
    "An electron",
    "The committee",
]
VERBS = ["crosses", "measures", "forgets", "repairs", "describes", "carries", "refuses", "compares"]
OBJECTS = [
    "seven bridges",
    "the missing letters",
    "a slow clock",
    "its own shadow",
    "two kinds of error",
    "the harvest",
]
ENDINGS = [
    "before winter",
    "without a word",
    "in the second year",
    "because the bank closed early",
    "at 5:30 pm",
    "again",
]


def sentences(count: int, generator: random.Random) -> list[str]:
    """The written ones, then composed ones of 5 to some 400 words: the longest are over the limit of 256 tokens."""
    texts = list(WRITTEN)
    while len(texts) < count:
        clauses = int(1.06 ** (len(texts) - len(WRITTEN)))  # 1 to 74
        words = [" ".join(map(generator.choice, (SUBJECTS, VERBS, OBJECTS, ENDINGS))) for _ in range(clauses)]
        texts.append(", while ".join(words) + ".")
    return texts


def embed(text: str, tokenizer: transformers.PreTrainedTokenizerBase, model: torch.nn.Module) -> np.ndarray:
    inputs = tokenizer(text, truncation=True, max_length=256, return_tensors="pt")
    with torch.no_grad():
        vector = model(**inputs).last_hidden_state[0].mean(dim=0)
    return (vector / vector.norm()).numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, default=Path("tests/data/minilm_reference.npz"))
    args = parser.parse_args()
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.folder)
    model = transformers.AutoModel.from_pretrained(args.folder, dtype=torch.float32).eval()
    texts = sentences(100, random.Random(0))
    vectors = np.stack([embed(text, tokenizer, model) for text in texts])
    # 2^-20 is a hundredth of what cosine >= 0.99999 can tell, and makes the file compress.
    vectors = (np.round(vectors * 2**20) / 2**20).astype(np.float32)
    lengths = np.array([len(tokenizer(text).input_ids) for text in texts], np.int32)
    np.savez_compressed(args.out, allow_pickle=False, texts=np.array(texts), vectors=vectors, lengths=lengths)
    print(f"{args.out}: {args.out.stat().st_size} bytes; lengths {lengths.min()} to {lengths.max()} tokens")


if __name__ == "__main__":
    main()
