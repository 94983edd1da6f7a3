"""Tells the SuperLink that a SuperNode is gone, so that it lets the next one with the same key in at once.

A SuperNode that ends in order does this itself. One that was killed does not, and the SuperLink would refuse its
successor for up to 60 seconds ("still online"). Flower has no command for it, so this is the only file of cloister that
uses Flower's private client; should a release move it, a restarted SuperNode waits for those seconds, nothing worse.
"""

from __future__ import annotations

from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

NO_SUCH_CALL = 2
ONLINE_S = 60.0
"""How long the SuperLink keeps a silent node online: 2 heartbeats of 30 s (flwr.common.constant)."""


def main(argv: list[str]) -> int:
    """Args: SuperLink address, CA file, node key (OpenSSH), node id. Returns the exit code: 0 done, 1 the SuperLink
    was not reached, 2 this Flower has no such call."""
    import httpx

    try:
        from flwr.proto.fleet_pb2 import DeactivateNodeRequest
        from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
        from flwr.supernode.fleet_http_client import FleetHttpClient
        from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor
    except ImportError:
        return NO_SUCH_CALL

    address, ca, key_path, node_id = argv
    key = load_ssh_private_key(Path(key_path).read_bytes(), None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        return 1
    interceptors = [RuntimeVersionHttpInterceptor(component_name="SuperNode"),
                    NodeAuthHttpInterceptor(key, key.public_key())]  # fmt: skip
    with FleetHttpClient.from_server_address(address, False, ca, interceptors=interceptors) as client:
        try:
            client.DeactivateNode(DeactivateNodeRequest(node_id=int(node_id)))
        except httpx.TransportError:
            return 1
        except httpx.HTTPStatusError:
            return 0  # it was not online: nothing to do
    return 0
