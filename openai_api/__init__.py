"""OpenAI's API as objects alone: bodies of requests as jobs, and jobs as completions, responses and errors.

It knows no server and no client, so that whoever has a body or a result in OpenAI's form translates it in one way: the
HTTP front, and the services that run batches.
"""
