"""Every family with masked layers: equal to its quantised twin, near the float model, adapters and checks included."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import IA3Config, LoraConfig, PrefixTuningConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D

from cloister.adapters import LoraSpec, add_lora, attach_adapter
from cloister.errors import OffloadError, UnsupportedLayerError
from cloister.offload import OffloadedLinear, OffloadSession
from cloister.pad import PadMode
from cloister.ring import FAITHFUL, FAST, QuantizedWeight, RingFormat, quantize_weight, row_room
from cloister.slicing import (
    BackboneInfo,
    OffloadReport,
    WholeSide,
    check_offload,
    inspect_backbone,
    load_far,
    load_whole,
    offload_model,
)
from cloister.slicing._verdicts import ALWAYS_FITS
from cloister.testing import FakeAccelerator

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated"),
]

# Of loss and LoRA gradients against the float model, whose widths are tiny and whose weights are large.
LOSS_ERROR = {"faithful": 1e-3, "fast": 2e-2}
GRADIENT_ERROR = {"faithful": 1e-2, "fast": 1.5e-1}
Batch = tuple[Tensor, Tensor]


class PlainSession:
    """Computes what a session does with the same integers and scales, without masks and without cloister's kernels."""

    def __init__(self, fmt: RingFormat) -> None:
        self.format = fmt
        self.pad_mode = PadMode.OTP
        self.layers: dict[str, tuple[QuantizedWeight, Tensor | None]] = {}

    def add(self, layer: str, weight: QuantizedWeight, bias: Tensor | None) -> None:
        self.layers[layer] = (weight, bias)

    def forward(self, layer: str, x: Tensor) -> Tensor:
        weight, bias = self.layers[layer]
        y, scale = self._product(weight.w_q, x.detach(), weight.forward_limit)
        found = (y * scale * weight.scales).float()
        return found if bias is None else found + bias

    def backward(self, layer: str, g: Tensor) -> Tensor:
        weight, _ = self.layers[layer]
        y, scale = self._product(weight.w_q.T, g.float() * weight.scales, weight.backward_limit)
        return (y * scale).float()

    def _product(self, w_q: Tensor, x: Tensor, limit: float) -> tuple[Tensor, Tensor]:
        wide = x.double()
        n = wide.shape[-1]
        squares = nn.functional.pad(wide.square(), (0, -n % 8)).unflatten(-1, (-1, 8))
        sums = torch.zeros_like(squares[..., 0, :])
        for part in squares.unbind(-2):
            sums += part
        for _ in range(3):
            sums = sums[..., 0::2] + sums[..., 1::2]
        scale = sums.sqrt() / row_room(limit, n)
        scale = torch.where(scale == 0, 1.0, scale)
        return torch.round(wide / scale) @ w_q.double().T, scale


def whole(info: BackboneInfo) -> nn.Module:
    """The model that users would load, frozen, and not training."""
    auto = AutoModel if info.is_encoder else AutoModelForCausalLM
    return auto.from_pretrained(info.path).requires_grad_(False).eval()


def with_lora(model: nn.Module, seed: int = 0, **options: object) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, **options)
        return get_peft_model(model, config).eval()


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    input_ids, attention_mask = batch
    out = model(input_ids=input_ids, attention_mask=attention_mask)
    if "logits" in out:
        wanted = attention_mask[:, 1:].bool()
        return cross_entropy(out.logits[:, :-1][wanted], input_ids[:, 1:][wanted])
    target = torch.randn(out.last_hidden_state.shape[-1], generator=torch.Generator().manual_seed(5))
    return (out.last_hidden_state[attention_mask.bool()] @ target).square().mean()


def step(model: nn.Module, batch: Batch) -> tuple[float, dict[str, Tensor]]:
    """Loss and the gradient of everything that trains."""
    model.zero_grad(set_to_none=True)
    loss = loss_of(model, batch)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    assert found
    squares = [((found[n] - expected[n]).square().sum(), expected[n].square().sum()) for n in found]
    return float((sum(a for a, _ in squares) / sum(b for _, b in squares)).sqrt())


