package fleet

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"io"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/rxvision/rxvision/cluster"
	"github.com/rxvision/rxvision/fleet/pb"
)

// Answer is the stream of chunks that a node gives to a call. Close it.
type Answer struct {
	id     string
	server *Server
	opened chan struct{} // closed when the node's stream has come
	once   sync.Once
	chunks chan *pb.AnswerChunk
	broken error // why the node's stream broke off, nil at its end; set before chunks is closed
	ctx    context.Context
	cancel context.CancelFunc
	free   func()
}

// Call asks a node for something. The node must be attached here, else the error
// has CodeUnavailable and says so.
func (s *Server) Call(ctx context.Context, nodeID string, call *pb.Call) (*Answer, error) {
	s.mu.Lock()
	sess := s.sessions[nodeID]
	s.mu.Unlock()
	if sess == nil {
		return nil, cluster.Errorf(cluster.CodeUnavailable, "node %s is not connected to this server", nodeID)
	}
	select {
	case sess.calls <- struct{}{}:
	default:
		return nil, cluster.Errorf(cluster.CodeUnavailable, "node %s has %d calls under way; try again", nodeID, MaxCalls)
	}
	var raw [16]byte
	if _, err := rand.Read(raw[:]); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	a := &Answer{
		id: hex.EncodeToString(raw[:]), server: s, opened: make(chan struct{}),
		chunks: make(chan *pb.AnswerChunk, answerQueue), ctx: ctx, cancel: cancel,
		free: func() { <-sess.calls },
	}
	s.mu.Lock()
	s.answers[a.id] = a
	s.mu.Unlock()
	call.Id = a.id
	if err := a.ask(sess, call); err != nil {
		a.Close()
		return nil, err
	}
	return a, nil
}

// ask sends the call and waits for the node to open its answer.
func (a *Answer) ask(sess *session, call *pb.Call) error {
	limit := a.server.cfg.AnswerTimeout
	wait := time.NewTimer(limit)
	defer wait.Stop()
	var err error
	var out chan<- *pb.ServerMessage
	told := sess.told
	for {
		select {
		case <-told:
			told, out = nil, sess.out
			continue
		case out <- &pb.ServerMessage{Message: &pb.ServerMessage_Call{Call: call}}:
			out = nil // sent once
			continue
		case <-a.opened:
		case <-wait.C:
			err = cluster.Errorf(cluster.CodeUnavailable, "node %s did not answer within %s", sess.nodeID, limit)
		case <-sess.ctx.Done():
			err = cluster.Errorf(cluster.CodeUnavailable, "node %s was disconnected before it answered", sess.nodeID)
		case <-a.ctx.Done():
			err = a.ctx.Err()
		}
		return err
	}
}

// Recv gives the next chunk, io.EOF at the end, or the node's error as a
// *cluster.Error; an answer that broke off has CodeUnavailable.
func (a *Answer) Recv() (*pb.AnswerChunk, error) {
	select {
	case c, ok := <-a.chunks:
		if !ok && a.ctx.Err() != nil {
			return nil, a.ctx.Err()
		}
		if !ok && a.broken != nil {
			return nil, cluster.Errorf(cluster.CodeUnavailable, "the node's answer broke off: %v", a.broken)
		}
		if !ok {
			return nil, io.EOF
		}
		if c.Error != nil {
			return nil, &cluster.Error{Code: cluster.Code(c.Error.Code), Text: c.Error.Text}
		}
		return c, nil
	case <-a.ctx.Done():
		return nil, a.ctx.Err()
	}
}

// Close ends the call; the node's stream is cancelled.
func (a *Answer) Close() {
	a.once.Do(func() {
		a.cancel()
		a.server.mu.Lock()
		delete(a.server.answers, a.id)
		a.server.mu.Unlock()
		a.free()
	})
}

// One reads an answer of exactly one chunk of at most MaxMessage bytes.
func (a *Answer) One() ([]byte, error) {
	defer a.Close()
	c, err := a.Recv()
	if errors.Is(err, io.EOF) {
		return nil, cluster.Errorf(cluster.CodeInternal, "the node ended its answer without data")
	}
	if err != nil {
		return nil, err
	}
	return c.Data, nil
}

// Answer implements pb.FleetServer: a node's answer to one call.
func (s *Server) Answer(stream pb.Fleet_AnswerServer) error {
	c, err := stream.Recv()
	if err != nil {
		return err
	}
	s.mu.Lock()
	a := s.answers[c.CallId]
	delete(s.answers, c.CallId) // an answer comes once
	s.mu.Unlock()
	if a == nil {
		return status.Error(codes.NotFound, "nobody waits for this call any more")
	}
	close(a.opened)
	ended := make(chan struct{})
	go func() { // ends when the handler returns and the stream with it
		defer close(a.chunks)
		defer close(ended)
		for ; err == nil; c, err = stream.Recv() {
			if len(c.Data) == 0 && c.Error == nil && c.FileEvent == "" && c.File == "" {
				continue // opens the answer, or a heartbeat
			}
			select {
			case a.chunks <- c:
			case <-a.ctx.Done():
				return
			}
		}
		if !errors.Is(err, io.EOF) {
			a.broken = err
		}
	}()
	select {
	case <-ended:
		if a.ctx.Err() == nil {
			return a.broken
		}
	case <-a.ctx.Done():
	}
	return status.Error(codes.Canceled, "nobody listens any more")
}

// CheckModel has some attached node load an artifact in a limited process and
// gives what it read from it. The error says in one sentence what is wrong with
// the model, or that no node can check it now.
//
// With no such node it waits up to Config.CheckWait for one, since servers and
// agents start in any order.
func (s *Server) CheckModel(ctx context.Context, digest string, size int64) (*cluster.ModelVersion, error) {
	wait := time.NewTimer(s.cfg.CheckWait)
	defer wait.Stop()
	for {
		s.mu.Lock()
		attached := s.attached
		s.mu.Unlock()
		v, err := s.checkNow(ctx, digest, size)
		if cluster.CodeOf(err) != cluster.CodeUnavailable {
			return v, err
		}
		select {
		case <-attached:
		case <-wait.C:
			return nil, err
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// one makes a call that is answered by one chunk.
func (s *Server) one(ctx context.Context, nodeID string, call *pb.Call) ([]byte, error) {
	a, err := s.Call(ctx, nodeID, call)
	if err != nil {
		return nil, err
	}
	return a.One()
}

func (s *Server) checkNow(ctx context.Context, digest string, size int64) (*cluster.ModelVersion, error) {
	for _, n := range s.cfg.Store.State().Snapshot().Nodes(nil, "") {
		if d := n.Drivers["onnx"]; n.Status != cluster.NodeStatusReady || d == nil || !d.Healthy {
			continue
		}
		b, err := s.one(ctx, n.ID, &pb.Call{Request: &pb.Call_CheckModel{CheckModel: &pb.CheckModelRequest{Digest: digest, Size: size}}})
		if cluster.CodeOf(err) == cluster.CodeUnavailable {
			continue // another node may do it
		}
		if err != nil {
			return nil, err
		}
		v := new(cluster.ModelVersion)
		if err := cluster.Unmarshal(b, v); err != nil {
			return nil, cluster.Errorf(cluster.CodeInternal, "node %s answered a model check with an unreadable record: %v", n.ID, err)
		}
		return v, nil
	}
	return nil, cluster.Errorf(cluster.CodeUnavailable, "no connected node can check models now: start an agent whose onnx driver is healthy (`nomad node status -verbose`)")
}
