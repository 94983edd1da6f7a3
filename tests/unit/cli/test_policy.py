"""`cloister policy`: what init writes accepts exactly what it was shown, and check says what a policy allows."""

from __future__ import annotations

import json
import stat

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from cloister.attest import Claims, Policy, SimulatedAttester, SimulatedRoot
from cloister.attest._attesters.vtpm import VtpmAttester
from cloister.attest._policy_init_sections import section_text
from cloister.attest._simulated.amd_root import SimulatedAmdRoot, SimulatedSnpAttester
from cloister.attest._simulated.gpu import SimulatedGpuRoot
from cloister.attest._simulated.sgx_quote import SimulatedEnclave, sgx_evidence
from cloister.attest._simulated.tpm import SimulatedTpm
from cloister.attest._verifiers.azure import AZURE_KIND
from cloister.attest._verifiers.composite import pack_composite
from cloister.attest._verifiers.gpu import gpu_nonce
from cloister.wire import Evidence, pack

TDX_NOW, SGX_NOW, SNP_NOW = "1750332747", "1750334171", "2024-06-01T00:00:00Z"
FLAGS = ("--allow-simulated",)


def init(desk, *evidence, flags=FLAGS, now=None, **options):
    args = [arg for name, value in options.items() for arg in (f"--{name.replace('_', '-')}", value)]
    return desk.run("policy", "init", *evidence, "--now", now or desk.now, *flags, *args)


def decide(desk, policy: str, *evidence, now=None, role="server"):
    path = desk.write("drafted.toml", policy)
    return desk.run("policy", "check", path, *evidence, "--now", now or desk.now, "--role", role)


def test_round_trip(desk):
    code, text, err = init(desk, desk.evidence)
    assert code == 0 and err.startswith("SIMULATED: ")
    assert decide(desk, text, desk.evidence)[0] == 0
    policy = Policy.parse(text.encode())
    assert policy.accept == {"simulated"} and policy.allow_simulated and not policy.platform_ids
    assert policy.intel_sha256 == {desk.root.root_sha256}
    assert set(policy.roles) == {"server"}
    assert set(policy.roles["server"]["tdx"]) == {"mr_seam", "mr_td", *(f"rtmr{i}" for i in range(4))}
    assert policy.tdx.platform.tcb_status == ("UpToDate",)
    assert policy.tdx.td_attributes_mask == b"\xff" * 8
    assert policy.require_layers == ("no_dump", "seccomp")
    assert not (policy.tdx.platform.allow_dynamic or policy.tdx.platform.allow_smt)
    assert "SIMULATED" in text and text.startswith("# Written by `cloister policy init`")


def test_one_changed_bit_of_any_register_is_refused(desk):
    text = init(desk, desk.evidence)[1]
    changed = bytearray(desk.rtmr3)
    changed[47] ^= 1
    for options in (
        {"rtmr3": bytes(changed)},
        {"td_attributes": bytes.fromhex("0000005000000000")},
        {"layers": ("no_dump",)},
    ):
        other = desk.write("other.bin", desk.attest(**options).to_bytes())
        assert decide(desk, text, other)[0] in (53, 54), options
    evidence = desk.attest()
    for at in range(48, 632, 37):
        blob = bytearray(evidence.blob)
        blob[at] ^= 1
        other = desk.write("other.bin", Evidence(evidence.type, bytes(blob), evidence.aux).to_bytes())
        assert decide(desk, text, other)[0] in (50, 51), at


def test_role(desk):
    text = init(desk, desk.evidence, role="client")[1]
    assert decide(desk, text, desk.evidence, role="client")[0] == 0
    assert decide(desk, text, desk.evidence)[0] == 54


def test_platform_is_named_and_pinned_only_when_asked(desk):
    loose, pinned = init(desk, desk.evidence)[1], init(desk, desk.evidence, flags=(*FLAGS, "--pin-platform"))[1]
    assert "# allow_piid = [" in loose
    [piid] = Policy.parse(pinned.encode()).platform_ids
    other = desk.write("other.bin", _other_platform(desk).to_bytes())
    loose = loose.replace(desk.root.root_sha256, _root_of_other(desk))
    pinned = pinned.replace(desk.root.root_sha256, _root_of_other(desk))
    assert decide(desk, loose, other)[0] == 0
    code, out, _ = decide(desk, pinned, other)
    assert code == 54 and "is not in [platforms]" in out and piid not in out.split("proven")[0]


