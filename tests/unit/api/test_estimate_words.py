"""What `cloister plan` says in words: where offload does not pay, what does not fit, when a GPU's mode is better."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
from tests.unit.api.plan_numbers import FREE, LLAMA_7B, WORK, endless, llama, machine_of

from cloister.adapters import SpfSpec
from cloister.api import Estimate, estimate_to_json, method1_words, method2_words, recommendation
from cloister.api._estimate import estimate
from cloister.api._machine import LinkSpec, Machine

BIG = llama(*LLAMA_7B)
SMALL = llama(64, 128, 2, 1000)
DESIGN = replace(FREE, lattice_ns=2.0, mask_ns=0.8, unmask_ns=0.8, otp_ns=1.0, encode_ns=0.1, combine_ns=0.2)


def found_on(machine: Machine, model: object = BIG, **work: object) -> Estimate:
    return estimate(model, machine, replace(WORK, cut_layer=model.n_layers // 2, **work))  # pyright: ignore


def slow_inside(machine: Machine) -> Machine:
    """An enclave that multiplies integers no faster than it multiplies floats."""
    return replace(machine, enclave=replace(machine.enclave, int8_gop_s=machine.enclave.bf16_gflop_s))


def test_where_offload_pays_it_says_how_much_and_where_not():
    found = found_on(slow_inside(machine_of(kernels=DESIGN)))
    words = method1_words(found)
    assert words.startswith("Offload pays with otp-2, lattice: at best ")
    assert "It does not pay with otp. otp multiplies each pad inside the enclave" in words
    assert "3 clients train at the same time" in words and "opt-in" in words
    assert (
        "Break-even hidden size against bf16 in the TEE: otp/faithful never" in words
        and "this model has 4,096" in words
    )
    assert recommendation(found).startswith("Use Method 1 with otp-2/f")
    assert recommendation(found).endswith("a TEE at the server only.")
    assert "3 clients" not in method1_words(found_on(slow_inside(machine_of(kernels=DESIGN)), n_clients=1))


def test_the_lattice_pad_is_recommended_with_its_assumption():
    machine = slow_inside(machine_of(kernels=replace(DESIGN, otp_ns=50.0)))
    assert "lattice/f" in recommendation(found_on(machine))
    assert "if its computational assumption is accepted" in recommendation(found_on(machine))


def test_a_small_model_does_not_pay():
    found = found_on(machine_of(kernels=DESIGN), SMALL)
    words = method1_words(found)
    assert "Offload does not pay here: no mode is clearly faster than all in the TEE, bf16." in words
    assert "It does not pay with" not in words
    assert recommendation(found).startswith("Use Method 2 (")


def test_what_holds_it_up():
    beside = machine_of(kernels=DESIGN, accelerator=endless(shares_cpu=True, int8_top_s=0.4))
    assert "a process on the enclave's own cores" in method1_words(found_on(beside))
    wire = replace(machine_of(kernels=DESIGN), link=LinkSpec(gb_s=0.001, latency_us=0))
    assert "What holds up otp, otp-2, lattice is the link." in method1_words(found_on(wire))
    many = machine_of(cores=96, bf16=20_000, kernels=DESIGN)
    assert "makes pads and masks on 1 of 96 threads; on all of them" in method1_words(found_on(many))
    assert "threads" not in method1_words(found_on(machine_of(kernels=DESIGN), SMALL))


def test_an_sgx_enclave_is_too_small():
    machine = machine_of(tee="sgx", memory_bytes=94e6, kernels=DESIGN)
    machine = replace(machine, enclave=replace(machine.enclave, runtime_bytes=450e6))
    found = found_on(machine)
    words = method1_words(found)
    assert "The enclave's 94.0 MB do not hold otp, otp-2, lattice, which need " in words
    assert "The keys of the lattice pad alone are too large: 69.0 GB for faithful, 34.5 GB for fast." in words
    assert "Python and torch alone take 450.0 MB." in words and "ASPLOS 2018" in words
    assert "It does not fit: the server's enclave needs" in method2_words(found)
    assert recommendation(found).startswith("Nothing fits this enclave: take a TEE with at least ")


def test_what_does_not_fit_a_large_enclave():
    found = found_on(machine_of(memory_bytes=60e9, kernels=DESIGN, accelerator=endless(memory_bytes=10e9)))
    words = method1_words(found)
    assert "do not hold lattice, which need" in words and "ASPLOS" not in words
    assert "The keys of the lattice pad alone are too large: 69.0 GB for faithful." in words
    assert "The accelerator's 10.0 GB do not hold the integer weights of faithful, 26.4 GB." in words
    assert "It does not fit" not in method2_words(found)
    less = method1_words(found_on(machine_of(memory_bytes=80e9, kernels=DESIGN)))
    assert "do not hold lattice/faithful" in less and "alone are too large" not in less


def test_a_gpu_with_a_mode_of_its_own_comes_first():
    found = found_on(machine_of(kernels=DESIGN, accelerator=endless(bf16_tflop_s=100, confidential=True)))
    assert "a confidential mode of its own" in method1_words(found)
    assert recommendation(found).startswith("Use GPU confidential computing (about ")
    assert "unless its maker is not trusted; otherwise use " in recommendation(found)


def test_everything_may_as_well_stay_inside():
    machine = machine_of(memory_bytes=1.0, kernels=DESIGN)
    found = found_on(machine, SMALL)
    inside = {name: replace(each, fits=name == "bf16") for name, each in found.inside.items()}
    assert recommendation(replace(found, inside=inside)).startswith("Keep all in the TEE, bf16 (")
    assert "ASPLOS" not in method2_words(found)


def test_a_machine_without_a_tee_protects_nothing():
    assert recommendation(found_on(machine_of(tee="none"))).endswith(
        "This machine has no TEE, so nothing on it is protected."
    )


def test_what_the_first_epoch_waits_for():
    slow = replace(machine_of(fp32=1000), network_mbit_s=1e-3)
    assert "The network brings 0.03 tokens/s, less than one pass" in method2_words(found_on(slow))
    fast = replace(machine_of(), network_mbit_s=1e9)
    assert "the first epoch waits" not in method2_words(found_on(fast))
    late = replace(WORK, cut_layer=31, n_clients=1)
    assert "All clients together" in method2_words(estimate(BIG, fast, late))
    assert "All clients" not in method2_words(estimate(BIG, fast, replace(late, cut_layer=0)))


def test_what_spf_costs_beside_lora():
    found = estimate(BIG, machine_of(), replace(WORK, cut_layer=16, spf=SpfSpec()))
    assert found.split.fits and found.split_spf is not None and found.split_spf.fits
    words = method2_words(found)
    assert re.search(r"trains 1\d\d times as many numbers, at 0\.8\d?x the speed, in [\d.]+ GB for [\d.]+ GB\.", words)
    between = machine_of(memory_bytes=sum(found.split.memory.values()))
    tight = method2_words(estimate(BIG, between, found.work))
    assert "That does not fit the server's enclave" in tight and "It does not fit:" not in tight
    assert "SPF" not in method2_words(found_on(machine_of()))
    unknown = estimate(replace(BIG, units=()), machine_of(), found.work)
    assert unknown.split_spf is None and "SPF does not know this model's layout" in method2_words(unknown)


@pytest.mark.parametrize("confidential", [False, True])
def test_json_has_every_number_and_every_word(confidential: bool):
    found = found_on(machine_of(kernels=DESIGN, accelerator=endless(confidential=confidential)), SMALL)
    data = json.loads(json.dumps(estimate_to_json(found), allow_nan=False))
    assert list(data) == [
        "version",
        "model",
        "machine",
        "work",
        "baselines",
        "method1",
        "method2",
        "method2_spf",
        "verdicts",
        "recommendation",
    ]
    assert data["version"] == 1 and data["model"]["n_parameters"] == SMALL.n_parameters
    assert data["model"]["n_frozen"] == sum(each["n_weights"] for each in data["model"]["linears"])
    assert data["machine"]["constants"]["enclave.fp32_gflop_s"] == {"value": 100, "source": "measured: here"}
    assert len(data["baselines"]) == 3 + confidential
    assert data["method2"]["memory_bytes"] == sum(data["method2"]["memory"].values())
    assert data["recommendation"] == recommendation(found) and data["verdicts"]["method1"] == method1_words(found)
    for row, expected in zip(data["method1"]["rows"], found.masked, strict=True):
        assert (row["pad"], row["format"]) == (expected.pad, expected.format)
        assert row["memory_bytes"] == sum(row["memory"].values()) and row["is_usable"] is expected.is_usable
        assert row["tokens_per_s"] == expected.tokens_per_s and row["link"]["forward_out"] == expected.link.forward_out
