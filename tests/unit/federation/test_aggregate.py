"""Aggregation: every rule against a slow oracle and against Flower's own strategies, and what must hold of all."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from tests.oracle import slow_aggregate as slow

from cloister.adapters import AdapterState, AdapterUpdate, LoraSpec, StateSpec
from cloister.errors import (
    ConfigError,
    FederationError,
    InsufficientClientsError,
    StateMismatchError,
    UpdateRejectedError,
)
from cloister.federation import AggregationSpec, Aggregator, ClientPrivacy
from cloister.train import gaussian_epsilon

from ._seeded import Seeded

A, B, HEAD = "m.0.x.lora_A.weight", "m.0.x.lora_B.weight", "m.score.weight"
SPEC = StateSpec(LoraSpec(r=2, alpha=4), "sequence-classification", {A: (2, 6), B: (5, 2), HEAD: (3, 6)}, {})
N = SPEC.n_numbers

Updates = list[tuple[int, AdapterUpdate]]

few = settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def tensors(values: np.ndarray, spec: StateSpec = SPEC) -> dict[str, np.ndarray]:
    found, at = {}, 0
    for name, shape in spec.shapes.items():
        size = int(np.prod(shape))
        found[name] = values[at : at + size].reshape(shape).astype(np.float32)
        at += size
    return found


def update_of(values: np.ndarray, spec: StateSpec = SPEC) -> AdapterUpdate:
    return AdapterUpdate(spec, tensors(values, spec))


def random_state(seed: int = 0, spec: StateSpec = SPEC) -> AdapterState:
    return AdapterState(spec, tensors(Seeded(seed).normal(size=spec.n_numbers), spec))


def random_updates(n: int, seed: int = 1, spec: StateSpec = SPEC) -> Updates:
    rng = Seeded(seed)
    return [(rng.integers(1, 50), update_of(rng.normal(size=spec.n_numbers), spec)) for _ in range(n)]


vectors = npst.arrays(np.float32, N, elements=st.floats(-1000, 1000, width=32))
lies = npst.arrays(np.float32, N, elements=st.floats(-(2.0**20), 2.0**20, width=32))
wild = npst.arrays(np.float32, N, elements=st.floats(-(2.0**100), 2.0**100, width=32))
updates_of_3_to_8 = st.lists(st.tuples(st.integers(1, 10**6), vectors.map(update_of)), min_size=3, max_size=8)


def name_of(index: int) -> str:
    return f"client-{index:04d}"


def aggregator(spec: AggregationSpec, folder: Path, start: AdapterState | None = None, **more: Any) -> Aggregator:
    return Aggregator(spec, start or random_state(), min_clients=1, folder=folder, **more)


def one_round(ours: Aggregator, updates: Updates, order: list[int] | None = None) -> Any:
    number = ours.begin([name_of(i) for i in range(len(updates))])
    for index in order or range(len(updates)):
        n_examples, update = updates[index]
        assert ours.add(name_of(index), n_examples, update.to_bytes(), round=number)
    return ours.finish()


def rule(name: str = "fedavg", **more: Any) -> AggregationSpec:
    uniform = {"weighting": "uniform"} if name == "trimmed-mean" or "privacy" in more else {}
    return AggregationSpec(max_norm=1e9, rule=name, **(uniform | more))  # type: ignore[arg-type]


def plain(update: AdapterState) -> dict[str, np.ndarray]:
    return {name: tensor.astype(np.float64) for name, tensor in update.tensors.items()}


def expect(state: AdapterState, start: AdapterState, mean: dict[str, np.ndarray]) -> None:
    for name, tensor in state.tensors.items():
        np.testing.assert_allclose(tensor, start.tensors[name] + mean[name], rtol=1e-5, atol=1e-5)


# --- against the oracle -----------------------------------------------------------------------------------------------


@few
@given(updates=updates_of_3_to_8)
def test_the_weighted_mean(tmp_path: Path, updates: Updates) -> None:
    start = random_state()
    result = one_round(aggregator(rule("fedprox"), tmp_path, start), updates)
    expect(result.state, start, slow.weighted_mean([(n, plain(u)) for n, u in updates]))


@few
@given(updates=updates_of_3_to_8)
def test_uniform_weights(tmp_path: Path, updates: Updates) -> None:
    start = random_state()
    result = one_round(aggregator(rule(weighting="uniform"), tmp_path, start), updates)
    expect(result.state, start, slow.weighted_mean([(1, plain(u)) for _, u in updates]))


@few
@given(updates=updates_of_3_to_8, trim=st.sampled_from([0.34, 0.4, 0.49]))
def test_the_trimmed_mean(tmp_path: Path, updates: Updates, trim: float) -> None:
    start = random_state()
    result = one_round(aggregator(rule("trimmed-mean", trim=trim), tmp_path, start, memory_bytes=1), updates)
    expect(result.state, start, slow.trimmed_mean([plain(u) for _, u in updates], trim))


def test_a_trimmed_mean_over_several_pieces_of_a_tensor(tmp_path: Path) -> None:
    spec = StateSpec(LoraSpec(r=2), "causal-lm", {"x": (3, 700)}, {})
    start, updates = random_state(0, spec), random_updates(5, 1, spec)
    result = one_round(aggregator(rule("trimmed-mean"), tmp_path, start, memory_bytes=24 * 5 * 300), updates)
    expect(result.state, start, slow.trimmed_mean([plain(u) for _, u in updates], 0.2))


def test_adam_over_rounds(tmp_path: Path) -> None:
    start = random_state()
    ours = aggregator(rule("fedadam", server_lr=0.3, beta_1=0.8, beta_2=0.9, tau=1e-2), tmp_path, start)
    means = []
    for number in range(4):
        updates = random_updates(3, seed=number)
        one_round(ours, updates)
        means.append(slow.weighted_mean([(n, plain(u)) for n, u in updates]))
    for name, tensor in ours.state.tensors.items():
        expected = slow.adam(start.tensors[name], [mean[name] for mean in means], 0.3, 0.8, 0.9, 1e-2)
        np.testing.assert_allclose(tensor, expected, rtol=1e-4, atol=1e-5)


# --- against Flower ---------------------------------------------------------------------------------------------------


def flowers(strategy: Any, start: AdapterState, updates: Updates, number: int) -> dict[str, np.ndarray]:
    from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict

    replies = []
    for n_examples, update in updates:
        arrays = {name: Array(start.tensors[name] + tensor) for name, tensor in update.tensors.items()}
        records = {"arrays": ArrayRecord(arrays), "metrics": MetricRecord({"num-examples": n_examples})}
        replies.append(SimpleNamespace(has_error=lambda: False, content=RecordDict(records)))  # type: ignore[arg-type]
    strategy.current_arrays = dict(start.tensors)
    arrays, _ = strategy.aggregate_train(number, replies)
    return {name: array.numpy() for name, array in arrays.items()}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of click, when Flower is imported
@pytest.mark.parametrize("name", ["fedavg", "fedprox", "fedadam", "trimmed-mean"])
def test_rounds_equal_flowers(tmp_path: Path, name: str) -> None:
    from flwr.serverapp import strategy as flower

    theirs = {
        "fedavg": flower.FedAvg,
        "fedprox": lambda: flower.FedProx(proximal_mu=0.1),
        "fedadam": flower.FedAdam,
        "trimmed-mean": flower.FedTrimmedAvg,
    }[name]()
    ours = aggregator(rule(name), tmp_path)
    for number in (1, 2, 3):
        start, updates = ours.state, random_updates(6, seed=number)
        expected = flowers(theirs, start, updates, number)
        result = one_round(ours, updates)
        assert result.round == number
        for key, tensor in result.state.tensors.items():
            np.testing.assert_allclose(tensor, expected[key], rtol=2e-4, atol=2e-5)


# --- what must hold ---------------------------------------------------------------------------------------------------


@few
@given(updates=updates_of_3_to_8, data=st.data(), name=st.sampled_from(["fedavg", "fedadam", "trimmed-mean"]))
def test_the_order_of_clients_does_not_matter(tmp_path: Path, updates: Updates, data: st.DataObject, name: str) -> None:
    order = data.draw(st.permutations(range(len(updates))))
    spec = rule(name, **({"trim": 0.34} if name == "trimmed-mean" else {}))
    one, two = (one_round(aggregator(spec, tmp_path), updates, turned).state for turned in (None, order))
    for key, tensor in one.tensors.items():
        # Within float64's rounding of a sum, which float32 mostly hides; Adam divides by what may be nearly zero.
        np.testing.assert_allclose(tensor, two.tensors[key], rtol=1e-5, atol=1e-4)


@few
@given(honest=st.lists(vectors, min_size=4, max_size=7), lie=lies)
def test_one_liar_cannot_leave_the_honest_range_of_a_trimmed_mean(
    tmp_path: Path, honest: list[np.ndarray], lie: np.ndarray
) -> None:
    start = AdapterState(SPEC, tensors(np.zeros(N)))
    updates = [(1, update_of(values)) for values in (*honest, lie)]
    state = one_round(aggregator(rule("trimmed-mean", trim=0.21), tmp_path, start), updates).state
    flat = np.concatenate([state.tensors[name].reshape(-1) for name in SPEC.shapes])
    slack = 1e-4 * (1 + np.abs(honest).max(axis=0))
    assert np.all(flat >= np.min(honest, axis=0) - slack)
    assert np.all(flat <= np.max(honest, axis=0) + slack)


def test_the_same_lie_moves_a_plain_mean(tmp_path: Path) -> None:
    start = AdapterState(SPEC, tensors(np.zeros(N)))
    updates = [*random_updates(4), (1, update_of(np.full(N, 1e6)))]
    assert one_round(aggregator(rule(), tmp_path, start), updates).state.tensors[A].min() > 1000


@few
@given(claim=st.integers(1, 2**60))
def test_no_claim_outweighs_the_maximum(tmp_path: Path, claim: int) -> None:
    start = AdapterState(SPEC, tensors(np.zeros(N)))
    updates = [(100, update_of(np.zeros(N))), (claim, update_of(np.ones(N)))]
    share = one_round(aggregator(rule(max_examples=100), tmp_path, start), updates).state.tensors[A][0, 0]
    assert share == pytest.approx(min(claim, 100) / (100 + min(claim, 100)))


def test_an_update_counts_once(tmp_path: Path) -> None:
    (n, one), (m, two), *_ = random_updates(2)
    start = random_state()
    ours = aggregator(rule(), tmp_path, start)
    number = ours.begin(["a", "b"])
    assert ours.add("a", n, one.to_bytes(), round=number)
    assert not ours.add("a", n, one.to_bytes(), round=number)
    assert ours.add("b", m, two.to_bytes(), round=number)
    assert not ours.add("a", n, one.to_bytes(), round=number)
    expect(ours.finish().state, start, slow.weighted_mean([(n, plain(one)), (m, plain(two))]))


def test_what_a_round_tells(tmp_path: Path) -> None:
    ours = aggregator(rule(), tmp_path)
    number = ours.begin(["a", "b", "c"])
    ours.add("c", 3, random_updates(1)[0][1].to_bytes(), round=number)
    with pytest.raises(UpdateRejectedError):
        ours.add("b", 3, b"nonsense", round=number)
    result = ours.finish()
    assert (result.clients, result.missing, result.epsilon) == (("c",), ("a",), None)
    assert result.facts()["rejected"] == {"b": {"key": "update", "cause": result.rejected["b"][1]}}
    assert "tensor" not in repr(result.facts())
    assert (ours.n_rounds, ours.state) == (1, result.state)
    assert "fedavg" in repr(ours)


def test_too_few_updates_leave_the_round_open(tmp_path: Path) -> None:
    ours = Aggregator(rule(), random_state(), min_clients=2, folder=tmp_path)
    number = ours.begin(["a", "b", "c"])
    updates = random_updates(2)
    ours.add("a", 1, updates[0][1].to_bytes(), round=number)
    with pytest.raises(UpdateRejectedError):
        ours.add("b", 1, b"", round=number)
    with pytest.raises(InsufficientClientsError, match="1 of 3") as caught:
        ours.finish()
    assert "client b" in caught.value.hint
    ours.add("c", 1, updates[1][1].to_bytes(), round=number)
    assert ours.finish().clients == ("a", "c")


def test_too_few_clients_are_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(InsufficientClientsError, match="min_clients is 2"):
        Aggregator(rule(), random_state(), min_clients=2, folder=tmp_path).begin(["a", "a"])


def test_a_trimmed_mean_that_would_trim_nothing_is_refused(tmp_path: Path) -> None:
    ours = aggregator(rule("trimmed-mean"), tmp_path)
    with pytest.raises(InsufficientClientsError, match="drops none") as caught:
        ours.begin(["a", "b", "c", "d"])
    assert "5 clients" in caught.value.hint
    number = ours.begin(list("abcde"))
    for client in "abcd":
        ours.add(client, 1, random_updates(1)[0][1].to_bytes(), round=number)
    with pytest.raises(InsufficientClientsError, match="drops none"):
        ours.finish()
    ours.add("e", 1, random_updates(1)[0][1].to_bytes(), round=number)
    assert len(ours.finish().clients) == 5


def test_an_open_round_can_be_given_up_and_begun_anew(tmp_path: Path) -> None:
    start, updates = random_state(), random_updates(3)
    ours = aggregator(rule(), tmp_path, start)
    ours.begin(["client-0000"])
    ours.add("client-0000", 1, update_of(np.full(N, 9.0)).to_bytes(), round=1)
    assert one_round(ours, updates).round == 1
    expect(ours.state, start, slow.weighted_mean([(n, plain(u)) for n, u in updates]))


def test_without_a_round_there_is_nothing_to_add_to(tmp_path: Path) -> None:
    ours = aggregator(rule(), tmp_path)
    for call in (ours.finish, lambda: ours.add("a", 1, b"", round=1)):
        with pytest.raises(FederationError, match="no round"):
            call()


def test_a_mean_beyond_float32_ends_the_round(tmp_path: Path) -> None:
    start = AdapterState(SPEC, tensors(np.full(N, 3e38)))
    ours = aggregator(AggregationSpec(max_norm=1e40), tmp_path, start)
    ours.begin(["a"])
    ours.add("a", 1, update_of(np.full(N, 3e38)).to_bytes(), round=1)
    with pytest.raises(StateMismatchError, match="finite"):
        ours.finish()
    with pytest.raises(FederationError, match="no round"):
        ours.finish()
    assert ours.state is start


# --- between rounds ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fedavg", "fedadam"])
def test_a_restarted_enclave_goes_on_as_if_nothing_was(tmp_path: Path, name: str) -> None:
    straight, broken = (aggregator(rule(name), tmp_path) for _ in range(2))
    rounds = [random_updates(3, seed=seed) for seed in range(3)]
    for updates in rounds:
        one_round(straight, updates)
        kept = broken.to_bytes()
        broken.begin(["client-0000"])
        broken.add("client-0000", 1, updates[0][1].to_bytes(), round=broken.n_rounds + 1)  # lost with the process
        broken = aggregator(rule(name), tmp_path, random_state(99))
        broken.restore(kept)
        one_round(broken, updates)
    assert broken.to_bytes() == straight.to_bytes()
    assert broken.n_rounds == 3


@pytest.mark.parametrize(
    ("blob", "message"),
    [
        (lambda ours: ours.to_bytes(), "another rule"),
        (lambda ours: ours.to_bytes().replace(b"fedadam", b"fedavg!"), "another rule"),
        (lambda ours: ours.to_bytes().replace(b"n_rounds", b"m_rounds"), "does not parse"),
        (lambda ours: ours.to_bytes().replace(b'"n_rounds": 1', b'"n_rounds":-1'), "no number"),
        (lambda ours: ours.to_bytes().replace(b"cloister-aggregator", b"cloister-aggregat.r"), "another rule"),
    ],
    ids=["rule", "facts", "key", "negative", "label"],
)
def test_a_state_of_another_job_is_refused(tmp_path: Path, blob: Any, message: str) -> None:
    ours = aggregator(rule("fedadam"), tmp_path)
    one_round(ours, random_updates(2))
    other = aggregator(rule("fedadam", server_lr=0.2), tmp_path)
    before = other.to_bytes()
    with pytest.raises(StateMismatchError, match=message):
        other.restore(blob(ours))
    assert other.to_bytes() == before


# --- privacy ----------------------------------------------------------------------------------------------------------


def private(noise_multiplier: float = 1.0, clip_norm: float = 1.0) -> AggregationSpec:
    return rule(privacy=ClientPrivacy(clip_norm, noise_multiplier, 1e-5))


def no_noise(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """Keeps the sums on the grid that noise would be added to, and leaves the noise out."""
    seen: list[np.ndarray] = []

    def off_the_grid(sums: np.ndarray, sigma: float) -> np.ndarray:
        seen.append(sums.copy())
        return sums * (sigma / 2**30)

    monkeypatch.setattr("cloister.federation._aggregate_rules.noised", off_the_grid)
    return seen


def test_every_update_is_clipped_and_the_mean_is_over_who_delivered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_noise(monkeypatch)
    start = AdapterState(SPEC, tensors(np.zeros(N)))
    ours = aggregator(private(clip_norm=0.5), tmp_path, start)
    ours.begin(["a", "b", "c", "d"])
    small, large = np.full(N, 1e-3), np.full(N, 1e3)
    ours.add("a", 1, update_of(small).to_bytes(), round=1)
    ours.add("b", 10**6, update_of(large).to_bytes(), round=1)
    with pytest.raises(UpdateRejectedError):
        ours.add("c", 1, b"", round=1)
    mean = ours.finish().state.tensors[A][0, 0]
    assert mean == pytest.approx((1e-3 + 0.5 / np.sqrt(N)) / 3, rel=1e-5)


@few
@given(
    values=npst.arrays(np.float32, N, elements=st.floats(-(2.0**100), 2.0**100, width=32)), clip=st.floats(1e-3, 1e3)
)
def test_no_client_moves_the_sum_further_than_the_noise_is_made_for(
    tmp_path: Path, values: np.ndarray, clip: float
) -> None:
    privacy = ClientPrivacy(clip, 0.7, 1e-5)
    spec = AggregationSpec(max_norm=1e40, weighting="uniform", privacy=privacy)
    with pytest.MonkeyPatch.context() as patch:
        seen = no_noise(patch)
        one_round(aggregator(spec, tmp_path), [(1, update_of(values))])
    squares = sum(int(step) ** 2 for sums in seen for step in sums.reshape(-1))
    assert squares <= int((2**30 / 0.7) ** 2)


def test_an_update_of_zeros_is_no_division_by_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_noise(monkeypatch)
    ours = aggregator(private(), tmp_path)
    start = ours.state
    assert np.array_equal(one_round(ours, [(1, update_of(np.zeros(N)))]).state.tensors[A], start.tensors[A])


def test_the_noise_has_its_size_and_epsilon_is_told(tmp_path: Path) -> None:
    spec = StateSpec(LoraSpec(r=2), "causal-lm", {"x": (20_000,)}, {})
    start = AdapterState(spec, {"x": np.zeros(20_000, np.float32)})
    ours = aggregator(private(noise_multiplier=2.0, clip_norm=3.0), tmp_path, start)
    assert ours.epsilon == 0
    result = one_round(ours, [(1, update_of(np.zeros(20_000), spec)) for _ in range(4)])
    noise = result.state.tensors["x"]
    assert noise.std() == pytest.approx(2.0 * 3.0 / 4, rel=0.03)
    assert abs(noise.mean()) < 0.05
    assert result.epsilon == pytest.approx(gaussian_epsilon(2.0, 1, delta=1e-5))
    second = one_round(ours, [(1, update_of(np.zeros(20_000), spec)) for _ in range(4)])
    assert second.epsilon is not None
    assert second.epsilon > result.epsilon
    restored = aggregator(private(noise_multiplier=2.0, clip_norm=3.0), tmp_path, start)
    restored.restore(ours.to_bytes())
    assert restored.epsilon == second.epsilon


@pytest.mark.parametrize(
    ("wrong", "key"),
    [
        ({"max_norm": 0}, "max_norm"),
        ({"max_norm": float("nan")}, "max_norm"),
        ({"max_norm": float("inf")}, "max_norm"),
        ({"max_examples": 0}, "max_examples"),
        ({"trim": 0.5}, "trim"),
        ({"trim": 0.0}, "trim"),
        ({"server_lr": 0}, "server_lr"),
        ({"beta_1": 1}, "beta_1"),
        ({"beta_2": -0.1}, "beta_2"),
        ({"tau": 0}, "tau"),
        ({"proximal_mu": -1}, "proximal_mu"),
        ({"rule": "fedadam", "exact_lora": True}, "exact_lora"),
        ({"rule": "trimmed-mean", "weighting": "uniform", "exact_lora": True}, "exact_lora"),
        ({"rule": "trimmed-mean"}, "weighting"),
        ({"privacy": ClientPrivacy(1, 1, 1e-5)}, "weighting"),
        ({"privacy": ClientPrivacy(1, 1, 1e-5), "weighting": "uniform", "exact_lora": True}, "privacy"),
        ({"privacy": ClientPrivacy(1, 1, 1e-5), "weighting": "uniform", "rule": "trimmed-mean"}, "privacy"),
        ({"privacy": ClientPrivacy(0, 1, 1e-5), "weighting": "uniform"}, "privacy.clip_norm"),
        ({"privacy": ClientPrivacy(1, 0, 1e-5), "weighting": "uniform"}, "privacy.noise_multiplier"),
        ({"privacy": ClientPrivacy(1, 1, 1.0), "weighting": "uniform"}, "privacy.delta"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_senseless_rule_is_refused_by_key(wrong: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        AggregationSpec(**({"max_norm": 1.0} | wrong))
    assert key in [problem.key for problem in caught.value.problems]
