"""What vLLM's users rely on: many requests at once, caches, long prompts, adapters; and the speed of a pruned model."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

import torch
from serving_models import agreed, greedy
from smollm2 import Kept, dense_smollm2, export
from vllm_server import RefusedError, Server

from darwinlm.model.reading import load

NEW_TOKENS, LONG, STEP = 24, 180, 32  # tokens of an answer, of a long prompt, and of what a step reads of it
BATCH, PROMPT, DECODED, TURNS = 16, 32, 96, 5  # of the throughput


def pruned_smollm2(root: Path) -> tuple[Any, Path]:
    """The checkpoint, and an export of a random part of the model."""
    root.mkdir(parents=True)
    checkpoint, dense = dense_smollm2(root)
    draw = random.Random(0)
    kept = [
        Kept(
            tuple(sorted(draw.sample(range(3), draw.randint(2, 3)))),
            tuple(sorted(draw.sample(range(1536), 32 * draw.randint(24, 48)))),
        )
        for _ in range(dense.config.num_hidden_layers)
    ]
    return checkpoint, export(checkpoint, dense, kept, root / "export", None)


def check_features(forks: Any, directory: Path) -> Iterator[tuple[str, str]]:
    """What was done with an export, and how many tokens were those of transformers."""
    model: Any = load(directory, torch.float32)
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(4, 300, (length,), generator=draw).tolist() for length in range(3, 43, 5)]
    wanted = [greedy(model, prompt, NEW_TOKENS) for prompt in prompts]
    long = torch.randint(4, 300, (LONG,), generator=draw).tolist()
    ends = [[*long, *prompt] for prompt in prompts[:2]]
    long_wanted = [greedy(model, prompt, NEW_TOKENS) for prompt in ends]
    adapter, adapted = _adapter(model, directory.with_name("adapter"), prompts)
    yield from _served(forks, directory, prompts, wanted, ends, long_wanted)
    yield "LoRA", _attempt(lambda: _lora(forks, directory, adapter, prompts, wanted, adapted))
    yield "compiled", _attempt(lambda: _compiled(forks, directory, prompts, wanted))


def _served(
    forks: Any,
    directory: Path,
    prompts: Sequence[list[int]],
    wanted: Sequence[list[int]],
    ends: Sequence[list[int]],
    long_wanted: Sequence[list[int]],
) -> Iterator[tuple[str, str]]:
    """What one server is asked, in eager mode."""
    few = ("--max-num-batched-tokens", str(STEP), "--max-num-seqs", str(len(prompts)))
    with Server(forks, directory, "--enforce-eager", "--enable-prefix-caching", "--block-size", "32", *few) as server:
        yield "one request after another", agreed([server.tokens(p, NEW_TOKENS) for p in prompts], wanted)
        yield f"{len(prompts)} requests at once", agreed(at_once(server, prompts, NEW_TOKENS), wanted)
        first = server.tokens(ends[0], NEW_TOKENS)
        yield f"prompt of {len(ends[0])} tokens, {STEP} a step", agreed([first], long_wanted[:1])
        before = server.counter("vllm:prefix_cache_hits_total")
        second = server.tokens(ends[1], NEW_TOKENS)
        hits = server.counter("vllm:prefix_cache_hits_total") - before
        cached = f"{hits:.0f} of {LONG} shared tokens from the cache"
        yield "prefix caching", f"{agreed([second], long_wanted[1:])}, {cached}"
        chat = {"messages": [{"role": "user", "content": "Say hello."}], "max_tokens": NEW_TOKENS, "ignore_eos": True}
        tokenized = server.post("/tokenize", {"messages": chat["messages"], "add_generation_prompt": True})["tokens"]
        answer = server.post("/v1/chat/completions", chat | {"return_token_ids": True})["choices"][0]["token_ids"]
        yield "chat template", agreed([answer], [server.tokens(tokenized, NEW_TOKENS)])


def _attempt(run: Callable[[], str]) -> str:
    try:
        return run()
    except RefusedError as refused:
        return f"**FAILS**: {str(refused)[:160]}"


def _compiled(forks: Any, directory: Path, prompts: Sequence[list[int]], wanted: Sequence[list[int]]) -> str:
    with Server(forks, directory) as server:
        return agreed(at_once(server, prompts, NEW_TOKENS), wanted)


def _adapter(model: Any, out: Path, prompts: Sequence[list[int]]) -> tuple[Path, list[list[int]]]:
    """A random LoRA adapter of every linear module, and the tokens that it gives in PEFT."""
    peft: Any = import_module("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=8, init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    adapted.save_pretrained(out)
    tokens = [greedy(adapted, prompt, NEW_TOKENS) for prompt in prompts]
    adapted.unload()
    return out, tokens


def _lora(forks: Any, directory: Path, adapter: Path, prompts: Sequence[list[int]], plain: Any, adapted: Any) -> str:
    flags = ("--enforce-eager", "--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"adapter={adapter}")
    with Server(forks, directory, *flags) as server:
        found = [server.tokens(prompt, NEW_TOKENS, model="adapter") for prompt in prompts]
        without = [server.tokens(prompt, NEW_TOKENS) for prompt in prompts]
    return f"{agreed(found, adapted)} with the adapter, {agreed(without, plain)} without"


def at_once(server: Server, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """The greedy tokens after each prompt, all asked for at the same time."""
    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(lambda prompt: server.tokens(prompt, count), prompts))


def matrices(directory: Path) -> int:
    """Weights that are read for every token: all matrices, and of tied embeddings one."""
    model = load(directory, torch.bfloat16)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.dim() == 2)


def throughput(python: Path, root: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Tokens a second of a dense and a pruned model that are asked in turns, eager and compiled."""
    checkpoint, pruned = pruned_smollm2(root)
    models = {"dense": checkpoint.path, "pruned": pruned}
    counted = matrices(models["dense"]) / matrices(pruned)
    draw = torch.Generator().manual_seed(1)
    prompts = torch.randint(100, 40_000, (BATCH, PROMPT), generator=draw).tolist()
    for mode, flags in {"eager": ("--enforce-eager",), "compiled": ()}.items():
        rates: dict[str, list[float]] = {name: [] for name in models}
        with ExitStack() as stack:
            options = {"dtype": "bfloat16", "length": 256}
            servers = {
                name: stack.enter_context(Server(python, path, *flags, **options)) for name, path in models.items()
            }
            for turn in range(TURNS + 1):
                for name, server in servers.items():
                    start = time.perf_counter()
                    at_once(server, prompts, DECODED)
                    if turn:  # the first warms up
                        rates[name].append(BATCH * DECODED / (time.perf_counter() - start))
        ratios = [ours / theirs for ours, theirs in zip(rates["pruned"], rates["dense"], strict=True)]
        yield (
            f"{mode}, bfloat16, batch {BATCH}",
            {
                "dense, tokens/s": f"{median(rates['dense']):.0f}",
                "pruned, tokens/s": f"{median(rates['pruned']):.0f}",
                "ratio (range)": f"{median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})",
                "counted": f"{counted:.2f}",
                "of counted": f"{median(ratios) / counted:.0%}",
            },
        )
