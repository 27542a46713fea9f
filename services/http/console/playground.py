"""The playground: a form that submits a job."""

import hashlib
import re
import secrets
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any, Final

import grpc
from google.protobuf.message import Message
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from durable_llm import ApiError
from durable_llm.errors import Violation
from jobs.classes import NAMES
from llm_pb import common_pb2, llm_pb2
from services.http.bodies import query_of
from services.http.console.caller import caller_of, check_token
from services.http.console.formats import as_path
from services.http.console.forms import read_fields
from services.http.console.optional import Part, ask, shown_quota
from services.http.console.pages import Pages
from services.http.console.used_again import NUMBERS, UsedAgain, use_again
from services.http.failures import Failure, bad_request, of_call, with_fields
from services.http.front import Front
from services.http.gateway import Calls
from services.http.parsing import parse
from services.http.signin.next_page import sign_in_path

_TEXTS: Final = ("user_id", "model", "system", "text", "kind", "project_id", "job_class", "stop")
_CLASSES: Final = {
    "" if number == common_pb2.JOB_CLASS_STANDARD else common_pb2.JobClass.Name(number): name.capitalize()
    for number, name in NAMES.items()
}
"""The classes in words, by the value of the form. A job of the default class names none."""
_MAX_LINES: Final = 100
_NONCE: Final = re.compile("[0-9a-f]{12}")
_FIRST: Final = {"kind": "prompt", "max_tokens": "200"}


class Playground:
    """The handlers."""

    def __init__(self, front: Front, pages: Pages) -> None:
        self._front = front
        self._pages = pages

    async def show(self, request: Request) -> Response:
        """Show the form: empty, or with the job that the query names."""
        workflow_id = query_of(request, ("job", "model", "form")).get("job", [""])[0]
        calls = self._front.gateway.in_name_of(caller_of(request))
        if not workflow_id:
            form = {**_FIRST, "model": request.query_params.get("model", "")}
            return await self._render(request, calls, form)
        found = await calls.call("GetJob", llm_pb2.GetJobRequest(workflow_id=workflow_id))
        again = use_again(found.job)
        return await self._render(request, calls, again.form, again=again)

    async def submit(self, request: Request) -> Response:
        """Submit the job of a form and redirect to its page.

        After an error, also when the session has ended, the page shows the filled form again, so that no text is lost.
        """
        form = await read_fields(request, self._front.settings, "nonce", *NUMBERS, *_TEXTS)
        calls = self._front.gateway.in_name_of(caller_of(request))
        try:
            check_token(request, form)
        except Failure as wrong:
            stale = Failure(wrong.status, "the session of this form has ended; submit it once more", wrong.reason)
            return await self._render(request, calls, form, stale)
        try:
            job = _job_of(form)
            submitted = await calls.call("Submit", llm_pb2.SubmitRequest(job=job))
        except Failure as wrong:
            failure = wrong
        except ApiError as error:
            failure = with_fields(of_call(error), lambda field: field.removeprefix("job."))
        else:
            if await _may_read(calls, submitted.workflow_id):
                return RedirectResponse(f"/console/jobs/{as_path(submitted.workflow_id)}", HTTPStatus.SEE_OTHER)
            return await self._render(request, calls, {**form, "nonce": ""}, submitted=submitted.workflow_id)
        return await self._render(request, calls, form, failure)

    async def _render(
        self,
        request: Request,
        calls: Calls,
        form: Mapping[str, str],
        failure: Failure | None = None,
        again: UsedAgain | None = None,
        submitted: str = "",
    ) -> Response:
        nonce = request.query_params.get("form", "")
        if not _NONCE.fullmatch(nonce):
            nonce = ""
        models: Sequence[llm_pb2.ModelInfo] = ()
        hidden = False
        try:
            models = (await calls.call("ListModels", llm_pb2.ListModelsRequest())).models
        except ApiError as error:
            hidden = error.code is grpc.StatusCode.PERMISSION_DENIED
            if failure is None and not hidden:
                raise
            if error.code is grpc.StatusCode.UNAUTHENTICATED:
                failure = of_call(error)
        signed_out = failure is not None and failure.status == HTTPStatus.UNAUTHORIZED
        quota = Part(None) if signed_out else await ask(calls, "GetQuota", llm_pb2.GetQuotaRequest())
        if not form.get("user_id") and request.method == "GET":
            bound_user = quota.bound_user if quota.answer is None else quota.answer.user_id
            form = {**form, "user_id": bound_user or "console"}
        page = self._pages.render(
            request,
            "playground.html",
            HTTPStatus.OK if failure is None else failure.status,
            form={name: form.get(name, "") for name in (*NUMBERS, *_TEXTS)},
            nonce=form.get("nonce") or nonce or secrets.token_hex(6),
            # Going back does not load the answer to a form.
            kept=request.method == "GET",
            models=models,
            classes=_CLASSES,
            failure=failure,
            wrong=_by_field(failure),
            again=again,
            signed_out=signed_out,
            sign_in=sign_in_path(request.url.path),
            quota=shown_quota(quota),
            models_hidden=hidden,
            submitted=submitted,
        )
        page.headers.update(failure.headers if failure is not None else {})
        return page


async def _may_read(calls: Calls, workflow_id: str) -> bool:
    """Return whether the caller may see the page of a job. A key may be for submitting alone."""
    try:
        await calls.call("GetStatus", llm_pb2.GetStatusRequest(workflow_id=workflow_id))
    except ApiError as error:
        return error.code is not grpc.StatusCode.PERMISSION_DENIED
    return True


def _job_of(form: dict[str, str]) -> llm_pb2.JobRequest:
    """Return the job of a form. Raises Failure, 400."""
    value: dict[str, Any] = {name: form.get(name, "").strip() for name in ("user_id", "model", "project_id")}
    if form.get("job_class"):
        value["job_class"] = form["job_class"]
    value["params"] = {name: form[name].strip() for name in NUMBERS if form.get(name, "").strip()}
    if form.get("stop"):
        # Building a message of very many lines would take seconds before it is refused.
        stop = form["stop"].split("\n", _MAX_LINES)
        if len(stop) > _MAX_LINES:
            raise bad_request(Violation("params.stop", f"must have at most {_MAX_LINES} lines"))
        value["params"]["stop"] = [line for line in stop if line]
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
    # A form that is sent twice starts one job. One that was changed in between starts another.
    digest = hashlib.sha256(_bytes(job)).hexdigest()[:12]
    job.request_id = f"play-{form.get('nonce') or secrets.token_hex(6)}-{digest}"
    return job


def _bytes(message: Message) -> bytes:
    return message.SerializeToString(deterministic=True)


def _by_field(failure: Failure | None) -> dict[str, str]:
    """Return what is wrong by the field of the form."""
    wrong: dict[str, str] = {}
    for field, words in failure.violations if failure is not None else ():
        top = field.removeprefix("params.").partition("[")[0]
        name = "text" if top in ("prompt", "messages") else top
        wrong.setdefault(name, words)
    return wrong
