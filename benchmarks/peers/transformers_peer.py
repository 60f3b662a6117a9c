"""transformers on torch CPU, float32, its defaults otherwise: `python transformers_peer.py language|encoder`."""

import sys
from typing import Any

import protocol


def _versions() -> str:
    import torch
    import transformers

    return f"transformers {transformers.__version__}, torch {torch.__version__}"


class Language:
    model: Any = None

    def prepare(self, path: str, threads: int, sequences: int, context: int) -> str:
        """Loads the folder `path`. The cache grows as it is needed, so `sequences` and `context` don't matter."""
        del sequences, context
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        if self.model is None:
            self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
            self.model.generation_config.eos_token_id = None  # never stop early
            self.model.generation_config.pad_token_id = 0
        return _versions()

    def generate(self, prompts: list[list[int]], max_tokens: int) -> dict[str, Any]:
        """Greedy; prompts of unequal length are padded on the left, as its documentation says to."""
        import torch

        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        with torch.inference_mode():
            output = self.model.generate(ids, attention_mask=mask, max_new_tokens=max_tokens, do_sample=False)
        return {"tokens": output[:, width:].tolist()}

    def first_token(self, path: str, threads: int, prompt: list[int], context: int) -> dict[str, Any]:
        self.prepare(path, threads, 1, context)
        return self.generate([prompt], 1)


class Encoder:
    model: Any = None
    tokenizer: Any = None

    def prepare(self, path: str, threads: int) -> str:
        import torch
        from transformers import AutoModel, AutoTokenizer

        torch.set_num_threads(threads)
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.model = AutoModel.from_pretrained(path, dtype=torch.float32).eval()
        return _versions()

    def embed(self, texts: list[str], batch: int, keep: bool = False) -> list[list[float]] | None:
        """Mean pooling and normalisation, as the model's card does."""
        import torch

        rows = []
        with torch.inference_mode():
            for start in range(0, len(texts), batch):
                inputs = self.tokenizer(texts[start : start + batch], padding=True, return_tensors="pt")
                hidden = self.model(**inputs).last_hidden_state
                mask = inputs["attention_mask"][..., None].to(hidden.dtype)
                pooled = (hidden * mask).sum(1) / mask.sum(1)
                rows.append(torch.nn.functional.normalize(pooled, dim=-1).numpy())
        return [row.tolist() for block in rows for row in block] if keep else None


if __name__ == "__main__":
    protocol.serve({"language": Language, "encoder": Encoder}[sys.argv[1]]())
