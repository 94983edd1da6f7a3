"""`cloister verify`: decisions, what was proven, one exit code for each outcome, and bad input of every kind."""

from __future__ import annotations

import json

import pytest

from cloister.cli import _outcome
from cloister.cli._main import build_parser
from cloister.errors import AttestationError
from cloister.wire import MAX_EVIDENCE_BYTES, Evidence

TDX_NOW = 1750332747
DAY = 86400


def check(desk, *args, now: object | None = None):
    return desk.run("verify", desk.evidence, "--policy", desk.policy, "--now", now or desk.now, *args)


def refused(desk, code: int, name: str, *args, now: object | None = None) -> str:
    """The evidence is refused for this reason, on both streams; what it prints on stdout comes back."""
    found, out, err = check(desk, *args, now=now)
    assert found == code
    assert f"{name} (exit code {code})" in out and out.startswith("REFUSED") and "\n  no  " in out
    assert err.startswith("error: ")
    return out


def test_accepted_without_a_session(desk):
    code, out, err = check(desk)
    assert code == 0 and err == ""
    assert out.startswith("ACCEPTED [SIMULATED] for the role server\nSIMULATED: ")
    assert "  ok  platform TCB status is UpToDate" in out and "\n  no  " not in out
    assert f"  rtmr3                  {desk.rtmr3.hex()}" in out
    assert f"  report_data            {desk.report_data.hex()}" in out
    assert "not proven\n  - anything against whoever holds" in out
    assert "  - that it was made for a session of yours; pass --report-data" in out
    assert "2027-01-15 08:00:00Z, by --now" in out


def test_accepted_for_a_session(desk):
    code, out, _ = check(desk, "--report-data", desk.report_data.hex())
    assert code == 0
    assert "  ok  report_data binds the evidence to this session" in out
    assert "pass --report-data" not in out


def test_evidence_of_another_session(desk):
    out = refused(desk, 53, "attest.measurement", "--report-data", "00" * 64)
    assert "relayed or replayed" in out and "proven\n" in out


def test_a_refusal_says_what_holds_all_the_same(desk):
    other = desk.write("evidence.bin", desk.attest(rtmr3=b"x" * 48).to_bytes())
    out = refused(desk, 53, "attest.measurement", "--report-data", desk.report_data.hex())
    assert other.exists() and "  ok  report_data binds" in out and "  no  rtmr3 is" in out


def test_json(desk):
    code, out, _ = check(desk, "--json")
    found = json.loads(out)
    assert code == 0 and found["accepted"] and found["simulated"] and found["exit_code"] == 0
    assert found["bound_to_report_data"] is None and found["code"] == ""
    assert found["claims"]["measurements"]["rtmr3"] == desk.rtmr3.hex()
    code, out, err = check(desk, "--json", "--report-data", "00" * 64)
    found = json.loads(out)
    assert code == found["exit_code"] == 53 and found["code"] == "attest.measurement"
    assert found["bound_to_report_data"] is False and err.startswith("error: ")


def test_the_policy_that_decided_is_named(desk):
    import hashlib

    assert f"sha384 {hashlib.sha384(desk.policy.read_bytes()).hexdigest()}" in check(desk)[1]


def test_role_without_values(desk):
    refused(desk, 54, "attest.policy", "--role", "client")


def test_other_collateral_takes_the_place_of_what_came_along(desk):
    good = desk.write("collateral.json", desk.root.collateral_json())
    assert check(desk, "--collateral", good)[0] == 0
    refused(desk, 50, "attest.malformed", "--aux", desk.write("bad.json", "{}"))


def test_raw_quote(desk):
    evidence = desk.attest()
    quote = desk.write("quote.bin", evidence.blob)
    collateral = desk.write("collateral.json", evidence.aux)
    args = ["verify", quote, "--policy", desk.policy, "--now", desk.now]
    assert desk.run(*args, "--type", "simulated", "--collateral", collateral)[0] == 0
    code, out, err = desk.run(*args, "--collateral", collateral)
    assert code == 50 and out == "" and "name its type" in err
    code, _, err = desk.run(*args, "--type", "simulated")
    assert code == 50 and "collateral is missing" in err
    code, _, err = desk.run(*args, "--type", "tdxx")
    assert code == 2 and "one of " in err
    code, out, _ = desk.run(*args, "--json")
    assert code == 50 and json.loads(out)["exit_code"] == 50


def test_type_that_is_not_what_the_file_says(desk):
    code, _, err = check(desk, "--type", "tdx")
    assert code == 50 and 'of the type "simulated", not "tdx"' in err
    assert check(desk, "--type", "simulated")[0] == 0


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b"hello", "is no evidence file"),
        (b"CLST", "does not parse"),
        (bytes(MAX_EVIDENCE_BYTES + 1), "is larger than"),
        (b"CLST\x02" + bytes(50), "does not parse"),
        (b"\x7fELF" + bytes(100), "is no evidence file"),
    ],
    ids=["empty", "foreign", "magic only", "oversized", "another version", "a program"],
)
def test_what_is_no_evidence(desk, content, says):
    desk.write("evidence.bin", content)
    code, out, err = check(desk)
    assert code == 50 and out == "" and says in err