def assert_near(
    found: tuple[float, dict[str, Tensor]], expected: tuple[float, dict[str, Tensor]], fmt: RingFormat
) -> None:
    assert abs(found[0] - expected[0]) < LOSS_ERROR[fmt.name] * max(1.0, abs(expected[0]))
    assert distance(found[1], expected[1]) < GRADIENT_ERROR[fmt.name]


@pytest.fixture
def session():
    with OffloadSession(FakeAccelerator(), FAITHFUL) as made:
        yield made


@pytest.fixture
def llama(tiny_folders: dict) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(tiny_folders["llama"]).requires_grad_(False).eval()


# --- every family -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", [FAITHFUL, FAST], ids=lambda fmt: fmt.name)
def test_every_family(info: BackboneInfo, batch: Batch, fmt: RingFormat) -> None:
    models = [with_lora(whole(info)) for _ in range(3)]
    expected = step(models[0], batch)
    with OffloadSession(FakeAccelerator(), fmt) as session:
        report = offload_model(models[1], session, smallest=1)
        twin_report = offload_model(models[2], PlainSession(fmt), smallest=1)  # type: ignore[arg-type]
        assert report == twin_report
        found, twin = step(models[1], batch), step(models[2], batch)
        n_messages = session.describe()["forward"]
    assert found[0] == twin[0]
    assert all(torch.equal(found[1][name], twin[1][name]) for name in found[1])
    assert_near(found, expected, fmt)
    assert n_messages == len(report.groups)  # each group is one message: its members are given the same tensor
    assert_all_are_replaced(models[1], report)


def assert_all_are_replaced(model: nn.Module, report: OffloadReport) -> None:
    """Every linear that does not train is gone with its weight, and every other parameter is accounted for."""
    masked = [m for m in model.modules() if isinstance(m, OffloadedLinear)]
    assert len(masked) == sum(len(group) for group in report.groups)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            assert ".lora_" in name or ".pooler." in name
        elif any(True for _ in module.parameters(recurse=False)):
            plain = ".".join(part for part in name.split(".") if part != "base_layer")
            assert plain in report.inside or ".lora_" in name, name
    assert report.n_inside == sum(p.numel() for p in model.parameters())
    assert report.n_offloaded == sum(m.in_features * m.out_features for m in masked)


