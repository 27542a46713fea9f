"""OpenAI's API under `/v1`, for its unmodified clients: responses, chat completions, completions, models."""

from services.http.openai.openapi import describe as describe
from services.http.openai.package import package as package
