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
using std::chrono::milliseconds;

std::string setting(const char* name, const char* otherwise) {
  const char* value = std::getenv(name);
  return value && *value ? value : otherwise;
}

// Gives a call the time limit of a setting, in seconds.
void limit(grpc::ClientContext& context, const char* name, const char* otherwise) {
  milliseconds most(static_cast<int64_t>(std::stod(setting(name, otherwise)) * 1000));
  context.set_deadline(std::chrono::system_clock::now() + most);
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

// Prints a job's output on stdout, and all else about it on stderr.
class Watcher {
 public:
  Watcher(pb::LlmService::Stub& stub, const std::string& id, const std::string& token) : stub_(stub) {
    request_.set_workflow_id(id);
    request_.set_resume_token(token);
  }

  // Sets the job's last status. A stream that breaks is opened again where it broke, so that every byte of the output is
  // printed once.
  grpc::Status watch(pb::JobStatus& last) {
    for (;;) {
      grpc::Status status = follow(last);
      // A job may be silent for hours: a stream that has begun and lasted until its deadline has not failed.
      bool lasted = messages_ > 0 && status.error_code() == StatusCode::DEADLINE_EXCEEDED;
      failures_ = lasted ? 0 : failures_ + 1;
      if (lasted) continue;
      // The address may be wrong as long as no gateway has answered. One that is full has answered.
      if (status.error_code() == StatusCode::RESOURCE_EXHAUSTED) tries_ = 60;
      auto delay = retry_delay(status);
      if (status.ok() || !delay || failures_ >= tries_) return status;
      note(status.error_message() + "; going on at byte " + std::to_string(end_));
      std::this_thread::sleep_for(*delay);
    }
  }

 private:
  // Prints what one stream brings. Returns OK once the job has ended.
  grpc::Status follow(pb::JobStatus& last) {
    grpc::ClientContext context;
    // A stream is opened again after this time, so that a dead connection is noticed.
    limit(context, "LLM_STREAM_SECONDS", "120");
    auto stream = stub_.StreamStatus(&context, request_);
    pb::StreamStatusResponse message;
    for (messages_ = 0; stream->Read(&message);) {
      // Each stream begins with the status, which the last stream may have brought already.
      if (++messages_ > 1 || message.has_delta()) failures_ = 0;
      tries_ = 60;
      if (!message.resume_token().empty()) request_.set_resume_token(message.resume_token());
      show(message);
      last = message.status();
      // Output may follow a first message with a final status.
      if (is_final(last.state()) && (message.has_result() || !message.has_delta())) return grpc::Status::OK;
    }
    grpc::Status status = stream->Finish();
    return status.ok() ? grpc::Status(StatusCode::UNAVAILABLE, "the stream ended before the job did") : status;
  }

  // Prints the output, and each new state.
  void show(const pb::StreamStatusResponse& message) {
    end_ = message.next_offset();
    if (message.delta().rewind())
      note("the job started over: what follows replaces the output from byte " + std::to_string(message.delta().offset()));
    const std::string& text = message.delta().text();
    std::cout << text << std::flush;
    if (!text.empty()) in_line_ = text.back() != '\n';
    if (message.has_status() && message.status().state() != state_) {
      state_ = message.status().state();
      note(pb::JobState_Name(state_));
    }
  }

  // Prints a line. On a terminal it does not continue a line of the output.
  void note(const std::string& line) {
    std::cerr << (in_line_ ? "\n" : "") << line << "\n";
    in_line_ = false;
  }

  pb::LlmService::Stub& stub_;
  pb::StreamStatusRequest request_;
  pb::JobState state_ = pb::JOB_STATE_UNSPECIFIED;
  int64_t end_ = 0;
  bool in_line_ = false;
  int messages_ = 0, failures_ = 0, tries_ = 5;
};

int main(int count, char** values) {
  auto argument = [&](int place) { return std::string(place < count ? values[place] : ""); };
  std::string command = argument(1), address = setting("LLM_ADDRESS", "127.0.0.1:50051");
  auto stub = pb::LlmService::NewStub(grpc::CreateChannel(address, grpc::InsecureChannelCredentials()));
  grpc::ClientContext context;
  limit(context, "LLM_TIMEOUT_SECONDS", "30");
  grpc::Status status;
  bool succeeded = true;
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
    pb::JobStatus last;
    status = Watcher(*stub, argument(2), argument(3)).watch(last);
    if (last.has_error()) std::cerr << last.error().message() << "\n";
    succeeded = last.state() == pb::JOB_STATE_SUCCEEDED;
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
  if (!status.ok())
    std::cerr << google::rpc::Code_Name(static_cast<google::rpc::Code>(status.error_code())) << ": " << status.error_message() << "\n";
  if (status.error_code() == StatusCode::UNAVAILABLE)
    std::cerr << "Does a gateway listen at " << address << "? LLM_ADDRESS names another address.\n";
  return status.ok() && succeeded ? 0 : 1;
}