_LLAMA_BLOCK = [
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
]
_BERT_BLOCK = [
    ("attention.self.query", "attention.self.key", "attention.self.value"),
    ("attention.output.dense",),
    ("intermediate.dense",),
    ("output.dense",),
]
_GPT2_BLOCK = [("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)]
_NEOX_BLOCK = [
    ("attention.query_key_value",),
    ("attention.dense",),
    ("mlp.dense_h_to_4h",),
    ("mlp.dense_4h_to_h",),
]
_STRUCTURE = {
    "bert": ("bert.encoder.layer", _BERT_BLOCK, ["cls.predictions.transform.dense", "cls.predictions.decoder"]),
    "gpt2": ("transformer.h", _GPT2_BLOCK, ["lm_head"]),
    "gpt_neox": ("gpt_neox.layers", _NEOX_BLOCK, ["lm_head"]),
}


def test_what_is_found(info: BackboneInfo) -> None:
    """In order, by name, for every family; adapters change nothing of it."""
    blocks, block, heads = _STRUCTURE.get(info.family, ("model.layers", _LLAMA_BLOCK, ["lm_head"]))
    if info.is_encoder:
        blocks, heads = "encoder.layer", ["pooler.dense"]
    expected = [
        tuple(f"{blocks}.{i}.{name}" for name in names) for i in range(info.n_layers) for names in block
    ]  # fmt: skip
    model = whole(info)
    assert check_offload(model, FAITHFUL, smallest=1) == [*expected, *((head,) for head in heads)]
    assert check_offload(model, FAITHFUL, smallest=1, pad=PadMode.LATTICE) == expected
    tuned = check_offload(with_lora(model), FAITHFUL, smallest=1)
    assert [tuple(name.removeprefix("base_model.model.") for name in names) for names in tuned] == [
        *expected,
        *((head,) for head in heads),
    ]


def test_heads_stay_inside_under_lattice_pads(llama: nn.Module) -> None:
    """Raw outputs of a masked layer would give its keys away, and logits leave the enclave."""
    session = PlainSession(FAST)
    session.pad_mode = PadMode.LATTICE
    report = offload_model(llama, session, smallest=1)  # type: ignore[arg-type]
    assert report.inside["lm_head"] == "a head, which lattice pads do not allow"
    assert isinstance(llama.lm_head, nn.Linear)


def test_tied_heads_and_embeddings(tiny_folders: dict, batch: Batch, session: OffloadSession) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_folders["llama-tied"]).requires_grad_(False).eval()
    before = model.model.embed_tokens.weight
    assert model.lm_head.weight is before
    report = offload_model(model, session, smallest=1)
    assert isinstance(model.lm_head, OffloadedLinear)
    assert model.model.embed_tokens.weight is before
    assert report.inside["model.embed_tokens"] == "an embedding"
    assert report.inside["model.norm"] == "no product of tokens"


# --- adapters and heads -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpoints", [None, {"use_reentrant": False}, {"use_reentrant": True}], ids=str)
def test_gradient_checkpointing(tiny_folders: dict, batch: Batch, checkpoints: dict | None) -> None:
    results = []
    for masked in (False, True):
        model = with_lora(AutoModelForCausalLM.from_pretrained(tiny_folders["qwen3"]).requires_grad_(False))
        if checkpoints:
            model.enable_input_require_grads()
            model.activation_checkpointing_enable(checkpoints)
            model.train()
        with OffloadSession(FakeAccelerator(), FAITHFUL) as session:
            if masked:
                report = offload_model(model, session, smallest=1)
            results.append(step(model, batch))
            if masked and checkpoints:
                assert session.describe()["forward"] == 2 * len(report.groups) - 1  # all but the head, twice
    assert_near(results[1], results[0], FAITHFUL)


def test_prefix_tuning(tiny_folders: dict, batch: Batch) -> None:
    results = []
    for masked in (False, True):
        model = AutoModelForCausalLM.from_pretrained(tiny_folders["llama"]).requires_grad_(False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, prefix_projection=True)
            model = get_peft_model(model, config).eval()
        with OffloadSession(FakeAccelerator(), FAITHFUL) as session:
            if masked:
                report = offload_model(model, session, smallest=1)
                assert "it trains" in {why for name, why in report.inside.items() if "prompt_encoder" in name}
            results.append(step(model, batch))
    assert_near(results[1], results[0], FAITHFUL)


def test_generation_with_a_cache(llama: nn.Module, session: OffloadSession) -> None:
    prompt = torch.tensor([[7, 8, 9]])
    options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    expected = llama.generate(prompt, **options)
    offload_model(llama, session, smallest=1)
    assert torch.equal(llama.generate(prompt, **options), expected)


@pytest.mark.parametrize("task", ["causal-lm", "sequence-classification"])
def test_a_far_side(info: BackboneInfo, batch: Batch, task: str) -> None:
    if info.is_encoder and task == "causal-lm":
        pytest.skip("an encoder has no causal-lm")
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(*batch[0].shape, info.hidden_size, generator=generator)
    results = []
    for masked in (False, True):
        far = load_far(info, 2, task=task, n_labels=5)  # type: ignore[arg-type]
        add_lora(far, LoraSpec(r=4), seed=0)
        for name, parameter in far.named_parameters():
            if ".lora_B." in name:
                nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
        with OffloadSession(FakeAccelerator(), FAITHFUL) as session:
            if masked:
                report = offload_model(far, session, smallest=1)
            logits = far(hidden, batch[1])
            loss = logits.square().mean()
            loss.backward()
            results.append((loss.item(), {n: p.grad for n, p in far.named_parameters() if p.grad is not None}))
    assert_near(results[1], results[0], FAITHFUL)
    if task == "sequence-classification":
        assert report.inside["head"] == "it trains"
    else:
        assert not any(isinstance(module, nn.Linear) for module in far.head.modules())


def test_a_whole_side(tiny_folders: dict, batch: Batch, session: OffloadSession) -> None:
    """What Method 1 trains: it must ask the masked head, not the one that was there when it was made."""
    info = inspect_backbone(tiny_folders["llama"])
    side = WholeSide(attach_adapter(load_whole(info, task="causal-lm"), LoraSpec(r=4), seed=0), info, task="causal-lm")
    with torch.no_grad():
        expected = side(*batch)
        report = offload_model(side, session, smallest=1)
        found = side(*batch)
    real = batch[1].bool()  # what stands at padding is nobody's, and is not sent
    assert float((found[real] - expected[real]).norm() / expected[real].norm()) < 1e-2
    assert session.describe()["forward"] == len(report.groups)


def test_a_classification_head_that_trains_stays_inside(tiny_folders: dict, session: OffloadSession) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(tiny_folders["bert-encoder"], num_labels=40)
        model = with_lora(model.requires_grad_(False), task_type="SEQ_CLS")
    report = offload_model(model, session, smallest=1)
    assert report.inside["base_model.model.classifier"] == "it trains"


# --- what stays inside ------------------------------------------------------------------------------------------------


def test_skip(llama: nn.Module, batch: Batch, session: OffloadSession) -> None:
    expected = loss_of(llama, batch)
    report = offload_model(llama, session, skip=("lm_head", "mlp.up_proj", "layers.1.self_attn.k_proj"), smallest=1)
    assert report.inside["lm_head"] == report.inside["model.layers.3.mlp.up_proj"] == "asked for"
    assert ("model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj") in report.groups
    assert ("model.layers.0.mlp.gate_proj",) in report.groups
    assert isinstance(llama.model.layers[1].self_attn.k_proj, nn.Linear)
    assert torch.allclose(loss_of(llama, batch), expected, atol=1e-2)


def test_what_is_skipped_is_not_judged(llama: nn.Module) -> None:
    llama.lm_head.weight.data[0, 0] = torch.nan
    llama.model.layers[0].mlp.up_proj.requires_grad_(True)
    check_offload(llama, FAST, skip=("lm_head", "layers.0.mlp.up_proj"))
    with pytest.raises(UnsupportedLayerError, match="'proj' is to be left inside"):
        check_offload(llama, FAST, skip=("lm_head", "up_proj", "proj"))


def test_small_products_stay_inside(llama: nn.Module) -> None:
    """Of the group, not of its members: k has 16 outputs, q, k and v have 64."""
    assert check_offload(llama, FAST)[0] == tuple(
        f"model.layers.0.self_attn.{name}_proj" for name in "qkv"
    )  # fmt: skip
    assert check_offload(llama, FAST, smallest=33) == []
    with OffloadSession(FakeAccelerator(), FAST) as session:
        report = offload_model(llama, session, smallest=33)
    assert set(report.inside.values()) == {"too small to pay", "an embedding", "no product of tokens"}
    assert report.groups == ()
    assert report.n_offloaded == 0


def test_a_linear_that_hangs_in_two_places(llama: nn.Module, session: OffloadSession, batch: Batch) -> None:
    llama.model.layers[1].mlp.up_proj = llama.model.layers[0].mlp.up_proj
    expected = loss_of(llama, batch)
    offload_model(llama, session, smallest=1)
    assert llama.model.layers[1].mlp.up_proj is llama.model.layers[0].mlp.up_proj
    assert isinstance(llama.model.layers[1].mlp.up_proj, OffloadedLinear)
    assert torch.allclose(loss_of(llama, batch), expected, atol=1e-2)


def test_training_mode_is_kept(llama: nn.Module, session: OffloadSession) -> None:
    llama.train()
    offload_model(llama, session)
    assert all(module.training for module in llama.modules())


def test_weights_are_let_go(llama: nn.Module, session: OffloadSession) -> None:
    import weakref

    weight = weakref.ref(llama.model.layers[0].mlp.up_proj.weight)
    offload_model(llama, session, smallest=1)
    assert weight() is None


# --- what is refused --------------------------------------------------------------------------------------------------


class Bilinear(nn.Module):
    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False)


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.zeros(4, 4, dtype=torch.int32))


