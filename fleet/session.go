package fleet

import (
	"context"
	"errors"
	"io"
	"iter"
	"maps"
	"slices"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/rxvision/rxvision/cluster"
	"github.com/rxvision/rxvision/fleet/pb"
)

// session is one node's stream. Its messages leave through out, one sender.
type session struct {
	server  *Server
	nodeID  string
	ctx     context.Context // ends with the session
	cancel  context.CancelCauseFunc
	out     chan *pb.ServerMessage
	acks    chan uint64   // what is committed; has room for all reports under way
	reports chan struct{} // a slot per report between its arrival and its acknowledgement
	calls   chan struct{} // a slot per reverse call under way
	told    chan struct{} // closed when the first desired state is queued: calls come after it
	last    atomic.Int64  // unix nanoseconds of the last message
}

func newSession(ctx context.Context, cancel context.CancelCauseFunc, s *Server, nodeID string) *session {
	c := &session{
		server: s, nodeID: nodeID, ctx: ctx, cancel: cancel, out: make(chan *pb.ServerMessage, sendQueue),
		acks: make(chan uint64, maxReports), reports: make(chan struct{}, maxReports), calls: make(chan struct{}, MaxCalls),
		told: make(chan struct{}),
	}
	c.touch()
	// Before anybody else can send: it is the first message of the stream.
	c.out <- &pb.ServerMessage{Message: &pb.ServerMessage_Welcome{Welcome: &pb.Welcome{
		TtlMs: s.cfg.TTL.Milliseconds(), Server: s.cfg.Name,
	}}}
	return c
}

func (c *session) touch()           { c.last.Store(time.Now().UnixNano()) }
func (c *session) heard() time.Time { return time.Unix(0, c.last.Load()) }

// run serves the stream until it breaks or the session is cancelled.
func (c *session) run(stream pb.Fleet_AttachServer) error {
	// Sender and receiver may hang in the stream of a node that neither reads nor
	// writes. They are not waited for: they end when the handler returns and gRPC
	// ends the stream with it.
	go func() { c.cancel(c.send(stream)) }()
	go func() { c.cancel(c.receive(stream)) }()
	c.cancel(c.desire())
	if err := context.Cause(c.ctx); !errors.Is(err, io.EOF) && !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}

// push queues a message; false when the session is over.
func (c *session) push(m *pb.ServerMessage) bool {
	select {
	case c.out <- m:
		return true
	case <-c.ctx.Done():
		return false
	}
}

func (c *session) send(stream pb.Fleet_AttachServer) error {
	for {
		select {
		case m := <-c.out:
			if err := stream.Send(m); err != nil {
				return err
			}
		case seq := <-c.acks:
			<-c.reports
			if err := stream.Send(&pb.ServerMessage{Message: &pb.ServerMessage_Ack{Ack: &pb.Ack{Seq: seq}}}); err != nil {
				return err
			}
		case <-c.ctx.Done():
			return c.ctx.Err()
		}
	}
}

// errForgotten ends the session of a node that was purged, that a restore lost,
// or that was missed while it registered.
var errForgotten = status.Error(codes.Aborted, "the servers do not count this node as connected: register again")

// counted says whether the state holds the node as one that is there.
func (c *session) counted(snap *cluster.Snapshot, ws cluster.WatchSet) bool {
	n := snap.Node(ws, c.nodeID)
	return n != nil && n.Status != cluster.NodeStatusDown
}

// desire follows what the state wants of the node and sends the differences.
func (c *session) desire() error {
	var (
		known bool              // the state has counted this node
		of    <-chan struct{}   // tells one state from another
		sent  map[string]uint64 // allocation → AllocModifyIndex
		jobs  map[jobVersion]bool
	)
	for {
		snap := c.server.cfg.Store.State().Snapshot()
		ws := cluster.WatchSet{}
		ws.Add(snap.Abandoned())
		switch counted := c.counted(snap, ws); {
		case counted:
			known = true
		case known: // else the state here may not have caught up with the registration
			return errForgotten
		}
		first, full := of == nil, snap.Abandoned() != of
		if full { // the first time, or after a restore: say everything
			of, sent, jobs = snap.Abandoned(), map[string]uint64{}, map[jobVersion]bool{}
		}
		d := c.difference(snap, ws, sent, jobs, full)
		if full || len(d.Allocs) > 0 || len(d.Gone) > 0 {
			for _, part := range split(d, MaxMessage/2, maps.Keys(sent)) {
				if !c.push(&pb.ServerMessage{Message: &pb.ServerMessage_Desired{Desired: part}}) {
					return c.ctx.Err()
				}
			}
		}
		if first {
			close(c.told)
		}
		if err := ws.WatchCtx(c.ctx); err != nil {
			return err
		}
	}
}

