"""ClientApp: courier of one client."""

from cloister.federation._courier_client import make_app

app = make_app()
