"""A gateway as a gRPC server: reflection, health, listening, shutdown, and its roles as two processes."""

import asyncio
import signal
import time
from collections.abc import AsyncIterator
from datetime import timedelta

import grpc
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from temporalio.api.enums.v1 import TaskQueueType
from temporalio.api.taskqueue.v1 import TaskQueue
from temporalio.api.workflowservice.v1 import DescribeTaskQueueRequest
from temporalio.client import Client

from deploy.local.ports import free_port
from deploy.local.stack import Stack
from jobs import names
from llm_pb import llm_pb2
from llm_pb.llm_pb2_grpc import LlmServiceStub
from runtime.grpc_server import GrpcServer, Limits
from tests.support.attacks import GOAWAY, PING, PREFACE, RST_STREAM, SETTINGS, call_frames, frame, read_frame
from tests.support.jobs import Seen, details_of, new_job, watch
from tests.support.stacks import FAST, stack_settings

PATIENCE = 32
"""Seconds that a call waits. They exceed the 30 s after which gRPC by default cancels a call that is not accepted."""
REFLECTIONS = ("v1.ServerReflection/ServerReflectionInfo", "v1alpha.ServerReflection/ServerReflectionInfo")
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def reflect(
    address: str, request: reflection_pb2.ServerReflectionRequest
) -> reflection_pb2.ServerReflectionResponse:
    async with grpc.aio.insecure_channel(address) as channel:
        call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([request]))
        return await call.read()


async def test_reflection_lists_the_services(stack: Stack) -> None:
    """A client without a proto file finds them."""
    answer = await reflect(stack.address("gateway"), reflection_pb2.ServerReflectionRequest(list_services=""))
    assert {service.name for service in answer.list_services_response.service} == {
        "llm.v1.LlmService",
        "llm.v1.FileService",
        "llm.v1.ScheduleService",
        "llm.v1.BatchService",
        "llm.v1.PipelineService",
        "grpc.health.v1.Health",
        "grpc.reflection.v1.ServerReflection",
        "grpc.reflection.v1alpha.ServerReflection",
    }


async def test_reflection_describes_every_service_that_it_lists(stack: Stack) -> None:
    """It describes reflection itself in both versions as well, because grpcurl asks for each."""
    address = stack.address("gateway")
    services = (await reflect(address, reflection_pb2.ServerReflectionRequest(list_services=""))).list_services_response
    for service in services.service:
        request = reflection_pb2.ServerReflectionRequest(file_containing_symbol=service.name)
        answer = (await reflect(address, request)).file_descriptor_response
        files = [FileDescriptorProto.FromString(data) for data in answer.file_descriptor_proto]
        assert service.name in {f"{file.package}.{described.name}" for file in files for described in file.service}


async def test_reflection_gives_the_whole_contract(stack: Stack) -> None:
    """llm.proto comes with all files that it imports, so that a client can build it from the response alone."""
    request = reflection_pb2.ServerReflectionRequest(file_containing_symbol="llm.v1.LlmService")
    answer = await reflect(stack.address("gateway"), request)
    files = [FileDescriptorProto.FromString(data) for data in answer.file_descriptor_response.file_descriptor_proto]
    assert "google/rpc/status.proto" in {file.name for file in files}
    pool = DescriptorPool()
    while files:
        known = [file for file in files if all(_in(pool, name) for name in file.dependency)]
        assert known, f"the imports of {[file.name for file in files]} are missing"
        for file in known:
            pool.Add(file)
            files.remove(file)
    methods = pool.FindServiceByName("llm.v1.LlmService").methods_by_name
    assert methods.keys() == llm_pb2.DESCRIPTOR.services_by_name["LlmService"].methods_by_name.keys()
    error = pool.FindMessageTypeByName("llm.v1.JobStatus").fields_by_name["error"]
    assert error.message_type == pool.FindMessageTypeByName("google.rpc.Status")


