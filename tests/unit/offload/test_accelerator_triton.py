"""The Triton epilogue gives torch's bits: on a GPU, else in Triton's interpreter; and it compiles without a GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import textwrap

import pytest
import torch

from cloister.ring import FAITHFUL, FAST, RingFormat

BOTH = pytest.mark.parametrize("fmt", [FAITHFUL, FAST], ids=lambda fmt: fmt.name)
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton comes with torch for CUDA")


def _run(script: str, **environment: str) -> None:
    env = {**os.environ, **environment}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], env=env, capture_output=True, text=True,
                          check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@BOTH
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (3, 700), (129, 4096)])
def test_on_a_gpu(fmt: RingFormat, shape: tuple[int, int]) -> None:
    from cloister.offload import _triton
    from cloister.offload._compute import combine
    from cloister.offload._cuda import choose_combine

    generator = torch.Generator().manual_seed(1)
    accumulators = torch.randint(-(2**31), 2**31, (fmt.n_planes, *shape), generator=generator).to(torch.int32).cuda()
    assert torch.equal(_triton.combine(accumulators, fmt), combine(accumulators, fmt))
    assert choose_combine(_triton.combine, accumulators.device) is _triton.combine


def test_in_the_interpreter() -> None:
    _run(
        """
        import torch
        from cloister.offload import _triton
        from cloister.offload._compute import combine
        from cloister.offload._cuda import choose_combine
        from cloister.ring import FAITHFUL, FAST
        generator = torch.Generator().manual_seed(1)
        for fmt in (FAITHFUL, FAST):
            for shape in ((0, 8), (1, 1), (3, 700), (5, 1024)):
                a = torch.randint(-(2**31), 2**31, (fmt.n_planes, *shape), generator=generator).to(torch.int32)
                assert torch.equal(_triton.combine(a, fmt), combine(a, fmt)), (fmt.name, shape)
        assert choose_combine(_triton.combine, torch.device("cpu")) is _triton.combine
        """,
        TRITON_INTERPRET="1",
    )


def test_compiles_for_hopper() -> None:
    _run(
        """
        from triton import compile
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
        from cloister.offload import _triton
        from cloister.ring import FAITHFUL, FAST
        for kernel, values in ((_triton._limbs_kernel, (3, 8, FAST.modulus - 1, 1024)),
                               (_triton._residues_kernel, (*_triton._constants(FAITHFUL), FAITHFUL.modulus, 1024))):
            fixed = dict(zip(kernel.arg_names[3:], values, strict=True))
            signature = {"accumulators": "*i32", "elements": "*i32", "n": "i32", **dict.fromkeys(fixed, "constexpr")}
            constants = {(kernel.arg_names.index(name),): value for name, value in fixed.items()}
            source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
            made = compile(source, target=GPUTarget("cuda", 90, 32))
            assert "cubin" in made.asm and not {"div", "rem"} & set(made.asm["ptx"].replace(".", " ").split())
        """,
    )