class PackedParams(nn.Module):
    _packed_params = ()


class OwnLinear(nn.Linear):
    pass


def _set(path: str, module: nn.Module) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, module)

    return change


def _with_weight(path: str, weight: Tensor) -> Callable[[nn.Module], None]:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return _set(path, linear)


def _frozen(module: nn.Module) -> nn.Module:
    return module.requires_grad_(False)


BLOCK = "model.layers.2"
FAULTS: dict[str, tuple[Callable[[nn.Module], object], str]] = {
    "trains": (lambda m: m.get_submodule(f"{BLOCK}.mlp.up_proj").requires_grad_(True), "mlp.up_proj: it trains"),
    "bias trains": (
        lambda m: setattr(m.get_submodule(f"{BLOCK}.mlp.up_proj"), "bias", nn.Parameter(torch.zeros(64))),
        "mlp.up_proj: it trains",
    ),
    "nan": (
        lambda m: m.get_submodule(f"{BLOCK}.mlp.up_proj").weight.data[3, 4].fill_(torch.nan),
        "mlp.up_proj: it holds NaN or infinite values",
    ),
    "infinite bias": (
        lambda m: setattr(
            m.get_submodule(f"{BLOCK}.mlp.up_proj"),
            "bias",
            nn.Parameter(torch.full((64,), torch.inf), requires_grad=False),
        ),
        "mlp.up_proj: it holds NaN or infinite values",
    ),
    "too large for float32": (
        _with_weight(f"{BLOCK}.mlp.up_proj", torch.full((4, 4), 1e300, dtype=torch.float64)),
        "mlp.up_proj: it holds NaN or infinite values",
    ),
    "meta": (
        _set(f"{BLOCK}.mlp.up_proj", _frozen(nn.Linear(4, 4, device="meta"))),
        "mlp.up_proj: it has no weights (meta device)",
    ),
    "hooks": (
        lambda m: m.get_submodule(f"{BLOCK}.mlp.up_proj").register_forward_hook(lambda *_: None),
        "mlp.up_proj: it has hooks",
    ),
    "int8 weight": (
        lambda m: setattr(
            m.get_submodule(f"{BLOCK}.mlp.up_proj"),
            "weight",
            nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False),
        ),
        "mlp.up_proj: its weight is quantised (torch.int8)",
    ),
    "overflow": (
        _with_weight(f"{BLOCK}.mlp.up_proj", torch.ones(2, 70_000)),
        "mlp.up_proj: its rows are too long for the format fast",
    ),
    "too wide": (_with_weight(f"{BLOCK}.mlp.up_proj", torch.ones(1, 2**17)), "mlp.up_proj: it has 131072 inputs"),
    "a kind of linear": (_set(f"{BLOCK}.mlp.up_proj", _frozen(OwnLinear(4, 4))), "mlp.up_proj: a module that multi"),
    "own product": (_set(f"{BLOCK}.mlp", Bilinear((4, 4))), f"{BLOCK}.mlp: a module that multiplies in a way of its"),
    "experts": (_set(f"{BLOCK}.mlp", Bilinear((3, 4, 4))), f"{BLOCK}.mlp: a weight of more than two dimensions"),
    "convolution": (_set(f"{BLOCK}.mlp", _frozen(nn.Conv1d(3, 4, 5))), f"{BLOCK}.mlp: a weight of more than two"),
    "attention": (
        _set(f"{BLOCK}.self_attn", _frozen(nn.MultiheadAttention(8, 2))),
        f"{BLOCK}.self_attn: a module that multiplies in a way of its own (MultiheadAttention)",
    ),
    "int8 module": (_set(f"{BLOCK}.mlp", Bilinear((4, 4), torch.int8)), f"{BLOCK}.mlp: a quantised module (Bilinear)"),
    "packed buffers": (_set(f"{BLOCK}.mlp", Packed()), f"{BLOCK}.mlp: a quantised module (Packed)"),
    "packed": (_set(f"{BLOCK}.mlp", PackedParams()), f"{BLOCK}.mlp: a quantised module (PackedParams)"),
    "a trained product in a block": (
        _set(f"{BLOCK}.mlp", Bilinear((4, 4)).requires_grad_(True)),
        f"{BLOCK}.mlp: a module that multiplies in a way of its own",
    ),
    "quantised model": (lambda m: setattr(m.config, "quantization_config", {"a": 1}), "its weights are quantised"),
    "cross attention": (lambda m: setattr(m.config, "add_cross_attention", True), "it attends to another model"),
    "family": (lambda m: setattr(m, "config", None), "it is of family None, not one of bert, gemma"),
}


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_one_fault(llama: nn.Module, fault: str) -> None:
    change, message = FAULTS[fault]
    change(llama)
    before = dict(llama.named_modules())
    with OffloadSession(FakeAccelerator(), FAST) as session:
        with pytest.raises(UnsupportedLayerError) as caught:
            offload_model(llama, session, smallest=1)
        assert message in caught.value.cause
        assert session.describe()["layers"] == {}
    assert dict(llama.named_modules()) == before


