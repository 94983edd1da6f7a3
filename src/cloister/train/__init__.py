"""Training: text of one institution to sealed features (near half), sealed features to a tuned far side (far half).

Nothing heavy is imported here. A name is loaded from its private module at first use, so that the couriers, which only
need the store, and the command line never pay for torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cloister._lazy import lazy_exports

if TYPE_CHECKING:
    from cloister.train._baselines import alone_baseline, linear_head_baseline, majority_baseline
    from cloister.train._boundary import BoundaryBlock, dequantize, quantize
    from cloister.train._checkpoint import Checkpointer, TrainState, saved_support
    from cloister.train._data import (
        Columns,
        Dataset,
        Example,
        TaskSpec,
        check_dataset,
        open_dataset,
    )
    from cloister.train._dp_sgd import DpSgdSpec, PrivateTraining, make_private
    from cloister.train._encoder import NearEncoder
    from cloister.train._evaluate import EvalResult, EvalSums, evaluate, evaluate_sums, merge_sums, predict
    from cloister.train._far import FarTrainer, StepInfo, TrainResult
    from cloister.train._features import ExampleKey, Features, FeatureSource, MemoryFeatures
    from cloister.train._importance import place_adapter, prepare_adapter, restore_tuned
    from cloister.train._local import LocalTraining, LocalUpdate, complete
    from cloister.train._near import NearRun
    from cloister.train._peft_folder import load_peft, save_peft
    from cloister.train._precision import resolve_precision, set_precision
    from cloister.train._privacy import gaussian_epsilon, noised, on_grid, require_privacy_extra
    from cloister.train._proximal import proximal_term
    from cloister.train._release import export_far_state, export_release, import_far_state
    from cloister.train._schedule import StepPlan, TrainSpec
    from cloister.train._shards import (
        Feature,
        ShardBody,
        decode_shard,
        encode_shard,
        shard_context,
        shard_entries,
    )
    from cloister.train._stopping import trained_features
    from cloister.train._store import ShardStore, open_store, verify_shard_file
    from cloister.train._text import TextEncoder, Tokenised
    from cloister.train._tokens import question_features, token_features


# Public name -> private module. One line a name, grouped by module; `__all__` below is the same names, sorted.
_HOME = {
    # near half: what runs on an institution's own machine
    "BoundaryBlock": "_boundary",
    "dequantize": "_boundary",
    "quantize": "_boundary",
    "Columns": "_data",
    "Dataset": "_data",
    "Example": "_data",
    "TaskSpec": "_data",
    "check_dataset": "_data",
    "open_dataset": "_data",
    "NearEncoder": "_encoder",
    "NearRun": "_near",
    "Feature": "_shards",
    "ShardBody": "_shards",
    "decode_shard": "_shards",
    "encode_shard": "_shards",
    "shard_context": "_shards",
    "shard_entries": "_shards",
    "ShardStore": "_store",
    "open_store": "_store",
    "verify_shard_file": "_store",
    "TextEncoder": "_text",
    "Tokenised": "_text",
    # far half: what runs inside the server enclave
    "alone_baseline": "_baselines",
    "linear_head_baseline": "_baselines",
    "majority_baseline": "_baselines",
    "Checkpointer": "_checkpoint",
    "TrainState": "_checkpoint",
    "saved_support": "_checkpoint",
    "EvalResult": "_evaluate",
    "evaluate": "_evaluate",
    "predict": "_evaluate",
    "FarTrainer": "_far",
    "StepInfo": "_far",
    "TrainResult": "_far",
    "ExampleKey": "_features",
    "FeatureSource": "_features",
    "Features": "_features",
    "MemoryFeatures": "_features",
    "export_far_state": "_release",
    "export_release": "_release",
    "import_far_state": "_release",
    "place_adapter": "_importance",
    "prepare_adapter": "_importance",
    "restore_tuned": "_importance",
    "resolve_precision": "_precision",
    "set_precision": "_precision",
    "StepPlan": "_schedule",
    "TrainSpec": "_schedule",
    "trained_features": "_stopping",
    # adapters that are aggregated
    "DpSgdSpec": "_dp_sgd",
    "PrivateTraining": "_dp_sgd",
    "make_private": "_dp_sgd",
    "load_peft": "_peft_folder",
    "save_peft": "_peft_folder",
    "gaussian_epsilon": "_privacy",
    "noised": "_privacy",
    "on_grid": "_privacy",
    "require_privacy_extra": "_privacy",
    "proximal_term": "_proximal",
    # a client of Method 1, in its own enclave
    "EvalSums": "_evaluate",
    "evaluate_sums": "_evaluate",
    "merge_sums": "_evaluate",
    "LocalTraining": "_local",
    "complete": "_local",
    "LocalUpdate": "_local",
    "question_features": "_tokens",
    "token_features": "_tokens",
}

__all__ = [
    "BoundaryBlock",
    "Checkpointer",
    "Columns",
    "Dataset",
    "DpSgdSpec",
    "EvalResult",
    "EvalSums",
    "Example",
    "ExampleKey",
    "FarTrainer",
    "Feature",
    "FeatureSource",
    "Features",
    "LocalTraining",
    "LocalUpdate",
    "MemoryFeatures",
    "NearEncoder",
    "NearRun",
    "PrivateTraining",
    "ShardBody",
    "ShardStore",
    "StepInfo",
    "StepPlan",
    "TaskSpec",
    "TextEncoder",
    "Tokenised",
    "TrainResult",
    "TrainSpec",
    "TrainState",
    "alone_baseline",
    "check_dataset",
    "complete",
    "decode_shard",
    "dequantize",
    "encode_shard",
    "evaluate",
    "evaluate_sums",
    "export_far_state",
    "export_release",
    "gaussian_epsilon",
    "import_far_state",
    "linear_head_baseline",
    "load_peft",
    "majority_baseline",
    "make_private",
    "merge_sums",
    "noised",
    "on_grid",
    "open_dataset",
    "open_store",
    "place_adapter",
    "predict",
    "prepare_adapter",
    "proximal_term",
    "quantize",
    "question_features",
    "require_privacy_extra",
    "resolve_precision",
    "restore_tuned",
    "save_peft",
    "saved_support",
    "set_precision",
    "shard_context",
    "shard_entries",
    "token_features",
    "trained_features",
    "verify_shard_file",
]

__getattr__, __dir__ = lazy_exports(__name__, _HOME)
