package fleet

import (
	"context"
	"errors"
	"io"
	"iter"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/rxvision/rxvision/cluster"
	"github.com/rxvision/rxvision/fleet/pb"
)

// session is one node's stream. Its messages leave through one sender.
type session struct {
	server *Server
	node   *cluster.Node // as it said hello
	nodeID string
	key    string // SHA-256 of the key that it must be enrolled with, "": nobody asks
	any    bool   // the node has found no better server
	began  time.Time
	ctx    context.Context // ends with the session
	cancel context.CancelCauseFunc
	out    chan *pb.ServerMessage
	acks   chan ack           // what is committed; has room for all reports under way
	beats  chan struct{}      // capacity 1: a heartbeat is to be answered
	tells  chan struct{}      // capacity 1: the TTL is to be told
	change chan *cluster.Node // capacity 1: the node's newest record, to be registered
	calls  chan struct{}      // a slot per reverse call under way
	told   chan struct{}      // closed when the first desired state is queued: calls come after it
	said   atomic.Uint64      // revision of the newest record of the node that was registered through the session
	last   atomic.Int64       // of the last message, nanoseconds since the server's birth

	mu       sync.Mutex // reports between their arrival and their acknowledgement
	reports  int
	reported int // bytes of them
}

// ack ends a report.
type ack struct {
	seq   uint64
	bytes int
}

func newSession(ctx context.Context, cancel context.CancelCauseFunc, s *Server, node *cluster.Node, anyServer bool, key string) *session {
	c := &session{
		server: s, node: node, nodeID: node.ID, key: key, any: anyServer, began: time.Now(),
		ctx: ctx, cancel: cancel, out: make(chan *pb.ServerMessage, sendQueue),
		acks: make(chan ack, maxReports), change: make(chan *cluster.Node, 1), beats: make(chan struct{}, 1), tells: make(chan struct{}, 1),
		calls: make(chan struct{}, MaxCalls), told: make(chan struct{}),
	}
	c.touch()
	return c
}

func (c *session) touch()           { c.last.Store(int64(time.Since(c.server.born))) }
func (c *session) heard() time.Time { return c.server.born.Add(time.Duration(c.last.Load())) }
func (c *session) retell()          { ring(c.tells) }

// run serves the stream until it breaks or the session is cancelled.
func (c *session) run(stream pb.Fleet_AttachServer) error {
	// Sender and receiver may hang in the stream of a node that neither reads nor
	// writes. They are not waited for: they end when the handler returns and gRPC
	// ends the stream with it.
	go func() { c.cancel(c.send(stream)) }()
	go func() { c.cancel(c.receive(stream)) }()
	// Without a leader there is no desired state that is surely the newest, but
	// calls are answered as ever.
	early := time.AfterFunc(c.server.cfg.AnswerTimeout/2, func() { c.tell() })
	defer early.Stop()
	var wg sync.WaitGroup
	defer wg.Wait()
	err := c.server.admit(c.ctx, c.node, c.key)
	if err == nil {
		c.said.Store(c.node.Revision)
		c.node = nil
		wg.Go(c.register)
		err = c.desire(func() { early.Stop(); c.tell() })
	}
	c.cancel(err)
	if err := context.Cause(c.ctx); !errors.Is(err, io.EOF) && !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}

// register writes the node's changes of its record.
func (c *session) register() {
	for {
		select {
		case n := <-c.change:
			if err := c.server.admit(c.ctx, n, c.key); err != nil {
				c.cancel(err)
				return
			}
			c.said.Store(n.Revision)
		case <-c.ctx.Done():
			return
		}
	}
}

