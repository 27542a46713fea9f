"""Runs the chunks of batches: many jobs as one activity.

    plan, input ──lines──▶ item (an attempt) ──▶ segments in the store ──▶ heartbeats and result name them
                              └──▶ log of the chunk in the feed, with which the next attempt goes on

What Temporal has been told of is done, and is never done again. What runs is in the log until then.
"""
