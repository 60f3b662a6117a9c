"""onnxruntime on the graph that make_models.py exports: `python onnxruntime_peer.py`."""

from pathlib import Path
from typing import Any

import numpy as np
import protocol


class Encoder:
    session: Any = None
    tokenizer: Any = None

    def prepare(self, path: str, threads: int, graph: str) -> str:
        """path: the checkpoint's folder, for its tokenizer; graph: the .onnx file."""
        import onnxruntime
        import tokenizers

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        self.tokenizer = tokenizers.Tokenizer.from_file(str(Path(path) / "tokenizer.json"))
        self.tokenizer.no_truncation()
        self.tokenizer.enable_padding()  # to the longest of a batch; the file asks for 128 always
        return f"onnxruntime {onnxruntime.__version__}"

    def embed(self, texts: list[str], batch: int, keep: bool = False) -> list[list[float]] | None:
        rows = []
        for start in range(0, len(texts), batch):
            encodings = self.tokenizer.encode_batch(texts[start : start + batch])
            ids = np.array([encoding.ids for encoding in encodings], np.int64)
            mask = np.array([encoding.attention_mask for encoding in encodings], np.int64)
            rows.append(self.session.run(None, {"input_ids": ids, "attention_mask": mask})[0])
        return np.concatenate(rows).tolist() if keep else None


if __name__ == "__main__":
    protocol.serve(Encoder())
