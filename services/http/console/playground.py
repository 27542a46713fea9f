"""The playground: a form that submits a job."""

import hashlib
import secrets
from http import HTTPStatus
from typing import Any, Final

from google.protobuf.message import Message
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from durable_llm import ApiError
from durable_llm.errors import Violation
from llm_pb import llm_pb2
from services.http.bodies import query_of
from services.http.console.caller import caller_of
from services.http.console.formats import as_path
from services.http.console.forms import read_form
from services.http.console.optional import quota_of
from services.http.console.pages import Pages
from services.http.failures import Failure, bad_request, of_call, with_fields
from services.http.front import Front
from services.http.gateway import Calls
from services.http.parsing import parse

_NUMBERS: Final = ("temperature", "top_p", "top_k", "max_tokens", "seed")
_TEXTS: Final = ("user_id", "model", "system", "text", "kind", "project_id", "stop")
_FIRST: Final = {"user_id": "console", "kind": "prompt", "max_tokens": "200"}


class Playground:
    """The handlers."""

    def __init__(self, front: Front, pages: Pages) -> None:
        self._front = front
        self._pages = pages

    async def show(self, request: Request) -> Response:
        """Show the form: empty, or with the job that the query names."""
        workflow_id = query_of(request, ("job", "model")).get("job", [""])[0]
        calls = self._front.gateway.in_name_of(caller_of(request))
        form = {**_FIRST, "model": request.query_params.get("model", "")}
        if workflow_id:
            found = await calls.call("GetJob", llm_pb2.GetJobRequest(workflow_id=workflow_id))
            form |= _form_of(found.job)
        return await self._render(request, calls, form)

    async def submit(self, request: Request) -> Response:
        """Submit the job of a form, and lead to its page. What is refused stands beside the form."""
        form = await read_form(request, self._front.settings)
        calls = self._front.gateway.in_name_of(caller_of(request))
        try:
            job = _job_of(form)
            submitted = await calls.call("Submit", llm_pb2.SubmitRequest(job=job))
        except Failure as wrong:
            failure = wrong
        except ApiError as error:
            failure = with_fields(of_call(error), lambda field: field.removeprefix("job."))
        else:
            return RedirectResponse(f"/console/jobs/{as_path(submitted.workflow_id)}", HTTPStatus.SEE_OTHER)
        if failure.status == HTTPStatus.UNAUTHORIZED:
            raise failure
        return await self._render(request, calls, form, failure)

    async def _render(
        self, request: Request, calls: Calls, form: dict[str, str], failure: Failure | None = None
    ) -> Response:
        models = (await calls.call("ListModels", llm_pb2.ListModelsRequest())).models
        page = self._pages.render(
            request,
            "playground.html",
            HTTPStatus.OK if failure is None else failure.status,
            form={name: form.get(name, "") for name in (*_NUMBERS, *_TEXTS)},
            nonce=form.get("nonce") or secrets.token_hex(6),
            models=models,
            failure=failure,
            wrong=_by_field(failure),
            quota=await quota_of(calls),
        )
        page.headers.update(failure.headers if failure is not None else {})
        return page


def _job_of(form: dict[str, str]) -> llm_pb2.JobRequest:
    """Return the job of a form. Raises Failure, 400."""
    value: dict[str, Any] = {name: form.get(name, "").strip() for name in ("user_id", "model", "project_id")}
    value["params"] = {name: form[name].strip() for name in _NUMBERS if form.get(name, "").strip()}
    if form.get("stop"):
        value["params"]["stop"] = [line for line in form["stop"].split("\n") if line]
    text, system = form.get("text", ""), form.get("system", "")
    if form.get("kind") == "chat":
        value["messages"] = [
            *([{"role": "ROLE_SYSTEM", "content": system}] if system.strip() else []),
            {"role": "ROLE_USER", "content": text},
        ]
    elif not text:
        raise bad_request(Violation("prompt", "must be set"))
    else:
        value["prompt"] = text
    job = parse(value, llm_pb2.JobRequest())
    # A form that is sent twice makes one job, and one that was changed after going back another one.
    digest = hashlib.sha256(_bytes(job)).hexdigest()[:12]
    job.request_id = f"play-{form.get('nonce') or secrets.token_hex(6)}-{digest}"
    return job


def _bytes(message: Message) -> bytes:
    return message.SerializeToString(deterministic=True)


def _form_of(job: llm_pb2.JobRequest) -> dict[str, str]:
    form = {"user_id": job.user_id, "model": job.model, "project_id": job.project_id, "text": job.prompt}
    for message in job.messages:
        form["system" if message.role == llm_pb2.ROLE_SYSTEM else "text"] = message.content
    form["kind"] = "chat" if job.messages else "prompt"
    form |= {name: f"{getattr(job.params, name):g}" for name in ("temperature", "top_p") if job.params.HasField(name)}
    form |= {name: str(getattr(job.params, name)) for name in _NUMBERS[2:] if job.params.HasField(name)}
    form["stop"] = "\n".join(job.params.stop)
    return form


def _by_field(failure: Failure | None) -> dict[str, str]:
    """Return what is wrong by the field of the form."""
    wrong: dict[str, str] = {}
    for field, words in failure.violations if failure is not None else ():
        top = field.removeprefix("params.").partition("[")[0]
        name = "text" if top in ("prompt", "messages") else top
        wrong.setdefault(name, words)
    return wrong