async def test_health_is_told_for_the_server_and_the_service(stack: Stack) -> None:
    """grpc.health.v1 serves both names and no other."""
    async with grpc.aio.insecure_channel(stack.address("gateway")) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        for service in ("", "llm.v1.LlmService", "llm.v1.FileService"):
            assert (await check(health_pb2.HealthCheckRequest(service=service))).status == SERVING
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await check(health_pb2.HealthCheckRequest(service="other"))
        assert error.value.code() == grpc.StatusCode.NOT_FOUND


async def test_health_lists_all_that_it_knows(stack: Stack) -> None:
    """The library itself would answer this method with a traceback."""
    async with grpc.aio.insecure_channel(stack.address("gateway")) as channel:
        answer = await health_pb2_grpc.HealthStub(channel).List(health_pb2.HealthListRequest())
    kinds = ("Llm", "File", "Schedule", "Batch", "Pipeline")
    assert answer.statuses.keys() == {"", *(f"llm.v1.{kind}Service" for kind in kinds)}
    assert all(state.status == SERVING for state in answer.statuses.values())


@pytest.mark.parametrize("method", ["v1.Health/Check", "v1.Health/Watch", *REFLECTIONS])
@pytest.mark.parametrize("data", [b"\xff\xff", b"\x0a\x7f", b"\x0a\x02\xc3\x28", b"\x0a\x03" * 50_000])
async def test_garbage_to_health_and_reflection_is_the_clients_fault(stack: Stack, method: str, data: bytes) -> None:
    """The answer is INVALID_ARGUMENT, and the log has no error, because the server has no fault."""
    gateway = stack.processes["gateway"]
    log = len(gateway.log)
    async with grpc.aio.insecure_channel(stack.address("gateway")) as channel:
        call = channel.stream_stream(f"/grpc.{'health' if 'Health' in method else 'reflection'}.{method}")()
        await call.write(data)
        if "Health" in method:
            await call.done_writing()
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await call.read()
    assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    details = details_of(error.value)
    assert details["ErrorInfo"].reason == "INVALID_REQUEST"
    assert details["BadRequest"].field_violations[0].description == error.value.details()
    assert "ERROR" not in gateway.log[log:]


async def test_a_wave_of_calls_is_answered_to_the_last(stack: Stack) -> None:
    """When a gateway comes back, all watchers call. By default gRPC cancels some of over 1,000 waiting calls."""
    own = [("grpc.use_local_subchannel_pool", 1)]
    channels = [grpc.aio.insecure_channel(stack.address("gateway"), options=own) for _ in range(30)]
    calls = [
        health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        for channel in channels
        for _ in range(100)
    ]
    answers = await asyncio.gather(*calls, return_exceptions=True)
    assert [answer for answer in answers if isinstance(answer, BaseException)] == []
    for channel in channels:
        await channel.close()


async def test_a_call_that_has_to_wait_for_long_is_answered() -> None:
    """By default gRPC returns CANCELLED after 30 s on a busy server, which clients do not retry."""
    server = GrpcServer(["test"], "127.0.0.1", port := free_port(), Limits(4 << 20))
    await server.start()

    def check() -> int:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            return int(health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest()).status)

    # gRPC accepts the first call immediately, so several are needed.
    calling = [asyncio.create_task(asyncio.to_thread(check)) for _ in range(3)]
    # The threads start, and then the event loop is blocked.
    await asyncio.sleep(0)
    time.sleep(PATIENCE)  # noqa: ASYNC251
    assert await asyncio.gather(*calling) == [NOT_SERVING] * 3
    await server.stop(timedelta(0))


NO_WINDOW = (4).to_bytes(2, "big") + (0).to_bytes(4, "big")
"""Settings of a client with a window of 0, to which no data may be sent."""
CANCEL = (8).to_bytes(4, "big")


async def pinged(address: str, pings: int, pause: float) -> list[bytes]:
    """Send pings `pause` seconds apart without a call. Return the answers, and the reason of a GOAWAY as the last."""
    reader, writer = await asyncio.open_connection(*address.rsplit(":", 1))
    writer.write(PREFACE + frame(SETTINGS))
    answers: list[bytes] = []
    for number in range(pings):
        writer.write(frame(PING, number.to_bytes(8, "big")))
        while True:
            kind, flags, _, payload = await read_frame(reader)
            if kind == GOAWAY:
                writer.close()
                return [*answers, payload[8:]]
            if kind == PING and flags == 1:
                answers.append(payload)
                break
        await asyncio.sleep(pause)
    writer.close()
    return answers


