"""A client's round of Method 1 in the test's own process, as its enclave does it."""

from __future__ import annotations

from cloister.api._local_model import _whole_side
from cloister.federation import EnclaveClientPlan
from cloister.offload import OffloadSession
from cloister.ring import FORMATS
from cloister.slicing import load_tokenizer, offload_model
from cloister.testing import FakeAccelerator
from cloister.train import LocalTraining, LocalUpdate, MemoryFeatures, token_features


def trained_round(
    plan: EnclaveClientPlan, adapter: bytes, n_round: int
) -> tuple[LocalUpdate, MemoryFeatures, FakeAccelerator]:
    """What comes of a round that starts from this global adapter, the client's tokens, and who saw its products."""
    side, info = _whole_side(plan)
    accelerator = FakeAccelerator()
    with OffloadSession(accelerator, FORMATS[plan.mask.ring], bucket=plan.mask.bucket) as session:
        offload_model(side, session)
        source, _ = token_features(
            plan.name, plan.datasets, load_tokenizer(info), plan.task, model_max_length=info.max_length
        )
        done = LocalTraining(side, source, plan.train, plan.task).train(adapter, n_round)
    return done, source, accelerator
