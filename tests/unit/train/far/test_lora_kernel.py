"""The fused adapter against PEFT's own modules, forwards and backwards."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn

from cloister.offload import FrozenLinear, OffloadedGroup, OffloadSession
from cloister.ring import FAITHFUL
from cloister.testing import FakeAccelerator
from cloister.train._lora_kernel import _Added, _LowRank, accelerate_lora


class Two(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.first = nn.Linear(6, 10, bias=bias)
        self.second = nn.Linear(10, 4, bias=bias)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def adapted(*, bias: bool = True, seed: int = 0, **config) -> Two:
    torch.manual_seed(seed)
    model = inject_adapter_in_model(
        LoraConfig(r=3, lora_alpha=5, target_modules=["first", "second"], **config), Two(bias)
    )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_B" in name:
            nn.init.normal_(parameter)  # B starts at 0, where half of the formula would go untested
    return model


def gradients(model: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    y = model(x)
    (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    return y.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@settings(deadline=None, max_examples=25)
@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=3), bias=st.booleans(), input_grad=st.booleans(),
    rslora=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_equals_peft(shape, bias, input_grad, rslora, seed):
    model = adapted(bias=bias, seed=seed, use_rslora=rslora)
    x = torch.randn(*shape, 6).requires_grad_(input_grad)
    y, expected = gradients(model, x)
    x_grad = x.grad.clone() if input_grad else None
    x.grad = None
    assert accelerate_lora(model) == 2
    fast_y, fast = gradients(model, x)
    torch.testing.assert_close(fast_y, y, rtol=1e-5, atol=1e-5)
    assert fast.keys() == expected.keys() == {n for n, _ in model.named_parameters() if "lora_" in n}
    for name in expected:
        torch.testing.assert_close(fast[name], expected[name], rtol=1e-4, atol=1e-5)
    if input_grad:
        torch.testing.assert_close(x.grad, x_grad, rtol=1e-4, atol=1e-5)


def test_gradients_by_finite_differences():
    x, w, bias = torch.randn(3, 6).double(), torch.randn(4, 6).double(), torch.randn(4).double()
    a, b = torch.randn(2, 6).double(), torch.randn(4, 2).double()
    for tensor in (x, a, b):
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, a, b: _LowRank.apply(x, w, bias, a, b, 0.7), (x, a, b))


@pytest.mark.parametrize("input_grad", [False, True], ids=["first", "later"])
def test_equals_peft_over_masked_layers(input_grad):
    """Two that share a product, of which one output waits for its turn, and one that reads them."""
    model = adapted()
    model.third = adapted(seed=1).first
    linears = [
        FrozenLinear(name, lora.base_layer.weight, lora.base_layer.bias)
        for name, lora in [("first", model.first), ("third", model.third), ("second", model.second)]
    ]
    model.forward = lambda x: model.second(torch.tanh(model.first(x) * model.third(x)))
    with OffloadSession(FakeAccelerator(), FAITHFUL) as session:
        model.first.base_layer, model.third.base_layer = OffloadedGroup(session, linears[:2]).members
        (model.second.base_layer,) = OffloadedGroup(session, linears[2:]).members
        x = torch.randn(2, 5, 6).requires_grad_(input_grad)
        y, expected = gradients(model, x)
        x_grad, x.grad = x.grad, None
        assert accelerate_lora(model) == 3
        fast_y, fast = gradients(model, x)
        with torch.inference_mode():
            torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(fast_y, y, rtol=1e-5, atol=1e-4)
    assert fast.keys() == expected.keys()
    assert len(fast) == 6
    for name in expected:
        torch.testing.assert_close(fast[name], expected[name], rtol=1e-3, atol=1e-3)
    if input_grad:
        torch.testing.assert_close(x.grad, x_grad, rtol=1e-3, atol=1e-3)


def test_gradients_of_the_added_term_by_finite_differences():
    y, x = torch.randn(3, 4).double(), torch.randn(3, 6).double()
    a, b = torch.randn(2, 6).double(), torch.randn(4, 2).double()
    for tensor in (y, x, a, b):
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(lambda y, x, a, b: _Added.apply(y * 1, x, a, b, 0.7), (y, x, a, b))


@pytest.mark.parametrize(
    "config", [{"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}], ids=["dropout", "dora", "bias"]
)
def test_what_it_does_not_compute_stays_with_peft(config):
    model = adapted(**config)
    assert accelerate_lora(model) == 0
    assert all("forward" not in m.__dict__ for m in model.modules() if isinstance(m, LoraLinear))


def test_never_forms_a_gradient_of_a_frozen_weight():
    """With memory for activations only: a dense gradient would be of the weight's shape."""
    model = adapted()
    accelerate_lora(model)
    made: list[torch.Size] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            # A transposed view of a weight is no new memory.
            if isinstance(out, torch.Tensor) and func._overloadpacket is not torch.ops.aten.t:
                made.append(out.shape)
            return out

    with Watch():
        gradients(model, torch.randn(7, 6))
    frozen = {model.first.base_layer.weight.shape, model.second.base_layer.weight.shape}
    assert not [shape for shape in made if shape in frozen or shape[::-1] in frozen]


def test_the_first_layers_input_gradient_is_not_computed():
    model = adapted()
    accelerate_lora(model)
    products: list[tuple[int, ...]] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func._overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_):
                products.append(tuple(out.shape))
            return out

    with Watch():
        gradients(model, torch.randn(7, 6))
    assert (7, 6) not in products, "the gradient of the boundary tensor was computed"
    assert (7, 10) in products
