"""The arguments of the commands around attestation. Nothing heavy is imported here."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from cloister.cli import _help

Adder = Callable[..., argparse.ArgumentParser]


def add_attest_commands(add: Adder, group: Callable[[str, str], Adder]) -> None:
    """Add `verify`, `policy`, `measure`, `doctor` and `collateral`.

    Args:
        add: makes a parser from name, help texts, and the module and name of its function.
        group: makes the same kind of adder below a command that has commands of its own.
    """
    _add_verify(add("verify", *_help.VERIFY, module="_evidence"))
    policy = group("policy", _help.POLICY)
    _add_policy_init(policy("init", *_help.POLICY_INIT, module="_evidence", function="policy_init"))
    _add_policy_check(policy("check", *_help.POLICY_CHECK, module="_evidence", function="policy_check"))
    measure = add("measure", *_help.MEASURE, module="_machine")
    measure.add_argument("job", metavar="JOB", help="a job file")
    measure.add_argument("--policy", metavar="P", help="the policy to measure (default: the job's own)")
    _add_json(measure)
    _add_json(add("doctor", *_help.DOCTOR, module="_machine"))
    collateral = group("collateral", _help.COLLATERAL)
    _add_fetch(collateral("fetch", *_help.COLLATERAL_FETCH, module="_evidence", function="collateral_fetch"))


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("evidence", metavar="EVIDENCE", help="an evidence file, or a raw quote or report with --type")
    parser.add_argument("--policy", required=True, metavar="P", help="the policy that decides")
    parser.add_argument(
        "--collateral", "--aux", metavar="C", help="collateral or certificates of a raw quote or report"
    )
    _add_shared(parser)
    _add_decision(parser)


def _add_policy_init(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("evidence", nargs="+", metavar="EVIDENCE", help="evidence of what is to be accepted")
    parser.add_argument("--out", metavar="F", help="the new policy (default: stdout)")
    parser.add_argument("--force", action="store_true", help="replace a file that is there")
    parser.add_argument("--pin-platform", action="store_true", help="allow only the machines that were shown")
    parser.add_argument("--allow-simulated", action="store_true", help="take evidence under a software root, too")
    _add_beside(parser)
    _add_shared(parser)


def _add_policy_check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("policy", metavar="POLICY", help="a policy file")
    parser.add_argument("evidence", nargs="*", metavar="EVIDENCE", help="explain the decision about it")
    _add_beside(parser)
    _add_shared(parser)
    _add_decision(parser)


def _add_fetch(parser: argparse.ArgumentParser) -> None:
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--quote", metavar="F", help="an SGX or TDX quote")
    given.add_argument("--snp-report", metavar="F", help="an SEV-SNP report")
    parser.add_argument(
        "--out", required=True, metavar="F", help="where to write it: JSON for a quote, PEM for a report"
    )
    parser.add_argument("--pccs", metavar="URL", help="a cache of Intel's service (default: Intel's own)")
    parser.add_argument("--kds", metavar="URL", help="a mirror of AMD's service (default: AMD's own)")
    parser.add_argument("--product", choices=("milan", "genoa", "turin"), help="of a report of version 2")


def _add_beside(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--collateral", "--aux", action="append", metavar="C",
        help="collateral or certificates; once for all evidence, or once for each, in its order",
    )  # fmt: skip


def _add_shared(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--role", choices=("server", "client"), default="server", help="whose values (default: server)")
    parser.add_argument("--type", metavar="T", help="of a raw quote or report: tdx, sgx, snp, ...")
    parser.add_argument("--now", metavar="T", help="Unix seconds or RFC 3339 (default: this machine's clock)")


def _add_decision(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--report-data", metavar="HEX", help="the 64 bytes that the evidence must be bound to")
    _add_json(parser)


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
