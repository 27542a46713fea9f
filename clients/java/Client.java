// A client of LlmService that knows the code generated from proto/llm.proto and nothing else of this repository.
//
//   java Client submit '{"user_id": "u", "request_id": "r", "model": "docstrings", "prompt": "def f("}'
//   java Client watch llmjob-u-r [resume_token]
//   java Client cancel llmjob-u-r [reason]
//
// The gateway is at LLM_ADDRESS, by default 127.0.0.1:50051. Results go to stdout, the job's states to stderr.
import com.google.protobuf.Any;
import com.google.protobuf.InvalidProtocolBufferException;
import com.google.protobuf.util.Durations;
import com.google.protobuf.util.JsonFormat;
import com.google.rpc.RetryInfo;
import io.grpc.ManagedChannelBuilder;
import io.grpc.Status;
import io.grpc.StatusRuntimeException;
import io.grpc.protobuf.StatusProto;
import java.io.PrintStream;
import java.nio.charset.StandardCharsets;
import java.util.Iterator;
import java.util.concurrent.TimeUnit;
import llm.v1.*;
import llm.v1.LlmServiceGrpc.LlmServiceBlockingStub;

public class Client {
  // How often in a row a watch may fail: less often as long as no gateway has answered, for the address may be wrong.
  static final int TRIES = 60, FIRST_TRIES = 5;
  static final PrintStream OUT = new PrintStream(System.out, true, StandardCharsets.UTF_8);

  static String setting(String name, String otherwise) {
    return System.getenv().getOrDefault(name, otherwise);
  }

  // Returns the stub with a time limit in seconds.
  static LlmServiceBlockingStub limited(LlmServiceBlockingStub stub, String name, String otherwise) {
    return stub.withDeadlineAfter((long) (Double.parseDouble(setting(name, otherwise)) * 1000), TimeUnit.MILLISECONDS);
  }

  static boolean isFinal(JobState state) {
    return state.getNumber() >= JobState.JOB_STATE_SUCCEEDED_VALUE;
  }

  // Returns the milliseconds until the next try after an error. Throws an error that does not pass by itself.
  static long retryDelay(StatusRuntimeException error) throws InvalidProtocolBufferException {
    com.google.rpc.Status status = StatusProto.fromThrowable(error);
    for (Any detail : status.getDetailsList()) {
      if (detail.is(RetryInfo.class)) return Durations.toMillis(detail.unpack(RetryInfo.class).getRetryDelay());
    }
    switch (error.getStatus().getCode()) {
      case UNAVAILABLE:
      case CANCELLED:
      case DEADLINE_EXCEEDED:
        return 1000;
      case INTERNAL:
      case UNKNOWN:
        // Without details it is a stream that a proxy has reset.
        if (status.getDetailsCount() == 0) return 1000;
      default:
        throw error;
    }
  }

  // Prints the job's output and states to its end, and returns the last status. A stream that breaks is opened again
  // where it broke, so that every byte of the output is printed once.
  static JobStatus watch(LlmServiceBlockingStub stub, String id, String token) throws Exception {
    long offset = 0;
    JobState state = JobState.JOB_STATE_UNSPECIFIED;
    int failures = 0, tries = FIRST_TRIES;
    for (; ; ) {
      boolean answered = false;
      try {
        StreamStatusRequest request = StreamStatusRequest.newBuilder().setWorkflowId(id).setResumeToken(token).build();
        // A stream is opened again after this time, so that a dead connection is noticed.
        Iterator<StreamStatusResponse> stream = limited(stub, "LLM_STREAM_SECONDS", "120").streamStatus(request);
        while (stream.hasNext()) {
          StreamStatusResponse message = stream.next();
          OutputDelta delta = message.getDelta();
          JobStatus status = message.getStatus();
          // Each stream begins with the status, which the last stream may have brought already.
          if (answered || message.hasDelta()) failures = 0;
          answered = true;
          tries = TRIES;
          offset = message.getNextOffset();
          if (!message.getResumeToken().isEmpty()) token = message.getResumeToken();
          if (delta.getRewind()) note("the job started over: what follows replaces the output from byte " + delta.getOffset());
          OUT.print(delta.getText());
          OUT.flush();
          if (message.hasStatus() && status.getState() != state) note(state = status.getState());
          // Output may follow a first message with a final status.
          if (isFinal(status.getState()) && (message.hasResult() || !message.hasDelta())) return status;
        }
        throw Status.UNAVAILABLE.withDescription("the stream ended before the job did").asRuntimeException();
      } catch (StatusRuntimeException error) {
        Status.Code code = error.getStatus().getCode();
        // A job may be silent for hours: a stream that has begun and fallen silent has not failed.
        boolean silent = answered && code == Status.Code.DEADLINE_EXCEEDED;
        failures = silent ? 0 : failures + 1;
        if (silent) continue;
        // A gateway that is full has answered.
        if (code == Status.Code.RESOURCE_EXHAUSTED) tries = TRIES;
        long delay = retryDelay(error);
        if (failures >= tries) throw error;
        note(error.getStatus().getDescription() + "; going on at byte " + offset);
        Thread.sleep(delay);
      }
    }
  }

  // Prints a line to stderr. On a terminal it does not continue a line of the output.
  static void note(Object line) {
    System.err.println("\n" + line);
  }

  // Prints what a command brings. Returns false for the watch of a job that did not succeed.
  static boolean run(LlmServiceBlockingStub stub, String command, String argument, String optional) throws Exception {
    LlmServiceBlockingStub limited = limited(stub, "LLM_TIMEOUT_SECONDS", "30");
    switch (command) {
      case "submit":
        JobRequest.Builder job = JobRequest.newBuilder();
        JsonFormat.parser().merge(argument, job);
        OUT.println(limited.submit(SubmitRequest.newBuilder().setJob(job).build()).getWorkflowId());
        return true;
      case "watch":
        JobStatus last = watch(stub, argument, optional);
        if (last.hasError()) System.err.println(last.getError().getMessage());
        return last.getState() == JobState.JOB_STATE_SUCCEEDED;
      case "cancel":
        CancelRequest request = CancelRequest.newBuilder().setWorkflowId(argument).setReason(optional).build();
        JobState state = limited.cancel(request).getStatus().getState();
        OUT.println(isFinal(state) ? state : "cancel requested");
        return true;
      default:
        System.err.println("usage: Client submit JOB_AS_JSON | watch WORKFLOW_ID [RESUME_TOKEN] | cancel WORKFLOW_ID [REASON]");
        return false;
    }
  }

  public static void main(String[] arguments) throws Exception {
    String address = setting("LLM_ADDRESS", "127.0.0.1:50051");
    LlmServiceBlockingStub stub = LlmServiceGrpc.newBlockingStub(ManagedChannelBuilder.forTarget(address).usePlaintext().build());
    String command = arguments.length > 1 ? arguments[0] : "", optional = arguments.length > 2 ? arguments[2] : "";
    boolean succeeded = false;
    try {
      succeeded = run(stub, command, arguments.length > 1 ? arguments[1] : "", optional);
    } catch (InvalidProtocolBufferException error) {
      System.err.println("the job is no JSON of a JobRequest: " + error.getMessage());
    } catch (StatusRuntimeException error) {
      System.err.println(error.getStatus().getCode() + ": " + error.getStatus().getDescription());
      if (error.getStatus().getCode() == Status.Code.UNAVAILABLE) {
        System.err.println("Does a gateway listen at " + address + "? LLM_ADDRESS names another address.");
      }
    }
    System.exit(succeeded ? 0 : 1);
  }
}
