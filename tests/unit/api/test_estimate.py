"""The formulas of `cloister plan` against numbers worked out by hand, and against the code that they speak of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tests.unit.api.plan_numbers import FREE, LLAMA_7B, WORK, endless, llama, machine_of

from cloister.adapters import SpfSpec
from cloister.api import _estimate_cost as cost
from cloister.api import _estimate_memory as memory
from cloister.api import _estimate_shapes as shapes
from cloister.api._estimate import estimate
from cloister.api._estimate_shapes import LinearShape
from cloister.api._machine import KernelSpec, LinkSpec
from cloister.errors import AdapterError
from cloister.pad import Direction, PadMode

TINY = llama(256, 512, 2, 1000, kv=128)
LINEAR = LinearShape("x", n_in=100, n_out=300, n_members=2, block=0, has_backward=True)


# --- what is copied from elsewhere, so that the formulas need no torch ------------------------------------------------


def test_numbers_of_the_formats_are_those_of_the_ring():
    from cloister.ring import FORMATS, MAX_FEATURES

    assert dict(cost.N_PLANES) == {name: fmt.n_planes for name, fmt in FORMATS.items()}
    assert dict(cost.N_WEIGHT_PLANES) == {name: fmt.n_weight_planes for name, fmt in FORMATS.items()}
    assert cost.MAX_FEATURES == MAX_FEATURES


def test_numbers_of_lattice_pads_are_those_of_their_parameters():
    from cloister.pad import LATTICE_PARAMETERS

    for fmt in cost.N_PLANES:
        assert memory.lattice_key_bytes(fmt, 16, 32) == 48 * LATTICE_PARAMETERS[fmt].bytes_per_feature
        assert memory.LATTICE_TOKENS == LATTICE_PARAMETERS[fmt].N_TOKENS


@pytest.mark.parametrize("fmt", ["faithful", "fast"])
@pytest.mark.parametrize(("n_in", "n_out"), [(48, 32), (40, 33)], ids=["whole lanes", "filled up"])
def test_keys_of_lattice_pads_are_as_large_as_a_session_has_them(fmt: str, n_in: int, n_out: int):
    import torch

    from cloister.offload import OffloadSession
    from cloister.ring import FORMATS, quantize_weight
    from cloister.testing import FakeAccelerator

    weight = torch.randn(n_out, n_in, generator=torch.Generator().manual_seed(0))
    with OffloadSession(FakeAccelerator(), FORMATS[fmt], pad=PadMode.LATTICE) as session:
        session.add("x", quantize_weight(weight, FORMATS[fmt], layer="x"))
        sides = session._layers["x"].sides.values()
        held = {side.direction.value: side.source._secrets for side in sides}  # type: ignore[attr-defined]
        sizes = {direction: secrets.s.nbytes + secrets.z.nbytes for direction, secrets in held.items()}
        session.forward("x", torch.ones(3, n_in))
        [begun] = session._layers["x"].sides[Direction.FORWARD].source._rests  # type: ignore[attr-defined]
        begun_bytes = begun.pad.n_bytes
    linear = replace(LINEAR, n_in=n_in, n_out=n_out)
    model = replace(TINY, linears=(linear,))
    bill = memory.masked_bill(model, machine_of(), replace(WORK, n_tokens=3), PadMode.LATTICE, fmt)
    assert {name: bill[f"pad keys, {name}"] for name in sizes} == sizes
    n_planes = cost.N_PLANES[fmt]
    assert begun_bytes == 1024 * (n_planes * n_in + 4 * n_out + 8)
    assert bill["pads begun"] == begun_bytes + 1024 * (n_planes * n_out + 4 * n_in + 8)


def test_limits_of_layers_are_those_of_offload():
    from cloister.offload._linear import MAX_ROWS
    from cloister.slicing._frozen_linears import SMALLEST_SIDE

    assert (shapes.MAX_ROWS, shapes.SMALLEST_SIDE) == (MAX_ROWS, SMALLEST_SIDE)


def test_a_boundary_tensor_is_as_large_as_the_shards_have_it():
    from cloister.train._boundary import bytes_per_token

    assert estimate(TINY, machine_of(), WORK).split.boundary_bytes == bytes_per_token(256, "int8")


# --- shapes -----------------------------------------------------------------------------------------------------------


def test_parameters_of_llama_7b():
    """6,738,415,616, as the model card has it."""
    assert llama(*LLAMA_7B).n_parameters == 6_738_415_616


def test_a_tied_head_is_counted_once():
    tied = replace(TINY, has_tied_head=True)
    assert TINY.n_parameters - tied.n_parameters == 256 * 1000


@pytest.mark.parametrize(
    ("n_out", "parts"),
    [(300, [300]), (32768, [32768]), (32769, [16385, 16384]), (100_000, [25000] * 4)],
    ids=["small", "just", "over", "vocabulary"],
)
def test_long_layers_are_cut_as_offload_cuts_them(n_out: int, parts: list[int]):
    import torch

    assert [size for _, size in replace(LINEAR, n_out=n_out).parts] == parts
    assert [len(part) for part in torch.tensor_split(torch.empty(n_out), len(parts))] == parts


def test_what_stays_inside():
    small = replace(TINY, linears=(*TINY.linears, replace(LINEAR, n_out=31)))
    assert [each.name for each in small.kept_inside(PadMode.OTP)] == ["x"]
    assert [each.name for each in small.kept_inside(PadMode.LATTICE)] == ["head", "x"]
    assert len(small.offloaded(PadMode.LATTICE)) == 8


def test_sides_of_a_cut():
    far, near = TINY.from_block(1), TINY.below_block(1)
    assert [each.block for each in near] == [0] * 4 and [each.block for each in far] == [1] * 4 + [None]
    # The first linears of the far side read the boundary tensor, which has no gradient.
    assert [each.has_backward for each in far] == [False, True, True, True, True]
    assert TINY.from_block(0) == TINY.linears and TINY.below_block(0) == ()


# --- work -------------------------------------------------------------------------------------------------------------


def test_operations_of_a_block_by_hand():
    block = TINY.linears[:4]
    # qkv 256 x 512 forwards only; o 256 x 256, gate and up 256 x 1024, down 512 x 256 in both directions.
    assert cost.linear_flops(block) == 2 * 256 * 512 + 4 * (256 * 256 + 256 * 1024 + 512 * 256)
    # LoRA: q, k, v read 256 and give 512 together; o; gate and up; down.
    numbers = 8 * ((3 * 256 + 512) + (256 + 256) + (2 * 256 + 1024) + (512 + 256))
    assert cost.n_adapter(TINY, block, WORK) == numbers
    # A rank below 32 takes as long as 32.
    flops = {rank: cost.adapter_flops(TINY, block, replace(WORK, rank=rank)) for rank in (8, 32, 64)}
    assert flops == {8: 6 * numbers * 4, 32: 6 * numbers * 4, 64: 6 * numbers * 8}
    # Two products of 512 tokens by 256 features forwards, five backwards.
    assert cost.attention_flops(TINY, WORK) == 7 * 2 * 512 * 256
    assert cost.attention_flops(replace(TINY, max_length=100), WORK) == 7 * 2 * 100 * 256


def test_a_prefix_in_place_of_lora():
    prefix = replace(WORK, rank=0, prefix_tokens=16)
    assert cost.n_adapter(TINY, TINY.linears, prefix) == 16 * 2 * 128 * 2
    assert cost.adapter_flops(TINY, TINY.linears, prefix) == 0
    assert cost.attention_flops(TINY, prefix) == 7 * 2 * (512 + 16) * 256


def test_spf_trains_rows_in_place_and_lora_on_one_projection_of_a_block():
    spf = replace(WORK, spf=SpfSpec(heads=0.25, neurons=0.5))
    block = TINY.linears[4:8]
    # One of four head groups: 64 query, 32 key and 32 value rows of 256. 256 of 512 neurons: gate and up rows of 256.
    rows = 128 * 256 + 256 * 2 * 256
    assert (cost.n_spf_rows(TINY, block, WORK), cost.n_spf_rows(TINY, block, spf)) == (0, rows)
    assert cost.n_adapter(TINY, block, spf) == 8 * (256 + 256)
    assert cost.adapter_flops(TINY, block, spf) == 6 * 32 * (256 + 256) + 2 * rows
    assert cost.kept_elements(TINY, block, spf) == cost.kept_elements(TINY, block, WORK) - 8 * (7 - 1)
    bill = memory.far_bill(TINY, machine_of(), spf)
    assert bill["adapter and optimiser"] == 16 * 8 * (256 + 256) + 12 * rows
    with pytest.raises(AdapterError, match=r"heads = 0\.01 selects none of a block's 4 head groups"):
        cost.n_spf_rows(TINY, block, replace(WORK, spf=SpfSpec(heads=0.01)))


@pytest.mark.parametrize("family", ["bert", "gemma", "gpt2", "gpt_neox", "llama", "mistral", "qwen2", "qwen3"])
def test_what_spf_trains_is_what_a_far_side_trains(family: str, tmp_path: Path):
    from cloister.adapters import add_spf, choose_support, n_trainable
    from cloister.api._estimate_model import read_shape
    from cloister.slicing import inspect_backbone, load_far
    from cloister.testing import write_tiny_model

    write_tiny_model(tmp_path, family)
    info, spec = inspect_backbone(tmp_path), SpfSpec(heads=0.5, neurons=0.25, r=4)
    far = load_far(info, 1, task="sequence-classification", n_labels=3, pooling="last", seed=0)
    add_spf(far, spec, choose_support(far.blocks, spec), seed=0)
    shape, work = read_shape(info), replace(WORK, spf=spec)
    found = estimate(shape, machine_of(), work).split_spf
    head = sum(parameter.numel() for parameter in far.head.parameters())
    assert found is not None and found.n_trained == n_trainable(far) - head


def test_time_in_one_place_is_operations_and_passes_over_memory():
    block, rates = TINY.linears[:4], cost.Rates(flop_s=1e9, byte_s=1e6)
    flops = cost.linear_flops(block) + cost.attention_flops(TINY, WORK) + cost.adapter_flops(TINY, block, WORK)
    kept = (256 + 512 + 24) + (256 + 256 + 8) + (256 + 1024 + 16) + (512 + 256 + 8) + 4 * 256
    assert cost.kept_elements(TINY, block, WORK) == kept
    moved = 4 * (6 * kept + 7 * cost.n_adapter(TINY, block, WORK) / 512)
    assert cost.plain_seconds(TINY, block, WORK, rates) == pytest.approx(flops / 1e9 + moved / 1e6)
    forward = 2 * sum(each.n_weights for each in block) + cost.attention_flops(TINY, WORK) * 2 / 7
    moved = 2 * 4 * (kept - 8 * 7)
    assert cost.forward_seconds(TINY, block, WORK, rates) == pytest.approx(forward / 1e9 + moved / 1e6)


def test_logits_are_passed_over_too():
    head, rates = TINY.linears[-1:], cost.Rates(flop_s=1e30, byte_s=1)
    assert cost.rest_seconds(TINY, head, WORK, rates) == pytest.approx(4 * 6 * 1000)


# --- masked layers ----------------------------------------------------------------------------------------------------

COSTS = KernelSpec(otp_ns=1, encode_ns=10, combine_ns=100, lattice_ns=1000, mask_ns=1e4, unmask_ns=1e5)
MASKING = (7 * 1e4 + 11 * 1e5) * 5e-9  # 5 tokens, 7 features in, 11 out


def product(pad: PadMode, fmt: str = "fast", **fields: object) -> cost.Masked:
    machine = replace(machine_of(kernels=COSTS), **fields)
    return cost.masked_product(machine, pad, fmt, n_tokens=5, n_in=7, n_out=11)


def test_the_lattice_pad_costs_the_same_for_inputs_and_outputs():
    found = product(PadMode.LATTICE)
    assert found.pads == pytest.approx(5 * (7 + 11) * 1000e-9) and found.masking == pytest.approx(MASKING)
    assert found.products == found.helper == found.helper_pads == 0


@pytest.mark.parametrize(("fmt", "planes"), [("faithful", 4), ("fast", 3)], ids=str)
def test_the_pad_otp_repeats_the_products_inside(fmt: str, planes: int):
    enclave = replace(machine_of().enclave, int8_gop_s=2)
    found = product(PadMode.OTP, fmt, enclave=enclave)
    assert found.products == pytest.approx(planes * 2 * 5 * 7 * 11 / 2e9)
    assert found.pads == pytest.approx(5 * (7 * 11 + 11 * 100) * 1e-9)
    assert found.helper == found.helper_pads == 0


def test_the_pad_otp_2_waits_for_another_host():
    away = LinkSpec(gb_s=1e-9, latency_us=3e6)
    found = product(PadMode.OTP2, helper_link=away)
    assert found.pads == pytest.approx(5 * 7 * 1e-9) and found.products == 0
    assert found.helper_pads == pytest.approx(5 * 7 * 11e-9)
    assert found.helper == pytest.approx(4 * 5 * 11 + 3)


def test_link_and_accelerator_of_a_product():
    device = endless(int8_top_s=4e-9, attained=0.5, combine_ns=1e9)
    found = product(PadMode.LATTICE, "faithful", link=LinkSpec(gb_s=1e-9, latency_us=2e6), accelerator=device)
    assert (found.sending, found.answering) == pytest.approx((4 * 5 * 7, 4 * 5 * 11))
    assert found.accelerator == pytest.approx(4 * 2 * 5 * 7 * 11 / 2e3 + 5 * 11)
    assert found.latency == 2
    assert found.serial == pytest.approx(found.pads + found.masking + 140 + 220 + found.accelerator + 2)


def test_threads_share_pads_and_masks():
    enclave = replace(machine_of().enclave, kernel_threads=4)
    assert product(PadMode.LATTICE, enclave=enclave).masking == pytest.approx(MASKING / 4)


def test_the_limit_has_every_core_at_work_and_everything_at_once():
    whole = cost.Masked(pads=8, products=1, masking=8, sending=3, answering=4, accelerator=5, helper=6, helper_pads=8)
    machine = machine_of(cores=16)
    assert whole.limit(machine, 2) == 6.5  # the helper: 6 + 8 / 16
    assert whole.limit(machine, 5) == 7  # the enclave: 1 + 16 / 16 + 5
    beside = replace(machine, accelerator=endless(shares_cpu=True))
    assert whole.limit(beside, 2) == 9
    assert replace(whole, sending=30).limit(beside, 2) == 9  # nothing is sent


def test_a_step_is_every_layer_in_both_directions():
    machine = machine_of(kernels=COSTS)
    forward, backward = (
        cost.masked_product(machine, PadMode.OTP, "fast", n_tokens=5, n_in=n_in, n_out=n_out)
        for n_in, n_out in ((100, 300), (300, 100))
    )
    both = cost.masked_step(machine, PadMode.OTP, "fast", [LINEAR], 5)
    assert both == forward + backward
    assert cost.masked_step(machine, PadMode.OTP, "fast", [replace(LINEAR, has_backward=False)], 5) == forward
    assert both.each(5).serial == pytest.approx(both.serial / 5)


# --- where it pays: the design's section 6 ----------------------------------------------------------------------------

DESIGN = replace(FREE, lattice_ns=2.0, mask_ns=0.8, unmask_ns=0.8)  # 2.8 ns an element, in and out


@pytest.mark.parametrize(
    ("gflop_s", "hidden"), [(62.5, 175), (210, 590), (785, 2200)], ids=["fp32 core", "bf16 AVX-512", "AMX"]
)
def test_break_even_of_the_design(gflop_s: float, hidden: float):
    machine = machine_of(fp32=gflop_s, kernels=DESIGN)
    for fmt in cost.N_PLANES:
        found = cost.break_even_hidden(machine, PadMode.LATTICE, fmt, "fp32", 512)
        assert found == pytest.approx(hidden, rel=0.01)


def test_break_even_with_a_link_an_accelerator_and_a_latency():
    """At the width that it names, both take the same time."""
    device = endless(int8_top_s=5)
    machine = replace(machine_of(fp32=100, kernels=COSTS, accelerator=device), link=LinkSpec(gb_s=10, latency_us=30))
    machine = replace(machine, kernels={"fast": DESIGN})
    width = cost.break_even_hidden(machine, PadMode.LATTICE, "fast", "fp32", 64)
    assert width is not None
    masked = 64 * width * (5.6e-9 + 7e-10) + 3 * 2 * 64 * width**2 / 5e12 + 30e-6
    assert masked == pytest.approx(2 * 64 * width**2 / 100e9)


def test_masking_never_pays_where_products_cost_as_much_or_the_width_is_beyond_the_ring():
    slow = machine_of(fp32=100, kernels=DESIGN, accelerator=endless(int8_top_s=0.3))  # 3 products at 3 times the rate
    assert cost.break_even_hidden(slow, PadMode.LATTICE, "fast", "fp32", 512) is None
    fast = machine_of(fp32=1e6, kernels=DESIGN)
    assert cost.break_even_hidden(fast, PadMode.LATTICE, "fast", "fp32", 512) is None


def test_limit_of_the_design_for_7b():
    """96 AVX-512 cores and one H200: 6 times all in the TEE, 0.27 times the plain H200.

    The design's are estimates, with element-wise steps fused into one pass and skinny products as fast as others; here
    they are as measured, so it is less.
    """
    h200 = endless(bf16_tflop_s=989, int8_top_s=1979, attained=0.6, memory_gb_s=4800)
    machine = machine_of(cores=96, fp32=62.5 * 96, bf16=210 * 96, accelerator=h200, kernels=DESIGN)
    machine = replace(machine, link=LinkSpec(gb_s=50, latency_us=26), enclave=replace(machine.enclave, memory_gb_s=400))
    found = estimate(llama(*LLAMA_7B), machine, replace(WORK, cut_layer=16))
    row = next(row for row in found.masked if (row.pad, row.format) == (PadMode.LATTICE, "fast"))
    assert 6 / 3 < row.limit_tokens_per_s / found.inside["bf16"].tokens_per_s < 6 * 3
    assert 0.27 / 3 < row.limit_tokens_per_s / found.plain.tokens_per_s < 0.27 * 3


# --- bytes and memory -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fmt", "planes"), [("faithful", 4), ("fast", 3)], ids=str)
def test_bytes_on_the_link_by_hand(fmt: str, planes: int):
    found = cost.link_bytes(fmt, [LINEAR, replace(LINEAR, has_backward=False)])
    assert (found.forward_out, found.forward_back) == (planes * 200, 4 * 600)
    assert (found.backward_out, found.backward_back) == (planes * 300, 4 * 100)
    assert found.total == planes * 500 + 4 * 700


def test_a_cut_head_is_sent_its_input_for_each_part():
    found = cost.link_bytes("fast", [replace(LINEAR, n_in=64, n_out=65536)])
    assert (found.forward_out, found.backward_back) == (2 * 3 * 64, 2 * 4 * 64)


def test_keys_of_the_lattice_pad_of_llama_7b_are_17_gb_a_direction():
    """The design: 8 KB a feature, 17 GB; q/k/v and gate/up fused, that is every input and output of one direction."""
    bill = memory.masked_bill(llama(*LLAMA_7B), machine_of(), WORK, PadMode.LATTICE, "fast")
    features = 32 * ((4096 + 3 * 4096) + 2 * 4096 + (4096 + 2 * 11008) + (11008 + 4096))
    assert bill["pad keys, forward"] == bill["pad keys, backward"] == 8192 * features == pytest.approx(17e9, rel=0.02)
    faithful = memory.masked_bill(llama(*LLAMA_7B), machine_of(), WORK, PadMode.LATTICE, "faithful")
    assert faithful["pad keys, forward"] == 2 * bill["pad keys, forward"]


def test_memory_of_a_small_enclave_by_hand():
    one = replace(TINY, linears=(LINEAR,), n_layers=1, n_embedding=10, n_other=4, n_after=6)
    bill = memory.masked_bill(one, machine_of(), WORK, PadMode.OTP, "fast")
    kept = 100 + 300 + 8 * 2 + 4 * 256
    assert bill == {
        "runtime": 1,
        "what is not offloaded": 4 * 20,
        "scales and check keys": 8 * 400 * 2 + 4 * 300,
        "integer weights to load again": 2 * 30_000,
        "integer weights for W r": 30_000,
        "pad in use": 512 * max(3 * 100 + 4 * 300 + 8, 3 * 300 + 4 * 100 + 8),
        "activations": 4 * 512 * kept,
        "adapter and optimiser": 16 * 8 * (2 * 100 + 300),
    }
    assert memory.accelerator_bytes("faithful", [LINEAR]) == 4 * 30_000
    inside = memory.inside_bill(one, machine_of(), WORK, "bf16")
    assert inside["weights"] == 2 * (30_000 + 20)
    assert memory.inside_bill(one, machine_of(), WORK, "fp32")["weights"] == 2 * inside["weights"]


def test_rows_of_begun_blocks_are_kept_unless_a_batch_is_whole_blocks():
    one = replace(TINY, linears=(LINEAR,))
    bill = memory.masked_bill(one, machine_of(), WORK, PadMode.LATTICE, "fast")
    assert bill["pads begun"] == 1024 * (3 * 100 + 4 * 300 + 8 + 3 * 300 + 4 * 100 + 8)
    whole = memory.masked_bill(one, machine_of(), replace(WORK, n_tokens=2048), PadMode.LATTICE, "fast")
    assert "pads begun" not in whole


def test_memory_of_both_sides_of_a_cut():
    bill = memory.far_bill(TINY, machine_of(), WORK)
    far = sum(each.n_weights for each in TINY.linears[4:])
    assert bill["weights"] == 4 * (far + 2 * 256 + 256) and bill["features"] == 2048
    near = sum(each.n_weights for each in TINY.linears[:4])
    assert memory.near_bytes(TINY, WORK) == 4 * (256 * 1000 + near + 2 * 256)


# --- all of it --------------------------------------------------------------------------------------------------------


def test_everything_together():
    machine = machine_of(
        accelerator=endless(bf16_tflop_s=0.8, confidential=True, confidential_share=0.5), kernels=COSTS
    )
    found = estimate(TINY, machine, WORK)
    assert found.best_inside.name == "all in the TEE, bf16"
    assert found.inside["bf16"].tokens_per_s == pytest.approx(4 * found.inside["fp32"].tokens_per_s)
    assert found.plain.tokens_per_s == pytest.approx(8 * found.inside["fp32"].tokens_per_s)
    assert found.gpu_tee is not None and found.gpu_tee.tokens_per_s == found.plain.tokens_per_s / 2
    assert [(row.pad.value, row.format) for row in found.masked] == [
        (pad, fmt) for pad in ("otp", "otp-2", "lattice") for fmt in ("faithful", "fast")
    ]
    for row in found.masked:
        assert row.tokens_per_s == pytest.approx(1 / sum(row.seconds.values()))
        assert row.times_tee["fp32"] == row.tokens_per_s / found.inside["fp32"].tokens_per_s
        assert row.tokens_per_s <= row.limit_tokens_per_s and row.is_usable
        # The second accelerator sends as many elements as the first.
        back = row.link.forward_back + row.link.backward_back
        assert row.helper_bytes == (back if row.pad is PadMode.OTP2 else 0)
    assert found.update_bytes == 4 * found.n_adapter
    assert found.split.upload_tokens_per_s == pytest.approx(1e6 / 260)
    assert found.split.near_tokens_per_s is not None and found.split.near_tokens_per_s > found.split.tokens_per_s


def test_with_only_embeddings_near_there_is_nothing_to_compute_there():
    assert estimate(TINY, machine_of(), replace(WORK, cut_layer=0)).split.near_tokens_per_s is None


@pytest.mark.parametrize(("tee", "confidential"), [("sgx", True), ("none", True), ("tdx", False)])
def test_a_gpu_tee_needs_a_tee_virtual_machine_and_the_mode(tee: str, confidential: bool):
    machine = machine_of(tee=tee, accelerator=endless(confidential=confidential))
    assert estimate(TINY, machine, WORK).gpu_tee is None


def test_what_does_not_fit():
    found = estimate(TINY, machine_of(memory_bytes=10, accelerator=endless(memory_bytes=10)), WORK)
    assert not any(row.fits or row.fits_accelerator or row.is_usable for row in found.masked)
    assert not found.split.fits and not any(row.fits for row in found.inside.values())


@pytest.mark.parametrize("family", ["bert", "gemma", "gpt2", "gpt_neox", "llama", "qwen3"])
def test_what_backward_keeps_is_what_torch_keeps(family: str, tmp_path: Path):
    """Of the blocks of a model with LoRA, within a factor of 1.5."""
    import torch
    from peft import LoraConfig, inject_adapter_in_model
    from transformers import AutoConfig, AutoModel
    from transformers.pytorch_utils import Conv1D

    from cloister.api._estimate_model import read_shape
    from cloister.slicing import inspect_backbone
    from cloister.testing import write_tiny_model

    write_tiny_model(tmp_path, family, hidden_size=128)
    shape = read_shape(inspect_backbone(tmp_path))
    model = AutoModel.from_config(AutoConfig.from_pretrained(tmp_path)).requires_grad_(False).eval()
    linears = {name: each for name, each in model.named_modules() if isinstance(each, (torch.nn.Linear, Conv1D))}
    names = [name for name in linears if "pooler" not in name]
    transposed = isinstance(linears[names[0]], Conv1D)
    inject_adapter_in_model(LoraConfig(r=8, target_modules=names, fan_in_fan_out=transposed), model)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address serves twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(torch.arange(64)[None] + 5)[0].sum()
    n_bytes = sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in own)
    expected = 4 * 64 * cost.kept_elements(shape, [each for each in shape.linears if not each.is_head], WORK)
    assert expected / 1.5 < n_bytes < expected * 1.5, n_bytes / expected