def _other_root(desk) -> SimulatedRoot:
    folder = desk.folder / "other-root"
    return SimulatedRoot.open(folder) if folder.exists() else SimulatedRoot.create(folder, now=desk.now)


def _root_of_other(desk) -> str:
    return _other_root(desk).root_sha256


def _other_platform(desk) -> Evidence:
    attester = SimulatedAttester(
        _other_root(desk).provision(), rtmr3=desk.rtmr3, layers=("no_dump", "seccomp")
    )  # fmt: skip
    return attester.evidence(desk.report_data)


def test_several_pieces_of_evidence(desk):
    second = desk.attest(rtmr3=b"x" * 48, td_attributes=bytes.fromhex("0000005000000000"), layers=("no_dump",))
    other = desk.write("other.bin", second.to_bytes())
    text = init(desk, desk.evidence, other)[1]
    policy = Policy.parse(text.encode())
    assert len(policy.roles["server"]["tdx"]["rtmr3"]) == 2 and policy.require_layers == ("no_dump",)
    assert policy.tdx.td_attributes_mask.hex() == "ffffffbfffffffff"
    code, out, _ = decide(desk, text, desk.evidence, other)
    assert code == 0 and out.count("ACCEPTED") == 2
    third = desk.write("third.bin", desk.attest(rtmr3=b"y" * 48).to_bytes())
    assert decide(desk, text, desk.evidence, third)[0] == 53


def test_collateral_for_each(desk):
    first, second = desk.attest(), desk.attest()
    quotes = [desk.write(f"q{i}", e.blob) for i, e in enumerate((first, second))]
    files = [desk.write(f"c{i}", e.aux) for i, e in enumerate((first, second))]
    given = ["policy", "init", *quotes, "--type", "simulated", *FLAGS, "--now", desk.now]
    assert desk.run(*given, "--collateral", files[0], "--collateral", files[1])[0] == 0
    assert desk.run(*given, "--collateral", files[0])[0] == 0
    assert desk.run(*given)[0] == 50
    code, _, err = desk.run(*given[:2], quotes[0], *given[2:], "--aux", files[0], "--aux", files[1])
    assert code == 2 and "2 files of collateral for 3" in err


def test_simulated_evidence_needs_a_word(desk):
    code, out, err = init(desk, desk.evidence, flags=())
    assert code == 54 and out == "" and "--allow-simulated" in err


def test_debug_evidence(desk):
    debug = desk.write("debug.bin", desk.attest(td_attributes=bytes.fromhex("0100001000000000")).to_bytes())
    code, out, err = init(desk, debug)
    assert code == 54 and out == "" and "ebug" in err


@pytest.mark.parametrize(("days", "code"), [(40, 52), (-40, 52)])
def test_evidence_of_another_time(desk, days, code):
    assert init(desk, desk.evidence, now=desk.now + days * 86400)[0] == code


def test_evidence_that_is_not_genuine(desk):
    evidence = desk.attest()
    blob = bytearray(evidence.blob)
    blob[600] ^= 1
    forged = desk.write("forged.bin", Evidence(evidence.type, bytes(blob), evidence.aux).to_bytes())
    assert init(desk, forged)[0] == 51
    assert init(desk, desk.write("foreign.bin", b"hello"))[0] == 50


def test_every_reason_is_told(desk):
    """Collateral too old for any strict policy, but not yet expired."""
    desk.root.refresh(desk.now, status="SWHardeningNeeded", advisories=("INTEL-SA-1",))
    try:
        patched = desk.write("e.bin", desk.attest().to_bytes())
        text = init(desk, patched)[1]
        assert Policy.parse(text.encode()).tdx.platform.tcb_status == ("SWHardeningNeeded",)
        assert decide(desk, text, desk.evidence)[0] == 54
        desk.root.refresh(desk.now, status="Revoked")
        assert init(desk, desk.write("r.bin", desk.attest().to_bytes()))[0] == 54
    finally:
        desk.root.refresh(desk.now)


