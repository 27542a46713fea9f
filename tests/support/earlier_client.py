"""Client with the stubs of another checkout, the first folder of PYTHONPATH. It prints one JSON object.

    PYTHONPATH=checkout python tests/support/earlier_client.py call ADDRESS METHOD REQUEST_TYPE REQUEST_BASE64
    PYTHONPATH=checkout python tests/support/earlier_client.py watch ADDRESS WORKFLOW_ID LEAVE_AFTER

`watch` reconnects with the offset after every LEAVE_AFTER messages (0: never) and whenever the gateway is unavailable.
It has its own loop, because an earlier checkout has neither durable_llm nor resume tokens.
"""

import asyncio
import base64
import json
import os
import sys
from pathlib import Path
from typing import Any

import grpc

import llm_pb
from llm_pb import llm_pb2
from llm_pb.llm_pb2_grpc import LlmServiceStub

SECONDS = 300
assert Path(llm_pb.__path__[0]).is_relative_to(os.environ["PYTHONPATH"])


async def call(stub: LlmServiceStub, method: str, request_type: str, data: str) -> dict[str, Any]:
    request = getattr(llm_pb2, request_type).FromString(base64.b64decode(data))
    answer = await getattr(stub, method)(request, timeout=SECONDS)
    return {"answer": base64.b64encode(answer.SerializeToString()).decode()}


async def watch(stub: LlmServiceStub, id_: str, leave_after: str) -> dict[str, Any]:
    output, rewinds, message = b"", 0, llm_pb2.StreamStatusResponse()
    while not message.HasField("result"):
        request = llm_pb2.StreamStatusRequest(workflow_id=id_, output_offset=message.next_offset)
        stream = stub.StreamStatus(request, timeout=SECONDS)
        count = 0
        try:
            async for message in stream:
                if message.HasField("delta"):
                    assert message.delta.offset <= len(output), "a gap"
                    rewinds += message.delta.rewind
                    output = output[: message.delta.offset] + message.delta.text.encode()
                count += 1
                if count == int(leave_after):
                    break
        except grpc.aio.AioRpcError as error:
            if error.code() != grpc.StatusCode.UNAVAILABLE:
                raise
            await asyncio.sleep(0.2)
        stream.cancel()
    return {
        "output": output.decode(),
        "result": message.result.output,
        "rewinds": rewinds,
        "state": llm_pb2.JobState.Name(message.status.state).removeprefix("JOB_STATE_"),
    }


async def main(what: str, address: str, *arguments: str) -> None:
    async with grpc.aio.insecure_channel(address) as channel:
        stub = LlmServiceStub(channel)
        answer = await (call(stub, *arguments) if what == "call" else watch(stub, *arguments))
    sys.stdout.write(json.dumps(answer))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
