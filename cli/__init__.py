"""The command line of sppfeat, installed as the package `sppfeat_cli`."""

__all__ = ["main"]


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1 failed, 2 wrong usage, 3 some images failed, 130 interrupted."""
    from sppfeat_cli.start import begin

    begin()
    from sppfeat_cli.app import run

    run()
