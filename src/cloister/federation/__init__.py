"""A run over many parties: the state machine of server enclave and clients, and Flower as the untrusted relay.

The only package that imports Flower, and only in its relay and couriers: what runs inside an enclave (`ServerRun`) or
over an institution's text (`ClientRun`) never loads it. What the methods do not share is in `_split` and `_enclave`;
what `cloister compare` compares them with, unprotected, in `_insecure_peer`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cloister._lazy import lazy_exports

if TYPE_CHECKING:
    from cloister.federation._aggregate import Aggregator
    from cloister.federation._aggregate_spec import AggregationSpec, ClientPrivacy, RoundResult
    from cloister.federation._client import ClientRun, ClientWork, ServerLink
    from cloister.federation._enclave.client import AdapterWork, LocalModel, read_adapter
    from cloister.federation._enclave.server import EnclaveServer
    from cloister.federation._insecure_peer.central import ask_insecure_model, train_insecure_central
    from cloister.federation._insecure_peer.job import InsecurePeerJob
    from cloister.federation._insecure_peer.processes import run_insecure_peer
    from cloister.federation._keys import (
        generate_node_key,
        load_node_key,
        read_node_key,
        register_node_key,
        write_node_key,
    )
    from cloister.federation._plan import (
        ClientPlan,
        EnclaveClientPlan,
        EnclaveServerPlan,
        MaskPlan,
        ModelPlan,
        ServerPlan,
        SplitClientPlan,
        SplitServerPlan,
    )
    from cloister.federation._relay import ClientEndpoint, Relay
    from cloister.federation._server import ServerRun
    from cloister.federation._split.asking import Questioner
    from cloister.federation._split.client import NearWork
    from cloister.federation._split.server import SplitServer

_HOME = {
    "AdapterWork": "_enclave.client",
    "AggregationSpec": "_aggregate_spec",
    "Aggregator": "_aggregate",
    "ClientEndpoint": "_relay",
    "ClientPlan": "_plan",
    "ClientPrivacy": "_aggregate_spec",
    "ClientRun": "_client",
    "ClientWork": "_client",
    "EnclaveClientPlan": "_plan",
    "EnclaveServer": "_enclave.server",
    "EnclaveServerPlan": "_plan",
    "InsecurePeerJob": "_insecure_peer.job",
    "LocalModel": "_enclave.client",
    "MaskPlan": "_plan",
    "ModelPlan": "_plan",
    "NearWork": "_split.client",
    "Questioner": "_split.asking",
    "Relay": "_relay",
    "RoundResult": "_aggregate_spec",
    "ServerLink": "_client",
    "ServerPlan": "_plan",
    "ServerRun": "_server",
    "SplitClientPlan": "_plan",
    "SplitServer": "_split.server",
    "SplitServerPlan": "_plan",
    "ask_insecure_model": "_insecure_peer.central",
    "generate_node_key": "_keys",
    "load_node_key": "_keys",
    "read_adapter": "_enclave.client",
    "read_node_key": "_keys",
    "register_node_key": "_keys",
    "run_insecure_peer": "_insecure_peer.processes",
    "train_insecure_central": "_insecure_peer.central",
    "write_node_key": "_keys",
}

__all__ = [
    "AdapterWork",
    "AggregationSpec",
    "Aggregator",
    "ClientEndpoint",
    "ClientPlan",
    "ClientPrivacy",
    "ClientRun",
    "ClientWork",
    "EnclaveClientPlan",
    "EnclaveServer",
    "EnclaveServerPlan",
    "InsecurePeerJob",
    "LocalModel",
    "MaskPlan",
    "ModelPlan",
    "NearWork",
    "Questioner",
    "Relay",
    "RoundResult",
    "ServerLink",
    "ServerPlan",
    "ServerRun",
    "SplitClientPlan",
    "SplitServer",
    "SplitServerPlan",
    "ask_insecure_model",
    "generate_node_key",
    "load_node_key",
    "read_adapter",
    "read_node_key",
    "register_node_key",
    "run_insecure_peer",
    "train_insecure_central",
    "write_node_key",
]

__getattr__, __dir__ = lazy_exports(__name__, _HOME)