def test_files(desk):
    out = desk.folder / "new.toml"
    code, text, err = init(desk, desk.evidence, out=out)
    assert code == 0 and text == "" and f"wrote {out}" in err and "cloister policy check" in err
    assert stat.S_IMODE(out.stat().st_mode) & 0o400 and Policy.load(out).accept
    out.write_text("mine")
    code, _, err = init(desk, desk.evidence, out=out)
    assert code == 2 and "is there already" in err and out.read_text() == "mine"
    assert init(desk, desk.evidence, out=out, flags=(*FLAGS, "--force"))[0] == 0
    assert Policy.load(out).accept
    assert init(desk, desk.evidence, out=desk.folder / "no" / "p.toml")[0] == 7


@pytest.mark.parametrize(("kind", "form"), [("vcek", "table"), ("vlek", "pem")])
def test_simulated_snp(desk, kind, form):
    root = SimulatedAmdRoot(now=desk.now)
    attester = SimulatedSnpAttester(root, host_data=b"h" * 32, kind=kind, form=form)
    path = desk.write("snp.bin", attester.evidence(desk.report_data).to_bytes())
    assert init(desk, path, flags=())[0] == 54
    text = init(desk, path)[1]
    policy = Policy.parse(text.encode())
    assert policy.amd_ark_sha256["milan"] == {root.root_sha256} and not policy.amd_ark_sha256["genoa"]
    assert policy.snp.signers == (kind,) and policy.snp.max_vmpl == 0 and not policy.snp.allow_smt
    assert policy.snp.min_tcb["milan"] == {"bootloader": 4, "tee": 1, "snp": 24, "microcode": 219}
    assert decide(desk, text, path)[0] == 0
    other = SimulatedSnpAttester(root, host_data=b"H" * 32, kind=kind).evidence(desk.report_data)
    assert decide(desk, text, desk.write("other.bin", other.to_bytes()))[0] == 53
    debug = SimulatedSnpAttester(root, host_data=b"h" * 32, guest_policy=0x20137 | 1 << 19, kind=kind)
    code, _, err = init(desk, desk.write("debug.bin", debug.evidence(desk.report_data).to_bytes()))
    assert code == 54 and "a debug enclave" in err


def test_platform_that_has_no_id(desk):
    attester = SimulatedSnpAttester(
        SimulatedAmdRoot(now=desk.now), host_data=b"h" * 32, kind="vlek", chip_id=bytes(64)
    )  # fmt: skip
    path = desk.write("snp.bin", attester.evidence(desk.report_data).to_bytes())
    code, _, err = init(desk, path, flags=(*FLAGS, "--pin-platform"))
    assert code == 54 and "names no platform" in err


def test_with_gpu(desk):
    gpu = SimulatedGpuRoot(now=desk.now).device()
    both = pack_composite(desk.attest(), [gpu.evidence(gpu_nonce(desk.report_data))])
    path = desk.write("gpu.bin", both.to_bytes())
    text = init(desk, path)[1]
    policy = Policy.parse(text.encode())
    assert policy.accept == {"simulated", "with-gpu"} and policy.gpu.required
    assert policy.nvidia_sha256 == {gpu.root.root_sha256} and len(policy.gpu.measurements) == 4
    assert decide(desk, text, path)[0] == 0
    code, out, _ = decide(desk, text, desk.evidence)
    assert code == 54 and "asks for a GPU" in out
    assert "[gpu] required" in desk.run("policy", "check", desk.folder / "drafted.toml")[1]
    text = init(desk, path, desk.evidence)[1]
    assert not Policy.parse(text.encode()).gpu.required
    assert decide(desk, text, path, desk.evidence)[0] == 0


def test_tpm_on_its_own_is_vouched_for_by_nobody(desk):
    path = desk.write("tpm.bin", Evidence("vtpm", b"x", b"").to_bytes())
    code, _, err = init(desk, path, flags=())
    assert code == 54 and "[vtpm].ak_sha256" in err
    assert init(desk, path)[0] == 50


def test_software_tpm(desk):
    port = SimulatedTpm(ec.generate_private_key(ec.SECP256R1()))
    evidence = VtpmAttester(port=port, events=[b"e" * 48]).evidence(desk.report_data)
    path = desk.write("tpm.bin", evidence.to_bytes())
    text = init(desk, path)[1]
    policy = Policy.parse(text.encode())
    assert policy.vtpm.ak_source == ("software",) and len(policy.vtpm.software_ak_sha256) == 1
    assert len(policy.roles["server"]["vtpm"]) == 24
    assert decide(desk, text, path)[0] == 0
    other = SimulatedTpm(port.key)
    again = VtpmAttester(port=other, events=[b"f" * 48]).evidence(desk.report_data)
    assert decide(desk, text, desk.write("other.bin", again.to_bytes()))[0] == 53


