"""The command line of sppfeat, installed as the package `sppfeat_cli`."""

from sppfeat_cli.app import main

__all__ = ["main"]
