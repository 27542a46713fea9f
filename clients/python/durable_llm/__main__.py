"""Runs the command line: python -m durable_llm."""

from durable_llm.cli import main

main()
