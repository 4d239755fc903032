"""The command line: ``tokenry list | search | show | compare | verify | status | report | demo | mixture | detect``."""

from tokenry.cli.main import app, run

__all__ = ["app", "run"]
