"""The whole suite on one machine: real servers and services as separate processes under one supervisor.

The commands are `python -m deploy.local up` and `demo`. `deploy.local.stack.Stack` is the library below them. The tests
use it to start, kill and restart real processes.
"""