def test_registers_that_were_not_seen_are_not_named(desk):
    claims = Claims(
        tee="vtpm", evidence_type="vtpm", simulated=True, root_sha256="00" * 32, measurements={"pcr15": "11" * 32},
        debug=False, report_data=bytes(64),
    )  # fmt: skip
    lines = section_text("vtpm", [claims], role="server", chosen={}, everywhere=True, below=False)
    assert [line for line in lines if line.startswith("pcr")] == [f'pcr15 = ["{"11" * 32}"]']


def test_sgx_of_one_and_of_two_products(desk):
    desk.root.refresh(desk.now, tee="sgx")
    one, two = (
        desk.write(
            f"sgx{i}.bin",
            sgx_evidence(desk.root, SimulatedEnclave(prod_id=i, svn=i), report_data=desk.report_data).to_bytes(),
        )
        for i in (3, 4)
    )
    text = init(desk, one)[1]
    policy = Policy.parse(text.encode())
    assert policy.sgx.prod_id == 3 and policy.sgx.min_svn == 3 and "mr_signer" in policy.roles["server"]["sgx"]
    assert decide(desk, text, one)[0] == 0 and decide(desk, text, two)[0] == 53
    text = init(desk, one, two)[1]
    policy = Policy.parse(text.encode())
    assert policy.sgx.prod_id is None and set(policy.roles["server"]["sgx"]) == {"mr_enclave"}
    assert decide(desk, text, one, two)[0] == 0


def test_certificates_that_do_not_parse_or_are_no_roots(desk):
    """The verifier names them; looking for a root only passes them by."""
    evidence = desk.attest()
    fields = json.loads(evidence.aux)
    fields["root_note"] = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----"
    path = desk.write("noted.bin", Evidence(evidence.type, evidence.blob, json.dumps(fields).encode()).to_bytes())
    assert init(desk, path)[0] in (0, 50)
    fields["tcb_info_issuer_chain"] = "-----BEGIN CERTIFICATE-----" * 4000
    path = desk.write("hostile.bin", Evidence(evidence.type, evidence.blob, json.dumps(fields).encode()).to_bytes())
    assert init(desk, path)[0] == 50


def test_real_azure(desk, samples):
    """A vTPM, and the SNP report below it that vouches for its key."""
    folder = samples / "azure" / "az-snp-vtpm"
    found = json.loads((folder / "evidence-genoa.json").read_text())
    body = {
        "hcl_report": _without_padding(bytes(found["report"])),
        "td_quote": b"",
        "message": bytes(found["quote"]["message"]),
        "pcrs": b"".join(map(bytes, found["quote"]["pcrs"])),
        "report_data": b"",
        "signature": bytes(found["quote"]["signature"]),
    }
    chain = found["vcek"].encode().rstrip() + b"\n" + (samples / "snp" / "ask_ark_genoa.pem").read_bytes()
    evidence = Evidence("azure", pack(AZURE_KIND, body), chain)
    path = desk.write("azure.bin", evidence.to_bytes())
    code, text, err = init(desk, path, flags=(), now="2025-06-01T00:00:00Z")
    assert code == 0, err
    policy = Policy.parse(text.encode())
    assert policy.vtpm.ak_source == ("hcl",) and set(policy.roles["server"]) == {"snp", "vtpm"}
    assert "cloister measure" not in text.split("[roles.server.snp]")[1].split("[roles.server.vtpm]")[0]
    assert decide(desk, text, path, now="2025-06-01T00:00:00Z")[0] == 0
    assert "and of the snp evidence" in decide(desk, text, path, now="2025-06-01T00:00:00Z")[1]


def _without_padding(report: bytes) -> bytes:
    """An HCL report without the zeros that pad its NV index: its header has its size."""
    return report[: int.from_bytes(report[8:12], "little")]


REAL = [
    ("dcap/tdx_quote", "tdx", "dcap/tdx_quote_collateral.json", TDX_NOW),
    ("dcap/sgx_quote", "sgx", "dcap/sgx_quote_collateral.json", SGX_NOW),
]


