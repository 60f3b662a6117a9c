"""all-MiniLM-L6-v2: jaxinfer beside transformers and onnxruntime, float32, from text to normalised vectors.

    python benchmarks/embed.py --torch-python PYTHON

Every text has the same number of tokens, so no peer pads. Batch 1 is one call a text. The onnxruntime graph is what
torch.onnx.export makes of transformers' model, pooling and normalisation in the graph; it needs onnx and onnxscript.
"""

import argparse
import json
import random
from contextlib import ExitStack
from typing import Any

import harness
from harness import PEERS, Worker

SUBJECT, REFERENCE = "jaxinfer", "transformers"


def peers(args: argparse.Namespace) -> dict[str, tuple[list, dict[str, Any]]]:
    """name -> the worker's command and the arguments of its `prepare`."""
    checkpoint = args.checkpoint or harness.fetch(args.jaxinfer_python, "all-minilm-l6-v2")
    common = {"path": str(checkpoint), "threads": args.threads}
    rows = {
        SUBJECT: ([args.jaxinfer_python, PEERS / "jaxinfer_peer.py", "encoder"], common),
        REFERENCE: ([args.torch_python, PEERS / "transformers_peer.py", "encoder"], common),
        "onnxruntime": (
            [args.torch_python, PEERS / "onnxruntime_peer.py"],
            {**common, "graph": str(args.work / "encoder.onnx")},
        ),
    }
    wanted = args.peers or list(rows)
    if unknown := set(wanted) - set(rows):
        raise SystemExit(f"--peers must be of {list(rows)}; got {sorted(unknown)}")
    if "onnxruntime" in wanted:
        harness.make_models(args.torch_python, "encoder", checkpoint, args.work)
    return {name: rows[name] for name in wanted}


def cosine(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))  # both are normalised


def main() -> None:
    parser = harness.parser(__doc__ or "", "embed")
    parser.add_argument("--peers", nargs="+", help="a subset, in the order of the table")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 128], help="tokens a text, with [CLS] and [SEP]")
    parser.add_argument("--texts", type=int, default=192, help="texts a measure at the shortest length and batch 32")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    harness.bind(args.threads)
    chosen = peers(args)
    words = json.loads((harness.HERE / "prompts.json").read_text(encoding="utf-8"))["words"]
    draw = random.Random(0)
    rates, cosines = {}, {}
    with ExitStack() as stack:
        environment = {"JAXINFER_CACHE": str(args.work / "cache")}
        workers = {n: stack.enter_context(Worker(n, command, environment)) for n, (command, _) in chosen.items()}
        versions = {n: workers[n].call("prepare", **arguments) for n, (_, arguments) in chosen.items()}
        for length in args.lengths:
            for batch in args.batches:
                # Enough texts for about a second; whole batches.
                count = max(1, args.texts * min(args.lengths) // length // (4 if batch == 1 else 1) // batch) * batch
                texts = [" ".join(draw.choice(words) for _ in range(length - 2)) for _ in range(count)]

                def rate(name: str, texts: list[str] = texts, batch: int = batch) -> float:
                    workers[name].call("embed", texts=texts, batch=batch)
                    return len(texts) / workers[name].seconds

                scenario = f"batch {batch}, {length} tokens"
                vectors = {
                    n: worker.call("embed", texts=texts[:batch], batch=batch, keep=True)
                    for n, worker in workers.items()
                }
                if REFERENCE in vectors:
                    cosines[scenario] = {
                        n: min(map(cosine, rows, vectors[REFERENCE])) for n, rows in vectors.items() if n != REFERENCE
                    }
                rates[scenario] = harness.interleave({n: lambda n=n: rate(n) for n in workers}, args.rounds)
                print(
                    f"{scenario}: " + ", ".join(f"{k} {harness.spread(v)}" for k, v in rates[scenario].items()),
                    flush=True,
                )
        peaks = {n: worker.peak_rss / 1e6 for n, worker in workers.items()}
    parts = {
        "Embeddings per second": harness.comparison("embeddings/s", rates, SUBJECT),
        "Peak resident memory, MB": harness.table(
            ["", *peaks], [["after all of the above", *(f"{v:.0f}" for v in peaks.values())]]
        ),
    }
    if cosines:
        others = list(next(iter(cosines.values())))
        rows = [[scenario, *(f"{cells[n]:.7f}" for n in others)] for scenario, cells in cosines.items()]
        parts[f"Least cosine to {REFERENCE}"] = harness.table(["", *others], rows)
    raw = {"embeddings per second": rates, "least cosine": cosines, "peak MB": peaks}
    harness.write(args.out, args, versions, parts, raw)


if __name__ == "__main__":
    main()
