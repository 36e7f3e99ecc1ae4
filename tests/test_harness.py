"""Tasks through lm-eval against log-likelihoods computed with transformers alone, and prompts against official ones."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel

import chats
import tiny
from darwinlm.config.evaluation import TasksConfig
from darwinlm.evaluation.local_tasks import LOCAL, local_tasks
from darwinlm.evaluation.tasks import LIKELIHOOD, SUITE, Request, Score, questions, run_tasks
from darwinlm.types import DarwinError, UsageError

SHARED = Path(__file__).parents[2] / "shared" / "data" / "eval"
QUESTIONS = 12
# What lm-eval's own task makes of a question: prompt, choices, and what follows each choice.
OFFICIAL: dict[str, tuple[dict[str, Any], str | int, list[str], str | int]] = {
    "arc_easy": (
        {"query": "Question: Which is hot?", "choices": ["ice", "fire", "snow", "rain"], "gold": 1},
        "Question: Which is hot?\nAnswer:",
        ["ice", "fire", "snow", "rain"],
        1,
    ),
    "piqa": (
        {"query": "Question: boil water\n", "choices": ["heat it", "cool it"], "gold": 0},
        "Question: boil water\nAnswer:",
        ["heat it", "cool it"],
        0,
    ),
    "boolq": (
        {"query": "Passage: Ice is cold.\nQuestion: is ice cold?", "choices": ["no", "yes"], "gold": 1},
        "Ice is cold.\nQuestion: is ice cold?\nAnswer:",
        ["no", "yes"],
        1,
    ),
    "logiqa": (
        {
            "query": "Context: All men die.\nQuestion: Who dies?\nChoices: A. Men.\nB. Gods.\nC. None.\nD. Stones.\n",
            "choices": ["A", "B", "C", "D"],
            "gold": 0,
        },
        "Passage: All men die.\nQuestion: Who dies?\nChoices:\nA. Men.\nB. Gods.\nC. None.\nD. Stones.\nAnswer:",
        ["Men.", "Gods.", "None.", "Stones."],
        0,
    ),
    "winogrande": (
        {
            "context_options": ["The cup broke as the cup", "The cup broke as the rock"],
            "continuation": "fell.",
            "gold": 0,
        },
        0,
        ["The cup broke as the cup", "The cup broke as the rock"],
        "fell.",
    ),
}

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed"),
    pytest.mark.filterwarnings("ignore"),  # lm-eval's and its dependencies'
]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """Whose context is long enough for every question."""
    model = tiny.build("llama-gqa")
    model.config.max_position_embeddings = 4096
    return model


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.parametrize("name", OFFICIAL)
def test_local_questions_are_put_as_the_official_tasks_put_them(name: str, tmp_path: Path) -> None:
    from lm_eval.tasks import TaskManager

    record, text, choices, target = OFFICIAL[name]
    write(tmp_path / LOCAL[name].file, [record])
    config = local_tasks(tmp_path)
    assert list(config) == [name]
    task: Any = TaskManager(include_defaults=False).load([config[name]])["tasks"][name]
    (doc,) = task.validation_docs()
    assert (task.doc_to_text(doc), task.doc_to_choice(doc), task.doc_to_target(doc)) == (text, choices, target)


@pytest.mark.parametrize("name", ["piqa", "winogrande"])
def test_accuracy_is_that_of_plain_log_likelihoods(name: str, model: PreTrainedModel, tmp_path: Path) -> None:
    if not SHARED.is_dir():
        pytest.skip("needs ../shared")
    lines = (SHARED / LOCAL[name].file).read_text().splitlines()[:QUESTIONS]
    records = [json.loads(line) for line in lines]
    write(tmp_path / LOCAL[name].file, records)
    scores = run_tasks(model, tiny.tokenizer(), [Request(name)], TasksConfig(tasks_data=str(tmp_path)))
    right = normed = 0
    correct = []
    for record in records:
        if name == "winogrande":
            pairs = [(context, f" {record['continuation']}") for context in record["context_options"]]
        else:
            pairs = [(f"{record['query']}Answer:", f" {choice}") for choice in record["choices"]]
        likelihoods = [log_likelihood(model, *pair) for pair in pairs]
        correct.append(likelihoods[record["gold"]])
        right += likelihoods.index(max(likelihoods)) == record["gold"]
        by_length = [value / (len(ending) - 1) for value, (_, ending) in zip(likelihoods, pairs, strict=True)]
        normed += by_length.index(max(by_length)) == record["gold"]
    assert {score.questions for score in scores} == {QUESTIONS}
    values = {score.metric: score.value for score in scores}
    assert values["acc"] == pytest.approx(right / QUESTIONS)
    assert 0 < right < QUESTIONS
    by_question = {score.metric: score.by_question for score in scores}
    assert by_question[LIKELIHOOD] == pytest.approx(correct, abs=1e-3)
    assert values[LIKELIHOOD] == pytest.approx(fmean(correct), abs=1e-3)
    assert sum(by_question["acc"] or ()) == right
    if name == "piqa":
        assert values["acc_norm"] == pytest.approx(normed / QUESTIONS)


def test_git_says_nothing_where_there_is_no_repository(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "piqa.jsonl", [OFFICIAL["piqa"][0]])
    monkeypatch.chdir(tmp_path)
    assert run_tasks(model, tiny.tokenizer(), [Request("piqa")], TasksConfig(tasks_data=str(tmp_path)))
    assert "git" not in capfd.readouterr().err


def log_likelihood(model: Any, context: str, ending: str) -> float:
    encode = tiny.tokenizer()
    before, ids = encode(context)["input_ids"], encode(context + ending)["input_ids"]
    with torch.no_grad():
        log_probs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(log_probs[at - 1, ids[at]].item() for at in range(len(before), len(ids)))


def test_shots_limits_and_task_files(model: PreTrainedModel, tmp_path: Path) -> None:
    records = [OFFICIAL["arc_easy"][0] | {"gold": gold} for gold in (0, 1, 2, 3, 1, 2)]
    write(tmp_path / "arc_easy.jsonl", records)
    data = write(tmp_path / "own.jsonl", [{"q": "Ice is", "a": ["hot", "cold"], "right": 1}] * 3)
    (tmp_path / "own.yaml").write_text(
        "task: own\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {tmp_path}/cache}}\n"
        "output_type: multiple_choice\ntest_split: test\ndoc_to_text: q\ndoc_to_target: right\ndoc_to_choice: a\n"
        "metric_list: [{metric: acc}]\n"
    )
    asked = [Request("arc_easy", 2, "acc_norm"), Request("own")]
    config = TasksConfig(limit=4, tasks_path=str(tmp_path), tasks_data=str(tmp_path))
    arc, of_arc, own, _ = run_tasks(model, tiny.tokenizer(), asked, config)
    assert (of_arc.metric, of_arc.shots, len(of_arc.by_question or ())) == (LIKELIHOOD, 2, 4)
    assert (arc.task, arc.metric, arc.shots, arc.questions) == ("arc_easy", "acc_norm", 2, 4)
    assert (own.task, own.metric, own.shots, own.questions, own.value in (0, 1)) == ("own", "acc", 0, 3, True)


@pytest.mark.parametrize(
    ("metric", "shown"), [("acc_norm", "85.0 ± 4.0"), ("word_perplexity", "0.850 ± 0.040"), ("bits_per_byte", "0.850")]
)
def test_only_shares_are_in_per_cent(metric: str, shown: str) -> None:
    assert str(Score("task", metric, 0, 0.85, None if "bits" in metric else 0.04, 1, "")) == shown


def test_groups_of_groups_count_their_tasks_and_those_without_figures_are_refused(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    data = write(tmp_path / "own.jsonl", [{"q": "Ice is", "a": ["hot", "cold"], "right": 1}] * 3)
    for name in ("one", "two"):
        (tmp_path / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\n"
            f"dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {tmp_path}/cache}}\n"
            "output_type: multiple_choice\ntest_split: test\ndoc_to_text: q\ndoc_to_target: right\ndoc_to_choice: a\n"
            "metric_list: [{metric: acc}]\n"
        )
    mean = "aggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    (tmp_path / "inner.yaml").write_text(f"group: inner\ntask: [one, two]\n{mean}")
    (tmp_path / "outer.yaml").write_text(f"group: outer\ntask: [inner]\n{mean}")
    (tmp_path / "bare.yaml").write_text("group: bare\ntask: [one, two]\n")
    config = TasksConfig(tasks_path=str(tmp_path))
    score, likelihood = run_tasks(model, tiny.tokenizer(), [Request("outer")], config)
    assert (score.metric, score.questions, score.by_question) == ("acc", 6, (score.value,) * 6)
    expected = log_likelihood(model, "Ice is", " cold")
    assert likelihood.by_question == pytest.approx((expected,) * 6, abs=1e-3)
    with pytest.raises(DarwinError, match="bare has no figure of its own; name tasks that have one, of one, two"):
        run_tasks(model, tiny.tokenizer(), [Request("bare")], config)
    before = questions([Request("one")], config)
    (tmp_path / "one.yaml").write_text((tmp_path / "one.yaml").read_text() + "num_fewshot: 1\n")
    assert questions([Request("one")], config) != before


@pytest.fixture
def brief() -> PreTrainedModel:
    """One whose answers soon end."""
    model = tiny.build("llama-gqa")
    model.config.max_position_embeddings = 4096
    model.generation_config = GenerationConfig(eos_token_id=[2, *range(100, 180)])
    return model


def said(model: Any, prompt: str) -> str:
    """The model's own answer to a user's prompt, through the chat template."""
    tokenizer: Any = chats.tokenizer(marks=False)
    turns = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    written = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=200)
    return tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)


def test_answers_to_gsm8k_are_read_as_officially_and_through_the_chat_template(
    brief: PreTrainedModel, tmp_path: Path
) -> None:
    """Of invented questions, half of which have the number as their answer that the model writes."""
    asked = [f"What is {number} and {number}?" for number in range(24)]
    numbers = [re.findall(r"\d+", said(brief, f"Question: {question}\nAnswer:")) for question in asked]
    known = [number[-1] for number in numbers if number]
    assert len(known) > 3
    records = [
        {"question": question, "answer": f"A few words.\n#### {number[-1] if number and n % 2 else 99999}"}
        for n, (question, number) in enumerate(zip(asked, numbers, strict=True))
    ]
    write(tmp_path / "gsm8k.jsonl", records)
    config = TasksConfig(tasks_data=str(tmp_path), chat_template=True)
    scores = run_tasks(brief, chats.tokenizer(marks=False), [Request("gsm8k", 0)], config)
    by_metric = {score.metric: score for score in scores}
    assert list(by_metric) == ["exact_match (strict-match)", "exact_match (flexible-extract)"]
    right = tuple(float(bool(number) and n % 2) for n, number in enumerate(numbers))
    assert 0 < sum(right) < len(right)
    assert by_metric["exact_match (flexible-extract)"].by_question == right
    assert sum(by_metric["exact_match (strict-match)"].by_question or ()) == 0
    assert str(by_metric["exact_match (flexible-extract)"]).startswith(f"{100 * fmean(right):.1f} ± "), "in per cent"
    plain = TasksConfig(tasks_data=str(tmp_path))
    assert questions([Request("gsm8k", 0)], config) != questions([Request("gsm8k", 0)], plain)
    with pytest.raises(UsageError, match="--chat-template: expected a model with a chat template, found none"):
        run_tasks(brief, tiny.tokenizer(), [Request("gsm8k", 0)], config)


def test_answers_to_ifeval_are_checked_as_officially(
    brief: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of invented prompts. What counts sentences needs data that nltk downloads, and none does here."""
    prompts = [f"Write of {topic}." for topic in ("rain", "ice", "sets", "lists", "files", "names")]
    answers = [said(brief, prompt) for prompt in prompts]
    letters = next(letter for letter in "esatr" if 0 < sum(letter in answer.lower() for answer in answers) < 6)
    kwargs = {"letter": letters, "let_frequency": 1, "let_relation": "at least"}
    names = ["keywords:letter_frequency", "punctuation:no_comma"]
    records = [
        {"key": n, "prompt": prompt, "instruction_id_list": names, "kwargs": [kwargs, {}]}
        for n, prompt in enumerate(prompts)
    ]
    write(tmp_path / "ifeval.jsonl", records)
    config = TasksConfig(tasks_data=str(tmp_path), chat_template=True)
    if importlib.util.find_spec("langdetect") is None or importlib.util.find_spec("immutabledict") is None:
        with pytest.raises(UsageError, match=r"ifeval needs the package .*: pip install lm-eval\[ifeval\]"):
            run_tasks(brief, chats.tokenizer(marks=False), [Request("ifeval")], config)
        return
    (tmp_path / "tokenizers" / "punkt_tab").mkdir(parents=True)
    monkeypatch.setattr("nltk.data.path", [str(tmp_path)])
    scores = run_tasks(brief, chats.tokenizer(marks=False), [Request("ifeval")], config)
    found = {score.metric: score for score in scores}
    has_letter, no_comma = (
        [float(test(a)) for a in answers] for test in (lambda a: letters in a.lower(), lambda a: "," not in a)
    )
    both = tuple(min(pair) for pair in zip(has_letter, no_comma, strict=True))
    assert found["prompt_level_strict_acc"].by_question == both
    assert found["inst_level_strict_acc"].value == pytest.approx(fmean([*has_letter, *no_comma]))


