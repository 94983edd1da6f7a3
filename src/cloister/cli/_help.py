"""What `--help` says: each command's purpose and an example that works."""

from __future__ import annotations

CLOISTER = """\
Fine-tune one language model across institutions that may not show each other, or the
operator of the server, their data or the tuned layers.

  cloister quickstart                 three hospitals, real text, about two minutes
  cloister init job.toml              a commented job file to fill in
  cloister check job.toml             every problem of it, before anything starts
  cloister run job.toml               train; the report is runs/latest/report.html
  cloister predict --run runs/latest --client hospital-a "Acute bronchitis"

  cloister compare job.toml           every method on the same data and seeds, in one table

  cloister plan folder/of/model       what each method costs, on this machine or another
  cloister doctor                     what this machine has: TEEs, hardening, versions
  cloister measure job.toml           what the job's enclave will measure, for a policy
  cloister policy init evidence       a strict policy from evidence that you show
  cloister verify evidence --policy policy.toml

  cloister accelerator --listen unix:/path    lend a GPU or CPU to an enclave, without trust
"""

EXIT_CODES = """\
exit codes:
  0    done                            8    a peer, a client or the relay failed
  1    any other error                 9    the enclave could not start or harden
  2    wrong job file or arguments     10   bytes from outside do not parse
  3    data cannot be used             11   a one-time pad cannot be made or used
  4    model cannot be used            12   a masked layer failed
  5    evidence refused                13   the adapter does not fit
  6    the encrypted channel broke     70   a bug in cloister
  7    store or disk failed            130  stopped by Ctrl-C (143: by SIGTERM)
  50 to 54: `verify` and `policy` on evidence; see `cloister verify --help`

Errors go to stderr as "error:" and "hint:" lines; stdout carries data only.
"""

QUICKSTART = (
    """\
co-train a medical coder at three hospitals on this machine
Writes the data of three hospitals with different specialties (descriptions of ICD-10-CM codes) and a
job file into RUNS/quickstart-data, then runs the job: the frozen near side of a sentence encoder at each
hospital, the tuned far side in an attested, simulated server enclave. Needs: pip install 'cloister[quickstart]'.""",
    """\
example:
  cloister quickstart
  cloister predict --run runs/latest --client hospital-north "Acute bronchitis due to rhinovirus"
""",
)

INIT = (
    """\
write a commented job file
Every key is in it with its default. An existing file is never overwritten.""",
    """\
example:
  cloister init my-job.toml
""",
)

CHECK = (
    """\
report every problem of a job file
Reads the job, the first rows of each data file and the model's configuration, and starts nothing.
Prints the job's hash: what a client's operator approves.""",
    """\
example:
  cloister check job.toml
""",
)

RUN = (
    """\
run a job: relay, clients and server enclave on this machine
Shows every client's decision about the server enclave's evidence, then progress, loss and bytes. At the end
the run folder holds report.html, result.json, events.jsonl and TensorBoard logs; runs/latest points to it.""",
    """\
examples:
  cloister run job.toml
  cloister run job.toml --json > events.jsonl
  cloister run --resume runs/latest        after Ctrl-C or a crash: sealed shards and checkpoints are kept
  cloister run job.toml --serve            keep the enclave up, so that predictions answer at once
""",
)

PREDICT = (
    """\
ask the tuned model as one of its clients
The near side runs here; the boundary tensor goes sealed to the server enclave, which is started again from
its sealed checkpoint if it is down, and the answer comes back sealed.""",
    """\
examples:
  cloister predict --run runs/latest --client hospital-north "Acute bronchitis due to rhinovirus"
  cloister predict --run runs/latest --client hospital-north --file texts.txt --json
""",
)

PLAN = (
    """\
estimate what each method costs for a model and a machine
Memory of the enclave, bytes over each boundary and expected speed: of masked offload (Method 1) in every pad mode and
format, and of split tuning (Method 2), beside everything in the TEE, on the plain accelerator, and on a GPU with
confidential computing. Only the model's configuration is read. docs/plan.md explains each term and its source.""",
    """\
examples:
  cloister plan models/llama-7b                              measures this machine, for some seconds
  cloister plan models/llama-7b --machine tdx-96-h200        a preset, which is an assumption
  cloister plan models/llama-7b --save-machine mine.toml     keep what was measured, or edit it
  cloister plan models/llama-7b --machine mine.toml --json
""",
)

