"""ServerApp: FedAvg, in the clear."""

from cloister.federation._insecure_peer.server import make_app

app = make_app()
