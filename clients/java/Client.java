// A client of LlmService that knows the code generated from proto/llm.proto and nothing else of this repository.
//
//   java Client submit '{"user_id": "u", "request_id": "r", "model": "docstrings", "prompt": "def f("}'
//   java Client watch llmjob-u-r [resume_token]
//   java Client cancel llmjob-u-r [reason]
//
// The gateway is at LLM_ADDRESS, by default 127.0.0.1:50051. Results go to stdout, the job's states to stderr.
import com.google.protobuf.Any;
import com.google.protobuf.InvalidProtocolBufferException;
import com.google.protobuf.util.JsonFormat;
import com.google.rpc.RetryInfo;
import io.grpc.Context;
import io.grpc.ManagedChannel;
import io.grpc.ManagedChannelBuilder;
import io.grpc.Status;
import io.grpc.StatusRuntimeException;
import io.grpc.protobuf.StatusProto;
import java.io.PrintStream;
import java.nio.charset.StandardCharsets;
import java.util.Iterator;
import java.util.Set;
import java.util.concurrent.Executors;
import java.util.concurrent.ScheduledExecutorService;
import java.util.concurrent.ScheduledFuture;
import java.util.concurrent.TimeUnit;
import llm.v1.CancelRequest;
import llm.v1.JobRequest;
import llm.v1.JobState;
import llm.v1.JobStatus;
import llm.v1.LlmServiceGrpc;
import llm.v1.LlmServiceGrpc.LlmServiceBlockingStub;
import llm.v1.StreamStatusRequest;
import llm.v1.StreamStatusResponse;
import llm.v1.SubmitRequest;

public class Client {
  static final String ADDRESS = setting("LLM_ADDRESS", "127.0.0.1:50051");
  // A gateway sends a message at least every GATEWAY_KEEPALIVE, 15 s by default. A longer silence is a break.
  static final long IDLE_MS = (long) (Double.parseDouble(setting("LLM_IDLE_SECONDS", "60")) * 1000);
  // Maximum time for the answer to a submit or a cancel. Both are safe to repeat.
  static final long TIMEOUT_MS = (long) (Double.parseDouble(setting("LLM_TIMEOUT_SECONDS", "30")) * 1000);
  static final long RETRY_MS = 1000;
  // How often in a row a watch may fail: less often as long as no gateway has answered, for the address may be wrong.
  static final int TRIES = 60, FIRST_TRIES = 5;
  static final Set<Status.Code> PASSING = Set.of(Status.Code.UNAVAILABLE, Status.Code.CANCELLED);
  // What gRPC makes of a stream that a proxy resets. The gateway's own errors have details.
  static final Set<Status.Code> RESET = Set.of(Status.Code.INTERNAL, Status.Code.UNKNOWN);
  static final PrintStream OUT = new PrintStream(System.out, true, StandardCharsets.UTF_8);
  static final ScheduledExecutorService TIMER = Executors.newSingleThreadScheduledExecutor(Client::daemon);

  static String setting(String name, String otherwise) {
    return System.getenv().getOrDefault(name, otherwise);
  }

  static Thread daemon(Runnable task) {
    Thread thread = new Thread(task);
    thread.setDaemon(true);
    return thread;
  }

  static boolean isFinal(JobState state) {
    return state.getNumber() >= JobState.JOB_STATE_SUCCEEDED_VALUE;
  }

  // Returns the delay in milliseconds that the gateway asks for by RetryInfo, null when it asks for none.
  static Long retryDelay(StatusRuntimeException error) throws InvalidProtocolBufferException {
    com.google.rpc.Status status = StatusProto.fromThrowable(error);
    for (Any detail : status.getDetailsList()) {
      if (detail.is(RetryInfo.class)) {
        com.google.protobuf.Duration delay = detail.unpack(RetryInfo.class).getRetryDelay();
        return delay.getSeconds() * 1000 + delay.getNanos() / 1_000_000;
      }
    }
    return null;
  }

  // How far a watch has come.
  String token;
  long offset;
  JobStatus status = JobStatus.getDefaultInstance();
  int failures = 0, tries = FIRST_TRIES;

  Client(String token) {
    this.token = token;
  }