def test_every_fault_at_once(llama: nn.Module) -> None:
    llama.model.layers[0].mlp.up_proj.requires_grad_(True)
    llama.model.layers[1].mlp = Bilinear((3, 4, 4))
    llama.model.layers[3].self_attn.o_proj.weight.data[0, 0] = torch.inf
    llama.lm_head.register_forward_pre_hook(lambda *_: None)
    llama.config.quantization_config = {"bits": 4}
    with pytest.raises(UnsupportedLayerError) as caught:
        check_offload(llama, FAST, skip=("nowhere",))
    assert caught.value.cause == (
        "the model cannot be offloaded, 6 problems: it is a variant: its weights are quantised; "
        "'nowhere' is to be left inside, and is not a linear of the model; "
        "model.layers.0.mlp.up_proj: it trains, and only frozen linears can be offloaded; "
        "model.layers.1.mlp: a weight of more than two dimensions (Bilinear), as experts and convolutions have; "
        "model.layers.3.self_attn.o_proj: it holds NaN or infinite values; "
        "lm_head: it has hooks, which would be lost"
    )


def test_two_faults_of_one_linear(llama: nn.Module) -> None:
    linear = llama.model.layers[0].mlp.up_proj
    linear.requires_grad_(True).weight.data[0, 0] = torch.nan
    with pytest.raises(UnsupportedLayerError, match=r"up_proj: it trains.*, it holds NaN"):
        check_offload(llama, FAST)


