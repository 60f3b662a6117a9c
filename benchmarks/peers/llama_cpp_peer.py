"""llama.cpp through xllamacpp's embedded server: `python llama_cpp_peer.py`."""

import importlib.metadata
from typing import Any

import protocol


class Language:
    server: Any = None
    sequences = 0

    def prepare(self, path: str, threads: int, sequences: int, context: int) -> str:
        """Loads the GGUF `path` with `context` tokens for each of `sequences`, anew if that number changes."""
        if self.sequences != sequences:
            import xllamacpp

            self.server = None  # the old one's memory goes first
            params = xllamacpp.CommonParams()
            params.model.path = path
            params.n_parallel, params.n_ctx = sequences, sequences * context
            params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
            # A prompt that was seen in an earlier round would cost nothing.
            params.cache_prompt, params.cache_ram_mib = False, 0
            self.server, self.sequences = xllamacpp.Server(params), sequences
        return f"xllamacpp {importlib.metadata.version('xllamacpp')}"

    def generate(self, prompts: list[list[int]], max_tokens: int) -> dict[str, Any]:
        """Greedy, all prompts as one request. The server tells texts, not token ids."""
        request = {
            "prompt": prompts if len(prompts) > 1 else prompts[0],
            "max_tokens": max_tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "cache_prompt": False,
        }
        choices = self.server.handle_completions(request)["choices"]
        if any(choice["finish_reason"] != "length" for choice in choices) or len(choices) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts gave {[choice['finish_reason'] for choice in choices]}")
        return {"texts": [choice["text"] for choice in sorted(choices, key=lambda choice: choice["index"])]}

    def first_token(self, path: str, threads: int, prompt: list[int], context: int) -> dict[str, Any]:
        self.prepare(path, threads, 1, context)
        return self.generate([prompt], 1)


if __name__ == "__main__":
    protocol.serve(Language())
