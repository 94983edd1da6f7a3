"""Models and machines in numbers that can be checked by hand."""

from __future__ import annotations

from dataclasses import replace

from cloister.api._estimate_shapes import LinearShape, ModelShape, UnitShape, Workload
from cloister.api._machine import AcceleratorSpec, EnclaveSpec, KernelSpec, LinkSpec, Machine


def llama(hidden: int, inner: int, n_layers: int, vocab: int, *, kv: int | None = None) -> ModelShape:
    """A Llama of these sizes, as `plan_model` would read it."""
    kv = hidden if kv is None else kv
    linears = [
        LinearShape(f"{block}.{name}", n_in, n_out, members, block, has_backward=block > 0 or name != "qkv")
        for block in range(n_layers)
        for name, n_in, n_out, members in (
            ("qkv", hidden, hidden + 2 * kv, 3), ("o", hidden, hidden, 1), ("gu", hidden, 2 * inner, 2),
            ("down", inner, hidden, 1),
        )
    ]  # fmt: skip
    linears.append(LinearShape("head", hidden, vocab, 1, None, has_backward=True))
    return ModelShape(
        path="a-llama", family="llama", n_layers=n_layers, hidden_size=hidden, query_size=hidden, kv_size=kv,
        vocab_size=vocab, max_length=4096, is_encoder=False, has_tied_head=False, linears=tuple(linears),
        units=(UnitShape("heads", 4, (hidden + 2 * kv) // 4 * hidden), UnitShape("neurons", inner, 2 * hidden)),
        n_embedding=vocab * hidden, n_other=2 * hidden, n_after=hidden,
    )  # fmt: skip


FREE = KernelSpec(otp_ns=0, encode_ns=0, combine_ns=0, lattice_ns=0, mask_ns=0, unmask_ns=0)


def machine_of(
    *,
    tee: str = "tdx",
    cores: float = 1,
    fp32: float = 100,
    bf16: float = 400,
    accelerator: AcceleratorSpec | None = None,
    kernels: KernelSpec = FREE,
    memory_bytes: float = 1e12,
) -> Machine:
    """Everything that is not named is free or endless."""
    return Machine(
        name="test",
        about="a test's",
        network_mbit_s=8,
        enclave=EnclaveSpec(
            tee=tee, cores=cores, kernel_threads=1, fp32_gflop_s=fp32, bf16_gflop_s=bf16, int8_gop_s=1e15,
            memory_gb_s=1e15, memory_bytes=memory_bytes, runtime_bytes=1,
        ),
        accelerator=accelerator or endless(),
        link=LinkSpec(gb_s=1e15, latency_us=0),
        helper_link=LinkSpec(gb_s=1e15, latency_us=0),
        kernels={"faithful": kernels, "fast": kernels},
        sources={"network_mbit_s": "assumed: 1 MB/s", **dict.fromkeys(
            ("enclave", "accelerator", "link", "helper_link", "kernels"), "measured: here")},
    )  # fmt: skip


def endless(**fields: object) -> AcceleratorSpec:
    """An accelerator without limits, but for what is named."""
    spec = AcceleratorSpec(
        shares_cpu=False, bf16_tflop_s=1e15, int8_top_s=1e15, attained=1, combine_ns=0, memory_gb_s=1e15,
        memory_bytes=1e15, confidential=False, confidential_share=1,
    )  # fmt: skip
    return replace(spec, **fields)


WORK = Workload(n_tokens=512, rank=8, prefix_tokens=0, cut_layer=1, n_clients=3, feature_bytes=2048)
LLAMA_7B = (4096, 11008, 32, 32000)
