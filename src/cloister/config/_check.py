"""Checks of a job against this machine: files, columns, labels, the backbone, its tokenizer and the cut."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast

from cloister.config._models import Job
from cloister.errors import AdapterError, CloisterError, ConfigError, DataError, ModelError, OffloadError, Problem


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
    for key, private in (("training", job.training.privacy), ("aggregation", job.aggregation.privacy)):
        if private is not None:
            attempt(f"{key}.privacy", _check_privacy_extra)
    for i, client in enumerate(job.clients):
        for split in client.datasets:
            attempt(f"clients[{i}].{split}", lambda i=i, split=split: _check_data(job, i, split))
        if client.node_key is not None:
            attempt(f"clients[{i}].node_key", lambda path=client.node_key: _check_file(path, "node key"))
        attempt(f"clients[{i}].accelerator", lambda i=i: _check_accelerator(job, i))
    if len(found) == 1:
        raise found[0][1]
    if found:
        raise ConfigError([problem for key, error in found for problem in _problems(key, error)])


def _problems(key: str, error: CloisterError) -> list[Problem]:
    """An error as the problem of a key, or of the keys that it names itself."""
    if isinstance(error, ConfigError):
        return [Problem(problem.key or key, problem.cause, problem.hint) for problem in error.problems]
    return [Problem(key, error.cause, error.hint)]


def _check_model(job: Job) -> None:
    from cloister.slicing import inspect_backbone, resolve_cut

    info = inspect_backbone(job.model.path)
    cut = resolve_cut(info, job.model.cut_layer)
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
    if job.adapter.name == "spf":
        from cloister.adapters import SpfSpec, check_spf
        from cloister.slicing import empty_blocks

        check_spf(empty_blocks(info, cut), cast("SpfSpec", job.far_adapter_spec()))


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
    try:
        check_dataset(
            data.path,
            columns=client.column_map(),
            # The pooling does not matter for reading, and finding it out needs the model, which has its own check.
            task=job.task_spec(is_encoder=True),
            split=data.split,
            where=data.where or None,
        )
    except DataError as error:
        cause = f"{split} data of client {client.name}: {error.cause}"
        raise DataError(cause, path=error.path, row=error.row, hint=error.hint) from None


def _check_privacy_extra() -> None:
    from cloister.train import require_privacy_extra

    require_privacy_extra()


def _check_accelerator(job: Job, i: int) -> None:
    """An address at which the client's enclave can listen, and its accelerator find it."""
    from cloister.offload import parse_address

    client = job.clients[i]
    given, key = client.accelerator, f"clients[{i}].accelerator"
    if given is None:
        return
    hint = "unix:/path, or tcp://host:port"
    try:
        address = parse_address(given)
    except OffloadError as error:
        raise _bad(key, f"of client {client.name}: {error.cause}", error.hint) from None
    if not address.path and not address.port:
        raise _bad(key, f"of client {client.name}: {given} has no port that an accelerator could connect to", hint)
    if address.path and not Path(address.path).parent.is_dir():
        raise _bad(key, f"of client {client.name}: there is no folder {Path(address.path).parent}", hint)
    for other in job.clients[:i]:
        if other.accelerator == given:
            raise _bad(key, f"of client {client.name}: {given} is client {other.name}'s too", "each has its own")


def _bad(key: str, cause: str, hint: str) -> ConfigError:
    return ConfigError([Problem(key, cause, hint)], hint=hint)


def _check_file(path: str | None, what: str) -> None:
    if path is not None and not Path(path).is_file():
        raise ConfigError(f"there is no {what} file {path}")
