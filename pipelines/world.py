"""The pipeline `world`: a world, pictures of it, its characters, their posts, and pictures of these."""

import asyncio
from collections.abc import Awaitable, Mapping
from datetime import timedelta
from typing import Any, Final, TypeVar

from jobs.pipelines import shown_error
from llm_pb import common_pb2, pipeline_pb2
from pipelines.errors import Incomplete, StepFailed
from pipelines.program import Pipeline
from pipelines.registry import pipeline

NAME: Final = "world"
_IMAGES: Final = 1
_CHARACTERS: Final = 3
_POSTS: Final = 10
_IMAGE_LIMIT: Final = 30
_TIMEOUTS: Final = {"describe": 5, "write": 3, "image": 5}
"""Maximum time of each step, in minutes."""
_NAMED: Final = 5
"""Maximum number of missing steps that the error names."""
_T = TypeVar("_T")


def _schema(**lengths: int) -> Mapping[str, Any]:
    """Return the JSON Schema of an object of texts, with the maximum length of each."""
    texts = {name: {"type": "string", "minLength": 1, "maxLength": length} for name, length in lengths.items()}
    return {"type": "object", "properties": texts, "required": [*lengths], "additionalProperties": False}


_WORLD: Final = _schema(name=60, description=600, picture=200)
_CHARACTER: Final = _schema(name=60, description=300)
_POST: Final = _schema(text=280, picture=200)


@pipeline(NAME, pipeline_pb2.WorldSpec, pipeline_pb2.WorldResult, resumes=True)
async def world(llm: Pipeline, spec: pipeline_pb2.WorldSpec) -> pipeline_pb2.WorldResult:
    """See WorldSpec."""
    steps = _Steps(spec)
    prompt = f"Describe a world on this theme, and a picture of it.\n\nTheme: {spec.theme}"
    about = await steps.generate(llm, "describe", "describe", prompt, _WORLD)
    steps.about = f"Theme: {spec.theme}\nWorld: {about['name']}\n{about['description']}"
    images = _count(spec, "images", _IMAGES) if spec.image_model else 0

    async def picture(here: Pipeline, number: int) -> common_pb2.FileRef | None:
        return await steps.kept(steps.image(here, about["picture"], number))

    pictures, characters = await asyncio.gather(
        llm.map("images", range(images), picture),
        llm.map("characters", range(_count(spec, "characters", _CHARACTERS)), steps.character),
    )
    posts = [post for post in await steps.posts(llm, characters) if post is not None]
    result = pipeline_pb2.WorldResult(
        name=about["name"],
        description=about["description"],
        images=[image for image in pictures if image is not None],
        characters=[character for character in characters if character is not None],
        posts=posts,
        missing=sorted(steps.missing, key=lambda step: step.path),
    )
    if result.missing:
        named = ", ".join(step.path for step in result.missing[:_NAMED])
        more = f" and {len(result.missing) - _NAMED} more" if len(result.missing) > _NAMED else ""
        first = result.missing[0].error.message
        raise Incomplete(result, f"these steps have failed: {named}{more}; the first one: {first}")
    return result


class _Steps:
    """The steps of a world."""

    def __init__(self, spec: pipeline_pb2.WorldSpec) -> None:
        self._spec = spec
        self._seed = spec.seed if spec.HasField("seed") else None
        self._of_jobs: dict[str, Any] = {} if self._seed is None else {"seed": self._seed}
        if spec.HasField("max_tokens"):
            self._of_jobs["max_tokens"] = spec.max_tokens
        self.about = ""
        """What each prompt says of the world."""
        self.missing: list[pipeline_pb2.MissingStep] = []

    async def kept(self, work: Awaitable[_T]) -> _T | None:
        """Return what a step has made; None, and a note of it, if it has failed."""
        try:
            return await work
        except StepFailed as error:
            self.missing.append(pipeline_pb2.MissingStep(path=error.path, error=shown_error(error.status)))
            return None

    async def character(self, llm: Pipeline, number: int) -> pipeline_pb2.WorldCharacter | None:
        """Invent a character."""
        prompt = f"Invent character {number + 1} of this world, unlike all others.\n\n{self.about}"
        found = await self.kept(self.generate(llm, "describe", "describe", prompt, _CHARACTER))
        if found is None:
            return None
        return pipeline_pb2.WorldCharacter(number=number, name=found["name"], description=found["description"])

    async def posts(
        self, llm: Pipeline, characters: list[pipeline_pb2.WorldCharacter | None]
    ) -> list[pipeline_pb2.WorldPost | None]:
        """Write the posts, then make their pictures. Posts of a character that is missing are left out."""
        pictures: dict[int, str] = {}

        async def write(here: Pipeline, number: int) -> pipeline_pb2.WorldPost | None:
            # Which character it is of must not depend on which ones there are: see `resumes` of pipeline().
            character = characters[number % len(characters)]
            if character is None:
                return None
            who = f"{character.name}: {character.description}"
            prompt = (
                f"Write post {number + 1} by this character, and describe a picture of it.\n\n{who}\n\n{self.about}"
            )
            found = await self.kept(self.generate(here, "write", "write", prompt, _POST))
            if found is None:
                return None
            pictures[number] = found["picture"]
            return pipeline_pb2.WorldPost(number=number, character=character.number, text=found["text"])

        async def illustrate(here: Pipeline, post: pipeline_pb2.WorldPost | None) -> None:
            if post is not None and self._spec.image_model:
                image = await self.kept(self.image(here, pictures[post.number], post.number))
                if image is not None:
                    post.image.CopyFrom(image)

        posts = await llm.map("posts", range(_count(self._spec, "posts", _POSTS)), write)
        await llm.map("posts", posts, illustrate, limit=_count(self._spec, "image_limit", _IMAGE_LIMIT))
        return posts

    async def generate(self, llm: Pipeline, name: str, step: str, prompt: str, schema: Mapping[str, Any]) -> Any:
        """Run a job that writes text, and return its JSON."""
        models = self._spec.models
        generated = await llm.generate(
            name,
            model=models[step] if step in models else models["describe"],
            messages=[{"role": "user", "content": prompt}],
            schema=schema,
            timeout=self._within(step),
            **self._of_jobs,
        )
        return generated.json

    async def image(self, llm: Pipeline, prompt: str, number: int) -> common_pb2.FileRef:
        """Run a job that makes a picture."""
        spec = self._spec
        return await llm.image(
            "image",
            model=spec.image_model,
            prompt=prompt,
            size=spec.image_size if spec.HasField("image_size") else None,
            # Pictures of the same prompt differ.
            seed=None if self._seed is None else (self._seed + number) % 2**63,
            timeout=self._within("image"),
        )

    def _within(self, step: str) -> timedelta:
        times = self._spec.step_timeouts
        return times[step].ToTimedelta() if step in times else timedelta(minutes=_TIMEOUTS[step])


def _count(spec: pipeline_pb2.WorldSpec, field: str, default: int) -> int:
    """Return the value of a field, or the default where it is unset. 0 is a value."""
    return int(getattr(spec, field)) if spec.HasField(field) else default  # type: ignore[arg-type]