def test_oversized_raw_quote(desk):
    quote = desk.write("quote.bin", bytes((1 << 20) + 1))
    code, _, err = desk.run("verify", quote, "--type", "tdx", "--policy", desk.policy)
    assert code == 50 and "no quote or report is" in err


def test_truncated_evidence_at_every_part(desk):
    whole = desk.evidence.read_bytes()
    for size in range(5, len(whole), 997):
        desk.write("evidence.bin", whole[:size])
        code, _, err = check(desk)
        assert code == 50 and "is it cut short?" in err


def test_truncated_quote_inside_of_whole_evidence(desk):
    evidence = desk.attest()
    desk.write("evidence.bin", Evidence(evidence.type, evidence.blob[:-100], evidence.aux).to_bytes())
    refused(desk, 50, "attest.malformed")


def test_one_changed_bit(desk):
    evidence = desk.attest()
    blob = bytearray(evidence.blob)
    blob[600] ^= 1
    desk.write("evidence.bin", Evidence(evidence.type, bytes(blob), evidence.aux).to_bytes())
    assert "proven: nothing" in refused(desk, 51, "attest.signature")


def test_expired_collateral(desk):
    refused(desk, 52, "attest.stale", now=desk.now + 40 * DAY)


@pytest.mark.parametrize("now", ["0", "1970-01-01T00:00:00Z", "2099-12-31T23:59:59+01:00", "253402300799"])
def test_clock_far_off(desk, now):
    code, _, err = check(desk, now=now)
    assert code == 52 and "is that right?" in err and "by --now" in err


def test_the_machines_clock_is_the_default_and_named(desk, monkeypatch):
    monkeypatch.setattr("cloister.cli._evidence.time.time", lambda: desk.now + 0.9)
    code, out, _ = desk.run("verify", desk.evidence, "--policy", desk.policy)
    assert code == 0 and "by this machine's clock" in out


@pytest.mark.parametrize("now", ["tomorrow", "-5", "2027-01-15T08:00:00", "253402300800", "9" * 5000, "1.5e9"])
def test_no_time(desk, now):
    code, out, err = check(desk, now=f"{now}") if now != "-5" else desk.run(
        "verify", desk.evidence, "--policy", desk.policy, "--now=-5"
    )  # fmt: skip
    assert code == 2 and out == "" and "is no time" in err and "RFC 3339" in err


@pytest.mark.parametrize("text", ["00", "zz" * 64, "0" * 127])
def test_no_report_data(desk, text):
    code, _, err = check(desk, "--report-data", text)
    assert code == 2 and "64 bytes" in err


def test_policy_with_a_typo(desk):
    desk.write("policy.toml", desk.policy.read_text().replace("rtmr1", "rtmr1x"))
    code, out, err = check(desk)
    assert code == 2 and out == "" and "tdx.rtmr1x: unknown key" in err and "did you mean rtmr1?" in err


def test_files_that_are_not_there(desk):
    assert desk.run("verify", desk.folder / "no", "--policy", desk.policy)[0] == 2
    assert desk.run("verify", desk.folder, "--policy", desk.policy)[0] == 2
    assert desk.run("verify", desk.evidence, "--policy", desk.folder / "no")[0] == 2
    assert check(desk, "--collateral", desk.folder / "no")[0] == 2


def test_each_class_of_refusal_has_a_code_of_its_own_in_the_help():
    codes = _outcome.REFUSAL_EXIT_CODES
    assert set(codes) == set(AttestationError.__subclasses__())
    assert len(set(codes.values())) == len(codes)
    parser = build_parser()._subparsers._group_actions[0].choices["verify"]  # pyright: ignore
    text = parser.format_help()
    assert all(f"  {code}   {cls.code}:" in text for cls, code in codes.items())
    assert _outcome.exit_code(AttestationError("something else")) == 5


def test_real_quote(desk, samples):
    quote, collateral = samples / "dcap" / "tdx_quote", samples / "dcap" / "tdx_quote_collateral.json"
    policy = desk.folder / "real.toml"
    given = [quote, "--type", "tdx", "--collateral", collateral, "--now", TDX_NOW]
    assert desk.run("policy", "init", *given, "--out", policy)[0] == 0
    code, out, _ = desk.run("verify", *given, "--policy", policy)
    assert code == 0 and out.startswith("ACCEPTED for the role server\n") and "SIMULATED" not in out
    code, out, err = desk.run("verify", *given, "--policy", desk.policy)
    assert code == 54 and 'type "tdx" is not accepted' in err
    assert desk.run("verify", *given[:-1], "2026-06-01T00:00:00Z", "--policy", policy)[0] == 52


def test_nested_claims_are_shown(desk):
    """Of a vTPM and the CPU below it, say."""
    import dataclasses

    from cloister.api import judge_evidence
    from cloister.attest import Policy

    policy = Policy.load(desk.policy)
    outcome = judge_evidence(desk.attest(), policy, role="server", now=desk.now)
    assert outcome.claims is not None
    inner = dataclasses.replace(outcome.claims, tee="snp")
    outcome = dataclasses.replace(outcome, claims=dataclasses.replace(outcome.claims, parts=(inner,)))
    assert _outcome.show_outcome(outcome, source="e", clock="--now", as_json=False) == 0
    assert "    tee                    snp" in desk.capsys.readouterr().out
