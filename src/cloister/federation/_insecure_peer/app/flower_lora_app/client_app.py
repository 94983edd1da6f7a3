"""ClientApp: trains on its own data, in the clear."""

from cloister.federation._insecure_peer.client import make_app

app = make_app()
