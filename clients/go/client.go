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
	"math"
	"os"
	"strconv"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	pb "llm/v1"
)

const (
	retryWait = time.Second
	// How often in a row a watch may fail: less often as long as no gateway has answered, for the address may be wrong.
	tries      = 60
	firstTries = 5
)

var (
	address = setting("LLM_ADDRESS", "127.0.0.1:50051")
	// A gateway sends a message at least every GATEWAY_KEEPALIVE, 15 s by default. A longer silence is a break.
	idleSeconds, _ = strconv.ParseFloat(setting("LLM_IDLE_SECONDS", "60"), 64)
	// Maximum time for the answer to a submit or a cancel. Both are safe to repeat.
	timeoutSeconds, _ = strconv.ParseFloat(setting("LLM_TIMEOUT_SECONDS", "30"), 64)
	// The names that the API gives the codes, for people.
	names = map[codes.Code]string{codes.InvalidArgument: "INVALID_ARGUMENT", codes.Unavailable: "UNAVAILABLE",
		codes.NotFound: "NOT_FOUND", codes.AlreadyExists: "ALREADY_EXISTS", codes.ResourceExhausted: "RESOURCE_EXHAUSTED",
		codes.DeadlineExceeded: "DEADLINE_EXCEEDED"}
)

func setting(name, otherwise string) string {
	if value := os.Getenv(name); value != "" {
		return value
	}
	return otherwise
}

// isFinal says whether a job stays in the state.
func isFinal(state pb.JobState) bool { return state >= pb.JobState_JOB_STATE_SUCCEEDED }

// retryDelay returns the delay that the gateway asks for by RetryInfo, and whether it asks for one.
func retryDelay(err error) (time.Duration, bool) {
	for _, detail := range status.Convert(err).Details() {
		if info, ok := detail.(*errdetails.RetryInfo); ok {
			return time.Duration(info.GetRetryDelay().GetSeconds())*time.Second +
				time.Duration(info.GetRetryDelay().GetNanos()), true
		}
	}
	return retryWait, false
}

// place is how far a watch has come.
type place struct {
	token    string
	offset   int64
	status   *pb.JobStatus
	failures int
	tries    int
}

// stream reads one stream. It returns nil at the job's end, otherwise why the stream broke.
func (at *place) stream(client pb.LlmServiceClient, id string) error {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	idle := time.Duration(idleSeconds * float64(time.Second))
	watchdog := time.AfterFunc(idle, cancel)
	defer watchdog.Stop()
	messages, err := client.StreamStatus(ctx, &pb.StreamStatusRequest{WorkflowId: id, ResumeToken: at.token})
	for first := true; err == nil; first = false {
		var message *pb.StreamStatusResponse
		if message, err = messages.Recv(); err == io.EOF {
			return status.Error(codes.Unavailable, "the stream ended before the job did")
		} else if err != nil {
			break
		}
		watchdog.Reset(idle)
		// Each stream begins with the status, which may be the one that the last stream has brought.
		if !first || message.Delta != nil || !proto.Equal(message.Status, at.status) {
			at.failures = 0
		}
		at.tries, at.offset = tries, message.NextOffset
		if message.ResumeToken != "" {
			at.token = message.ResumeToken
		}
		if message.Status != nil {
			at.status = message.Status
		}
		show(message)
		// Output may follow a first message with a final status.
		if message.Status != nil && isFinal(message.Status.State) && (message.Result != nil || message.Delta == nil) {
			return nil
		}
	}
	return err
}

// watch prints the job's output and states to its end. A stream that breaks is opened again where it broke, so that
// every byte of the output is printed once.
func watch(client pb.LlmServiceClient, id, token string) (*pb.JobStatus, error) {
	at := &place{token: token, tries: firstTries}
	for {
		err := at.stream(client, id)
		if err == nil {
			return at.status, nil
		}
		wait, asked := retryDelay(err)
		at.failures++
		code := status.Code(err)
		// Without RetryInfo it is a limit of gRPC's, such as a message's size.
		limited := code == codes.ResourceExhausted && asked
		if limited {
			at.tries = tries
		}
		// A proxy has reset the stream. The gateway's own errors have details.
		reset := (code == codes.Internal || code == codes.Unknown) && len(status.Convert(err).Details()) == 0
		if !(limited || reset || code == codes.Unavailable || code == codes.Canceled) || at.failures >= at.tries {
			return nil, err
		}
		fmt.Fprintf(os.Stderr, "%s; going on at byte %d\n", status.Convert(err).Message(), at.offset)
		time.Sleep(wait)
	}
}

func show(message *pb.StreamStatusResponse) {
	if delta := message.Delta; delta != nil {
		if delta.Rewind {
			fmt.Fprintf(os.Stderr, "the job started over: what follows replaces the output from byte %d\n", delta.Offset)
		}
		fmt.Print(delta.Text)
	}
	if status := message.Status; status != nil {
		fmt.Fprintf(os.Stderr, "%s %.0f %%\n", status.State, math.Round(status.GetProgress().GetPercent()))
	}
}

func run(command, argument, optional string) (bool, error) {
	channel, err := grpc.Dial(address, grpc.WithInsecure())
	if err != nil {
		return false, err
	}
	defer channel.Close()
	client := pb.NewLlmServiceClient(channel)
	ctx, cancel := context.WithTimeout(context.Background(), time.Duration(timeoutSeconds*float64(time.Second)))
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
		final, err := watch(client, argument, optional)
		if final.GetError() != nil {
			fmt.Fprintln(os.Stderr, final.Error.Message)
		}
		return final.GetState() == pb.JobState_JOB_STATE_SUCCEEDED, err
	case "cancel":
		response, err := client.Cancel(ctx, &pb.CancelRequest{WorkflowId: argument, Reason: optional})
		if err == nil && isFinal(response.Status.State) {
			fmt.Println(response.Status.State)
		} else if err == nil {
			fmt.Println("cancel requested")
		}
		return true, err
	}
	return false, fmt.Errorf("usage: client submit JOB_AS_JSON | watch WORKFLOW_ID [RESUME_TOKEN] | cancel WORKFLOW_ID [REASON]")
}

func main() {
	arguments := append(os.Args[1:], "", "", "")
	succeeded, err := run(arguments[0], arguments[1], arguments[2])
	if failed, ok := status.FromError(err); err != nil && ok {
		name := names[failed.Code()]
		if name == "" {
			name = failed.Code().String()
		}
		fmt.Fprintf(os.Stderr, "%s: %s\n", name, failed.Message())
		if failed.Code() == codes.Unavailable {
			fmt.Fprintf(os.Stderr, "Does a gateway listen at %s? LLM_ADDRESS names another address.\n", address)
		}
	} else if err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
	if err != nil || !succeeded {
		os.Exit(1)
	}
}
