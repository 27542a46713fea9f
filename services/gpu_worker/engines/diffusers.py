"""Images of a model in the format of Hugging Face's diffusers. The packages are imported as the model loads."""

import asyncio
import io
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

from pydantic import Field

from jobs.errors import EngineDead, EngineFailed, OutOfMemory
from llm_pb import llm_pb2
from services.gpu_worker.engines.engine import EngineConfig, Image
from services.gpu_worker.engines.images import ImageEngine, ImageOptions, Order, Painted


class DiffusersOptions(ImageOptions):
    """The options of diffusers."""

    device: str = "cuda"
    """The device of torch that the model runs on."""
    dtype: Literal["float32", "float16", "bfloat16"] = "bfloat16"
    """The type of the weights."""
    steps: int = Field(30, ge=1)
    """Steps of an image."""
    guidance_scale: float | None = Field(None, ge=0)
    """How closely an image follows its prompt. Default: the model's."""


class DiffusersPainter:
    """See Painter. Images are made one after another."""

    name = "diffusers"

    def __init__(self, model: str, options: DiffusersOptions) -> None:
        self.gpu = llm_pb2.GpuInfo(name=options.device)
        self._model = model
        self._options = options
        self._pipeline: Any = None
        self._thread = ThreadPoolExecutor(1, "diffusers")
        self._stopped = False

    async def start(self) -> None:
        """Load the model. Raises EngineDead if that fails."""
        try:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._load)
        except ImportError as error:
            raise EngineDead(f"the engine diffusers needs the extra diffusers: {error}") from error
        except Exception as error:  # whatever keeps the packages from loading the model
            raise EngineDead(f"the model cannot be loaded: {type(error).__name__}: {error}") from error

    def _load(self) -> None:
        import torch
        from diffusers import AutoPipelineForText2Image

        options = self._options
        dtype = getattr(torch, options.dtype)
        # Weights in another format are a pickle, which is a program.
        found = AutoPipelineForText2Image.from_pretrained(self._model, dtype=dtype, use_safetensors=True)
        self._pipeline = found.to(options.device)
        self._pipeline.set_progress_bar_config(disable=True)
        if options.device.startswith("cuda"):
            self.gpu = llm_pb2.GpuInfo(name=torch.cuda.get_device_name(options.device))

    async def paint(self, order: Order) -> Painted:
        """Make the image; see Painter.paint. A cancel ends it with its current step."""
        cancelled = asyncio.Event()
        made = asyncio.get_running_loop().run_in_executor(self._thread, self._run, order, cancelled.is_set)
        try:
            return Painted(Image(await made, "image/png"))
        finally:
            cancelled.set()

    def _run(self, order: Order, is_cancelled: Any) -> bytes:
        import torch

        def after_step(pipeline: Any, _step: int, _time: Any, kept: dict[str, Any]) -> dict[str, Any]:
            pipeline._interrupt = is_cancelled() or self._stopped
            return kept

        options = self._options
        settings: dict[str, Any] = {"num_inference_steps": options.steps, "callback_on_step_end": after_step}
        if order.seed is not None:
            # On the CPU, so that the same seed is the same image on every device.
            settings["generator"] = torch.Generator("cpu").manual_seed(order.seed)
        if options.guidance_scale is not None:
            settings["guidance_scale"] = options.guidance_scale
        if is_cancelled() or self._stopped:
            raise EngineDead("the engine was closed")
        try:
            found = self._pipeline(order.prompt, width=order.width, height=order.height, **settings).images[0]
        except torch.cuda.OutOfMemoryError as error:
            raise OutOfMemory("the device has no memory left for this image") from error
        except Exception as error:  # whatever it was, this image fails, not the engine
            raise EngineFailed(f"the model failed on this image: {type(error).__name__}") from error
        file = io.BytesIO()
        found.save(file, "PNG")
        return file.getvalue()

    async def close(self) -> None:
        """End the image that is made with its current step."""
        self._stopped = True
        self._thread.shutdown(wait=False, cancel_futures=True)


def create(config: EngineConfig) -> ImageEngine:
    """Return the engine. Raises ValueError for an unknown or bad option."""
    options = DiffusersOptions.model_validate(dict(config.options))
    return ImageEngine(DiffusersPainter(config.model_path, options), config, options)
