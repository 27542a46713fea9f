// A client of LlmService that knows the code generated from proto/llm.proto and nothing else of this repository.
//
//   client submit '{"user_id": "u", "request_id": "r", "model": "docstrings", "prompt": "def f("}'
//   client watch llmjob-u-r [resume_token]
//   client cancel llmjob-u-r [reason]
//
// The gateway is at LLM_ADDRESS, by default 127.0.0.1:50051. Results go to stdout, the job's states to stderr.
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <iostream>
#include <optional>
#include <string>
#include <thread>

#include <google/protobuf/util/json_util.h>
#include <google/protobuf/util/message_differencer.h>
#include <grpcpp/grpcpp.h>

#include "google/rpc/code.pb.h"
#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"
#include "llm.grpc.pb.h"

namespace pb = llm::v1;
using std::chrono::duration;
using std::chrono::system_clock;

std::string setting(const char* name, const char* otherwise) {
  const char* value = std::getenv(name);
  return value && *value ? value : otherwise;
}

const std::string kAddress = setting("LLM_ADDRESS", "127.0.0.1:50051");
// A gateway sends a message at least every GATEWAY_KEEPALIVE, 15 s by default. A longer silence is a break.
const duration<double> kIdle(std::stod(setting("LLM_IDLE_SECONDS", "60")));
// Maximum time for the answer to a submit or a cancel. Both are safe to repeat.
const duration<double> kTimeout(std::stod(setting("LLM_TIMEOUT_SECONDS", "30")));
const duration<double> kRetry(1);
// How often in a row a watch may fail: less often as long as no gateway has answered, for the address may be wrong.
constexpr int kTries = 60, kFirstTries = 5;

bool is_final(pb::JobState state) { return state >= pb::JOB_STATE_SUCCEEDED; }

// Returns the delay that the gateway asks for by RetryInfo, nothing when it asks for none.
std::optional<duration<double>> retry_delay(const grpc::Status& failure) {
  google::rpc::Status status;
  google::rpc::RetryInfo info;
  status.ParseFromString(failure.error_details());
  for (const auto& detail : status.details())
    if (detail.UnpackTo(&info)) return duration<double>(info.retry_delay().seconds() + info.retry_delay().nanos() / 1e9);
  return std::nullopt;
}

void show(const pb::StreamStatusResponse& message) {
  if (message.has_delta()) {
    if (message.delta().rewind())
      std::cerr << "the job started over: what follows replaces the output from byte " << message.delta().offset() << "\n";
    std::cout << message.delta().text() << std::flush;
  }
  if (message.has_status())
    std::cerr << pb::JobState_Name(message.status().state()) << " "
              << std::lround(message.status().progress().percent()) << " %\n";
}

// How far a watch has come.
struct Place {
  std::string token;
  int64_t offset = 0;
  pb::JobStatus status;
  int failures = 0, tries = kFirstTries;
};

// Reads one stream. Returns OK at the job's end, otherwise why the stream broke.
grpc::Status read_stream(pb::LlmService::Stub& stub, const std::string& id, Place& at) {
  grpc::ClientContext context;
  grpc::CompletionQueue queue;
  // Waits for the operation that was begun. False when it has failed or no message has come for too long.
  bool silent = false;
  auto done = [&] {
    void* tag;
    bool ok = false;
    auto deadline = system_clock::now() + std::chrono::duration_cast<system_clock::duration>(kIdle);
    if (queue.AsyncNext(&tag, &ok, deadline) == grpc::CompletionQueue::TIMEOUT) {
      silent = true;
      context.TryCancel();
      queue.Next(&tag, &ok);
    }
    return ok && !silent;
  };
  pb::StreamStatusRequest request;
  request.set_workflow_id(id);
  request.set_resume_token(at.token);
  auto stream = stub.AsyncStreamStatus(&context, request, &queue, nullptr);
  bool first = true, ended = false;
  pb::StreamStatusResponse message;
  for (bool ok = done(); ok && !ended; first = false) {
    stream->Read(&message, nullptr);
    if (!(ok = done())) break;
    // Each stream begins with the status, which may be the one that the last stream has brought.
    if (!first || message.has_delta() || !google::protobuf::util::MessageDifferencer::Equals(message.status(), at.status))
      at.failures = 0;
    at.tries = kTries;
    at.offset = message.next_offset();
    if (!message.resume_token().empty()) at.token = message.resume_token();
    if (message.has_status()) at.status = message.status();
    show(message);
    // Output may follow a first message with a final status.
    ended = message.has_status() && is_final(message.status().state()) && (message.has_result() || !message.has_delta());
  }
  if (ended) context.TryCancel();
  grpc::Status status;
  void* tag;
  bool ok;
  stream->Finish(&status, nullptr);
  queue.Next(&tag, &ok);
  queue.Shutdown();
  while (queue.Next(&tag, &ok)) {
  }
  if (ended) return grpc::Status::OK;
  if (silent) return {grpc::StatusCode::UNAVAILABLE, "no message has come for too long"};
  if (status.ok()) return {grpc::StatusCode::UNAVAILABLE, "the stream ended before the job did"};
  // A proxy has reset the stream. The gateway's own errors have details.
  bool reset = status.error_code() == grpc::StatusCode::INTERNAL || status.error_code() == grpc::StatusCode::UNKNOWN;
  if (reset && status.error_details().empty()) return {grpc::StatusCode::UNAVAILABLE, status.error_message()};
  return status;
}

