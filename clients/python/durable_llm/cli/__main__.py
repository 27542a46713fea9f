"""Runs the command line: python -m durable_llm.cli."""

from durable_llm.cli import main

main()
