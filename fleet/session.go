package fleet

import (
	"context"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/rxvision/rxvision/cluster"
	"github.com/rxvision/rxvision/fleet/pb"
)

// session is one node's stream. Its messages leave through out, one sender.
type session struct {
	server *Server
	nodeID string
	cancel context.CancelCauseFunc
	out    chan *pb.ServerMessage
	calls  chan struct{} // a slot per reverse call under way
	last   atomic.Int64  // unix nanoseconds of the last message
}

func (c *session) touch()           { c.last.Store(time.Now().UnixNano()) }
func (c *session) heard() time.Time { return time.Unix(0, c.last.Load()) }

// run serves the stream until it breaks or the session is cancelled.
func (c *session) run(ctx context.Context, stream pb.Fleet_AttachServer) error {
	ctx, cancel := context.WithCancelCause(ctx)
	var wg sync.WaitGroup
	start := func(f func() error) {
		wg.Add(1)
		go func() { defer wg.Done(); cancel(f()) }()
	}
	start(func() error { return c.send(ctx, stream) })
	start(func() error { return c.desire(ctx) })
	// The receiver ends when the handler returns and gRPC ends the stream; it
	// is not waited for, since Recv has no other way out.
	go func() { cancel(c.receive(ctx, stream)) }()
	c.push(ctx, &pb.ServerMessage{Message: &pb.ServerMessage_Welcome{Welcome: &pb.Welcome{
		TtlMs: c.server.cfg.TTL.Milliseconds(), Server: c.server.cfg.Name,
	}}})
	<-ctx.Done()
	wg.Wait()
	if err := context.Cause(ctx); err != io.EOF && err != context.Canceled {
		return err
	}
	return nil
}

// push queues a message; false when the session is over.
func (c *session) push(ctx context.Context, m *pb.ServerMessage) bool {
	select {
	case c.out <- m:
		return true
	case <-ctx.Done():
		return false
	}
}

func (c *session) send(ctx context.Context, stream pb.Fleet_AttachServer) error {
	for {
		select {
		case m := <-c.out:
			if err := stream.Send(m); err != nil {
				return err
			}
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// desire follows what the state wants of the node and sends the differences.
func (c *session) desire(ctx context.Context) error {
	sent := map[string]uint64{} // allocation → AllocModifyIndex
	jobs := map[jobVersion]bool{}
	full := true
	for {
		snap := c.server.cfg.Store.State().Snapshot()
		ws := cluster.WatchSet{}
		ws.Add(snap.Abandoned())
		d := c.difference(snap, ws, sent, jobs, full)
		if full || len(d.Allocs) > 0 || len(d.Gone) > 0 {
			for _, part := range split(d) {
				if !c.push(ctx, &pb.ServerMessage{Message: &pb.ServerMessage_Desired{Desired: part}}) {
					return ctx.Err()
				}
			}
		}
		full = false
		if err := ws.WatchCtx(ctx); err != nil {
			return err
		}
		select {
		case <-snap.Abandoned(): // a restore: say everything again
			sent, jobs, full = map[string]uint64{}, map[jobVersion]bool{}, true
		default:
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

// split keeps messages under MaxMessage. Only a full one must be whole in its
// list of names, so its parts after the first are differences.
func split(d *pb.Desired) []*pb.Desired {
	const most = MaxMessage / 2
	size := 0
	for _, b := range append(append([][]byte{}, d.Jobs...), d.Allocs...) {
		size += len(b)
	}
	if size <= most {
		return []*pb.Desired{d}
	}
	parts := []*pb.Desired{{Index: d.Index, Gone: d.Gone}}
	size = 0
	add := func(b []byte) *pb.Desired {
		if size += len(b); size > most {
			parts, size = append(parts, &pb.Desired{Index: d.Index}), len(b)
		}
		return parts[len(parts)-1]
	}
	for _, j := range d.Jobs {
		p := add(j)
		p.Jobs = append(p.Jobs, j)
	}
	for _, a := range d.Allocs {
		p := add(a)
		p.Allocs = append(p.Allocs, a)
	}
	return parts
}

// receive takes what the node says. Status updates are acknowledged when they
// are in the log.
func (c *session) receive(ctx context.Context, stream pb.Fleet_AttachServer) error {
	for {
		msg, err := stream.Recv()
		if err != nil {
			return err
		}
		c.touch()
		switch m := msg.Message.(type) {
		case *pb.NodeMessage_Heartbeat:
		case *pb.NodeMessage_Allocs:
			if err := c.report(ctx, m.Allocs); err != nil {
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
			if err := c.server.register(ctx, n); err != nil {
				return err
			}
		default:
			return status.Error(codes.InvalidArgument, "unknown message from the node")
		}
	}
}

// report queues a batch of status for the log; the acknowledgement follows when
// it is committed. A node speaks for its own allocations only.
func (c *session) report(ctx context.Context, u *pb.AllocUpdates) error {
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
	ack := &pb.ServerMessage{Message: &pb.ServerMessage_Ack{Ack: &pb.Ack{Seq: u.Seq}}}
	if len(own) == 0 {
		c.push(ctx, ack)
		return nil
	}
	return c.server.updates.add(ctx, own, func(err error) {
		if err != nil {
			c.cancel(toStatus(err)) // the node sends it again on its next stream
			return
		}
		c.push(ctx, ack)
	})
}
