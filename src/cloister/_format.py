"""Numbers as a person reads them."""

from __future__ import annotations

from collections.abc import Mapping

SPARKS = "▁▂▃▄▅▆▇█"


def human_bytes(n: float) -> str:
    """Decimal units, as network and disk vendors count: 999 B, 1.2 kB, 34.5 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} TB"


def human_time(seconds: float) -> str:
    """0:07, 12:34, 1:02:03."""
    total = max(0, round(seconds))
    hours, rest = divmod(total, 3600)
    minutes, secs = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{secs:02}" if hours else f"{minutes}:{secs:02}"


def human_metric(name: str, value: float) -> str:
    """Accuracies and other shares as percent, everything else as it is."""
    return f"{100 * value:.1f} %" if is_share(name) else f"{value:.3g}" if value >= 100 else f"{value:.2f}"


def human_epsilons(by_client: Mapping[str, float]) -> str:
    """Privacy spent: alpha 3.20, beta 2.91; empty where there is none."""
    return ", ".join(f"{client} {epsilon:.2f}" for client, epsilon in sorted(by_client.items()))


def is_share(name: str) -> bool:
    """Whether a metric lies between 0 and 1 and more is better."""
    return name != "perplexity"


def sparkline(values: list[float], width: int = 24) -> str:
    """The last values as a line of blocks, each the mean of an equal part."""
    if not values:
        return ""
    n = min(width, len(values))
    parts = [values[i * len(values) // n : (i + 1) * len(values) // n] for i in range(n)]
    means = [sum(part) / len(part) for part in parts]
    low, high = min(means), max(means)
    span = (high - low) or 1.0
    return "".join(SPARKS[round((mean - low) / span * (len(SPARKS) - 1))] for mean in means)