@pytest.mark.parametrize(("name", "kind", "beside", "now"), REAL, ids=["tdx", "sgx"])
def test_real_intel(desk, samples, name, kind, beside, now):
    given = [samples / name, "--type", kind, "--collateral", samples / beside, "--now", now]
    code, text, err = desk.run("policy", "init", *given)
    assert code == 0 and "SIMULATED" not in text + err
    policy = desk.write("p.toml", text)
    assert desk.run("policy", "check", policy, *given)[0] == 0
    blob = bytearray((samples / name).read_bytes())
    blob[200] ^= 1
    given[0] = desk.write("changed", bytes(blob))
    assert desk.run("policy", "check", policy, *given)[0] == 51
    assert desk.run("policy", "init", *given)[0] == 51


def test_real_sgx_pins_enclave_signer_and_product(desk, samples):
    name, kind, beside, now = REAL[1]
    given = [samples / name, "--type", kind, "--collateral", samples / beside, "--now", now]
    policy = Policy.parse(desk.run("policy", "init", *given)[1].encode())
    assert set(policy.roles["server"]["sgx"]) == {"mr_enclave", "mr_signer"} and policy.sgx.prod_id == 0
    assert policy.sgx.platform.tcb_status == ("ConfigurationAndSWHardeningNeeded",)


def _amd(desk, samples, report: str, vcek: str):
    import ssl

    leaf = ssl.DER_cert_to_PEM_cert((samples / "snp" / vcek).read_bytes())
    chain = desk.write("chain.pem", leaf.encode() + (samples / "snp" / "ask_ark_milan.pem").read_bytes())
    return [samples / "snp" / report, "--type", "snp", "--aux", chain, "--now", SNP_NOW]


def test_real_snp(desk, samples):
    given = _amd(desk, samples, "trustee/test-report.bin", "trustee/test-vcek.der")
    code, text, _ = desk.run("policy", "init", *given, "--pin-platform")
    assert code == 0
    policy = Policy.parse(text.encode())
    assert policy.snp.allow_smt and not policy.snp.allow_migrate_ma and len(policy.platform_ids) == 1
    assert desk.run("policy", "check", desk.write("p.toml", text), *given)[0] == 0
    code, _, err = desk.run("policy", "init", *_amd(desk, samples, "attestation.bin", "vcek.testcer"))
    assert code == 54 and "a debug enclave" in err
    assert desk.run("policy", "init", *_amd(desk, samples, "attestation.bin", "trustee/test-vcek.der"))[0] == 51


def test_check_says_what_a_policy_allows(desk):
    code, out, _ = desk.run("policy", "check", desk.policy)
    policy = Policy.load(desk.policy)
    assert code == 0 and policy.sha384.hex() in out and policy.template_sha384.hex() in out
    assert "evidence of the types simulated" in out and "[SIMULATED]" in out
    assert f"server on tdx: rtmr3 is {desk.rtmr3.hex()[:16]}…" in out
    assert "allow_simulated = true" in out and "[platforms] is empty" in out
    found = json.loads(desk.run("policy", "check", desk.policy, "--json")[1])
    assert found["sha384"] == policy.sha384.hex() and found["allow_simulated"] and len(found["warnings"]) == 2


def test_check_explains_a_decision(desk):
    given = (desk.evidence, "--now", desk.now, "--report-data", desk.report_data.hex())
    code, out, _ = desk.run("policy", "check", desk.policy, *given)
    assert code == 0 and out.count("  ok  ") >= 8
    code, out, _ = desk.run("policy", "check", desk.policy, *given, "--json")
    assert code == 0 and json.loads(out)["bound_to_report_data"] is True
    assert desk.run("policy", "check", desk.policy, desk.write("x", b"hello"))[0] == 50


def test_check_of_a_policy_with_a_typo(desk):
    code, _, err = desk.run("policy", "check", desk.write("p.toml", "version = 1\nacept = []\n"))
    assert code == 2 and "did you mean accept?" in err
    assert desk.run("policy", "check", desk.write("p.toml", "version = "))[0] == 2