type jobVersion struct {
	cluster.JobKey
	created, version uint64
}

func (c *session) difference(snap *cluster.Snapshot, ws cluster.WatchSet, sent map[string]uint64, jobs map[jobVersion]bool, full bool) *pb.Desired {
	allocs := snap.AllocsByNode(ws, c.nodeID)
	d := &pb.Desired{Index: snap.Index(nil, cluster.TableAllocs), Full: full}
	now := make(map[string]bool, len(allocs))
	used := map[jobVersion]bool{}
	for _, a := range allocs {
		now[a.ID] = true
		v := jobVersion{a.JobKey(), a.JobCreateIndex, a.JobVersion}
		used[v] = true
		if sent[a.ID] == a.AllocModifyIndex {
			continue
		}
		if !jobs[v] {
			if j := snap.JobVersion(nil, a.JobKey(), a.JobVersion); j != nil {
				d.Jobs = append(d.Jobs, cluster.Marshal(j))
				jobs[v] = true
			}
		}
		sent[a.ID] = a.AllocModifyIndex
		d.Allocs = append(d.Allocs, cluster.Marshal(a))
	}
	for id := range sent {
		if !now[id] {
			d.Gone = append(d.Gone, id)
			delete(sent, id)
		}
	}
	for v := range jobs {
		if !used[v] {
			delete(jobs, v)
		}
	}
	return d
}

// split keeps messages near a number of bytes. The last part carries what holds
// for the whole: whether it is full, which IDs are gone, and, where parts came
// before a full one, the IDs of all.
func split(d *pb.Desired, most int, all iter.Seq[string]) []*pb.Desired {
	var parts []*pb.Desired
	size, p := 0, &pb.Desired{Index: d.Index}
	next := func(b []byte) {
		if size += len(b); size > most && size > len(b) {
			parts, size, p = append(parts, p), len(b), &pb.Desired{Index: d.Index}
		}
	}
	for _, j := range d.Jobs {
		next(j)
		p.Jobs = append(p.Jobs, j)
	}
	for _, a := range d.Allocs {
		next(a)
		p.Allocs = append(p.Allocs, a)
	}
	p.Full, p.Gone = d.Full, d.Gone
	if p.Full && parts != nil {
		p.All = slices.Sorted(all)
	}
	return append(parts, p)
}

// receive takes what the node says. Status updates are acknowledged when they
// are in the log.
func (c *session) receive(stream pb.Fleet_AttachServer) error {
	for {
		msg, err := stream.Recv()
		if err != nil {
			return err
		}
		c.touch()
		switch m := msg.Message.(type) {
		case *pb.NodeMessage_Heartbeat:
			if !c.counted(c.server.cfg.Store.State().Snapshot(), nil) {
				return errForgotten
			}
		case *pb.NodeMessage_Allocs:
			if err := c.report(m.Allocs); err != nil {
				return err
			}
		case *pb.NodeMessage_Node:
			n, err := decodeNode(m.Node.Node)
			if err != nil {
				return err
			}
			if n.ID != c.nodeID {
				return status.Errorf(codes.PermissionDenied, "a session of node %s may not speak for node %s", c.nodeID, n.ID)
			}
			if err := c.server.register(c.ctx, n); err != nil {
				return err
			}
		default:
			return status.Error(codes.InvalidArgument, "unknown message from the node")
		}
	}
}

// report queues a batch of status for the log; the acknowledgement follows when
// it is committed. A node speaks for its own allocations only.
func (c *session) report(u *pb.AllocUpdates) error {
	snap := c.server.cfg.Store.State().Snapshot()
	var own []*cluster.Allocation
	for _, b := range u.Allocs {
		a := new(cluster.Allocation)
		if err := cluster.Unmarshal(b, a); err != nil {
			return status.Errorf(codes.InvalidArgument, "allocation record: %v", err)
		}
		if known := snap.Alloc(nil, a.ID); known != nil && known.NodeID == c.nodeID {
			own = append(own, a)
		}
	}
	select {
	case c.reports <- struct{}{}: // a node that does not read what it is told is not read either
	case <-c.ctx.Done():
		return c.ctx.Err()
	}
	if len(own) == 0 {
		c.acks <- u.Seq
		return nil
	}
	return c.server.updates.add(c.ctx, own, func(err error) {
		if err != nil {
			c.cancel(toStatus(err)) // the node sends it again on its next stream
			return
		}
		c.acks <- u.Seq // never waits: it would hold up every node
	})
}
