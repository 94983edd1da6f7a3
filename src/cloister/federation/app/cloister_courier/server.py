"""ServerApp: courier of the server enclave."""

from cloister.federation._courier_server import make_app

app = make_app()
