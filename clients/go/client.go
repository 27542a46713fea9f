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
	"strings"
	"time"

	"google.golang.org/genproto/googleapis/rpc/code"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"

	pb "llm/v1"
)

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

// isFinal says whether a job stays in the state.
func isFinal(state pb.JobState) bool { return state >= pb.JobState_JOB_STATE_SUCCEEDED }

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

// A watcher prints a job's output on stdout, and all else about it on stderr.
type watcher struct {
	client pb.LlmServiceClient
	id     string
	token  string // Names what has been printed.
	end    int64  // Where that ends, in bytes.
	state  pb.JobState
	inLine bool // The output has not ended with a line.

	failures, tries int // Of streams in a row.
}

// watch returns the job's last status. A stream that breaks is opened again where it broke, so that every byte of the
// output is printed once.
func (w *watcher) watch() (*pb.JobStatus, error) {
	for w.tries = 5; ; {
		last, err := w.follow()
		if last != nil {
			return last, nil
		} else if err == nil {
			continue
		}
		failure := status.Convert(err)
		if failure.Code() == codes.ResourceExhausted {
			w.tries = 60 // The address may be wrong as long as no gateway has answered. One that is full has answered.
		}
		w.failures++
		delay, passes := retryDelay(failure)
		if !passes || w.failures >= w.tries {
			return nil, err
		}
		w.note("%s; going on at byte %d", failure.Message(), w.end)
		time.Sleep(delay)
	}
}

// follow prints what one stream brings. It returns the status of a job that has ended, and nothing for a job that is
// silent, which it may be for hours.
func (w *watcher) follow() (*pb.JobStatus, error) {
	// A stream is opened again after this time, so that a dead connection is noticed.
	ctx, cancel := limit("LLM_STREAM_SECONDS", "120")
	defer cancel()
	stream, err := w.client.StreamStatus(ctx, &pb.StreamStatusRequest{WorkflowId: w.id, ResumeToken: w.token})
	if err != nil {
		return nil, err
	}
	for first := true; ; first = false {
		message, err := stream.Recv()
		switch {
		case err == io.EOF:
			return nil, status.Error(codes.Unavailable, "the stream ended before the job did")
		case !first && status.Code(err) == codes.DeadlineExceeded:
			w.failures = 0
			return nil, nil
		case err != nil:
			return nil, err
		}
		w.tries = 60
		// Each stream begins with the status, which the last stream may have brought already.
		if !first || message.Delta != nil {
			w.failures = 0
		}
		w.show(message)
		// Output may follow a first message with a final status.
		if isFinal(message.GetStatus().GetState()) && (message.Result != nil || message.Delta == nil) {
			return message.Status, nil
		}
	}
}

// show prints the output, and each new state.
func (w *watcher) show(message *pb.StreamStatusResponse) {
	if message.ResumeToken != "" {
		w.token = message.ResumeToken
	}
	w.end = message.NextOffset
	if delta := message.Delta; delta != nil {
		if delta.Rewind {
			w.note("the job started over: what follows replaces the output from byte %d", delta.Offset)
		}
		fmt.Print(delta.Text)
		w.inLine = !strings.HasSuffix(delta.Text, "\n")
	}
	if message.Status != nil && message.Status.State != w.state {
		w.state = message.Status.State
		w.note("%s", w.state)
	}
}

// note prints a line. On a terminal it does not continue a line of the output.
func (w *watcher) note(format string, values ...interface{}) {
	if w.inLine {
		format = "\n" + format
	}
	w.inLine = false
	log.Printf(format, values...)
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
		last, err := (&watcher{client: client, id: argument, token: optional}).watch()
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
	if err == nil {
		arguments := append(os.Args[1:], "", "", "")
		err = run(pb.NewLlmServiceClient(channel), arguments[0], arguments[1], arguments[2])
	}
	if err == nil {
		return
	}
	if failure, ok := status.FromError(err); !ok {
		log.Print(err)
	} else {
		log.Printf("%s: %s", code.Code(failure.Code()), failure.Message())
		if failure.Code() == codes.Unavailable {
			log.Printf("Does a gateway listen at %s? LLM_ADDRESS names another address.", address)
		}
	}
	os.Exit(1)
}
