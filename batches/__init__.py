"""What a batch is, apart from any process: the lines of its input, the order in which they run, and its results.

    input (JSONL) ──lines──▶ Line ──plan──▶ plan file ──▶ chunks ──segments──▶ BatchItem ──results──▶ output, errors

Everything reads pieces and yields pieces, so that a batch of a million lines needs little memory.
"""
