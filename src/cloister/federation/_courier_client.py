"""A client's courier: Flower starts it for one message, it hands the sealed bytes to the client's process and returns.

Holds no secret, opens nothing, may be killed at any time.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from cloister.enclave import host_call
from cloister.errors import CloisterError, EnclaveError

if TYPE_CHECKING:
    from flwr.app import Context, Message
    from flwr.clientapp import ClientApp

_log = logging.getLogger(__name__)

RECORD = "cloister"
"""Name of the one record in every message, and of the message's kind (`query.cloister`)."""

DEFAULT_TIMEOUT_S = 60.0
RETRY_S = 0.3


def make_app() -> ClientApp:
    """The ClientApp of Flower's app bundle."""
    from flwr.app import ConfigRecord, Message, RecordDict
    from flwr.clientapp import ClientApp

    app = ClientApp()

    @app.query(RECORD)
    def carry(message: Message, context: Context) -> Message:  # pyright: ignore[reportUnusedFunction]
        answer = answer_message(dict(message.content[RECORD]), context.node_config)
        return Message(RecordDict({RECORD: ConfigRecord({**answer})}), reply_to=message)

    return app


def answer_message(
    fields: Mapping[str, object],
    node_config: Mapping[str, object],
    *,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, bytes | str]:
    """What goes back for one message of the server's courier.

    Returns:
        `blob`, the sealed answer; or `error`, a stable code; for a message without a blob, `client`, this node's name.
    """
    blob = fields.get("blob")
    if not isinstance(blob, bytes):
        return {"client": str(node_config.get("cloister-client", ""))}
    wait_s = fields.get("timeout_s")
    deadline = clock() + (float(wait_s) if isinstance(wait_s, (int, float)) else DEFAULT_TIMEOUT_S)
    place = node_config.get("cloister-socket") or os.environ.get("CLOISTER_CLIENT_SOCKET", "")
    while True:
        try:
            answer = host_call(Path(str(place)), "request", {"blob": blob}, timeout_s=max(deadline - clock(), 0.1))
        except EnclaveError as error:
            # The client's process is being started again; asking twice is harmless, its answers are idempotent.
            if clock() + RETRY_S >= deadline:
                _log.warning("no answer from the client's process: %s", error.cause)
                return {"error": error.code}
            sleep(RETRY_S)
        except CloisterError as error:
            _log.warning("the client's process refused: %s", error.code)
            return {"error": error.code}
        else:
            sealed = answer.get("blob")
            return {"blob": sealed} if isinstance(sealed, bytes) else {"error": EnclaveError.code}
