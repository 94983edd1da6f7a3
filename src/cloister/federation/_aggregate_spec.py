"""What the server enclave does with a round's updates: the rule, its bounds, and what a client may cost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from cloister.adapters import AdapterState
from cloister.errors import ConfigError, Problem

Rule = Literal["fedavg", "fedprox", "fedadam", "trimmed-mean"]

MEMORY_BYTES = 256 * 1024 * 1024
"""What a trimmed mean may hold at once, whatever the number of clients (docs: aggregation)."""


@dataclass(frozen=True)
class ClientPrivacy:
    """Differential privacy of whole clients: one client's update of a round, or a zero in its place.

    Everybody who delivers takes part in every round and the relay sees it, so no amplification by sampling is claimed.

    Attributes:
        clip_norm: L2 norm that every update is clipped to.
        noise_multiplier: standard deviation of the noise in the sum over `clip_norm`; at least 0.01.
        delta: probability for which epsilon need not hold.
    """

    clip_norm: float
    noise_multiplier: float
    delta: float


@dataclass(frozen=True)
class AggregationSpec:
    """One job's way of making a global adapter out of updates. *Public*.

    Attributes:
        rule: `fedavg` (weighted mean), `fedprox` (the same; the clients add `train.proximal_term`), `fedadam` (the
            mean as the gradient of Adam at the server), `trimmed-mean` (coordinate by coordinate, robust).
        max_norm: an update of a larger L2 norm is refused.
        max_examples: more examples than this count as this many, so that no claim can outweigh everybody.
        weighting: `examples` or `uniform`.
        exact_lora: aggregate the products B A and factor the mean anew, not A and B apart.
        trim: share of the clients that a trimmed mean drops at either end.
        server_lr, beta_1, beta_2, tau: of FedAdam, as Flower's defaults.
        proximal_mu: of FedProx, for the clients.
        privacy: None for none.

    Raises:
        ConfigError: every problem at once.
    """

    max_norm: float
    rule: Rule = "fedavg"
    max_examples: int = 1_000_000
    weighting: Literal["examples", "uniform"] = "examples"
    exact_lora: bool = False
    trim: float = 0.2
    server_lr: float = 0.1
    beta_1: float = 0.9
    beta_2: float = 0.99
    tau: float = 1e-3
    proximal_mu: float = 0.0
    privacy: ClientPrivacy | None = None

    def __post_init__(self) -> None:
        if problems := [*self._ranges(), *self._combinations()]:
            raise ConfigError(problems)

    def _ranges(self) -> list[Problem]:
        checks = {
            "max_norm": 0 < self.max_norm < math.inf,
            "max_examples": self.max_examples >= 1,
            "trim": 0 < self.trim < 0.5,
            "server_lr": 0 < self.server_lr < math.inf,
            "beta_1": 0 <= self.beta_1 < 1,
            "beta_2": 0 <= self.beta_2 < 1,
            "tau": 0 < self.tau < math.inf,
            "proximal_mu": 0 <= self.proximal_mu < math.inf,
        }
        if private := self.privacy:
            checks["privacy.clip_norm"] = 0 < private.clip_norm < math.inf
            checks["privacy.noise_multiplier"] = 0.01 <= private.noise_multiplier < math.inf
            checks["privacy.delta"] = 0 < private.delta < 1
        return [Problem(key, "out of its range") for key, is_in_range in checks.items() if not is_in_range]

    def _combinations(self) -> list[Problem]:
        problems: list[Problem] = []
        if self.rule in ("fedadam", "trimmed-mean") and self.exact_lora:
            problems.append(Problem("exact_lora", f"{self.rule} works on A and B apart", "use fedavg or fedprox"))
        if self.privacy and (self.exact_lora or self.rule == "trimmed-mean"):
            problems.append(Problem("privacy", "one client's share of products or of order statistics is not bounded"))
        if self.privacy and self.weighting != "uniform":
            problems.append(Problem("weighting", "weights by examples are not private", 'set "uniform"'))
        if self.rule == "trimmed-mean" and self.weighting != "uniform":
            problems.append(Problem("weighting", "a trimmed mean has no weights", 'set "uniform"'))
        return problems


@dataclass(frozen=True)
class RoundResult:
    """What a round gave.

    Attributes:
        round: its number, from 1.
        state: the new global adapter. *Secret*.
        clients: whose updates are in it.
        rejected: whose are not, with the key and cause of each.
        missing: who did not answer.
        residual: with exact LoRA, the Frobenius norm of what a product of rank r cannot hold of the mean product, over
            all layers, in the units of the weights; 0 elsewhere.
        residual_share: the same over the mean product's own norm.
        epsilon: spent by all rounds so far at the spec's delta; None without privacy.
    """

    round: int
    state: AdapterState = field(repr=False)
    clients: tuple[str, ...]
    rejected: Mapping[str, tuple[str, str]]
    missing: tuple[str, ...]
    residual: float = 0.0
    residual_share: float = 0.0
    epsilon: float | None = None

    def facts(self) -> dict[str, object]:
        """For the run report: everything but the adapter. *Public* to the run's parties."""
        rejected = {client: {"key": key, "cause": cause} for client, (key, cause) in self.rejected.items()}
        facts: dict[str, object] = {"round": self.round, "clients": list(self.clients), "rejected": rejected}
        facts |= {"missing": list(self.missing), "epsilon": self.epsilon}
        return facts | {"residual": self.residual, "residual_share": self.residual_share}
