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

ADDRESS = ENV.fetch("LLM_ADDRESS", "127.0.0.1:50051")
# A gateway sends a message at least every GATEWAY_KEEPALIVE, 15 s by default. A longer silence is a break.
IDLE_SECONDS = Float(ENV.fetch("LLM_IDLE_SECONDS", "60"))
# Maximum time for the answer to a submit or a cancel. Both are safe to repeat.
TIMEOUT_SECONDS = Float(ENV.fetch("LLM_TIMEOUT_SECONDS", "30"))
RETRY_SECONDS = 1
# How often in a row a watch may fail: less often as long as no gateway has answered, for the address may be wrong.
TRIES = 60
FIRST_TRIES = 5
FINAL = %i[JOB_STATE_SUCCEEDED JOB_STATE_FAILED JOB_STATE_CANCELLED JOB_STATE_TIMED_OUT].freeze
CODES = GRPC::Core::StatusCodes.constants.to_h { |name| [GRPC::Core::StatusCodes.const_get(name), name.to_s] }.freeze

# Returns the delay in seconds that the gateway asks for by RetryInfo, nil when it asks for none.
def retry_delay(error)
  info = error.to_rpc_status&.details&.find { |detail| detail.is(Google::Rpc::RetryInfo) }
  delay = info&.unpack(Google::Rpc::RetryInfo)&.retry_delay
  delay && delay.seconds + delay.nanos / 1e9
end

# Yields the messages of one stream. Raises GRPC::Unavailable for a stream that falls silent or ends before its job.
def each_message(stub, request)
  call = stub.stream_status(request, return_op: true)
  latest = Process.clock_gettime(Process::CLOCK_MONOTONIC)
  watchdog = Thread.new do
    sleep 0.2 while Process.clock_gettime(Process::CLOCK_MONOTONIC) - latest < IDLE_SECONDS
    call.cancel
  end
  call.execute.each do |message|
    latest = Process.clock_gettime(Process::CLOCK_MONOTONIC)
    yield message
  end
  raise GRPC::Unavailable, "the stream ended before the job did"
rescue GRPC::Core::CallError
  # What the watchdog's cancel becomes here.
  raise GRPC::Unavailable, "no message has come for #{IDLE_SECONDS} s"
ensure
  watchdog&.kill
end

# Prints the job's output and states to its end, and returns the last status. A stream that breaks is opened again where
# it broke, so that every byte of the output is printed once.
def watch(stub, workflow_id, token)
  failures, tries, offset, known = 0, FIRST_TRIES, 0, nil
  begin
    first = true
    each_message(stub, Llm::V1::StreamStatusRequest.new(workflow_id: workflow_id, resume_token: token)) do |message|
      # Each stream begins with the status, which may be the one that the last stream has brought.
      failures = 0 if !first || message.delta || message.status != known
      known = message.status || known
      first, tries, offset = false, TRIES, message.next_offset
      token = message.resume_token unless message.resume_token.empty?
      show(message)
      # Output may follow a first message with a final status.
      return known if message.status && FINAL.include?(known.state) && (message.result || !message.delta)
    end
  rescue GRPC::Unavailable, GRPC::Cancelled, GRPC::ResourceExhausted, GRPC::Internal, GRPC::Unknown => e
    # A proxy resets a stream so. The gateway's own errors have details.
    raise if (e.is_a?(GRPC::Internal) || e.is_a?(GRPC::Unknown)) && e.to_rpc_status
    asked = retry_delay(e)
    limited = e.is_a?(GRPC::ResourceExhausted)
    tries = TRIES if limited
    failures += 1
    # Without RetryInfo it is a limit of gRPC's, such as a message's size.
    raise if (limited && asked.nil?) || failures >= tries
    warn "#{e.details}; going on at byte #{offset}"
    sleep(asked || RETRY_SECONDS)
    retry
  end
end

def show(message)
  delta, status = message.delta, message.status
  warn "the job started over: what follows replaces the output from byte #{delta.offset}" if delta&.rewind
  $stdout.write(delta.text) if delta
  warn [status.state, status.progress && "#{status.progress.percent.round} %"].compact.join(" ") if status
end

def main(command, *arguments)
  stub = Llm::V1::LlmService::Stub.new(ADDRESS, :this_channel_is_insecure)
  deadline = Time.now + TIMEOUT_SECONDS
  case command
  when "submit"
    job = Llm::V1::JobRequest.decode_json(arguments.fetch(0))
    puts stub.submit(Llm::V1::SubmitRequest.new(job: job), deadline: deadline).workflow_id
  when "watch"
    status = watch(stub, arguments.fetch(0), arguments.fetch(1, ""))
    warn status.error.message if status.error
    return status.state == :JOB_STATE_SUCCEEDED
  when "cancel"
    request = Llm::V1::CancelRequest.new(workflow_id: arguments.fetch(0), reason: arguments.fetch(1, ""))
    status = stub.cancel(request, deadline: deadline).status
    puts FINAL.include?(status.state) ? status.state : "cancel requested"
  else
    abort "usage: client.rb submit JOB_AS_JSON | watch WORKFLOW_ID [RESUME_TOKEN] | cancel WORKFLOW_ID [REASON]"
  end
  true
end

$stdout.sync = true
begin
  exit main(*ARGV)
rescue Google::Protobuf::ParseError => e
  abort "the job is no JSON of a JobRequest: #{e.message}"
rescue IndexError
  abort "#{ARGV.first} needs an argument"
rescue Interrupt
  exit 130
rescue GRPC::BadStatus => e
  warn "#{CODES.fetch(e.code)}: #{e.details}"
  warn "Does a gateway listen at #{ADDRESS}? LLM_ADDRESS names another address." if e.is_a?(GRPC::Unavailable)
  exit 1
end
