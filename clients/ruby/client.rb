# A client of LlmService that knows the code generated from proto/llm.proto and nothing else of this repository.
#
#   ruby -I generated client.rb submit '{"user_id": "u", "request_id": "r", "model": "docstrings", "prompt": "def f("}'
#   ruby -I generated client.rb watch llmjob-u-r [resume_token]
#   ruby -I generated client.rb cancel llmjob-u-r [reason]
#
# The gateway is at LLM_ADDRESS, by default 127.0.0.1:50051. Results go to stdout, the job's states to stderr.
require "google/protobuf/well_known_types"
require "grpc"
require "google/rpc/error_details_pb"
require "llm_services_pb"

include Llm::V1

ADDRESS = ENV.fetch("LLM_ADDRESS", "127.0.0.1:50051")
# Maximum time for the answer to a submit or a cancel. Both are safe to repeat.
TIMEOUT_SECONDS = Float(ENV.fetch("LLM_TIMEOUT_SECONDS", "30"))
# A stream is opened again after this time, so that a dead connection is noticed.
STREAM_SECONDS = Float(ENV.fetch("LLM_STREAM_SECONDS", "120"))
# How often in a row a watch may fail: less often as long as no gateway has answered, for the address may be wrong.
TRIES, FIRST_TRIES = 60, 5
FINAL = %i[JOB_STATE_SUCCEEDED JOB_STATE_FAILED JOB_STATE_CANCELLED JOB_STATE_TIMED_OUT].freeze

# Prints the job's output and states to its end, and returns the last status. A stream that breaks is opened again where
# it broke, so that every byte of the output is printed once.
def watch(stub, workflow_id, token)
  offset, state, failures, tries = 0, nil, 0, FIRST_TRIES
  begin
    answered = false
    request = StreamStatusRequest.new(workflow_id: workflow_id, resume_token: token)
    stub.stream_status(request, deadline: Time.now + STREAM_SECONDS).each do |message|
      delta, status, offset = message.delta, message.status, message.next_offset
      # Each stream begins with the status, which the last stream may have brought already.
      failures = 0 if answered || delta
      answered, tries = true, TRIES
      token = message.resume_token unless message.resume_token.empty?
      warn "\nthe job started over: what follows replaces the output from byte #{delta.offset}" if delta&.rewind
      print delta.text if delta
      warn "\n#{state = status.state}" if status && status.state != state
      # Output may follow a first message with a final status.
      return status if FINAL.include?(status&.state) && (message.result || !delta)
    end
    raise GRPC::Unavailable, "the stream ended before the job did"
  rescue GRPC::BadStatus, GRPC::Core::CallError => e
    # What a deadline becomes while a message is awaited.
    e = GRPC::DeadlineExceeded.new("no message has come") if e.is_a?(GRPC::Core::CallError)
    # A job may be silent for hours: a stream that has begun and fallen silent has not failed.
    silent = answered && e.is_a?(GRPC::DeadlineExceeded)
    failures = silent ? 0 : failures + 1
    retry if silent
    # A gateway that is full has answered.
    tries = TRIES if e.is_a?(GRPC::ResourceExhausted)
    delay = retry_delay(e)
    raise e if delay.nil? || failures >= tries
    warn "\n#{e.details}; going on at byte #{offset}"
    sleep delay
    retry
  end
end

# Returns the seconds until the next try after an error, nil for an error that does not pass by itself.
def retry_delay(error)
  details = error.to_rpc_status&.details.to_a
  info = details.find { |detail| detail.is(Google::Rpc::RetryInfo) }
  return info.unpack(Google::Rpc::RetryInfo).retry_delay.to_f if info
  case error
  when GRPC::Unavailable, GRPC::Cancelled, GRPC::DeadlineExceeded then 1
  when GRPC::Internal, GRPC::Unknown then 1 if details.empty? # a stream that a proxy has reset
  end
end

$stdout.sync = true
command, argument, optional = ARGV
stub = LlmService::Stub.new(ADDRESS, :this_channel_is_insecure, timeout: TIMEOUT_SECONDS)
begin
  case argument && command
  when "submit"
    puts stub.submit(SubmitRequest.new(job: JobRequest.decode_json(argument))).workflow_id
  when "watch"
    status = watch(stub, argument, optional.to_s)
    abort status.error&.message.to_s unless status.state == :JOB_STATE_SUCCEEDED
  when "cancel"
    state = stub.cancel(CancelRequest.new(workflow_id: argument, reason: optional.to_s)).status.state
    puts FINAL.include?(state) ? state : "cancel requested"
  else
    abort "usage: client.rb submit JOB_AS_JSON | watch WORKFLOW_ID [RESUME_TOKEN] | cancel WORKFLOW_ID [REASON]"
  end
rescue Google::Protobuf::ParseError => e
  abort "the job is no JSON of a JobRequest: #{e.message}"
rescue GRPC::BadStatus => e
  warn "#{GRPC::Core::StatusCodes.constants.find { |name| GRPC::Core::StatusCodes.const_get(name) == e.code }}: #{e.details}"
  warn "Does a gateway listen at #{ADDRESS}? LLM_ADDRESS names another address." if e.is_a?(GRPC::Unavailable)
  exit 1
end
