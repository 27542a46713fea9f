"""The whole suite on one machine: real servers and services as separate processes under one supervisor.

`python -m deploy.local up` and `demo` are the commands; `deploy.local.stack.Stack` is the library below them, which the
tests use to start, kill and restart real processes.
"""