  // Reads one stream to the job's end. Throws why it broke.
  void stream(LlmServiceBlockingStub stub, String id) {
    Context.CancellableContext context = Context.current().withCancellation();
    Context before = context.attach();
    Runnable silent = () -> context.cancel(null);
    ScheduledFuture<?> watchdog = TIMER.schedule(silent, IDLE_MS, TimeUnit.MILLISECONDS);
    try {
      Iterator<StreamStatusResponse> messages =
          stub.streamStatus(StreamStatusRequest.newBuilder().setWorkflowId(id).setResumeToken(token).build());
      for (boolean first = true; messages.hasNext(); first = false) {
        StreamStatusResponse message = messages.next();
        watchdog.cancel(false);
        watchdog = TIMER.schedule(silent, IDLE_MS, TimeUnit.MILLISECONDS);
        // Each stream begins with the status, which may be the one that the last stream has brought.
        if (!first || message.hasDelta() || !message.getStatus().equals(status)) failures = 0;
        tries = TRIES;
        offset = message.getNextOffset();
        if (!message.getResumeToken().isEmpty()) token = message.getResumeToken();
        if (message.hasStatus()) status = message.getStatus();
        show(message);
        // Output may follow a first message with a final status.
        boolean last = message.hasResult() || !message.hasDelta();
        if (message.hasStatus() && isFinal(status.getState()) && last) return;
      }
      throw Status.UNAVAILABLE.withDescription("the stream ended before the job did").asRuntimeException();
    } finally {
      watchdog.cancel(false);
      context.detach(before);
      context.cancel(null);
    }
  }

  // Prints the job's output and states to its end. A stream that breaks is opened again where it broke, so that every
  // byte of the output is printed once.
  JobStatus watch(LlmServiceBlockingStub stub, String id) throws Exception {
    while (true) {
      try {
        stream(stub, id);
        return status;
      } catch (StatusRuntimeException error) {
        Status.Code code = error.getStatus().getCode();
        Long asked = retryDelay(error);
        // Without RetryInfo it is a limit of gRPC's, such as a message's size.
        boolean limited = code == Status.Code.RESOURCE_EXHAUSTED && asked != null;
        boolean reset = RESET.contains(code) && StatusProto.fromThrowable(error).getDetailsCount() == 0;
        if (limited) tries = TRIES;
        if (!(limited || reset || PASSING.contains(code)) || ++failures >= tries) throw error;
        System.err.println(error.getStatus().getDescription() + "; going on at byte " + offset);
        Thread.sleep(asked != null ? asked : RETRY_MS);
      }
    }
  }

  static void show(StreamStatusResponse message) {
    if (message.getDelta().getRewind()) {
      System.err.println("the job started over: what follows replaces the output from byte " + message.getDelta().getOffset());
    }
    OUT.print(message.getDelta().getText());
    OUT.flush();
    if (message.hasStatus()) {
      JobStatus status = message.getStatus();
      System.err.println(status.getState() + " " + Math.round(status.getProgress().getPercent()) + " %");
    }
  }

  static boolean run(LlmServiceBlockingStub stub, String command, String argument, String optional) throws Exception {
    LlmServiceBlockingStub limited = stub.withDeadlineAfter(TIMEOUT_MS, TimeUnit.MILLISECONDS);
    switch (command) {
      case "submit":
        JobRequest.Builder job = JobRequest.newBuilder();
        try {
          JsonFormat.parser().merge(argument, job);
        } catch (InvalidProtocolBufferException error) {
          System.err.println("the job is no JSON of a JobRequest: " + error.getMessage());
          return false;
        }
        OUT.println(limited.submit(SubmitRequest.newBuilder().setJob(job).build()).getWorkflowId());
        return true;
      case "watch":
        JobStatus last = new Client(optional).watch(stub, argument);
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
    String[] given = java.util.Arrays.copyOf(arguments, 3);
    for (int place = 0; place < 3; place++) if (given[place] == null) given[place] = "";
    ManagedChannel channel = ManagedChannelBuilder.forTarget(ADDRESS).usePlaintext().build();
    boolean succeeded = false;
    try {
      succeeded = run(LlmServiceGrpc.newBlockingStub(channel), given[0], given[1], given[2]);
    } catch (StatusRuntimeException error) {
      System.err.println(error.getStatus().getCode() + ": " + error.getStatus().getDescription());
      if (error.getStatus().getCode() == Status.Code.UNAVAILABLE) {
        System.err.println("Does a gateway listen at " + ADDRESS + "? LLM_ADDRESS names another address.");
      }
    }
    channel.shutdownNow();
    System.exit(succeeded ? 0 : 1);
  }
}
