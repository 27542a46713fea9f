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

include GRPC::Core::StatusCodes

ADDRESS = ENV.fetch("LLM_ADDRESS", "127.0.0.1:50051")
# Maximum time for the answer to a submit or a cancel. Both are safe to repeat.
TIMEOUT_SECONDS = Float(ENV.fetch("LLM_TIMEOUT_SECONDS", "30"))
# A stream is opened again after this time, so that a silent one is noticed.
STREAM_SECONDS = Float(ENV.fetch("LLM_STREAM_SECONDS", "120"))
FINAL = %i[JOB_STATE_SUCCEEDED JOB_STATE_FAILED JOB_STATE_CANCELLED JOB_STATE_TIMED_OUT].freeze

# Returns the seconds until the next try after an error, nil for an error that does not pass by itself.
def retry_delay(error)
  details = error.to_rpc_status&.details.to_a
  info = details.find { |detail| detail.is(Google::Rpc::RetryInfo) }
  return info.unpack(Google::Rpc::RetryInfo).retry_delay.to_f if info
  # INTERNAL and UNKNOWN without details are streams that a proxy has reset.
  passes = [UNAVAILABLE, CANCELLED, DEADLINE_EXCEEDED] + (details.empty? ? [INTERNAL, UNKNOWN] : [])
  1 if passes.include?(error.code)
end

# Prints the job's output and states to its end, and returns the last status. A stream that breaks is opened again where
# it broke, so that every byte of the output is printed once.
def watch(stub, workflow_id, token)
  failures, offset = 0, 0
  begin
    request = Llm::V1::StreamStatusRequest.new(workflow_id: workflow_id, resume_token: token)
    stub.stream_status(request, deadline: Time.now + STREAM_SECONDS).each_with_index do |message, index|
      # Each stream begins with the status, which the last stream may have brought already.
      failures = 0 if index.positive? || message.delta
      offset = message.next_offset
      token = message.resume_token unless message.resume_token.empty?
      show(message)
      # Output may follow a first message with a final status.
      return message.status if FINAL.include?(message.status&.state) && (message.result || !message.delta)
    end
    raise GRPC::Unavailable, "the stream ended before the job did"
  rescue GRPC::BadStatus, GRPC::Core::CallError => e
    # What a deadline becomes while a message is awaited.
    e = GRPC::DeadlineExceeded.new("no message has come") if e.is_a?(GRPC::Core::CallError)
    failures += 1
    delay = retry_delay(e)
    # The address may be wrong as long as no gateway has answered.
    raise if delay.nil? || failures >= (token.empty? ? 5 : 60)
    warn "#{e.details}; going on at byte #{offset}"
    sleep delay
    retry
  end
end

def show(message)
  delta, status = message.delta, message.status
  warn "the job started over: what follows replaces the output from byte #{delta.offset}" if delta&.rewind
  $stdout.write(delta.text) if delta
  warn [status.state, status.progress && "#{status.progress.percent.round} %"].compact.join(" ") if status
end

$stdout.sync = true
command, argument, optional = ARGV
stub = Llm::V1::LlmService::Stub.new(ADDRESS, :this_channel_is_insecure)
deadline = Time.now + TIMEOUT_SECONDS
begin
  case argument && command
  when "submit"
    request = Llm::V1::SubmitRequest.new(job: Llm::V1::JobRequest.decode_json(argument))
    puts stub.submit(request, deadline: deadline).workflow_id
  when "watch"
    status = watch(stub, argument, optional.to_s)
    warn status.error.message if status.error
    exit status.state == :JOB_STATE_SUCCEEDED
  when "cancel"
    request = Llm::V1::CancelRequest.new(workflow_id: argument, reason: optional.to_s)
    status = stub.cancel(request, deadline: deadline).status
    puts FINAL.include?(status.state) ? status.state : "cancel requested"
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
