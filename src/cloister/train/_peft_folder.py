"""Adapters in PEFT's folder format on disk; what is in the files is `adapters`' (which reads and writes none)."""

from __future__ import annotations

from pathlib import Path

from cloister._files import write_whole
from cloister.adapters import CONFIG_FILE, WEIGHTS_FILE, AdapterState, parse_peft_files, peft_files
from cloister.errors import StoreError


def save_peft(state: AdapterState, folder: Path | str, *, base_model: str = "") -> None:
    """Write a folder that `PeftModel.from_pretrained` loads. The caller's policy has released the adapter.

    Args:
        state: *secret* until released.
        folder: made if it is not there.
        base_model: the backbone's public name, for PEFT's configuration.

    Raises:
        StoreError: the disk did not take it.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"{folder} cannot be made: {error.strerror}", path=str(folder)) from error
    files = peft_files(state, base_model=base_model)
    for name in (WEIGHTS_FILE, CONFIG_FILE):  # the configuration last: with it the folder counts as an adapter
        write_whole(folder / name, files[name])


def load_peft(folder: Path | str) -> AdapterState:
    """Read a folder that PEFT or `save_peft` wrote.

    Raises:
        StoreError: a file cannot be read.
        WireError, AdapterError: as `adapters.parse_peft_files`.
    """
    try:
        files = {name: (Path(folder) / name).read_bytes() for name in (CONFIG_FILE, WEIGHTS_FILE)}
    except OSError as error:
        raise StoreError(f"{error.filename} cannot be read: {error.strerror}", path=str(folder)) from error
    return parse_peft_files(files)
