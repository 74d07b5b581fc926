"""lm-evaluation-harness on the server: its tasks score as they do on transformers in fp32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import LONG, Case
from running_server import Running

TASKS = Path(__file__).parents[2] / "lm_eval"

lm_eval = pytest.importorskip("lm_eval")
task_index = pytest.importorskip("lm_eval.tasks")
pytestmark = pytest.mark.clients


def scores(tasks: list[str], kind: str, chat: bool = False, **arguments: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the metrics of tasks, and the responses of the model by task."""
    manager = task_index.TaskManager(include_path=str(TASKS), include_defaults=False)
    options: dict[str, Any] = {"task_manager": manager, "log_samples": True, "bootstrap_iters": 0}
    done = lm_eval.simple_evaluate(
        model=kind, model_args=arguments, tasks=tasks, apply_chat_template=chat, verbosity="ERROR", **options
    )
    responses = {
        task: [sample["filtered_resps"] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]
        for task, samples in done["samples"].items()
    }
    return done["results"], responses


def test_task_scores_match_transformers(
    server: Running, checkpoint: Callable[[Case], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(TASKS)  # paths of data in the tasks
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    tasks = ["freeexport_likelihood", "freeexport_generation"]
    source: dict[str, Any] = {"pretrained": str(checkpoint(LONG)), "dtype": "float32", "device": "cpu"}
    tokenizer = {"tokenizer": source["pretrained"], "tokenizer_backend": "huggingface"}
    served = {"base_url": f"{server.url}/v1/completions", "model": "m", **tokenizer}
    expected, wanted = scores(tasks, "hf", batch_size=1, add_bos_token=True, **source)
    metrics, responses = scores(tasks, "local-completions", num_concurrent=2, add_bos_token=True, **served)
    assert metrics == expected
    assert responses["freeexport_generation"] == wanted["freeexport_generation"]
    for ours, other in zip(responses[tasks[0]], wanted[tasks[0]], strict=True):
        assert [each[0] for each in ours] == pytest.approx([each[0] for each in other], abs=1e-3)
        assert [each[1] for each in ours] == [each[1] for each in other]
    _, chats = scores(tasks[1:], "hf", chat=True, batch_size=1, add_bos_token=False, **source)
    served["base_url"] = f"{server.url}/v1/chat/completions"
    assert scores(tasks[1:], "local-chat-completions", chat=True, **served)[1] == chats
