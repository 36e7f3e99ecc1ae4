"""What to prune an instruct model on: KL on held-out chat and articles, by the text of calibration, search and refit.

    python benchmarks/chats.py OUT [--model smollm2-135m] [--arms articles own ...] [--tokens 32768] [--length 512]

resumes. The chats are derived here, and the model wrote none of their answers: a question for each packaged article's
title, answered by the article's own text. Titles are split once: a tenth are in no text that an arm sees, neither as
chat nor as article. KL to the dense model in nats a token, over answers alone on chats, and
seconds of each run, which for arms with own answers contain writing them. Results are in OUT/results.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from pathlib import Path
from typing import Any

import torch

from darwinlm.commands.compress import run
from darwinlm.commands.run_directory import load
from darwinlm.config.own import OwnConfig
from darwinlm.config.run import CalibrationConfig, EvaluationConfig, RefitConfig, RunConfig, SearchConfig
from darwinlm.data.chat import Chat
from darwinlm.data.corpus import Drawn, stream_beside
from darwinlm.data.documents import PACKAGED, _packaged, text_of
from darwinlm.data.packing import as_counts, as_sequences
from darwinlm.evaluation.quality import perplexity_and_kl
from darwinlm.model.checkpoint import find_checkpoint
from darwinlm.runtime.device import resolve_device
from darwinlm.runtime.files import write_json, write_text
from darwinlm.types import LossTokens

JUDGED = 16_384  # tokens of each held-out text
CHARACTERS = 2000  # of an answer, at most


def write_texts(out: Path) -> None:
    """Chats, their questions alone, and articles, each for arms and held out."""
    lines: dict[str, list[str]] = {}
    (corpus,) = PACKAGED
    for title, record in json.loads(_packaged(corpus).read_text(encoding="utf-8")).items():
        text = text_of(record, corpus)[:CHARACTERS].strip()
        if not text:
            continue
        question = {"role": "user", "content": f"What do you know about this: {title}?"}
        chat = Chat.of([question, {"role": "assistant", "content": text}])
        # Not by the hash of darwinlm, which holds out a tenth of what an arm sees once more.
        side = "held-out" if hashlib.sha256(f"judged {title}".encode()).digest()[0] < 26 else "seen"
        lines.setdefault(f"{side}-chats.jsonl", []).append(str(chat))
        lines.setdefault(f"{side}-questions.jsonl", []).append(str(chat.opening))
        lines.setdefault(f"{side}-articles.jsonl", []).append(json.dumps({"text": text}))
    for name, of_file in lines.items():
        write_text(out / name, "".join(f"{line}\n" for line in of_file))


def arms(out: Path) -> dict[str, tuple[str, LossTokens]]:
    """What each arm is calibrated, searched and refitted on, and what of it counts."""
    chats, questions, articles = (out / f"seen-{name}.jsonl" for name in ("chats", "questions", "articles"))
    return {
        "articles": (str(articles), "all"),
        "prompts": (str(questions), "all"),
        "chats": (str(chats), "assistant"),
        "chats, all tokens": (str(chats), "all"),
        "own": (f"self:{chats}", "assistant"),
        "own and articles": (f"self:{chats},{articles}", "assistant"),
        "chats, own and articles": (f"{chats}=2,self:{chats}=1,{articles}=1", "assistant"),
        "nothing but own": ("self", "all"),
    }


def settings(given: argparse.Namespace, data: str, loss_tokens: LossTokens, name: str) -> RunConfig:
    """A run of an arm. The questions are few, so all arms are scaled to the text there is where it is too little."""
    return RunConfig(
        model=given.model,
        data=data,
        out=str(given.out / name.replace(", ", "-").replace(" ", "-")),
        target=given.target,
        loss_tokens=loss_tokens,
        fit_data=True,
        verify=False,
        own=OwnConfig(tokens=3 * given.tokens, answer_tokens=given.length // 2, batch_size=128),
        calibration=CalibrationConfig(tokens=given.tokens, sequence_length=given.length),
        search=SearchConfig(generations=given.generations),
        refit=RefitConfig(tokens=given.tokens),
        evaluation=EvaluationConfig(tokens=4096, repeats=1, speed_tokens=64),
    )


def judged_on(out: Path, model: str, length: int) -> dict[str, Drawn]:
    """Held-out chats, whose answers count, and held-out articles."""
    tokenizer = find_checkpoint(model, out).tokenizer
    texts = {}
    for name in ("chats", "articles"):
        stream = stream_beside(str(out / f"held-out-{name}.jsonl"), tokenizer, JUDGED, lambda _: True)
        ids = as_sequences(stream.ids[:JUDGED], length, tokenizer)
        texts[name] = Drawn(ids, as_counts(stream, length, tokenizer)[: len(ids)])
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--target", default="params=0.8")
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--generations", type=int, default=10)
    parser.add_argument("--arms", nargs="+")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    write_texts(given.out)
    texts, kept = judged_on(given.out, given.model, given.length), given.out / "results.json"
    results = json.loads(kept.read_text()) if kept.exists() else {}
    device = resolve_device("auto")
    dense = find_checkpoint(given.model, given.out).load(torch.float32, device)
    print("| calibrated, searched and refitted on | KL chats | KL articles | seconds |\n| --- | --- | --- | --- |")
    for name, (data, loss_tokens) in arms(given.out).items():
        if given.arms and name not in given.arms:
            continue
        if name not in results:
            began = time.monotonic()
            done = run(settings(given, data, loss_tokens, name))
            seconds = time.monotonic() - began
            pruned: Any = load(done.path)
            models = {"dense": dense, name: pruned.to(device)}
            kl = {t: perplexity_and_kl(models, d.ids, counts=d.counts)[name].kl for t, d in texts.items()}
            results[name] = kl | {"seconds": seconds}
            write_json(kept, results)
        row = results[name]
        print(f"| {name} | {row['chats']:.4f} | {row['articles']:.4f} | {row['seconds']:.0f} |", flush=True)


if __name__ == "__main__":
    main()
