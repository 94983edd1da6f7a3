"""The commented job file that `cloister init` writes."""

from __future__ import annotations

_TEMPLATE = """\
# A cloister job: institutions that may not show each other their data tune one model together.
# Check it with `cloister check job.toml`, start it with `cloister run job.toml`.
# Relative paths count from the folder of this file. Lines with "# key = value" show the default.

version = 1
name = "my-first-job"               # lower-case letters, digits, hyphens; part of the run's id

[task]
name = "sequence-classification"    # or "causal-lm"
labels = ["no", "yes"]              # the classes; their order is the class index. Not for causal-lm
# pooling = "mean"                  # "mean" (default of encoders), "cls" or "last" (default of decoders)
# max_length = 128                  # tokens; the model's own limit if left out
# on_too_long = "error"             # or "truncate": cut longer texts, and count them in the report

[model]
path = "./model"                    # a folder that transformers loads, a hub name, or "package:NAME/folder"
                                    # families: Llama, Qwen2, Qwen3, Mistral, Gemma, GPT-2, GPT-NeoX, BERT
# cut_layer = 6                     # blocks that stay with the clients; half of them if left out

[method]
# name = "split"                    # clients run the frozen near side, the server enclave tunes the far side
                                    # "enclave": adapters live in enclaves, see docs/job.md for its keys
# boundary = "int8"                 # how boundary tensors are stored: "int8", "bf16" or "fp32"
# near_batch_size = 32

[adapter]
# name = "lora"
# r = 8
# alpha = 16
# dropout = 0.0
# targets = "all-linear"            # or a list such as ["query", "value"]
# use_rslora = false
                                    # "spf": rows of attention heads and neurons train, with LoRA: see docs/job.md

[training]
# epochs = 3
# batch_size = 16
# grad_accumulation = 1
# lr = 1e-3
# weight_decay = 0.01
# warmup_ratio = 0.06
# schedule = "cosine"               # or "linear", "constant"
# max_grad_norm = 1.0
# seed = 0
# checkpoint_every_steps = 50
# max_steps = 1000                  # stop earlier than `epochs` says
# precision = "fp32"                # "bf16" is faster on processors that compute in it; "auto" takes it there
# patience = 2                      # stop after so many epochs without a lower loss on held-out training examples
# held_out = 0.1                    # only with patience: share of each client's training examples

[evaluation]
# baselines = ["majority"]          # also "linear-head" and "alone" (each client's own model); they cost time

# One table for each institution. Only its name and weight are shared; the paths stay on its machine.
[[clients]]
name = "hospital-a"
train = "data/hospital-a/train.jsonl"   # JSONL, CSV, Parquet, or a folder written by datasets' save_to_disk
test = "data/hospital-a/test.jsonl"     # held out: sealed like the rest, used for evaluation only; may be left out
# columns = { text = "text", label = "label" }           # a pair: text_b; causal-lm: prompt, completion
# train = { path = "all.csv", where = { site = "a" } }   # only the rows with this value; "a.b" looks inside
# train = { path = "saved", split = "train" }            # which part of a saved DatasetDict
# node_key = "keys/hospital-a.pem"                       # the operator's own P-384 key; a fresh one if left out
# weight = 1.0                                           # how much this client's examples count

[[clients]]
name = "hospital-b"
train = "data/hospital-b/train.jsonl"
test = "data/hospital-b/test.jsonl"

[policy]
# file = "policy.toml"              # the allow-list of enclaves; a strict one for this machine if left out

[store]
# url = "s3://bucket/prefix"        # where sealed shards travel; a folder of the run if left out
# shard_max_bytes = 67108864
# options = {}                      # passed to fsspec; may hold credentials, never shown or shared

[federation]
# min_clients = 2                   # all if left out
# timeout_s = 3600
# patience_s = 10
# tls = true
# port = 9092                       # a free one if left out

[enclave]
# backend = "simulated"             # no TEE: protects from other users, not root. Others: docs/job.md
# memory_budget_bytes = 2147483648

[release]
# what = "none"                     # "adapter" or "weights" hand the tuned parameters to every client
# live_metrics = true               # false: the server's host learns loss and metrics only at the end
"""


def job_template() -> str:
    """A job file that explains itself. It is valid as it stands, once its data and model exist."""
    return _TEMPLATE
