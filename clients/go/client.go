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
	"errors"
	"fmt"
	"io"
	"log"
	"os"
	"time"

	"google.golang.org/genproto/googleapis/rpc/code"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"

	pb "llm/v1"
)

// How often in a row a watch may fail: less often as long as no gateway has answered, for the address may be wrong.
const mostTries, firstTries = 60, 5

func setting(name, otherwise string) string {
	if value, ok := os.LookupEnv(name); ok {
		return value
	}
	return otherwise
}

// limit returns a context with the time limit of a setting, in seconds.
func limit(name, otherwise string) (context.Context, context.CancelFunc) {
	most, err := time.ParseDuration(setting(name, otherwise) + "s")
	if err != nil {
		log.Fatalf("%s: %v", name, err)
	}
	return context.WithTimeout(context.Background(), most)
}

func isFinal(state pb.JobState) bool { return state >= pb.JobState_JOB_STATE_SUCCEEDED }

// watch prints the job's output and states to its end, and returns the last status. A stream that breaks is opened again
// where it broke, so that every byte of the output is printed once.
func watch(client pb.LlmServiceClient, request *pb.StreamStatusRequest) (*pb.JobStatus, error) {
	var end int64
	var state pb.JobState
	failures, tries := 0, firstTries
	for {
		// A stream is opened again after this time, so that a dead connection is noticed.
		ctx, cancel := limit("LLM_STREAM_SECONDS", "120")
		stream, err := client.StreamStatus(ctx, request)
		answered := false
		for err == nil {
			var message *pb.StreamStatusResponse
			if message, err = stream.Recv(); err != nil {
				break
			}
			// Each stream begins with the status, which the last stream may have brought already.
			if answered || message.Delta != nil {
				failures = 0
			}
			answered, tries, end = true, mostTries, message.NextOffset
			if message.ResumeToken != "" {
				request.ResumeToken = message.ResumeToken
			}
			if message.GetDelta().GetRewind() {
				log.Printf("\nthe job started over: what follows replaces the output from byte %d", message.Delta.Offset)
			}
			fmt.Print(message.GetDelta().GetText())
			if message.Status != nil && message.Status.State != state {
				state = message.Status.State
				log.Printf("\n%s", state)
			}
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
		failure := status.Convert(err)
		if answered && failure.Code() == codes.DeadlineExceeded {
			failures = 0
			continue // A job may be silent for hours: a stream that has begun and fallen silent has not failed.
		}
		failures++
		if failure.Code() == codes.ResourceExhausted {
			tries = mostTries // A gateway that is full has answered.
		}
		delay, passes := retryDelay(failure)
		if !passes || failures >= tries {
			return nil, err
		}
		log.Printf("\n%s; going on at byte %d", failure.Message(), end)
		time.Sleep(delay)
	}
}

// retryDelay returns the time until the next try after an error, and whether the error passes by itself.
func retryDelay(failure *status.Status) (time.Duration, bool) {
	for _, detail := range failure.Details() {
		if info, ok := detail.(*errdetails.RetryInfo); ok {
			return info.RetryDelay.AsDuration(), true
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

// run does what the command line asks for. A watch of a job that does not succeed is an error.
func run(client pb.LlmServiceClient, command, argument, optional string) error {
	ctx, cancel := limit("LLM_TIMEOUT_SECONDS", "30")
	defer cancel()
	switch command {
	case "submit":
		job := &pb.JobRequest{}
		if err := protojson.Unmarshal([]byte(argument), job); err != nil {
			return fmt.Errorf("the job is no JSON of a JobRequest: %w", err)
		}
		response, err := client.Submit(ctx, &pb.SubmitRequest{Job: job})
		if err == nil {
			fmt.Println(response.WorkflowId)
		}
		return err
	case "watch":
		last, err := watch(client, &pb.StreamStatusRequest{WorkflowId: argument, ResumeToken: optional})
		if err == nil && last.State != pb.JobState_JOB_STATE_SUCCEEDED {
			err = errors.New(last.GetError().GetMessage())
		}
		return err
	case "cancel":
		response, err := client.Cancel(ctx, &pb.CancelRequest{WorkflowId: argument, Reason: optional})
		if state := response.GetStatus().GetState(); isFinal(state) {
			fmt.Println(state)
		} else if err == nil {
			fmt.Println("cancel requested")
		}
		return err
	}
	return errors.New("usage: client submit JOB_AS_JSON | watch WORKFLOW_ID [RESUME_TOKEN] | cancel WORKFLOW_ID [REASON]")
}

func main() {
	log.SetFlags(0)
	address := setting("LLM_ADDRESS", "127.0.0.1:50051")
	channel, err := grpc.Dial(address, grpc.WithInsecure())
	if err != nil {
		log.Fatal(err)
	}
	arguments := append(os.Args[1:], "", "", "")
	if err = run(pb.NewLlmServiceClient(channel), arguments[0], arguments[1], arguments[2]); err == nil {
		return
	}
	if failure, ok := status.FromError(err); ok {
		err = fmt.Errorf("%s: %s", code.Code(failure.Code()), failure.Message())
		if failure.Code() == codes.Unavailable {
			err = fmt.Errorf("%w\nDoes a gateway listen at %s? LLM_ADDRESS names another address.", err, address)
		}
	}
	log.Fatal(err)
}
