package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"

	"github.com/rxvision/rxvision/blob"
	"github.com/rxvision/rxvision/cluster"
	"github.com/rxvision/rxvision/fleet/pb"
)

// patience bounds every wait of the tests; it is no measurement.
const patience = 60 * time.Second

// fleetServer plays the servers over a real socket: it wants allocations, learns
// how they are and asks questions.
type fleetServer struct {
	pb.UnimplementedFleetServer
	address string
	grpc    *grpc.Server

	mu       sync.Mutex
	changed  chan struct{} // closed and replaced at each change
	node     *cluster.Node
	hellos   int
	jobs     map[string]*cluster.Job
	allocs   map[string]*cluster.Allocation // desired
	reported map[string]*cluster.Allocation
	batches  int
	mute     bool // keep acknowledgements back
	replies  bool // promise to answer heartbeats …
	silent   bool // … and do not
	refuse   int  // that many hellos
	any      bool // as the last hello said
	out      chan *pb.ServerMessage
	hangUp   context.CancelFunc
	timeline string    // of what is desired
	hello    *pb.Hello // the newest
	answers  map[string]chan *pb.AnswerChunk
	blobs    map[string][]byte
}

func newFleetServer(t *testing.T) *fleetServer {
	t.Helper()
	s := &fleetServer{
		changed: make(chan struct{}), jobs: map[string]*cluster.Job{}, allocs: map[string]*cluster.Allocation{},
		reported: map[string]*cluster.Allocation{}, answers: map[string]chan *pb.AnswerChunk{}, blobs: map[string][]byte{},
	}
	s.listen(t, "127.0.0.1:0")
	t.Cleanup(func() { s.grpc.Stop() })
	return s
}

func (s *fleetServer) listen(t *testing.T, address string) {
	t.Helper()
	l, err := net.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	s.address = l.Addr().String()
	s.grpc = grpc.NewServer(grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: time.Second, PermitWithoutStream: true}))
	pb.RegisterFleetServer(s.grpc, s)
	server := s.grpc
	go func() { _ = server.Serve(l) }()
}

// stop ends the server and all its streams; listen starts it again.
func (s *fleetServer) stop() { s.grpc.Stop() }

// change runs f under the lock and wakes all who wait.
func (s *fleetServer) change(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	defer func() {
		close(s.changed)
		s.changed = make(chan struct{})
	}()
	f()
}

// wait waits until ok, called under the lock, holds.
func (s *fleetServer) wait(t *testing.T, what string, ok func() bool) {
	t.Helper()
	limit := time.After(patience)
	for {
		held, changed := s.check(ok)
		if held {
			return
		}
		select {
		case <-changed:
		case <-limit:
			s.mu.Lock()
			defer s.mu.Unlock()
			for id, a := range s.reported {
				t.Logf("%s: %s (%s) %+v", id, a.ClientStatus, a.ClientDescription, a.Serving)
				for name, ts := range a.TaskStates {
					for _, e := range ts.Events {
						t.Logf("  %s %s: %s", name, e.Type, e.DisplayMessage)
					}
				}
			}
			t.Fatalf("waited in vain for %s", what)
		}
	}
}

// check calls ok under the lock, which it lets go also if ok panics.
func (s *fleetServer) check(ok func() bool) (bool, <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return ok(), s.changed
}

func (s *fleetServer) Attach(stream pb.Fleet_AttachServer) error {
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	n := new(cluster.Node)
	if h := first.GetHello(); h == nil || h.Protocol != 1 || cluster.Unmarshal(h.Node, n) != nil {
		return status.Error(codes.InvalidArgument, "bad hello")
	}
	refused := false
	s.change(func() {
		s.any, s.hello = first.GetHello().Any, first.GetHello()
		if refused = s.refuse > 0; refused {
			s.refuse--
		}
	})
	if refused {
		return status.Error(codes.Unavailable, "not now")
	}
	ctx, cancel := context.WithCancel(stream.Context())
	defer cancel()
	out := make(chan *pb.ServerMessage, 1000)
	out <- &pb.ServerMessage{Message: &pb.ServerMessage_Welcome{Welcome: &pb.Welcome{TtlMs: 3000, Server: "fake", Answers: s.replies}}}
	s.change(func() {
		s.node, s.out, s.hangUp = n, out, cancel
		s.hellos++
		out <- s.desired(true)
	})
	defer s.change(func() {
		if s.out == out {
			s.out = nil
		}
	})
	received := make(chan error, 1)
	go func() { received <- s.receive(stream, out) }()
	for {
		select {
		case m := <-out:
			if err := stream.Send(m); err != nil {
				return err
			}
		case err := <-received:
			return err
		case <-ctx.Done():
			return status.Error(codes.Unavailable, "the server hung up")
		}
	}
}

func (s *fleetServer) receive(stream pb.Fleet_AttachServer, out chan *pb.ServerMessage) error {
	for {
		m, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		switch m := m.Message.(type) {
		case *pb.NodeMessage_Heartbeat:
			s.change(func() {
				if s.replies && !s.silent {
					out <- &pb.ServerMessage{Message: &pb.ServerMessage_Heartbeat{Heartbeat: &pb.Heartbeat{}}}
				}
			})
		case *pb.NodeMessage_Node:
			n := new(cluster.Node)
			if err := cluster.Unmarshal(m.Node.Node, n); err != nil {
				return err
			}
			s.change(func() { s.node = n })
		case *pb.NodeMessage_Allocs:
			var bad error
			s.change(func() {
				s.batches++
				for _, b := range m.Allocs.Allocs {
					a := new(cluster.Allocation)
					if bad = cluster.Unmarshal(b, a); bad != nil {
						return
					}
					if !s.mute {
						s.reported[a.ID] = a
					}
				}
				if !s.mute {
					out <- &pb.ServerMessage{Message: &pb.ServerMessage_Ack{Ack: &pb.Ack{Seq: m.Allocs.Seq}}}
				}
			})
			if bad != nil {
				return bad
			}
		}
	}
}

