"""jaxinfer, float32: `python jaxinfer_peer.py language|encoder`."""

import sys
from typing import Any

import protocol


def _versions() -> str:
    import jax

    import jaxinfer as ji

    return f"jaxinfer {ji.__version__}, jax {jax.__version__}"


class Language:
    model: Any = None

    def prepare(self, path: str, threads: int, sequences: int, context: int) -> str:
        """Loads `path`. XLA:CPU has a thread a core and no setting: the driver has bound the process to its cores."""
        del threads, sequences
        import jaxinfer as ji

        if self.model is None:
            self.model = ji.load(path, dtype="float32", max_len=context)
        return _versions()

    def generate(self, prompts: list[list[int]], max_tokens: int) -> dict[str, Any]:
        completions = self.model.generate(prompts, max_tokens=max_tokens, ignore_eos=True)
        return {"tokens": [c.tokens for c in completions], "texts": [c.text for c in completions]}

    def first_token(self, path: str, threads: int, prompt: list[int], context: int) -> dict[str, Any]:
        """Streams, as one who waits for a first token does, and leaves after it."""
        self.prepare(path, threads, 1, context)
        deltas = self.model.stream(prompt, max_tokens=16, ignore_eos=True)
        tokens = next(delta.tokens for delta in deltas if delta.tokens)
        return {"tokens": [tokens]}


class Encoder:
    model: Any = None

    def prepare(self, path: str, threads: int) -> str:
        del threads
        import jaxinfer as ji

        self.model = ji.load(path, dtype="float32")
        return _versions()

    def embed(self, texts: list[str], batch: int, keep: bool = False) -> list[list[float]] | None:
        if batch == 1:  # a caller with one text at a time
            rows = [self.model.embed([text])[0] for text in texts]
        else:
            rows = self.model.embed(texts, batch_size=batch)
        return [row.tolist() for row in rows] if keep else None


if __name__ == "__main__":
    protocol.serve({"language": Language, "encoder": Encoder}[sys.argv[1]]())