BASE = 'version = 1\naccept = ["tdx"]\n[roots]\nintel_sha256 = ["' + "00" * 32 + '"]\n'
SERVER = "[roles.server.tdx]\n" + "".join(f'{r} = ["{"11" * 48}"]\n' for r in ("mr_td", "rtmr1", "rtmr2", "rtmr3"))
SNP = (
    'version = 1\naccept = ["snp"]\n[roots]\namd_ark_sha256.milan = ["' + "00" * 32 + '"]\n[roles.server.snp]\n'
    f'measurement = ["{"11" * 48}"]\nhost_data = ["{"22" * 32}"]\n'
)
VTPM = f'version = 1\n[vtpm]\nak_source = ["pinned"]\nak_sha256 = ["{"33" * 32}"]\n[roles.server.vtpm]\n'


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("version = 1\n", "accept is empty"),
        ("version = 1\n", "no role has reference values"),
        ("version = 1\n", "no root and no attestation key"),
        (BASE, 'accept names "tdx", and no role has a set'),
        (BASE + SERVER.replace("rtmr3 ", "mr_seam "), "has no value of rtmr3"),
        (BASE + "[roles.server.tdx]\nrtmr0 = []\n", "rtmr0"),
        (BASE + SERVER, "td_attributes_mask is zero"),
        (BASE + SERVER, "xfam is empty"),
        (BASE.replace("[roots]", "clock_skew_s = 3600\n[roots]") + SERVER, "clock_skew_s = 3600"),
        (BASE.replace("[roots]", "max_session_age_s = 90000\n[roots]") + SERVER, "at least once a day"),
        (BASE + SERVER + '[tdx]\ntcb_status = ["OutOfDate"]\n', "knows of weaknesses"),
        (BASE + SERVER + "[tdx]\ncollateral_max_age_d = 60\n", "collateral_max_age_d = 60"),
        (BASE + SERVER + SERVER.replace("server", "client"), "share a value of rtmr3"),
        (BASE + f'[sgx]\nprod_id = 1\n[roles.server.sgx]\nmr_signer = ["{"44" * 32}"]\n', "no mr_enclave"),
        (SNP, "min_tcb.milan is missing"),
        (SNP + "[snp]\nmax_vmpl = 2\nguest_policy.migrate_ma = true\n", "max_vmpl = 2"),
        (SNP + "[snp]\nmax_vmpl = 2\nguest_policy.migrate_ma = true\n", "migration agent may move"),
        (VTPM, "has no value of pcr15"),
        (VTPM, "no vendor vouches"),
    ],
)
def test_warnings(desk, text, says):
    if says == "has no value of pcr15":
        text = text.replace("[vtpm]", 'accept = ["vtpm"]\n[vtpm]', 1)
    code, out, err = desk.run("policy", "check", desk.write("p.toml", text))
    assert code == 0 and says in out.split("\nwarnings\n")[1], err


def test_words_of_every_section(desk):
    text = (
        BASE.replace('["tdx"]', '["tdx", "snp", "sgx", "azure"]')
        + 'amd_ark_sha256.milan = ["' + "55" * 32 + '"]\n' + SERVER
        + '[tdx]\nxfam = ["0000000000000000"]\nreject_advisories = ["INTEL-SA-9"]\nmin_tcb_eval = 3\n'
        + 'td_attributes_mask = "0000001000000000"\ntd_attributes_value = "0000001000000000"\n'
        + "[snp]\nmin_tcb.milan = { snp = 8 }\nmin_tcb.genoa = {}\n"
        + '[vtpm]\nak_sha256 = ["' + "33" * 32 + '"]\n'
        + f'[platforms]\nallow_piid = ["{"66" * 16}"]\n'
        + '[gpu]\ndriver = ["550"]\n'
        + f'[roles.server.snp]\nmeasurement = ["{"11" * 48}"]\nhost_data = ["{"22" * 32}"]\n'
        + f'[roles.server.sgx]\nmr_enclave = ["{"44" * 32}"]\n'
        + f'[roles.server.vtpm]\npcr15 = ["{"77" * 32}"]\n'
    )  # fmt: skip
    out = desk.run("policy", "check", desk.write("p.toml", text))[1]
    for says in (
        "refused where INTEL-SA-9 applies", "TCB data of generation 3 or later", "milan firmware of at least snp 8",
        "genoa firmware of at least anything", "platforms: 1 by id", "1 keys pinned", "any product, security version 0",
        "[gpu] not required", "attestation keys vouched for by hcl", "roots amd_ark_sha256.milan: 5555555555555555…",
    ):  # fmt: skip
        assert says in out, (says, out)
    assert out.rstrip().endswith("no warnings")
