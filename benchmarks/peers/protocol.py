"""The peers' side of the benchmarks: a worker that answers one JSON object a line on stdin with one on stdout.

Asked {"op": "generate", ...arguments}, it calls the peer's method of that name and answers
{"result": ..., "seconds": time in the method, "peak_rss": most bytes this process held}, or {"error": traceback}.
It sleeps in a read between two questions and ends when stdin closes.
"""

import json
import os
import resource
import sys
import time
import traceback


def peak_rss() -> int:
    """Bytes; ru_maxrss counts KiB on Linux, bytes on macOS."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def serve(peer: object) -> None:
    # Libraries print to stdout as they please: the answers keep it to themselves, the rest joins stderr.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    for line in sys.stdin:
        question = json.loads(line)
        method = getattr(peer, question.pop("op"))
        started = time.perf_counter()
        try:
            result = method(**question)
            answer = {"result": result, "seconds": time.perf_counter() - started, "peak_rss": peak_rss()}
        except Exception:
            answer = {"error": traceback.format_exc()}
        answers.write(json.dumps(answer) + "\n")