// Prints the job's output and states to its end. A stream that breaks is opened again where it broke, so that every byte
// of the output is printed once.
grpc::Status watch(pb::LlmService::Stub& stub, const std::string& id, Place& at) {
  for (;;) {
    grpc::Status status = read_stream(stub, id, at);
    if (status.ok()) return status;
    auto asked = retry_delay(status);
    // Without RetryInfo it is a limit of gRPC's, such as a message's size.
    bool limited = status.error_code() == grpc::StatusCode::RESOURCE_EXHAUSTED && asked;
    bool passes = limited || status.error_code() == grpc::StatusCode::UNAVAILABLE || status.error_code() == grpc::StatusCode::CANCELLED;
    if (limited) at.tries = kTries;
    if (!passes || ++at.failures >= at.tries) return status;
    std::cerr << status.error_message() << "; going on at byte " << at.offset << "\n";
    std::this_thread::sleep_for(asked.value_or(kRetry));
  }
}

// Returns the exit status.
int run(const std::string& command, const std::string& argument, const std::string& optional) {
  auto stub = pb::LlmService::NewStub(grpc::CreateChannel(kAddress, grpc::InsecureChannelCredentials()));
  grpc::ClientContext context;
  context.set_deadline(system_clock::now() + std::chrono::duration_cast<system_clock::duration>(kTimeout));
  grpc::Status status;
  bool succeeded = true;
  if (command == "submit") {
    pb::SubmitRequest request;
    pb::SubmitResponse response;
    auto parsed = google::protobuf::util::JsonStringToMessage(argument, request.mutable_job());
    if (!parsed.ok()) {
      std::cerr << "the job is no JSON of a JobRequest: " << parsed.ToString() << "\n";
      return 1;
    }
    status = stub->Submit(&context, request, &response);
    if (status.ok()) std::cout << response.workflow_id() << "\n";
  } else if (command == "watch") {
    Place at;
    at.token = optional;
    status = watch(*stub, argument, at);
    if (at.status.has_error()) std::cerr << at.status.error().message() << "\n";
    succeeded = at.status.state() == pb::JOB_STATE_SUCCEEDED;
  } else if (command == "cancel") {
    pb::CancelRequest request;
    pb::CancelResponse response;
    request.set_workflow_id(argument);
    request.set_reason(optional);
    status = stub->Cancel(&context, request, &response);
    pb::JobState state = response.status().state();
    if (status.ok()) std::cout << (is_final(state) ? pb::JobState_Name(state) : "cancel requested") << "\n";
  } else {
    std::cerr << "usage: client submit JOB_AS_JSON | watch WORKFLOW_ID [RESUME_TOKEN] | cancel WORKFLOW_ID [REASON]\n";
    return 1;
  }
  if (!status.ok()) {
    std::cerr << google::rpc::Code_Name(static_cast<google::rpc::Code>(status.error_code())) << ": " << status.error_message() << "\n";
    if (status.error_code() == grpc::StatusCode::UNAVAILABLE)
      std::cerr << "Does a gateway listen at " << kAddress << "? LLM_ADDRESS names another address.\n";
  }
  return status.ok() && succeeded ? 0 : 1;
}

int main(int count, char** values) {
  auto argument = [&](int place) { return place < count ? values[place] : ""; };
  return run(argument(1), argument(2), argument(3));
}
