"""The command line: ``tokenry list | search | show | compare | verify | status | report | demo | mixture | detect | audit | batch | upscale``."""

from tokenry.cli.main import app, run

__all__ = ["app", "run"]
