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
"""

EXIT_CODES = """\
exit codes:
  0    done                            8    a peer, a client or the relay failed
  1    any other error                 9    the enclave could not start or harden
  2    wrong job file or arguments     10   bytes from outside do not parse
  3    data cannot be used             13   the adapter does not fit
  4    model cannot be used            70   a bug in cloister
  5    evidence refused                130  stopped by Ctrl-C (143: by SIGTERM)
  6    the encrypted channel broke
  7    store or disk failed

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
