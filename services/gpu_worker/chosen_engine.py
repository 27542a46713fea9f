"""The engine of the settings."""

from services.gpu_worker.engines.engine import Engine, EngineConfig, create_engine
from services.gpu_worker.settings import GpuWorkerSettings, wrong_engine_options


def chosen_engine(settings: GpuWorkerSettings, model_path: str) -> Engine:
    """Return the engine, not started. Raises ValidationError for options that it does not take."""
    config = EngineConfig(
        model_path,
        settings.max_concurrent,
        settings.engine_options,
        special_tokens_in_messages=settings.special_tokens_in_messages,
    )
    try:
        return create_engine(settings.engine, config)
    except ValueError as error:
        raise wrong_engine_options(error) from error
