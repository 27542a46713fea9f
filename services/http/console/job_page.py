"""The page of a job, and the forms on it."""

import asyncio
from contextlib import suppress
from http import HTTPStatus
from typing import Final

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from durable_llm import ApiError
from durable_llm._enums import name_of
from llm_pb import llm_pb2
from services.http.bodies import query_of
from services.http.console.caller import caller_of
from services.http.console.formats import as_path, words_of
from services.http.console.forms import read_form
from services.http.console.item_page import ItemPage, id_of
from services.http.console.job_view import FINAL, JobView, problem_of
from services.http.console.optional import ask
from services.http.console.snippets import base_of, snippets
from services.http.large_outputs import beginning, download
from services.http.rest.stream import PARAMETER, stream_to

_SHOWN_BYTES: Final = 64 * 1024
"""Maximum number of characters that the page shows of an output that is a file."""


class JobPage(ItemPage):
    """The handlers."""

    place = "/console/jobs"

    async def events(self, request: Request) -> Response:
        """Answer with the stream of a job, for an EventSource."""
        return await stream_to(self._calls(request), self._front, request, query_of(request, (PARAMETER,)))

    async def output(self, request: Request) -> Response:
        """Answer with the output of a job as a text."""
        return await download(self._calls(request), self._front, request)

    async def cancel(self, request: Request) -> Response:
        """Request that a job stops."""
        form = await read_form(request, self._front.settings, "reason")
        message = llm_pb2.CancelRequest(workflow_id=id_of(request), reason=form.get("reason", "").strip())
        return await self._do(request, "Cancel", message)

    async def redeliver(self, request: Request) -> Response:
        """Send the outcome of a job again."""
        form = await read_form(request, self._front.settings, "delivery_id")
        ids = [form["delivery_id"]] if form.get("delivery_id") else []
        return await self._do(
            request, "Redeliver", llm_pb2.RedeliverRequest(workflow_id=id_of(request), delivery_ids=ids)
        )

    async def confirm(self, request: Request) -> Response:
        """Show the form that confirms the deletion of a job."""
        message = llm_pb2.GetStatusRequest(workflow_id=id_of(request))
        found = await self._calls(request).call("GetStatus", message)
        return self._pages.render(request, "delete.html", status=found.status)

    async def delete(self, request: Request) -> Response:
        """Delete a job and show the progress of its deletion."""
        await read_form(request, self._front.settings)
        message = llm_pb2.DeleteJobRequest(workflow_id=id_of(request))
        found = await self._calls(request).call("DeleteJob", message)
        path = f"/console/deletions/{as_path(found.deletion.deletion_id)}"
        return RedirectResponse(path, HTTPStatus.SEE_OTHER)

    async def deletion(self, request: Request) -> Response:
        """Show the progress of a deletion."""
        message = llm_pb2.GetDeletionRequest(deletion_id=id_of(request))
        deletion = (await self._calls(request).call("GetDeletion", message)).deletion
        words = words_of(llm_pb2.DeletionState, deletion.state, "DELETION_STATE_")
        parts = [words_of(llm_pb2.JobPart, part, "JOB_PART_").lower() for part in deletion.removed]
        return self._pages.render(request, "deletion.html", deletion=deletion, words=words, parts=parts)

    async def _show(self, request: Request, refused: str = "", status: HTTPStatus = HTTPStatus.OK) -> Response:
        workflow_id, calls = id_of(request), self._calls(request)
        found, listed = await asyncio.gather(
            calls.call("GetJob", llm_pb2.GetJobRequest(workflow_id=workflow_id)),
            ask(calls, "ListDeliveries", llm_pb2.ListDeliveriesRequest(workflow_id=workflow_id)),
        )
        deliveries = listed.answer.deliveries if listed.answer is not None else ()
        settings = self._front.settings
        if found.result.HasField("output_file") and found.status.state in FINAL:
            # The rest of the page is worth showing without it.
            with suppress(ApiError):
                found.result.output = (await beginning(calls, workflow_id, _SHOWN_BYTES))[:_SHOWN_BYTES]
        job = JobView(found, settings)
        return self._pages.render(
            request,
            "job.html",
            status,
            job=job,
            refused=refused,
            state_name=name_of(llm_pb2.JobState, found.status.state),
            finish=words_of(llm_pb2.FinishReason, found.result.finish_reason, "FINISH_REASON_").lower(),
            no_deliveries=listed.problem,
            deliveries=[
                (
                    delivery,
                    words_of(llm_pb2.NotifyState, delivery.state, "NOTIFY_STATE_"),
                    [
                        (attempt, problem_of(attempt.error) if attempt.HasField("error") else None)
                        for attempt in delivery.attempts
                    ],
                )
                for delivery in deliveries
            ],
            pending=any(delivery.state == llm_pb2.NOTIFY_STATE_PENDING for delivery in deliveries),
            snippets=snippets(
                found.job,
                base_of(request),
                settings.gateway,
                tls=settings.gateway_tls is not None,
                credential=bool(caller_of(request)),
            ),
            roles={
                value.number: value.name.removeprefix("ROLE_").capitalize() for value in llm_pb2.Role.DESCRIPTOR.values
            },
            options=[(field.name, _option(value)) for field, value in found.job.params.ListFields()],
        )


def _option(value: object) -> str:
    if isinstance(value, llm_pb2.Choice):
        return ", ".join(map(repr, value.options))
    if isinstance(value, str | int | float):
        return str(value)
    return ", ".join(map(repr, value))  # type: ignore[call-overload]  # a repeated field
