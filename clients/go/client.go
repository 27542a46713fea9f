// A client of LlmService that knows the code generated from proto/llm.proto and nothing else of this repository.
//
//	client submit '{"user_id": "u", "request_id": "r", "model": "docstrings", "prompt": "def f("}'
//	client watch llmjob-u-r [resume_token]
//	client cancel llmjob-u-r [reason]
//
// The gateway is at LLM_ADDRESS, by default 127.0.0.1:50051. Results go to stdout, the job's states to stderr.
package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"strconv"
	"time"

	"google.golang.org/genproto/googleapis/rpc/code"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"

	pb "llm/v1"
)

// limit returns a context with a time limit in seconds, which a variable of the environment may set.
func limit(variable string, otherwise float64) (context.Context, context.CancelFunc) {
	if seconds, err := strconv.ParseFloat(os.Getenv(variable), 64); err == nil {
		otherwise = seconds
	}
	return context.WithTimeout(context.Background(), time.Duration(otherwise*float64(time.Second)))
}

// isFinal says whether a job stays in the state.
func isFinal(state pb.JobState) bool { return state >= pb.JobState_JOB_STATE_SUCCEEDED }

// retryDelay returns the time until the next try after an error, and whether the error passes by itself.
func retryDelay(failure *status.Status) (time.Duration, bool) {
	for _, detail := range failure.Details() {
		if info, ok := detail.(*errdetails.RetryInfo); ok {
			return info.GetRetryDelay().AsDuration(), true
		}
	}
	switch failure.Code() {
	case codes.Unavailable, codes.Canceled, codes.DeadlineExceeded:
		return time.Second, true
	case codes.Internal, codes.Unknown: // Without details it is a stream that a proxy has reset.
		return time.Second, len(failure.Details()) == 0
	}
	return 0, false
}

// watch prints the job's output and states to its end, and returns the last status. A stream that breaks is opened again
// where it broke, so that every byte of the output is printed once.
func watch(client pb.LlmServiceClient, id, token string) (*pb.JobStatus, error) {
	failures, offset := 0, int64(0)
	for {
		// A stream is opened again after this time, so that a silent one is noticed.
		ctx, cancel := limit("LLM_STREAM_SECONDS", 120)
		messages, err := client.StreamStatus(ctx, &pb.StreamStatusRequest{WorkflowId: id, ResumeToken: token})
		for first := true; err == nil; first = false {
			var message *pb.StreamStatusResponse
			if message, err = messages.Recv(); err != nil {
				break
			}
			// Each stream begins with the status, which the last stream may have brought already.
			if !first || message.Delta != nil {
				failures = 0
			}
			offset = message.NextOffset
			if message.ResumeToken != "" {
				token = message.ResumeToken
			}
			show(message)
			// Output may follow a first message with a final status.
			if isFinal(message.GetStatus().GetState()) && (message.Result != nil || message.Delta == nil) {
				cancel()
				return message.Status, nil
			}
		}
		cancel()
		if err == io.EOF {
			err = status.Error(codes.Unavailable, "the stream ended before the job did")
		}
		failures++
		delay, passes := retryDelay(status.Convert(err))
		// The address may be wrong as long as no gateway has answered.
		if !passes || failures >= 60 || (token == "" && failures >= 5) {
			return nil, err
		}
		fmt.Fprintf(os.Stderr, "%s; going on at byte %d\n", status.Convert(err).Message(), offset)
		time.Sleep(delay)
	}
}

func show(message *pb.StreamStatusResponse) {
	if message.GetDelta().GetRewind() {
		fmt.Fprintf(os.Stderr, "the job started over: what follows replaces the output from byte %d\n", message.Delta.Offset)
	}
	fmt.Print(message.GetDelta().GetText())
	if status := message.Status; status != nil {
		fmt.Fprintf(os.Stderr, "%s %.0f %%\n", status.State, status.GetProgress().GetPercent())
	}
}

// run prints what a command brings, and says whether the job of a watch succeeded.
func run(client pb.LlmServiceClient, command, argument, optional string) (bool, error) {
	ctx, cancel := limit("LLM_TIMEOUT_SECONDS", 30)
	defer cancel()
	switch command {
	case "submit":
		job := &pb.JobRequest{}
		if err := protojson.Unmarshal([]byte(argument), job); err != nil {
			return false, fmt.Errorf("the job is no JSON of a JobRequest: %w", err)
		}
		response, err := client.Submit(ctx, &pb.SubmitRequest{Job: job})
		if err == nil {
			fmt.Println(response.WorkflowId)
		}
		return true, err
	case "watch":
		last, err := watch(client, argument, optional)
		if last.GetError() != nil {
			fmt.Fprintln(os.Stderr, last.Error.Message)
		}
		return last.GetState() == pb.JobState_JOB_STATE_SUCCEEDED, err
	case "cancel":
		response, err := client.Cancel(ctx, &pb.CancelRequest{WorkflowId: argument, Reason: optional})
		if state := response.GetStatus().GetState(); isFinal(state) {
			fmt.Println(state)
		} else if err == nil {
			fmt.Println("cancel requested")
		}
		return true, err
	}
	return false, fmt.Errorf("usage: client submit JOB_AS_JSON | watch WORKFLOW_ID [RESUME_TOKEN] | cancel WORKFLOW_ID [REASON]")
}

func main() {
	address := os.Getenv("LLM_ADDRESS")
	if address == "" {
		address = "127.0.0.1:50051"
	}
	channel, err := grpc.Dial(address, grpc.WithInsecure())
	succeeded := false
	if err == nil {
		arguments := append(os.Args[1:], "", "", "")
		succeeded, err = run(pb.NewLlmServiceClient(channel), arguments[0], arguments[1], arguments[2])
	}
	if failure, ok := status.FromError(err); err != nil && ok {
		fmt.Fprintf(os.Stderr, "%s: %s\n", code.Code(failure.Code()), failure.Message())
		if failure.Code() == codes.Unavailable {
			fmt.Fprintf(os.Stderr, "Does a gateway listen at %s? LLM_ADDRESS names another address.\n", address)
		}
	} else if err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
	if err != nil || !succeeded {
		os.Exit(1)
	}
}
