"""`predict`: a client of a finished run asks the tuned model; neither its text nor the tuned layers are shown."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cloister.attest import Policy
from cloister.enclave import host_call
from cloister.errors import AttestationError, ConfigError, EnclaveError, FederationError
from cloister.federation import Questioner, ServerLink

from ._folder import RunFolder
from ._launch import Launch, Programs
from ._plans import client_plan

if TYPE_CHECKING:
    from cloister.attest import Decision
    from cloister.config import Job
    from cloister.federation import SplitClientPlan

    from ._events import OnEvent

CALL_TIMEOUT_S = 300.0
MAX_NEW_TOKENS = 64
TEXTS_AT_ONCE = 256
"""In one question; fewer where their boundary tensors would not fit one."""
_QUESTION_BYTES = 32 << 20  # of the 64 MiB that a question may have


def predict(
    run_dir: str | Path,
    client: str,
    texts: Sequence[str | tuple[str, str]],
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    on_event: OnEvent | None = None,
    programs: Programs | None = None,
) -> list[dict[str, Any]]:
    """Asks the tuned model of a finished run, as one of its clients.

    The near side runs here; only sealed boundary tensors go to the server enclave, after this client has verified the
    enclave's evidence under its policy. An enclave that still serves is asked; otherwise it is started again from its
    sealed checkpoint.

    Args:
        run_dir: folder of the run, for instance `runs/latest`.
        client: which of the run's clients asks; its node key proves it.
        texts: texts, or pairs of texts, to classify; or prompts to complete.
        max_new_tokens: longest completion (causal-lm), greedy.

    Returns:
        One dict a text: {"label", "probability", "probabilities"} or {"completion"}.

    Raises:
        ConfigError: no such run or client.
        AttestationError: the enclave's evidence was refused; no boundary tensor was sent.
    """
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "on_event": on_event, "programs": programs}
    return predict_all(run_dir, {client: texts}, **options)[client]


def predict_all(
    run_dir: str | Path,
    questions: Mapping[str, Sequence[str | tuple[str, str]]],
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    on_event: OnEvent | None = None,
    programs: Programs | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """`predict` for several clients, one after the other, each with its own texts; an enclave is started once.

    Only on a machine that plays all of these clients: each one's texts are its own.

    Raises:
        ConfigError, AttestationError: see `predict`.
    """
    folder = RunFolder.open(Path(run_dir))
    job = folder.read_job()
    for client in questions:
        if client not in job.client_names:
            raise ConfigError(
                f"{client} is no client of {folder.run_id}", hint=f"its clients are {', '.join(job.client_names)}"
            )
    if not folder.result.is_file():
        raise FederationError(f"{folder.run_id} is not finished", hint="resume it with `cloister run --resume`")
    tell = on_event or (lambda _event: None)
    if job.method.name == "enclave":
        answers: dict[str, list[dict[str, Any]]] = {}
        for client, texts in questions.items():
            launch = Launch(job, folder, on_event=tell, programs=programs)
            answers[client] = _ask_own_enclave(launch, job, client, list(texts), max_new_tokens)
        return answers
    with _enclave(job, folder, tell, programs) as socket_path:
        return {
            client: _ask(*_connect(job, folder, socket_path, client, tell), list(texts), max_new_tokens)
            for client, texts in questions.items()
        }


def _connect(
    job: Job, folder: RunFolder, socket_path: Path, client: str, tell: OnEvent
) -> tuple[SplitClientPlan, Questioner]:
    """Method 2: this client's session with the server enclave, after it has verified the enclave's evidence."""
    plan = client_plan(job, folder, Policy.load(folder.policy), client, with_data=False)
    link = ServerLink(plan, now=time.time, on_decision=lambda found: tell(_decision_event(client, found)))
    questioner = Questioner(plan, link, lambda blob: _exchange(socket_path, client, blob))
    questioner.connect()
    return plan, questioner


def _ask_own_enclave(launch: Launch, job: Job, client: str, texts: list[Any], limit: int) -> list[dict[str, Any]]:
    """Method 1: the client's own enclave has the adapter, and answers its own people."""
    answers: list[dict[str, Any]] = []
    with launch:
        socket_path = launch.start_asking(client)
        for part in _parts(texts, TEXTS_AT_ONCE):
            asked = {"texts": [list(text) if isinstance(text, tuple) else text for text in part],
                     "max_new_tokens": limit}  # fmt: skip
            answers += host_call(socket_path, "ask", asked, timeout_s=CALL_TIMEOUT_S)["answers"]
    if job.task.name == "sequence-classification":
        return [_classified(answer["probabilities"], job.task.labels) for answer in answers]
    return answers