// tell lets calls go to the node.
func (c *session) tell() {
	c.mu.Lock()
	defer c.mu.Unlock()
	select {
	case <-c.told:
	default:
		close(c.told)
	}
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

// send is the stream's one sender. The welcome comes first.
func (c *session) send(stream pb.Fleet_AttachServer) error {
	c.retell()
	var out chan *pb.ServerMessage
	for {
		m := &pb.ServerMessage{}
		select {
		case <-c.tells:
			m.Message = &pb.ServerMessage_Welcome{Welcome: &pb.Welcome{
				TtlMs: c.server.TTL().Milliseconds(), Server: c.server.cfg.Name, Answers: true,
			}}
			out = c.out
		case m = <-out:
		case <-c.beats:
			m.Message = &pb.ServerMessage_Heartbeat{Heartbeat: &pb.Heartbeat{}}
		case a := <-c.acks:
			c.mu.Lock()
			c.reports--
			c.reported -= a.bytes
			c.mu.Unlock()
			m.Message = &pb.ServerMessage_Ack{Ack: &pb.Ack{Seq: a.seq}}
		case <-c.ctx.Done():
			return c.ctx.Err()
		}
		if err := stream.Send(m); err != nil {
			return err
		}
	}
}

// errForgotten ends the session of a node that was purged, that a restore lost or
// knows as it once was, or that was missed while it registered.
var errForgotten = status.Error(codes.Aborted, "the servers do not count this node as connected: register again")

// counted says whether the state holds the node as one that is there, and knows of it
// what it said here.
func (c *session) counted(snap *cluster.Snapshot, ws cluster.WatchSet) bool {
	if c.key != "" {
		if e := snap.Enrollment(ws, cluster.EnrollmentKey{Role: cluster.RoleNode, Name: c.nodeID}); e == nil || e.KeyHash != c.key {
			return false
		}
	}
	n := snap.Node(ws, c.nodeID)
	return n != nil && n.Status == cluster.NodeStatusReady && n.Revision >= c.said.Load()
}

// desire follows what the state wants of the node and sends the differences. It
// says told once the first, full desired state is queued.
func (c *session) desire(told func()) error {
	var of <-chan struct{} // tells one state from another
	var known *desired
	for {
		snap := c.server.cfg.Store.State().Snapshot()
		ws := cluster.WatchSet{}
		ws.Add(snap.Abandoned())
		if !c.counted(snap, ws) {
			return errForgotten
		}
		first, full := of == nil, snap.Abandoned() != of
		if full { // the first time, or after a restore: say everything
			of, known = snap.Abandoned(), &desired{jobs: map[jobVersion]*jobTold{}}
		}
		d := known.follow(snap, snap.AllocsByNode(ws, c.nodeID))
		d.Full = full
		if full || len(d.Allocs) > 0 || len(d.Gone) > 0 {
			for _, part := range split(d, desiredPart, known.ids()) {
				if !c.push(&pb.ServerMessage{Message: &pb.ServerMessage_Desired{Desired: part}}) {
					return c.ctx.Err()
				}
			}
		}
		if first {
			told()
		}
		if err := ws.WatchCtx(c.ctx); err != nil {
			return err
		}
	}
}

// desired is what a node was told.
type desired struct {
	allocs []*cluster.Allocation // by ID
	jobs   map[jobVersion]*jobTold
}

type jobVersion struct {
	cluster.JobKey
	created, version uint64
}

// jobTold is a job's version that allocations of the node run.
type jobTold struct {
	allocs int
	told   bool
}

func versionOf(a *cluster.Allocation) jobVersion {
	return jobVersion{a.JobKey(), a.JobCreateIndex, a.JobVersion}
}

// ids are those of all allocations.
func (k *desired) ids() iter.Seq[string] {
	return func(yield func(string) bool) {
		for _, a := range k.allocs {
			if !yield(a.ID) {
				return
			}
		}
	}
}

// follow takes over the node's allocations, by ID, and gives what the node must be
// told. Records that are the same as before cost next to nothing.
func (k *desired) follow(snap *cluster.Snapshot, allocs []*cluster.Allocation) *pb.Desired {
	d := &pb.Desired{Index: snap.Index(nil, cluster.TableAllocs)}
	old := k.allocs
	k.allocs = allocs
	var left []*cluster.Allocation // records that were gone or replaced
	for _, a := range allocs {
		for len(old) > 0 && old[0].ID < a.ID {
			d.Gone, left, old = append(d.Gone, old[0].ID), append(left, old[0]), old[1:]
		}
		var was *cluster.Allocation
		if len(old) > 0 && old[0].ID == a.ID {
			was, old = old[0], old[1:]
		}
		if was == a {
			continue
		}
		v := versionOf(a)
		j := k.jobs[v]
		if j == nil {
			j = &jobTold{}
			k.jobs[v] = j
		}
		j.allocs++
		if was != nil {
			left = append(left, was)
			if was.AllocModifyIndex == a.AllocModifyIndex {
				continue
			}
		}
		if !j.told {
			if job := snap.JobVersion(nil, a.JobKey(), a.JobVersion); job != nil {
				d.Jobs, j.told = append(d.Jobs, cluster.Marshal(job)), true
			}
		}
		d.Allocs = append(d.Allocs, cluster.Marshal(a))
	}
	for _, a := range old {
		d.Gone, left = append(d.Gone, a.ID), append(left, a)
	}
	for _, a := range left {
		v := versionOf(a)
		if j := k.jobs[v]; j.allocs > 1 {
			j.allocs--
		} else {
			delete(k.jobs, v)
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
// are in the log; nothing here waits for it, or heartbeats would go unheard.
func (c *session) receive(stream pb.Fleet_AttachServer) error {
	for {
		msg, err := stream.Recv()
		if err != nil {
			return err
		}
		c.touch()
		switch m := msg.Message.(type) {
		case *pb.NodeMessage_Heartbeat:
			ring(c.beats)
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
			select { // this is the newest: an older one that waits is not needed
			case <-c.change:
			default:
			}
			c.change <- n
		default:
			return status.Error(codes.InvalidArgument, "unknown message from the node")
		}
	}
}

// report queues a batch of status for the log; the acknowledgement follows when
// it is committed. A node speaks for its own allocations only: what this server
// knows to be another's is dropped here, and the rules judge the rest, since this
// server may lag behind what the node heard elsewhere.
func (c *session) report(u *pb.AllocUpdates) error {
	snap := c.server.cfg.Store.State().Snapshot()
	var own []*cluster.Allocation
	bytes := 0
	for _, b := range u.Allocs {
		a := new(cluster.Allocation)
		if err := cluster.Unmarshal(b, a); err != nil {
			return status.Errorf(codes.InvalidArgument, "allocation record: %v", err)
		}
		if known := snap.Alloc(nil, a.ID); known == nil || known.NodeID == c.nodeID {
			a.NodeID = c.nodeID
			own = append(own, a)
			bytes += len(b)
		}
	}
	c.mu.Lock()
	c.reports++
	c.reported += bytes
	over := c.reports > maxReports || c.reports > 1 && c.reported > maxReportBytes
	c.mu.Unlock()
	if over {
		return status.Errorf(codes.ResourceExhausted, "more than %d reports, or %d bytes of them, are not acknowledged yet", maxReports, maxReportBytes)
	}
	done := func(err error) {
		if err != nil {
			c.cancel(toStatus(err)) // the node sends it again on its next stream
			return
		}
		c.acks <- ack{u.Seq, bytes} // never waits: it would hold up every node
	}
	if len(own) == 0 {
		done(nil)
		return nil
	}
	c.server.updates.add(report{ctx: c.ctx, allocs: own, done: done})
	return nil
}
