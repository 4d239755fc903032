"""``python -m tokenry.cli``, for a source tree that is not installed."""

from tokenry.cli.main import run

run()
