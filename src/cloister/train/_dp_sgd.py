"""DP-SGD inside a client enclave, by Opacus (Abadi et al., 2016, arXiv 1607.00133). Needs the extra `dp`.

Opacus computes and clips each example's gradient and accounts. Ours are the two draws that must be unpredictable: the
noise (`_privacy`) and who is in a batch, since Opacus's own secure mode needs a package that is no longer kept.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cloister.errors import ConfigError, DataError, UnsupportedLayerError
from cloister.train._privacy import epsilon_of, noised, on_grid, rdp_accountant, require_privacy_extra

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.data import DataLoader


@dataclass(frozen=True)
class DpSgdSpec:
    """What each example may cost.

    Attributes:
        noise_multiplier: standard deviation of the noise over `max_grad_norm`.
        max_grad_norm: L2 norm that an example's gradient is clipped to.
        delta: probability for which epsilon need not hold; below 1 / n_examples.
    """

    noise_multiplier: float
    max_grad_norm: float
    delta: float

    def __post_init__(self) -> None:
        if not (self.noise_multiplier > 0 and self.max_grad_norm > 0 and 0 < self.delta < 1):
            raise ConfigError("DP-SGD needs a noise multiplier and a norm above 0, and delta in (0, 1)")


class PrivateTraining:
    """A module, optimiser and batches that together are DP-SGD; made by `make_private`.

        for batch in private:
            private.optimizer.zero_grad()
            loss(private.module, batch).backward()   # the mean over the batch's examples
            private.optimizer.step()

    Every batch MUST have its step, and nothing else may read the examples. Iterating gives one epoch; a draw without
    any example takes its step, of noise alone, by itself. Who counts steps otherwise uses `draw` and `step_on_noise`.

    Attributes:
        module: gives each example's own gradient, also where the model is called without it.
        optimizer: clips, adds noise, accounts, steps.
        sample_rate: with what probability an example is in a batch.
    """

    def __init__(self, module: nn.Module, optimizer: Any, loader: DataLoader[Any], spec: DpSgdSpec) -> None:
        from opacus import GradSampleModule

        self._spec = spec
        self._loader = loader
        self._accountant = rdp_accountant()
        self._n_examples = len(loader.dataset)  # type: ignore[arg-type]
        batch_size = loader.batch_size or 1
        self._n_steps = max(1, round(self._n_examples / batch_size))
        self.sample_rate = min(1.0, batch_size / self._n_examples)
        self.module = GradSampleModule(module, batch_first=True, loss_reduction="mean")
        self.optimizer = _optimizer_class()(
            optimizer,
            noise_multiplier=spec.noise_multiplier,
            max_grad_norm=spec.max_grad_norm,
            expected_batch_size=batch_size,
        )
        self.optimizer.attach_step_hook(self._accountant.get_optimizer_hook_fn(sample_rate=self.sample_rate))

    def __iter__(self) -> Iterator[Any]:
        for _ in range(self._n_steps):
            if (batch := self.draw()) is not None:
                yield batch
            else:
                self.step_on_noise()

    def draw(self) -> Any | None:
        """The next batch, collated; None where nobody is in it, which takes `step_on_noise`. *Secret*."""
        chosen = poisson_draw(self._n_examples, self.sample_rate)
        return self._loader.collate_fn([self._loader.dataset[int(i)] for i in chosen]) if len(chosen) else None

    def step_on_noise(self) -> None:
        """Whether a step is taken must not tell whether anybody was drawn; transformers refuse an empty batch."""
        self.optimizer.zero_grad()
        for parameter in self.optimizer.params:
            parameter.grad_sample = torch.zeros(0, *parameter.shape)
        self.optimizer.step()

    def close(self) -> None:
        """Takes Opacus out of the module again, which trains and answers as before. May be called again."""
        self.optimizer.zero_grad(set_to_none=True)
        self.module.cleanup()

    @property
    def epsilon(self) -> float:
        """Spent so far at the spec's delta, by example of this client: an upper bound."""
        return epsilon_of(self._accountant, self._spec.delta)


def make_private(
    module: nn.Module, optimizer: torch.optim.Optimizer, loader: DataLoader[Any], spec: DpSgdSpec
) -> PrivateTraining:
    """DP-SGD for a model with its adapter attached.

    Args:
        module: what trains in it must be in layers that Opacus can take apart by example; frozen layers may be any.
        optimizer: over exactly what trains.
        loader: gives the data set, the batch's mean size and the collation; its own order is not used.
        spec: clipping and noise.

    Raises:
        UnsupportedLayerError: a layer that trains mixes examples or keeps statistics of them; names all of them.
        ConfigError: the extra `dp` is not installed, or the optimiser misses something that trains.
        DataError: there are no examples.
    """
    check_private(module)
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if held != {id(parameter) for parameter in module.parameters() if parameter.requires_grad}:
        raise ConfigError("the optimiser of DP-SGD must hold exactly what trains")
    if not len(loader.dataset):  # type: ignore[arg-type]
        raise DataError("DP-SGD has no examples to train on")
    return PrivateTraining(module, optimizer, loader, spec)


def check_private(module: nn.Module) -> None:
    """Whether DP-SGD can train a model; leaves it in training mode.

    Raises:
        UnsupportedLayerError: a layer that trains mixes examples or keeps statistics of them; names all of them.
        ConfigError: the extra `dp` is not installed.
    """
    require_privacy_extra()
    from opacus import GradSampleModule
    from opacus.validators import ModuleValidator

    module.train()  # an evaluation mode hides from the validator what training would do
    found = [*ModuleValidator.validate(module, strict=False), *GradSampleModule.validate(module, strict=False)]
    errors = [str(error) for error in found]
    # Opacus passes over these where they are frozen, and they mix the examples of a batch all the same.
    norms = (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d)
    errors += [f"{name} is a frozen {m}" for name, m in module.named_modules() if isinstance(m, norms) and not errors]
    if errors:
        raise UnsupportedLayerError(
            f"DP-SGD cannot train {len(errors)} of this model's layers: {'; '.join(errors)}",
            hint="train an adapter beside them, or leave DP-SGD out",
        )


def poisson_draw(n: int, rate: float) -> np.ndarray:
    """Which of n examples are in a batch: each by itself with probability `rate`, from the system's generator."""
    if rate >= 1:
        return np.arange(n)
    return np.flatnonzero(np.frombuffer(os.urandom(8 * n), dtype=np.uint64) < int(rate * 2**64))


def _optimizer_class() -> Any:
    from opacus.optimizers import DPOptimizer

    class _ExactNoise(DPOptimizer):
        """Opacus's optimiser with noise from `_privacy`."""

        def add_noise(self) -> None:
            sigma = self.noise_multiplier * self.max_grad_norm
            parameters: list[Any] = self.params
            for parameter in parameters:
                summed = parameter.summed_grad.to("cpu", torch.float64).numpy()
                # One rounding of the sum moves it by at most sqrt(d) steps of the grid, 2^-30 sigma each.
                grad = torch.from_numpy(noised(on_grid(summed, sigma), sigma))
                parameter.grad = grad.to(parameter).view_as(parameter)

    return _ExactNoise
