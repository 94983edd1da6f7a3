"""The ServerApp: one message to every node, round after round, as Flower's own strategies send them."""

from __future__ import annotations

import json
import time
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    while len(nodes := list(grid.get_node_ids())) < int(config["num-clients"]):
        time.sleep(0.1)
    ready_at = time.time()
    rounds_s = []
    for _ in range(int(config["num-server-rounds"])):
        content = RecordDict({"echo": ConfigRecord({"blob": b""})})
        messages = [Message(content, dst_node_id=node, message_type="query") for node in nodes]
        began = time.perf_counter()
        answers = list(grid.send_and_receive(messages))
        rounds_s.append(time.perf_counter() - began)
        if len(answers) != len(nodes) or any(answer.has_error() for answer in answers):
            raise RuntimeError("not every node answered")
    path = Path(str(config["result-path"]))
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps({"ready_at": ready_at, "rounds_s": rounds_s}), encoding="utf-8")
    temporary.rename(path)
