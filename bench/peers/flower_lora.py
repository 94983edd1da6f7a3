"""The peer of every table: plain Flower, PEFT LoRA or prefix, FedAvg, as a user of Flower would write it; no security.

The app, and what starts and stops it, are in the package, where `cloister compare` uses them too:
src/cloister/federation/_insecure_peer. It runs on Flower's deployment runtime: one SuperLink, one SuperNode for each
client, all on loopback with Flower's own defaults, without TLS and without authentication. Rounds x local epochs =
epochs. The final global model is tested once, on the common test set, by the ServerApp.

    python bench/peers/flower_lora.py --model FOLDER --train A.jsonl B.jsonl --test T.jsonl --labels 10 [--layers upper]

Data: JSON lines of `text` and `label` (an index). One JSON object with the result goes to standard output.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from pathlib import Path

from cloister.federation import InsecurePeerJob as PeerJob
from cloister.federation import run_insecure_peer as run_peer

__all__ = ["PeerJob", "run_peer"]


def main() -> None:
    """One run of the peer alone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--train", type=Path, nargs="+", required=True, help="one file for each client")
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--labels", type=int, required=True)
    parser.add_argument("--layers", choices=("all", "upper"), default="all", help="where LoRA goes")
    parser.add_argument("--cut-layer", type=int, default=PeerJob.cut_layer, help="the first block of `upper`")
    parser.add_argument("--max-length", type=int, default=PeerJob.max_length)
    parser.add_argument("--adapter", choices=("lora", "prefix"), default=PeerJob.adapter)
    parser.add_argument("--epochs", type=int, default=PeerJob.epochs)
    parser.add_argument("--rounds", type=int, help="default: one for each epoch")
    parser.add_argument("--lora-r", type=int, default=PeerJob.r)
    parser.add_argument("--lora-alpha", type=float, default=PeerJob.alpha)
    parser.add_argument("--lr", type=float, default=PeerJob.lr)
    parser.add_argument("--batch-size", type=int, default=PeerJob.batch_size)
    parser.add_argument("--seed", type=int, default=PeerJob.seed)
    parser.add_argument("--threads", type=int, default=PeerJob.num_threads, help="torch's, in each app process")
    parser.add_argument("--evaluate-every-round", action="store_true", help="by the clients, as in the tutorial")
    parser.add_argument("--count-wire", action="store_true", help="count what the SuperNodes' sockets carry")
    args = parser.parse_args()
    job = PeerJob(
        model=args.model.absolute(),
        train=tuple(path.absolute() for path in args.train),
        test=args.test.absolute(),
        n_labels=args.labels,
        max_length=args.max_length,
        adapter=args.adapter,
        layers=args.layers,
        cut_layer=args.cut_layer,
        r=args.lora_r,
        alpha=args.lora_alpha,
        lr=args.lr,
        batch_size=args.batch_size,
        epochs=args.epochs,
        rounds=args.rounds,
        seed=args.seed,
        evaluate_every_round=args.evaluate_every_round,
        num_threads=args.threads,
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    print(json.dumps(run_peer(job, count_wire=args.count_wire), indent=1))


if __name__ == "__main__":
    main()
