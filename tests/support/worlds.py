"""Worlds with scripted answers of the simulated engine, for tests."""

import json
from typing import Any, Final

from llm_pb import pipeline_pb2
from tests.support.pipelines import WITH_PIPELINES, Followed
from tests.support.stacks import FAST

PAINTER_MODEL: Final = {
    "name": "painter",
    "queue": "painter",
    "context_tokens": 4096,
    "max_output_tokens": 2,
    "default_max_tokens": 2,
    "image_sizes": [{"width": 64, "height": 48}, {"width": 32, "height": 32}],
    "price": {"currency": "EUR", "prompt_per_million": "0", "output_per_million": "20000"},
}
"""A model that makes images of two tokens, for 2 cents each."""
MODELS: Final = [
    {
        "name": "docstrings",
        "context_tokens": 16384,
        "max_output_tokens": 8192,
        "default_max_tokens": 300,
        "structured_output": True,
        "price": {"currency": "EUR", "prompt_per_million": "0", "output_per_million": "0"},
    },
    PAINTER_MODEL,
]
"""The models of the gateway: one that writes, and the one that makes images."""
LONG_OUTPUTS: Final = {
    "gateway": {
        **WITH_PIPELINES["gateway"],
        "GATEWAY_MODELS": json.dumps([{**MODELS[0], "context_tokens": 300_000, "max_output_tokens": 100_000}]),
    },
    "gpu-worker": {
        **FAST["gpu-worker"],
        "GPU_WORKER_ENGINE_OPTIONS": '{"tokens_per_second": 1000000, "context_tokens": 300000}',
    },
}
"""The environment of a stack whose model writes scripted JSON of more than 64 KiB, a byte a token."""
PAINTER: Final = {
    "GPU_WORKER_ENGINE": "simulated-images",
    "GPU_WORKER_MODEL": "painter",
    "GPU_WORKER_TASK_QUEUE": "painter",
    "GPU_WORKER_ENGINE_OPTIONS": '{"width": 64, "height": 48}',
}
"""The environment of the worker that makes images."""
FILTERED: Final = {"GPU_WORKER_ENGINE_OPTIONS": '{"width": 64, "height": 48, "refuse": "dragon"}'}
"""Added to PAINTER: it refuses dragons."""


def new_world(
    key: str, *, characters: int = 2, posts: int = 3, bad_post: str = "", named: str = "", **changes: Any
) -> Any:
    """Return a world with scripted texts. `bad_post` is the text of the picture of the last post.

    The pictures of worlds that are `named` the same are the same.
    """
    named = named or key
    scripts = {"Describe a world": {"name": "Aqua", "description": "All is water.", "picture": f"sea {named}"}}
    for number in range(1, characters + 1):
        scripts[f"Invent character {number} of"] = {"name": f"Fish {number}", "description": "It swims."}
    for number in range(1, posts + 1):
        picture = bad_post if bad_post and number == posts else f"bubble {number} {named}"
        scripts[f"Write post {number} by"] = {"text": f"Blub {number}", "picture": picture}
    theme = "water" + "".join(f"[[when {what}: {json.dumps(answer)}]]" for what, answer in scripts.items())
    pipeline = pipeline_pb2.PipelineRequest(user_id="alice", request_id=key)
    spec = {"models": {"describe": "docstrings"}, "image_model": "painter", "seed": 7, **changes}
    pipeline.world.CopyFrom(pipeline_pb2.WorldSpec(theme=theme, characters=characters, posts=posts, **spec))
    return pipeline


def world_of(seen: Followed) -> pipeline_pb2.WorldResult:
    """Return the result of a world, an incomplete one as well."""
    assert seen.result is not None, seen.status
    result = pipeline_pb2.WorldResult()
    assert seen.result.value.Unpack(result)
    return result


def leaves(*, images: int = 1, characters: int = 2, posts: int = 3) -> set[str]:
    """Return the paths of all steps of a world."""
    return {
        "describe",
        *(f"images/{number}/image" for number in range(images)),
        *(f"characters/{number}/describe" for number in range(characters)),
        *(f"posts/{number}/{step}" for number in range(posts) for step in ("write", "image")),
    }
