"""Signing in to the console: the session of a browser, and how it comes to hold a credential of the gateway.

The front stores nothing. The session is a cookie that every front with the same key can read. Only the gateway decides
whether a credential is valid.
"""