// desired is the message that wants everything; hold mu.
func (s *fleetServer) desired(full bool, gone ...string) *pb.ServerMessage {
	d := &pb.Desired{Full: full, Gone: gone, Timeline: s.timeline}
	for _, j := range s.jobs {
		d.Jobs = append(d.Jobs, cluster.Marshal(j))
	}
	for _, a := range s.allocs {
		d.Allocs = append(d.Allocs, cluster.Marshal(a))
	}
	return &pb.ServerMessage{Message: &pb.ServerMessage_Desired{Desired: d}}
}

// want changes what is desired and sends it, if a node is attached.
func (s *fleetServer) want(f func(), gone ...string) {
	s.change(func() {
		f()
		if s.out != nil {
			s.out <- s.desired(false, gone...)
		}
	})
}

// run wants an allocation of a job.
func (s *fleetServer) run(j *cluster.Job, a *cluster.Allocation) {
	s.want(func() {
		s.jobs[j.ID], s.allocs[a.ID] = j, a
	})
}

// edit changes an allocation's desired side.
func (s *fleetServer) edit(id string, f func(a *cluster.Allocation)) {
	s.want(func() {
		a := cluster.Clone(s.allocs[id])
		f(a)
		s.allocs[id] = a
	})
}

func (s *fleetServer) halt(id string) {
	s.edit(id, func(a *cluster.Allocation) { a.DesiredStatus = cluster.AllocDesiredStop })
}

// alloc gives what the node last said of an allocation, nil when nothing.
func (s *fleetServer) alloc(id string) *cluster.Allocation {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.reported[id]
}

func (s *fleetServer) waitStatus(t *testing.T, id, want string) *cluster.Allocation {
	t.Helper()
	var got *cluster.Allocation
	s.wait(t, fmt.Sprintf("allocation %s to be %s", id, want), func() bool {
		got = s.reported[id]
		return got != nil && got.ClientStatus == want
	})
	return got
}

// waitEvent waits for an event of a task whose message contains text.
func (s *fleetServer) waitEvent(t *testing.T, id, task, kind, text string) *cluster.Allocation {
	t.Helper()
	var got *cluster.Allocation
	s.wait(t, fmt.Sprintf("event %s %q of task %s", kind, text, task), func() bool {
		got = s.reported[id]
		return hasEvent(got, task, kind, text)
	})
	return got
}

func (s *fleetServer) Answer(stream pb.Fleet_AnswerServer) error {
	c, err := stream.Recv()
	if err != nil {
		return err
	}
	s.mu.Lock()
	ch := s.answers[c.CallId]
	s.mu.Unlock()
	if ch == nil {
		return status.Error(codes.NotFound, "no such call")
	}
	for ; err == nil; c, err = stream.Recv() {
		select {
		case ch <- c:
		case <-stream.Context().Done():
			return stream.Context().Err()
		}
	}
	close(ch)
	return nil
}

// call asks the node something; the channel closes at the end of the answer.
func (s *fleetServer) call(t *testing.T, c *pb.Call) <-chan *pb.AnswerChunk {
	t.Helper()
	ch := make(chan *pb.AnswerChunk, 1000)
	s.wait(t, "an agent to ask", func() bool { return s.out != nil })
	s.change(func() {
		c.Id = fmt.Sprint("call-", len(s.answers))
		s.answers[c.Id] = ch
		s.out <- &pb.ServerMessage{Message: &pb.ServerMessage_Call{Call: c}}
	})
	return ch
}

// ask collects a whole answer.
func (s *fleetServer) ask(t *testing.T, c *pb.Call) (data []byte, chunks []*pb.AnswerChunk, err error) {
	t.Helper()
	limit, ch := time.After(patience), s.call(t, c)
	for {
		select {
		case c, ok := <-ch:
			if !ok {
				return data, chunks, nil
			}
			if c.Error != nil {
				return data, chunks, &cluster.Error{Code: cluster.Code(c.Error.Code), Text: c.Error.Text}
			}
			if len(c.Data) > 0 || c.FileEvent != "" {
				data, chunks = append(data, c.Data...), append(chunks, c)
			}
		case <-limit:
			t.Fatal("a call was not answered")
		}
	}
}

func (s *fleetServer) Artifact(q *pb.ArtifactRequest, stream pb.Fleet_ArtifactServer) error {
	s.mu.Lock()
	b, ok := s.blobs[q.Digest]
	s.mu.Unlock()
	if !ok {
		return status.Error(codes.NotFound, "no such artifact")
	}
	return stream.Send(&pb.ArtifactChunk{Data: b[q.Offset:], Size: int64(len(b))})
}

// model stores an artifact and gives a task's reference to it.
func (s *fleetServer) model(content string) *cluster.ModelRef {
	d := blob.Sum([]byte(content)).String()
	s.change(func() { s.blobs[d] = []byte(content) })
	return &cluster.ModelRef{Reference: "m", Name: "m", Version: 3, Digest: d, Size: int64(len(content))}
}