async def test_a_client_that_leaves_with_its_answer_unread_is_no_error(stack: Stack) -> None:
    """gRPC reports an error when the answer fails before the cancel arrives. The log has a line without a traceback."""
    gateway = stack.add("gateway")
    await gateway.start()
    await gateway.wait_ready()
    methods = ("llm.v1.LlmService/ListModels", "grpc.health.v1.Health/Check", "grpc.health.v1.Health/Watch")
    streams = {1 + 2 * number: methods[number % 3] for number in range(60)}
    pause = 0.0
    async with asyncio.timeout(60):
        while "ExecuteBatchError" not in gateway.log:
            reader, writer = await asyncio.open_connection(*stack.address(gateway.name).rsplit(":", 1))
            calls = (call_frames(stream, f"/{method}", b"") for stream, method in streams.items())
            writer.write(PREFACE + frame(SETTINGS, NO_WINDOW) + b"".join(calls))
            await writer.drain()
            # A client without a window is not notified of its answer, so each round waits longer before it leaves.
            pause += 0.1
            await asyncio.sleep(pause)
            writer.write(b"".join(frame(RST_STREAM, CANCEL, 0, stream) for stream in streams) + frame(PING, bytes(8)))
            while (await read_frame(reader))[:2] != (PING, 1):
                pass
            writer.close()
    assert await _serves(stack.address(gateway.name))
    await gateway.terminate()
    assert "Traceback" not in gateway.log
    assert "ERROR" not in gateway.log


async def test_a_client_may_ping_a_quiet_connection(stack: Stack) -> None:
    """It may ping for ever at GATEWAY_PING_INTERVAL. More frequent pings get a GOAWAY."""
    gateway = stack.add("gateway", {"GATEWAY_PING_INTERVAL": "PT0.2S"})
    await gateway.start()
    await gateway.wait_ready()
    address = stack.address(gateway.name)
    async with asyncio.timeout(60):
        # The test is about these pauses. gRPC closes the connection at the third ping that comes too early.
        assert await pinged(address, 8, 0.22) == [number.to_bytes(8, "big") for number in range(8)]
        assert (await pinged(address, 8, 0))[-1] == b"too_many_pings"
    await gateway.terminate()


async def test_only_this_machine_can_call_unless_told_otherwise(stack: Stack) -> None:
    """Without GATEWAY_HOST the gateway listens only on the loopback address."""
    gateway = stack.add("gateway")
    del gateway.environment["GATEWAY_HOST"]
    await gateway.start()
    await gateway.wait_ready()
    port = int(gateway.environment["GATEWAY_PORT"])
    assert f"listening on 127.0.0.1:{port}" in gateway.log
    with pytest.raises(OSError, match=str(port)):
        await asyncio.open_connection("127.0.0.2", port)
    await gateway.terminate()
    assert gateway.returncode == 0


async def test_a_port_that_is_taken_ends_the_gateway(stack: Stack) -> None:
    """The error names the address and the setting that changes it."""
    taken = stack.address("gateway")
    gateway = stack.add("gateway", {"GATEWAY_PORT": taken.rpartition(":")[2]})
    await gateway.start()
    assert await gateway.wait() == 1
    assert f"cannot listen on {taken}" in gateway.log
    assert "GATEWAY_PORT" in gateway.log