COMPARE = (
    """\
train and evaluate a job by every method, and put the results in one table
On the same data, model and seeds, one after the other:
  central         LoRA, all data in one place          in the clear
  fedavg          FedAvg LoRA on plain Flower          in the clear; what the others are compared with
  method1-lora    LoRA in enclaves                     Method 1
  method1-prefix  P-tuning v2 in enclaves              Method 1
  method2-lora    LoRA on the far side                 Method 2
  method2-spf     SPF + LoRA on the far side           Method 2

Every method sees each example equally often, at the same rates (docs/compare.md). The two that run in the clear put
everybody's data in ordinary processes of this machine: compare on data that you may see. What is finished is kept, so
a stopped comparison goes on when the same command is given again. Writes compare/<name of the job>/compare.html,
compare.csv and compare.json. Needs: pip install 'cloister[evaluate]'.

How long: a run of every method for each seed, one after the other. The quickstart's job (3 hospitals, 1,569 texts) with
2 epochs took on two busy cores, for one seed, 1 minute each for Method 2, 1.5 for central, 2 for Method 1 and 2.5 for
fedavg, 11 minutes in all. Method 1 grows fastest with the model: `cloister plan MODEL`. Try --seeds 1 first.""",
    """\
examples:
  cloister compare job.toml
  cloister compare job.toml --only method2-lora,fedavg --seeds 1
  cloister compare job.toml --seeds 5 --lr method1-prefix=0.01
  cloister compare --resume compare/quickstart        after Ctrl-C, a crash, or a method that failed
""",
)

_REFUSALS = """\
exit codes:
  0    accepted
  50   attest.malformed: truncated, oversized, or no evidence at all
  51   attest.signature: a signature, certificate chain or revocation fails
  52   attest.stale: evidence or collateral expired, too old, or from the future
  53   attest.measurement: genuine, and of other code, another job or another session
  54   attest.policy: not allowed: type, root, debug, patch level, platform
  2    the policy or an argument is wrong
"""

VERIFY = (
    """\
decide offline whether a policy accepts evidence
Prints the decision, every check that passed or did not, what was proven and what was not. EVIDENCE is an
evidence file of cloister, or a raw quote or report with --type and --collateral. Nothing goes online.""",
    f"""\
examples:
  cloister verify evidence.bin --policy policy.toml
  cloister verify quote.bin --type tdx --collateral collateral.json --policy policy.toml --now 2026-06-01T12:00:00Z

{_REFUSALS}""",
)

POLICY = "write or check the allow-list that decides about evidence"

POLICY_INIT = (
    """\
write a strict policy from evidence that you show
The evidence must be genuine under its vendor's root. Root, registers, attributes and patch level are pinned
as seen, and the result is checked against the same evidence. Debug enclaves are refused.""",
    f"""\
examples:
  cloister policy init quote.bin --type tdx --collateral collateral.json --out policy.toml
  cloister policy init evidence.bin --allow-simulated --pin-platform > policy.toml

{_REFUSALS}""",
)

POLICY_CHECK = (
    """\
say what a policy allows, or explain its decision line by line
Without EVIDENCE: what it allows in words, warnings, its SHA-384 and its template's, which enclaves measure.""",
    f"""\
examples:
  cloister policy check policy.toml
  cloister policy check policy.toml quote.bin --type tdx --collateral collateral.json

{_REFUSALS}""",
)

MEASURE = (
    """\
print what the server enclave of a job will measure
Digests of the installed package, the job, the policy and the backbone, and the registers that follow from them,
as TOML lines for the policy. Every installation of one release gives the same values.""",
    """\
example:
  cloister measure job.toml
""",
)

DOCTOR = (
    """\
report what this machine has
Attestation backends with what is missing of each, hardening layers, versions, Flower, room. Changes nothing.""",
    """\
example:
  cloister doctor
""",
)

COLLATERAL = "fetch what a verifier needs beside a quote or report"

COLLATERAL_FETCH = (
    """\
fetch collateral or certificates from the vendor: the only command that goes online
Intel's service learns the platform's model; AMD's learns the chip's id and firmware.""",
    """\
examples:
  cloister collateral fetch --quote quote.bin --out collateral.json
  cloister collateral fetch --snp-report report.bin --out chain.pem
""",
)

ACCELERATOR = (
    """\
lend this machine's GPU or CPU to an enclave, which trusts it with nothing
Holds the frozen weights that it is sent, and multiplies masked features by them, until it is stopped. It sees no
features: only public weights, shapes, order and timing. The enclave checks every answer, and goes on after a
restart of this process. One enclave at a time; at a unix: path only this user's, on this host, over shared memory.
The link of tcp:// is not encrypted: with the pad otp-2, nobody may read the links of both accelerators.""",
    """\
examples:
  cloister accelerator --listen unix:/run/user/1000/gpu.sock --device cuda
  cloister accelerator --listen tcp://10.0.0.5:7070
  cloister accelerator --connect tcp://10.0.0.9:7070   a client's enclave that waits there (clients.accelerator)
""",
)
