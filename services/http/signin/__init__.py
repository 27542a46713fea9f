"""Signing in to the console: the session of a browser, and how it comes to hold a credential of the gateway.

The front keeps nothing. The session is a cookie that only fronts with its key can read, so it is good at each of them.
Whether a credential counts is for the gateway alone to say.
"""
