"""The commands `policies`, `policies new` and `policies check`."""

from __future__ import annotations

from steer.cli import output


def overview(as_json: bool) -> None:
    """Print the built-in policies."""
    from steer.cli import policy_tables

    if as_json:
        output.as_json({"policies": policy_tables.described()})
    else:
        output.tables(policy_tables.overview())


def new(name: str, as_json: bool) -> None:
    """Write a template of a policy. Raises SteerError: it cannot be written."""
    from steer.policy_tools.new import begin

    file = begin(name)
    if as_json:
        output.as_json({"written": str(file)})
        return
    print(f"wrote {file}. Edit it, then try:")
    for command in ("policies check", "run --demo --policy"):
        print(f"  steer {command} ./{file}")


def check(file: str, verbose: bool, as_json: bool) -> None:
    """Print what a policy costs.

    Args:
        verbose: show the whole log of the verifier if it refuses the policy.

    Raises:
        SteerError: it does not compile or load.
    """
    from steer.cli import policy_tables
    from steer.policy_tools import check

    checked = check.check(file, whole_log=verbose)
    if as_json:
        output.as_json(checked)
    else:
        output.tables(policy_tables.tables(checked))
