// A client of LlmService that knows the code generated from proto/llm.proto and nothing else of this repository.
//
//   client submit '{"user_id": "u", "request_id": "r", "model": "docstrings", "prompt": "def f("}'
//   client watch llmjob-u-r [resume_token]
//   client cancel llmjob-u-r [reason]
//
// The gateway is at LLM_ADDRESS, by default 127.0.0.1:50051. Results go to stdout, the job's states to stderr.
#include <chrono>
#include <cstdlib>
#include <iostream>
#include <optional>
#include <string>
#include <thread>

#include <google/protobuf/util/json_util.h>
#include <grpcpp/grpcpp.h>

#include "google/rpc/code.pb.h"
#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"
#include "llm.grpc.pb.h"

namespace pb = llm::v1;
using grpc::StatusCode;
using std::chrono::milliseconds, std::chrono::system_clock;

// How often in a row a watch may fail: less often as long as no gateway has answered, for the address may be wrong.
constexpr int kTries = 60, kFirstTries = 5;

std::string setting(const char* name, const char* otherwise) {
  const char* value = std::getenv(name);
  return value && *value ? value : otherwise;
}

// Gives a call the time limit of a setting, in seconds.
void limit(grpc::ClientContext& context, const char* name, const char* otherwise) {
  milliseconds most(static_cast<int64_t>(std::stod(setting(name, otherwise)) * 1000));
  context.set_deadline(system_clock::now() + most);
}

bool is_final(pb::JobState state) { return state >= pb::JOB_STATE_SUCCEEDED; }

// Returns the time until the next try after an error, nothing for an error that does not pass by itself.
std::optional<milliseconds> retry_delay(const grpc::Status& failure) {
  google::rpc::Status status;
  google::rpc::RetryInfo info;
  status.ParseFromString(failure.error_details());
  for (const auto& detail : status.details())
    if (detail.UnpackTo(&info)) return milliseconds(info.retry_delay().seconds() * 1000 + info.retry_delay().nanos() / 1000000);
  StatusCode code = failure.error_code();
  // Without details it is a stream that a proxy has reset.
  bool reset = (code == StatusCode::INTERNAL || code == StatusCode::UNKNOWN) && failure.error_details().empty();
  if (reset || code == StatusCode::UNAVAILABLE || code == StatusCode::CANCELLED || code == StatusCode::DEADLINE_EXCEEDED)
    return milliseconds(1000);
  return std::nullopt;
}

// Prints the job's output and states to its end, and sets its last status. A stream that breaks is opened again where it
// broke, so that every byte of the output is printed once.
grpc::Status watch(pb::LlmService::Stub& stub, pb::StreamStatusRequest request, pb::JobStatus& last) {
  int64_t end = 0;
  pb::JobState state = pb::JOB_STATE_UNSPECIFIED;
  int failures = 0, tries = kFirstTries;
  for (;;) {
    grpc::ClientContext context;
    // A stream is opened again after this time, so that a dead connection is noticed.
    limit(context, "LLM_STREAM_SECONDS", "120");
    auto stream = stub.StreamStatus(&context, request);
    pb::StreamStatusResponse message;
    bool answered = false;
    while (stream->Read(&message)) {
      // Each stream begins with the status, which the last stream may have brought already.
      if (answered || message.has_delta()) failures = 0;
      answered = true;
      tries = kTries;
      end = message.next_offset();
      last = message.status();
      if (!message.resume_token().empty()) request.set_resume_token(message.resume_token());
      if (message.delta().rewind())
        std::cerr << "\nthe job started over: what follows replaces the output from byte " << message.delta().offset() << "\n";
      std::cout << message.delta().text() << std::flush;
      if (message.has_status() && last.state() != state)
        std::cerr << "\n" << pb::JobState_Name(state = last.state()) << "\n";
      // Output may follow a first message with a final status.
      if (is_final(last.state()) && (message.has_result() || !message.has_delta())) return grpc::Status::OK;
    }
    grpc::Status status = stream->Finish();
    if (status.ok()) status = grpc::Status(StatusCode::UNAVAILABLE, "the stream ended before the job did");
    // A job may be silent for hours: a stream that has begun and fallen silent has not failed.
    bool silent = answered && status.error_code() == StatusCode::DEADLINE_EXCEEDED;
    failures = silent ? 0 : failures + 1;
    if (silent) continue;
    // A gateway that is full has answered.
    if (status.error_code() == StatusCode::RESOURCE_EXHAUSTED) tries = kTries;
    auto delay = retry_delay(status);
    if (!delay || failures >= tries) return status;
    std::cerr << "\n" << status.error_message() << "; going on at byte " << end << "\n";
    std::this_thread::sleep_for(*delay);
  }
}

int main(int count, char** values) {
  auto argument = [&](int place) { return std::string(place < count ? values[place] : ""); };
  std::string command = argument(1), address = setting("LLM_ADDRESS", "127.0.0.1:50051");
  auto stub = pb::LlmService::NewStub(grpc::CreateChannel(address, grpc::InsecureChannelCredentials()));
  grpc::ClientContext context;
  limit(context, "LLM_TIMEOUT_SECONDS", "30");
  grpc::Status status;
  if (command == "submit") {
    pb::SubmitRequest request;
    pb::SubmitResponse response;
    auto parsed = google::protobuf::util::JsonStringToMessage(argument(2), request.mutable_job());
    if (!parsed.ok()) {
      std::cerr << "the job is no JSON of a JobRequest: " << parsed.ToString() << "\n";
      return 1;
    }
    status = stub->Submit(&context, request, &response);
    if (status.ok()) std::cout << response.workflow_id() << "\n";
  } else if (command == "watch") {
    pb::StreamStatusRequest request;
    pb::JobStatus last;
    request.set_workflow_id(argument(2));
    request.set_resume_token(argument(3));
    status = watch(*stub, request, last);
    if (status.ok() && last.state() != pb::JOB_STATE_SUCCEEDED) {
      std::cerr << last.error().message() << "\n";
      return 1;
    }
  } else if (command == "cancel") {
    pb::CancelRequest request;
    pb::CancelResponse response;
    request.set_workflow_id(argument(2));
    request.set_reason(argument(3));
    status = stub->Cancel(&context, request, &response);
    pb::JobState state = response.status().state();
    if (status.ok()) std::cout << (is_final(state) ? pb::JobState_Name(state) : "cancel requested") << "\n";
  } else {
    std::cerr << "usage: client submit JOB_AS_JSON | watch WORKFLOW_ID [RESUME_TOKEN] | cancel WORKFLOW_ID [REASON]\n";
    return 1;
  }
  if (status.ok()) return 0;
  std::cerr << google::rpc::Code_Name(static_cast<google::rpc::Code>(status.error_code())) << ": " << status.error_message() << "\n";
  if (status.error_code() == StatusCode::UNAVAILABLE)
    std::cerr << "Does a gateway listen at " << address << "? LLM_ADDRESS names another address.\n";
  return 1;
}
