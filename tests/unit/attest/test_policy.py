from __future__ import annotations

import hashlib

import pytest

from cloister.attest import Policy, render_policy, write_policy
from cloister.errors import ConfigError

ROOT = "ab" * 32
REGISTER, OTHER = "01" * 48, "02" * 48
MINIMAL = "version = 1\n"


def problems(text: str) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        Policy.parse(text.encode(), source="p.toml")
    assert caught.value.source == "p.toml"
    return {problem.key: f"{problem.cause} {problem.hint}" for problem in caught.value.problems}


def test_minimal_policy_denies_everything():
    policy = Policy.parse(MINIMAL.encode())
    assert policy.accept == frozenset()
    assert not policy.allow_simulated
    assert policy.intel_sha256 == frozenset()
    assert policy.roles == {}
    assert policy.registers_for("server", "tdx") is None
    assert policy.tdx.platform.tcb_status == ("UpToDate",)
    assert not (
        policy.tdx.platform.allow_dynamic or policy.tdx.platform.allow_cached_keys or policy.tdx.platform.allow_smt
    )
    assert policy.clock_skew_s == 0
    assert policy.max_session_age_s == 86400
    assert policy.tdx.platform.collateral_max_age_d == 30


def test_full_policy_is_read():
    text = f"""
version = 1
accept = ["tdx", "simulated"]
allow_simulated = true
max_session_age_s = 60
clock_skew_s = 5
[roots]
intel_sha256 = ["ABABABABABABABABABABABABABABABABABABABABABABABABABABABABABABABAB"]
[tdx]
mr_td = ["{REGISTER}", "{OTHER}"]
xfam = ["e702060000000000"]
td_attributes_mask = "00000010000000FF"
td_attributes_value = "0000001000000000"
tcb_status = ["UpToDate", "SWHardeningNeeded"]
reject_advisories = ["INTEL-SA-1"]
min_tcb_eval = 17
allow = {{ dynamic = true }}
collateral_max_age_d = 7
[simulated]
require_layers = ["seccomp"]
[platforms]
allow_piid = ["00112233445566778899aabbccddeeff"]
[roles.server.tdx]
rtmr3 = ["{REGISTER}"]
[roles.client.tdx]
mr_td = ["{REGISTER}"]
rtmr3 = []
"""
    policy = Policy.parse(text.encode())
    assert policy.accept == {"tdx", "simulated"}
    assert policy.intel_sha256 == {ROOT}
    assert policy.tdx.td_attributes_mask[-1] == 0xFF
    assert policy.tdx.platform.min_tcb_evaluation == 17
    assert policy.tdx.platform.allow_dynamic
    assert not policy.tdx.platform.allow_smt
    assert policy.require_layers == ("seccomp",)
    assert policy.registers_for("server", "tdx") == {"mr_td": ("01" * 48, "02" * 48), "rtmr3": ("01" * 48,)}
    assert policy.registers_for("client", "tdx") == {"mr_td": ("01" * 48,), "rtmr3": ()}
    assert policy.sha384 == hashlib.sha384(text.encode()).digest()


def test_every_problem_is_reported_at_once_with_its_key():
    text = f"""
version = 2
acept = ["tdx"]
accept = ["simulated", "sev"]
max_session_age_s = true
clock_skew_s = -1
allow_simulated = "yes"
[roots]
intel_sha256 = ["zz"]
[tdx]
mr_td = "not a list"
rtmr0 = [1]
rtmr3 = ["{REGISTER}"]
td_attributes_mask = "00"
td_attributes_value = "0000001000000000"
tcb_status = ["Fine"]
allow = 1
[simulated]
layers = []
[platforms]
allow_piid = ["00"]
[roles.server]
sev = {{}}
tdx = {{ rtmr3 = ["00"] }}
[roles.auditor.tdx]
[unknown]
"""
    found = problems(text)
    assert set(found) == {
        "version",
        "acept",
        "accept",
        "max_session_age_s",
        "clock_skew_s",
        "allow_simulated",
        "roots.intel_sha256",
        "tdx.mr_td",
        "tdx.rtmr0",
        "tdx.rtmr3",
        "tdx.td_attributes_mask",
        "tdx.td_attributes_value",
        "tdx.tcb_status",
        "tdx.allow",
        "simulated.layers",
        "platforms.allow_piid",
        "roles.server.sev",
        "roles.server.tdx.rtmr3",
        "roles.auditor",
        "unknown",
    }
    assert "did you mean accept?" in found["acept"]
    assert "one of UpToDate" in found["tdx.tcb_status"]