async def test_sigterm_hands_the_watchers_over(stack: Stack, stub: LlmServiceStub) -> None:
    """Health returns NOT_SERVING, streams end with UNAVAILABLE, and the process exits with status 0.

    The client loses nothing: it continues at another gateway with the next_offset that it had.
    """
    gateway = stack.add("gateway")
    await gateway.start()
    await gateway.wait_ready()
    seen = Seen()
    async with grpc.aio.insecure_channel(stack.address(gateway.name)) as channel:
        leaving = LlmServiceStub(channel)
        response = await leaving.Submit(llm_pb2.SubmitRequest(job=new_job(params={"max_tokens": 400})))
        health = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service="llm.v1.LlmService"))
        assert (await health.read()).status == SERVING
        request = llm_pb2.StreamStatusRequest(workflow_id=response.workflow_id)
        messages: AsyncIterator[llm_pb2.StreamStatusResponse] = aiter(leaving.StreamStatus(request))
        while not seen.output:
            seen.add(await anext(messages))
        asked = time.monotonic()
        gateway.signal(signal.SIGTERM)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await _read_on(messages, seen)
        assert error.value.code() == grpc.StatusCode.UNAVAILABLE
        details = details_of(error.value)
        assert details["ErrorInfo"].reason == "GATEWAY_SHUTDOWN"
        assert details["RetryInfo"].retry_delay.seconds > 0
        assert (await health.read()).status == NOT_SERVING
        assert await gateway.wait() == 0
        # The open call of health uses up GATEWAY_SHUTDOWN_GRACE, 2 s. The rest is the time of the process's exit.
        assert time.monotonic() - asked < 40

    request = llm_pb2.StreamStatusRequest(workflow_id=response.workflow_id, output_offset=seen.next_offset)
    async for message in stub.StreamStatus(request, timeout=60):
        seen.add(message)
    assert seen.states[-1] == "SUCCEEDED"
    assert seen.output == seen.final.result.output.encode()


async def test_the_two_halves_run_as_two_processes(tmp_path_factory: pytest.TempPathFactory) -> None:
    """GATEWAY_ROLE=api serves calls and runs no workflow. GATEWAY_ROLE=workflows runs workflows and does not listen."""
    environment = {**FAST, "gateway": {**FAST["gateway"], "GATEWAY_ROLE": "api"}}
    only = ("temporal", "nats", "gateway", "gpu-worker", "notifier")
    settings = stack_settings(tmp_path_factory.mktemp("halves"))
    async with (
        Stack(settings, only=only, environment=environment) as stack,
        grpc.aio.insecure_channel(stack.address("gateway")) as channel,
    ):
        stub = LlmServiceStub(channel)
        response = await stub.Submit(llm_pb2.SubmitRequest(job=new_job(params={"max_tokens": 5})))
        assert await _workflow_pollers(stack) == 0
        workflows = stack.add("gateway", {"GATEWAY_ROLE": "workflows"})
        await workflows.start()
        seen = await watch(stub, response.workflow_id)
        assert seen.states[-1] == "SUCCEEDED"
        assert await _workflow_pollers(stack) == 1
        with pytest.raises(OSError, match="Connect call failed"):
            await asyncio.open_connection("127.0.0.1", int(workflows.environment["GATEWAY_PORT"]))
        await workflows.terminate()
        assert workflows.returncode == 0
        # The job's outcome is known without running its workflow.
        told = await stub.GetStatus(llm_pb2.GetStatusRequest(workflow_id=response.workflow_id), timeout=60)
        assert (told.status, told.result) == (seen.final.status, seen.final.result)


async def _read_on(messages: AsyncIterator[llm_pb2.StreamStatusResponse], seen: Seen) -> None:
    async for message in messages:
        seen.add(message)


async def _workflow_pollers(stack: Stack) -> int:
    temporal = await Client.connect(stack.address("temporal"))
    queue = await temporal.workflow_service.describe_task_queue(
        DescribeTaskQueueRequest(
            namespace=temporal.namespace,
            task_queue=TaskQueue(name=names.WORKFLOW_QUEUE),
            task_queue_type=TaskQueueType.TASK_QUEUE_TYPE_WORKFLOW,
        )
    )
    return len({poller.identity for poller in queue.pollers})


def _in(pool: DescriptorPool, name: str) -> bool:
    try:
        pool.FindFileByName(name)
    except KeyError:
        return False
    return True


async def _serves(address: str) -> bool:
    async with grpc.aio.insecure_channel(address) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        return bool((await check(health_pb2.HealthCheckRequest())).status == SERVING)