@pytest.mark.parametrize("out", ["merged", "dora", "ia3"])
def test_adapters_that_need_the_weight(llama: nn.Module, out: str) -> None:
    if out == "ia3":
        model = get_peft_model(llama, IA3Config(target_modules=["up_proj"], feedforward_modules=["up_proj"]))
    else:
        model = with_lora(llama, use_dora=out == "dora")
        if out == "merged":
            model.merge_adapter()
    expected = {"merged": "its adapter is merged", "dora": "such as DoRA", "ia3": "IA3Linear|its adapter Linear is not"}
    with pytest.raises(UnsupportedLayerError, match=expected[out]):
        check_offload(model, FAST)


def test_a_saved_copy_of_a_head_stays_inside(llama: nn.Module, batch: Batch, session: OffloadSession) -> None:
    with torch.random.fork_rng(devices=[]):
        model = get_peft_model(llama, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])).eval()
    report = offload_model(model, session, smallest=1)
    assert report.inside["base_model.model.lm_head"] == "it trains"
    loss_of(model, batch).backward()


def test_a_gpu_model_is_refused(llama: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Activations are the enclave's, and it computes on the CPU."""
    from cloister.slicing import _verdicts

    class Elsewhere:
        """Stands for a weight on another device, which this machine may not have."""

        is_meta, device, dtype, shape = False, torch.device("cuda:0"), torch.float32, (4, 4)

    monkeypatch.setattr(_verdicts, "weight_of", lambda _: Elsewhere())
    monkeypatch.setattr(_verdicts, "_is_finite", lambda _: True)
    with pytest.raises(UnsupportedLayerError, match="it is on cuda:0, and the enclave computes on the CPU"):
        check_offload(llama, FAST)


def test_a_session_that_fails_leaves_the_model(llama: nn.Module) -> None:
    before = dict(llama.named_modules())
    session = OffloadSession(FakeAccelerator(), FAST)
    session.close()
    with pytest.raises(OffloadError, match="closed"):
        offload_model(llama, session, smallest=1)
    assert dict(llama.named_modules()) == before


@pytest.mark.parametrize("fmt", [FAITHFUL, FAST], ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("shape", [(1, ALWAYS_FITS), (ALWAYS_FITS, 1), (ALWAYS_FITS, 2), (2, ALWAYS_FITS)], ids=str)
def test_up_to_here_every_weight_fits(fmt: RingFormat, shape: tuple[int, int]) -> None:
    """The largest norms that there are, with the most bits."""
    quantize_weight(torch.ones(shape), fmt, layer="l", weight_bits=fmt.MAX_WEIGHT_BITS)