def test_what_cannot_be_asked_is_refused(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = [Request("arc_easy")]
    with pytest.raises(UsageError, match=r"--tasks-data: expected one of arc_easy\.jsonl"):
        run_tasks(model, tiny.tokenizer(), ask, TasksConfig(tasks_data=str(tmp_path)))
    with pytest.raises(UsageError, match="--tasks-path: no directory"):
        run_tasks(model, tiny.tokenizer(), ask, TasksConfig(tasks_path=str(tmp_path / "none")))
    write(tmp_path / "arc_easy.jsonl", [{"query": "Question: half a record"}])
    with pytest.raises(DarwinError, match=r"arc_easy\.jsonl cannot be read as questions"):
        run_tasks(model, tiny.tokenizer(), ask, TasksConfig(tasks_data=str(tmp_path)))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"tasks need lm-eval, .*: pip install '\.\[eval\]' in a clone of darwinlm"):
        run_tasks(model, tiny.tokenizer(), ask, TasksConfig())


def test_suite_is_the_papers() -> None:
    shots = {request.task: request.shots for request in SUITE}
    assert {task for task, count in shots.items() if count == 0} == {"sciq", "piqa", "arc_easy", "logiqa", "boolq"}
    normed = {request.task for request in SUITE if request.metric == "acc_norm"}
    assert normed == {"arc_challenge", "hellaswag", "logiqa"}, "LLM-Shearing, icl_eval/README.md"
    assert {task: count for task, count in shots.items() if count} == {
        "winogrande": 5, "mmlu": 5, "hellaswag": 10, "arc_challenge": 25,
    }  # fmt: skip
