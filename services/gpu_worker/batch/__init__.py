"""Runs the chunks of batches: many jobs as one activity.

    plan, input ──lines──▶ item (an attempt) ──▶ segments in the store ──▶ heartbeats and result name them
                              └──▶ log of the chunk in the feed, with which the next attempt goes on

An item that a heartbeat has reported to Temporal is done, and never runs again. Until then it is in the log.
"""