def _parts(texts: list[Any], n: int) -> list[list[Any]]:
    """The texts in runs of `n`; one empty run for no text, which is refused where questions are made."""
    return [texts[start : start + n] for start in range(0, max(1, len(texts)), n)]


def _exchange(socket_path: Path, client: str, blob: bytes) -> bytes:
    answer = host_call(socket_path, "exchange", {"client": client, "blob": blob}, timeout_s=CALL_TIMEOUT_S)
    return answer["blob"]


@contextmanager
def _enclave(job: Job, folder: RunFolder, tell: OnEvent, programs: Programs | None) -> Iterator[Path]:
    """The host port of a server enclave with the trained model: one that serves, or a fresh one for this call."""
    serving = folder.serving_socket()
    if serving is not None:
        try:
            if host_call(serving, "status", {}, timeout_s=5.0)["serving"]:
                yield serving
                return
        except EnclaveError:
            pass  # the file is older than the process that it speaks of: start one
    with Launch(job, folder, on_event=tell, programs=programs) as launch:
        launch.start_server()
        launch.wait_until_serving()
        yield launch.server_socket


def _ask(plan: SplitClientPlan, questioner: Questioner, texts: list[Any], max_new_tokens: int) -> list[dict[str, Any]]:
    from cloister.slicing import inspect_backbone, load_near, load_tokenizer
    from cloister.train import NearEncoder

    info = inspect_backbone(plan.model.path)
    tokenizer = load_tokenizer(info)
    near = load_near(info, plan.model.cut_layer)
    encoder = NearEncoder(
        near, tokenizer, plan.task, boundary=plan.model.boundary, batch_size=plan.near_batch_size,
        model_max_length=info.max_length,
    )  # fmt: skip
    if plan.task.name == "sequence-classification":
        longest = (plan.task.max_length or info.max_length) * info.hidden_size * 4  # bytes, in fp32
        parts = _parts(texts, max(1, min(TEXTS_AT_ONCE, _QUESTION_BYTES // longest)))
        answers = [answer for part in parts for answer in questioner.ask(encoder.question(part))]
        return [_classified(answer["probabilities"], plan.task.labels) for answer in answers]
    return [_complete(text, encoder, questioner, tokenizer, max_new_tokens) for text in texts]


def _classified(probabilities: list[float], labels: tuple[str, ...]) -> dict[str, Any]:
    best = max(range(len(labels)), key=lambda i: probabilities[i])
    return {
        "label": labels[best],
        "probability": probabilities[best],
        "probabilities": dict(zip(labels, probabilities, strict=True)),
    }


def _complete(prompt: str, encoder: Any, questioner: Questioner, tokenizer: Any, limit: int) -> dict[str, Any]:
    """Greedy completion: the near side runs over the growing text here, the enclave names the next token.

    Every step sends the whole sequence's boundary tensor again; caches on both sides are the serving issue's.
    """
    made: list[int] = []
    for _ in range(limit):
        question = encoder.continued(prompt, made)
        if question is None:
            break  # the model's length limit
        token = questioner.ask(question)[0]["next_token"]
        if token == tokenizer.eos_token_id:
            break
        made.append(token)
    return {"completion": tokenizer.decode(made, skip_special_tokens=True), "n_tokens": len(made)}


def _decision_event(client: str, found: Decision | AttestationError) -> dict[str, Any]:
    base = {"t": time.time(), "source": f"client/{client}", "event": "evidence", "client": client}
    if isinstance(found, AttestationError):
        return base | {"accepted": False, "reasons": list(found.reasons), "error": found.code, "claims": {}}
    return base | {"accepted": True, "reasons": list(found.reasons), "claims": found.claims.to_dict()}
