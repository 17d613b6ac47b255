package agent

import (
	"context"
	"encoding/json"
	"errors"
	"sync"
	"time"

	"google.golang.org/grpc"

	"github.com/rxvision/rxvision/cluster"
	"github.com/rxvision/rxvision/fleet/pb"
)

// Bounds of what servers may ask at once.
const (
	maxCalls = 256
	maxFrame = 64 << 10 // bytes of data in one chunk of an answer

	closeWait = 10 * time.Second // for the server to take the end of an answer
)

// calls answers what a server asks over one stream.
type calls struct {
	agent  *Agent
	client pb.FleetClient
	slots  chan struct{}
	wg     sync.WaitGroup
}

// take begins to answer a call, on a stream of its own.
func (c *calls) take(ctx context.Context, call *pb.Call) {
	select {
	case c.slots <- struct{}{}:
	default:
		c.agent.log.Warn("call refused: too many under way", "call", call.Id, "most", maxCalls)
		return
	}
	c.wg.Go(func() {
		defer func() { <-c.slots }()
		if err := c.answer(ctx, call); err != nil {
			c.agent.log.Debug("answer to a call ended", "call", call.Id, "error", err)
		}
	})
}

func (c *calls) answer(ctx context.Context, call *pb.Call) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := c.client.Answer(ctx)
	if err != nil {
		return err
	}
	// Sent at once: the server then knows that the call has come.
	if err := stream.Send(&pb.AnswerChunk{CallId: call.Id}); err != nil {
		return err
	}
	over := make(chan struct{})
	go func() { // nobody writes to us; the stream's end means that nobody listens any more
		defer close(over)
		defer cancel()
		for {
			if _, err := stream.Recv(); err != nil {
				return
			}
		}
	}()
	defer func() {
		select {
		case <-over:
		case <-time.After(closeWait):
			cancel()
			<-over
		}
	}()
	if err := c.agent.handle(ctx, call, stream); err != nil {
		e := &pb.Error{Code: string(cluster.CodeOf(err)), Text: err.Error()}
		if err := stream.Send(&pb.AnswerChunk{Error: e}); err != nil {
			return err
		}
	}
	return stream.CloseSend()
}

// answerStream is the sending side of an answer.
type answerStream = grpc.BidiStreamingClient[pb.AnswerChunk, pb.AnswerInput]

// handle does what a call asks for.
func (a *Agent) handle(ctx context.Context, call *pb.Call, out answerStream) error {
	switch q := call.Request.(type) {
	case *pb.Call_Logs:
		return a.logs(ctx, q.Logs, out)
	case *pb.Call_File:
		return a.files(ctx, q.File, out)
	case *pb.Call_NodeStats:
		return sendJSON(out, a.nodeStats())
	case *pb.Call_AllocStats:
		stats, err := a.allocStats(q.AllocStats)
		if err != nil {
			return err
		}
		return sendJSON(out, stats)
	case *pb.Call_Checks:
		results, err := a.checkResults(q.Checks.AllocId)
		if err != nil {
			return err
		}
		return sendJSON(out, results)
	case *pb.Call_Restart:
		if err := a.restartTasks(q.Restart); err != nil {
			return err
		}
		return sendJSON(out, struct{}{})
	case *pb.Call_Signal:
		if err := a.signalTasks(q.Signal); err != nil {
			return err
		}
		return sendJSON(out, struct{}{})
	case *pb.Call_CheckModel:
		v, err := a.drivers.CheckModel(ctx, q.CheckModel.Digest, q.CheckModel.Size)
		if err != nil {
			return err
		}
		return out.Send(&pb.AnswerChunk{Data: cluster.Marshal(v)})
	}
	return cluster.Errorf(cluster.CodeUnsupported, "this agent (%s) does not know what the server asks for; upgrade it", a.cfg.Version)
}

// sendJSON answers in one chunk.
func sendJSON(out answerStream, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	if len(b) > maxMessage/2 {
		return cluster.Errorf(cluster.CodeTooLarge, "the answer is over %d bytes", maxMessage/2)
	}
	return out.Send(&pb.AnswerChunk{Data: b})
}

// known finds an allocation for a call.
func (a *Agent) known(id string) (*runner, error) {
	if r := a.runner(id); r != nil {
		return r, nil
	}
	return nil, cluster.Errorf(cluster.CodeNotFound, "Unknown allocation %q", id)
}

// errNotRunning is Nomad's text.
var errNotRunning = cluster.Errorf(cluster.CodeInternal, "Task not running")

// chosen gives the tasks that a call is about: one by name, or all.
func (r *runner) chosen(name string) ([]*taskRunner, error) {
	if name != "" {
		t := r.tasks[name]
		if t == nil {
			return nil, cluster.Errorf(cluster.CodeNotFound, "Could not find task named: %s, allocation %s has none of that name", name, r.id)
		}
		return []*taskRunner{t}, nil
	}
	var all []*taskRunner
	for _, t := range r.tasks {
		all = append(all, t)
	}
	return all, nil
}

func (a *Agent) restartTasks(q *pb.RestartRequest) error {
	r, err := a.known(q.AllocId)
	if err != nil {
		return err
	}
	tasks, err := r.chosen(q.Task)
	if err != nil {
		return err
	}
	any := false
	for _, t := range tasks {
		any = t.requestRestart() || any
	}
	if !any {
		return errNotRunning
	}
	return nil
}

func (a *Agent) signalTasks(q *pb.SignalRequest) error {
	r, err := a.known(q.AllocId)
	if err != nil {
		return err
	}
	tasks, err := r.chosen(q.Task)
	if err != nil {
		return err
	}
	var errs []error
	sent := false
	for _, t := range tasks {
		if t.running() == nil && q.Task == "" {
			continue
		}
		sent = true
		errs = append(errs, t.signal(q.Signal))
	}
	if !sent {
		return errNotRunning
	}
	return errors.Join(errs...)
}