def test_simulated_needs_its_switch():
    assert "allow_simulated = true" in problems('version = 1\naccept = ["simulated"]')["accept"]


def test_version_is_required():
    assert "missing" in problems("accept = []")["version"]


@pytest.mark.parametrize("blob", [b"\xff", b"version = ", b"a = " + b"[" * 5000, b"version = 1\nversion = 1"])
def test_not_toml(blob):
    with pytest.raises(ConfigError, match="not a TOML file"):
        Policy.parse(blob)


def test_deeply_dotted_key_is_only_unknown():
    with pytest.raises(ConfigError, match="unknown key"):
        Policy.parse(b"version = 1\n" + b".".join([b"a"] * 500) + b" = 1")


def test_load_names_the_file(tmp_path):
    path = tmp_path / "policy.toml"
    with pytest.raises(ConfigError, match="cannot read the policy"):
        Policy.load(path)
    path.write_text(MINIMAL)
    assert Policy.load(path).source == str(path)


def test_template_hash_ignores_rtmr3_and_nothing_else():
    draft = Policy.parse(render_policy(root_sha256=ROOT))
    final = Policy.parse(render_policy(root_sha256=ROOT, server_rtmr3=[b"\x01" * 48]))
    other_root = Policy.parse(render_policy(root_sha256="cd" * 32, server_rtmr3=[b"\x01" * 48]))
    stricter = Policy.parse(render_policy(root_sha256=ROOT, require_layers=["seccomp"]))
    assert draft.template_sha384 == final.template_sha384
    assert draft.sha384 != final.sha384
    assert len({draft.template_sha384, other_root.template_sha384, stricter.template_sha384}) == 3


def test_template_hash_is_of_the_meaning_not_of_the_text():
    tidy = b"version = 1\nallow_simulated = false\n[roles.server.tdx]\nrtmr3 = []\n"
    untidy = b"# a comment\nallow_simulated=false\nversion =  1\n"
    assert Policy.parse(tidy).template_sha384 == Policy.parse(untidy).template_sha384


def test_template_hash_known_answer():
    canonical = b'{"accept":["tdx"],"version":1}'
    label = b"cloister-policy-template/v1"
    encoded = len(label).to_bytes(4, "big") + label + len(canonical).to_bytes(4, "big") + canonical
    policy = Policy.parse(b'version = 1\naccept = ["tdx"]\n')
    assert policy.template_sha384 == hashlib.sha384(encoded).digest()


def test_rendered_policy_has_a_client_set_only_where_asked():
    without = Policy.parse(render_policy(root_sha256=ROOT))
    with_client = Policy.parse(render_policy(root_sha256=ROOT, client_rtmr3=[b"\x02" * 48]))
    assert "client" not in without.roles
    assert with_client.roles["client"]["tdx"]["rtmr3"] == ("02" * 48,)


def test_write_policy(tmp_path):
    path = tmp_path / "policy.toml"
    write_policy(path, root_sha256=ROOT, server_rtmr3=[b"\x01" * 48])
    assert path.read_bytes() == render_policy(root_sha256=ROOT, server_rtmr3=[b"\x01" * 48])
    assert list(tmp_path.iterdir()) == [path]


def test_write_policy_to_nowhere(tmp_path):
    with pytest.raises(ConfigError, match="cannot write the policy"):
        write_policy(tmp_path / "missing" / "policy.toml", root_sha256=ROOT)


@pytest.mark.parametrize(
    ("text", "key", "words"),
    [
        (f'[sgx]\nmr_signer = ["{"ab" * 32}"]', "sgx.prod_id", "every product"),
        ("[snp.guest_policy]\ndebug = true", "snp.guest_policy.debug", "never accepted"),
        ('[vtpm]\nak_source = ["software"]', "vtpm.ak_source", "allow_simulated"),
        ("[snp.min_tcb.milan]\nfmc = 256", "snp.min_tcb.milan.fmc", "from 0 to 255"),
        ('[gpu]\ncc_mode = ["off"]', "gpu.cc_mode", "not known"),
        ("[gpu.measurements]\n65 = []", "gpu.measurements.65", "unknown key"),
    ],
)
def test_what_no_policy_can_say(text: str, key: str, words: str):
    assert words in problems(f"version = 1\n{text}")[key]
