"""Run the official COCO caption evaluation: pycocoevalcap, which needs Java.

    python tests/golden/oracle.py < jobs.json > results.json

A job is {"predictions": [caption, ...], "references": [[caption, ...], ...]}, one entry per image. Its result
is {"predictions": [tokens, ...], "references": [[tokens, ...], ...], "scores": {...}, "per_image": [{...}],
"seconds": s} with the names of `captioning.scores.names`. Without predictions there are only tokens.

It runs as a process of its own, so that pycocoevalcap can live in another environment.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    jobs = json.load(sys.stdin)
    json.dump([evaluate(job["predictions"], job["references"]) for job in jobs], sys.stdout)


def evaluate(predictions: list[str], references: list[list[str]]) -> dict:
    """Tokenise with Java, then score; `seconds` covers both."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    begin = time.perf_counter()
    tokenize = PTBTokenizer().tokenize
    targets = tokenize({i: [{"caption": c} for c in captions] for i, captions in enumerate(references)})
    result: dict[str, Any] = {"references": [targets.get(i, []) for i in range(len(references))]}
    if predictions:
        hypotheses = tokenize({i: [{"caption": caption}] for i, caption in enumerate(predictions)})
        bleu, bleus = Bleu(4).compute_score(targets, hypotheses, verbose=0)
        rouge, rouges = Rouge().compute_score(targets, hypotheses)
        cider, ciders = Cider().compute_score(targets, hypotheses)
        names = ["bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider_d"]
        columns = [*bleus, rouges, ciders]
        result["predictions"] = [hypotheses[i][0] for i in range(len(predictions))]
        result["scores"] = dict(zip(names, map(float, [*bleu, rouge, cider]), strict=True))
        result["per_image"] = [dict(zip(names, map(float, row), strict=True)) for row in zip(*columns, strict=True)]
    return {**result, "seconds": time.perf_counter() - begin}


def run(jobs: list[dict], python: str = sys.executable) -> list[dict]:
    """`evaluate` every job in a process of the interpreter `python`."""
    process = subprocess.run(
        [python, Path(__file__)], input=json.dumps(jobs), stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(process.stdout)


if __name__ == "__main__":
    main()
