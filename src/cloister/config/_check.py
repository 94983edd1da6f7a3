"""Checks of a job against this machine: files, columns, labels, the backbone, its tokenizer and the cut."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cloister.config._models import Job
from cloister.errors import AdapterError, CloisterError, ConfigError, DataError, ModelError, Problem


def check_job(job: Job) -> None:
    """Look at everything the job names before anything is started. Reads the first rows of each file, no weights.

    Raises:
        DataError, ModelError, ...: the one problem, as its own class, so that the exit code says which branch failed.
        ConfigError: when there are several, all of them with their keys.
    """
    found: list[tuple[str, CloisterError]] = []

    def attempt(key: str, check: Callable[[], object]) -> None:
        try:
            check()
        except (ConfigError, DataError, ModelError, AdapterError) as error:
            found.append((key, error))

    attempt("model", lambda: _check_model(job))
    if job.policy.file is not None:
        attempt("policy.file", lambda: _check_file(job.policy.file, "policy"))
    attempt("enclave", lambda: _check_enclave(job))
    for i, client in enumerate(job.clients):
        for split in client.datasets:
            attempt(f"clients[{i}].{split}", lambda i=i, split=split: _check_data(job, i, split))
        if client.node_key is not None:
            attempt(f"clients[{i}].node_key", lambda path=client.node_key: _check_file(path, "node key"))
    if len(found) == 1:
        raise found[0][1]
    if found:
        raise ConfigError([Problem(key, error.cause, error.hint) for key, error in found])


def _check_model(job: Job) -> None:
    from cloister.slicing import inspect_backbone, resolve_cut

    info = inspect_backbone(job.model.path)
    resolve_cut(info, job.model.cut_layer)
    wanted = job.task.max_length
    if wanted is not None and wanted > info.max_length:
        raise ConfigError(
            [
                Problem(
                    "task.max_length",
                    f"is {wanted} tokens, and the model takes at most {info.max_length}",
                    f"set it to {info.max_length} or less, or leave it out",
                )
            ]
        )
    if job.task.name == "causal-lm" and info.is_encoder:
        raise ModelError(
            f"the model {job.model.path} is an encoder and cannot generate text",
            path=job.model.path,
            hint="use a decoder for causal-lm, or the task sequence-classification",
        )


def _check_enclave(job: Job) -> None:
    """A real enclave needs a policy that somebody wrote: reference values of a real platform cannot be made up here."""
    enclave = job.enclave
    if enclave.backend != "simulated" and job.policy.file is None:
        problem = Problem(
            "policy.file",
            f'missing: the backend "{enclave.backend}" needs a policy with reference values',
            "write one from evidence of the machine: cloister policy init",
        )
        raise ConfigError([problem])
    for what, path in (("collateral", enclave.collateral), ("TD quote", enclave.td_quote)):
        _check_file(path, what)


def _check_data(job: Job, i: int, split: str) -> None:
    from cloister.train import check_dataset

    client = job.clients[i]
    data = client.datasets[split]
    check_dataset(
        data.path,
        columns=client.column_map(),
        # The pooling does not matter for reading, and finding it out needs the model, which has its own check.
        task=job.task_spec(is_encoder=True),
        split=data.split,
        where=data.where or None,
    )


def _check_file(path: str | None, what: str) -> None:
    if path is not None and not Path(path).is_file():
        raise ConfigError(f"there is no {what} file {path}")
