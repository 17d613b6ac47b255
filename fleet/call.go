package fleet

import (
	"cmp"
	"context"
	"crypto/rand"
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
	recv func() (*pb.AnswerChunk, error)
	end  func()
	once sync.Once
}

// Recv gives the next chunk, io.EOF at the end, or the node's error as a
// *cluster.Error; an answer that broke off has CodeUnavailable.
func (a *Answer) Recv() (*pb.AnswerChunk, error) { return a.recv() }

// Close ends the call; the node's stream is cancelled.
func (a *Answer) Close() { a.once.Do(a.end) }

// errNotHere says that another server may hold the node.
var errNotHere = errors.New("the node is not connected to this server")

// Call asks a node for something, through whichever server holds its stream. When
// none does the error has CodeUnavailable and says so.
func (s *Server) Call(ctx context.Context, nodeID string, call *pb.Call) (*Answer, error) {
	a, err := s.callHere(ctx, nodeID, call)
	if !errors.Is(err, errNotHere) {
		return a, err
	}
	for _, id := range s.holders(nodeID) {
		if a, err = s.callThere(ctx, id, nodeID, call); !errors.Is(err, errNotHere) {
			return a, err
		}
	}
	return nil, cluster.Errorf(cluster.CodeUnavailable, "node %s is not connected to any server", nodeID)
}

// callThere has another server ask a node that it holds.
func (s *Server) callThere(ctx context.Context, serverID, nodeID string, c *pb.Call) (*Answer, error) {
	client, err := s.client(serverID)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	stream, err := client.Call(ctx, &pb.PeerCall{Node: nodeID, Call: c})
	var first *pb.AnswerChunk
	if err == nil {
		first, err = stream.Recv()
	}
	switch {
	case status.Code(err) == codes.FailedPrecondition:
		err = errNotHere
	case err != nil:
		err = fromStatus(serverID, err)
	case first.Error != nil:
		err = fromWire(first.Error)
	}
	if err != nil {
		cancel()
		return nil, err
	}
	recv := func() (*pb.AnswerChunk, error) {
		chunk, err := stream.Recv()
		switch {
		case errors.Is(err, io.EOF):
			return nil, io.EOF
		case err != nil && ctx.Err() != nil:
			return nil, ctx.Err()
		case err != nil:
			return nil, cluster.Errorf(cluster.CodeUnavailable, "the node's answer broke off: %v", err)
		case chunk.Error != nil:
			return nil, fromWire(chunk.Error)
		}
		return chunk, nil
	}
	return &Answer{recv: recv, end: cancel}, nil
}

func fromWire(e *pb.Error) error { return &cluster.Error{Code: cluster.Code(e.Code), Text: e.Text} }

// Call implements pb.PeersServer: it asks a node that this server holds.
func (p *peerService) Call(r *pb.PeerCall, stream pb.Peers_CallServer) error {
	failed := func(err error) error {
		return stream.Send(&pb.AnswerChunk{Error: &pb.Error{Code: string(cluster.CodeOf(err)), Text: err.Error()}})
	}
	if r.Call == nil {
		return status.Error(codes.InvalidArgument, "the call is missing")
	}
	a, err := p.server.callHere(stream.Context(), r.Node, r.Call)
	if errors.Is(err, errNotHere) {
		return status.Error(codes.FailedPrecondition, err.Error())
	}
	if err != nil {
		return failed(err)
	}
	defer a.Close()
	if err := stream.Send(&pb.AnswerChunk{}); err != nil {
		return err
	}
	for {
		chunk, err := a.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return failed(err)
		}
		if err := stream.Send(chunk); err != nil {
			return err
		}
	}
}

// call is a call under way to a node that this server holds.
type call struct {
	id     string
	nodeID string // whom it asks
	server *Server
	opened chan struct{} // closed when the node's stream has come
	chunks chan *pb.AnswerChunk
	broken error // why the node's stream broke off, nil at its end; set before chunks is closed
	ctx    context.Context
}

// callHere asks a node whose stream this server holds, else it gives errNotHere.
func (s *Server) callHere(ctx context.Context, nodeID string, c *pb.Call) (*Answer, error) {
	s.mu.Lock()
	sess := s.sessions[nodeID]
	s.mu.Unlock()
	if sess == nil {
		return nil, errNotHere
	}
	select {
	case sess.calls <- struct{}{}:
	default:
		return nil, cluster.Errorf(cluster.CodeUnavailable, "node %s has %d calls under way; try again", nodeID, MaxCalls)
	}
	ctx, cancel := context.WithCancel(ctx)
	a := &call{id: rand.Text(), nodeID: nodeID, server: s, opened: make(chan struct{}), chunks: make(chan *pb.AnswerChunk, answerQueue), ctx: ctx}
	answer := &Answer{recv: a.recv, end: func() {
		cancel()
		s.mu.Lock()
		delete(s.answers, a.id)
		s.mu.Unlock()
		<-sess.calls
	}}
	s.mu.Lock()
	s.answers[a.id] = a
	s.mu.Unlock()
	if err := a.ask(sess, &pb.Call{Id: a.id, Request: c.Request}); err != nil {
		answer.Close()
		return nil, err
	}
	return answer, nil
}

// ask sends the call and waits for the node to open its answer.
func (a *call) ask(sess *session, c *pb.Call) error {
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
		case out <- &pb.ServerMessage{Message: &pb.ServerMessage_Call{Call: c}}:
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

func (a *call) recv() (*pb.AnswerChunk, error) {
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
			return nil, fromWire(c.Error)
		}
		return c, nil
	case <-a.ctx.Done():
		return nil, a.ctx.Err()
	}
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
	who, err := s.identify(stream.Context(), "Answer")
	if err != nil {
		return err
	}
	c, err := stream.Recv()
	if err != nil {
		return err
	}
	s.mu.Lock()
	a := s.answers[c.CallId]
	if a != nil && who.speaksFor(a.nodeID) != nil {
		a = nil
	}
	if a != nil {
		delete(s.answers, c.CallId) // an answer comes once
	}
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
	soon, cancel := context.WithTimeout(ctx, s.cfg.CheckWait)
	defer cancel()
	for {
		snap, ws := s.cfg.Store.State().Snapshot(), cluster.WatchSet{}
		ws.Add(snap.Abandoned())
		s.mu.Lock()
		ws.Add(s.attached)
		s.mu.Unlock()
		v, err := s.checkNow(ctx, snap.Nodes(ws, ""), digest, size)
		if cluster.CodeOf(err) != cluster.CodeUnavailable {
			return v, err
		}
		if ws.WatchCtx(soon) != nil {
			return nil, cmp.Or(ctx.Err(), err)
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

// checkNow asks the nodes one after another.
func (s *Server) checkNow(ctx context.Context, nodes []*cluster.Node, digest string, size int64) (*cluster.ModelVersion, error) {
	for _, n := range nodes {
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
