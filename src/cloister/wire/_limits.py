"""Frozen limits of the wire format (spec/wire.md, section "Limits"). Changing one is a new format version.

Every number is an upper bound that a parser checks before it allocates, so that a hostile peer can make a party neither
allocate nor recurse beyond them.
"""

from __future__ import annotations

VERSION = 1
MAGIC = b"CLST"

# 1 GiB is the largest released adapter or far side; 64 MiB is room for the report, the evidence and the framing.
MAX_RELEASE_BYTES = 1 << 30
MAX_REPORT_BYTES = 32 << 20
MAX_MESSAGE_BYTES = MAX_RELEASE_BYTES + (64 << 20)
# A record adds 16 bytes for each 16 KiB chunk (0.1 %), the envelope some 30 bytes: 8 MiB covers both at 1 GiB.
MAX_ENVELOPE_BYTES = MAX_MESSAGE_BYTES + (8 << 20)

# Real TDX collateral (certificates, CRLs, TCB info, QE identity as JSON) is 30 to 60 KB; a quote is 5 to 8 KB.
MAX_EVIDENCE_BLOB_BYTES = 1 << 20
MAX_EVIDENCE_AUX_BYTES = 1 << 20
MAX_EVIDENCE_BYTES = MAX_EVIDENCE_BLOB_BYTES + MAX_EVIDENCE_AUX_BYTES + 256

MAX_HEADER_BYTES = 1024
MAX_PREDICT_BYTES = 64 << 20
MAX_FACTS_BYTES = 1 << 20
MAX_SHARDS = 65_536
MAX_COUNT = (1 << 53) - 1  # exact in every JSON reader that a report may pass through
MAX_ROUND = (1 << 31) - 1
MAX_ATTEMPT = (1 << 31) - 1
MAX_HIDDEN_SIZE = 1 << 20
MAX_PATIENCE_S = 86_400.0

# 65,536 shard entries of eleven items each, and as much again.
MAX_CBOR_ITEMS = 1 << 21
MAX_CBOR_DEPTH = 16

# Accelerator (spec/pad.md). The largest layer of today's models, a vocabulary of 131,071 by 16,384, has 4 GiB of int16.
ACCELERATOR_HEADER_BYTES = 96
MAX_ACCELERATOR_LAYERS = 1 << 16
MAX_ACCELERATOR_TOKENS = 1 << 20
MAX_ACCELERATOR_FEATURES = (1 << 17) - 1  # more, and an int32 does not hold a product (spec/pad.md section 1.3)
MAX_ACCELERATOR_PAYLOAD_BYTES = 1 << 32

SHA384_BYTES = 48
KEY_BYTES = 32
