package fleet

import (
	"cmp"
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
	hello  *pb.Hello     // until the node was told what it lacks
	node   *cluster.Node // as it said last; of admission
	nodeID string
	key    string // SHA-256 of the key that it must be enrolled with, "": nobody asks
	any    bool   // the node has found no better server
	began  time.Time
	admits sync.Mutex      // one admission at a time
	ctx    context.Context // ends with the session
	cancel context.CancelCauseFunc
	out    chan *pb.ServerMessage
	acks   chan ack           // what is committed; has room for all reports under way
	beats  chan struct{}      // capacity 1: a heartbeat is to be answered
	words  chan struct{}      // capacity 1: the node was heard
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

func newSession(ctx context.Context, cancel context.CancelCauseFunc, s *Server, hello *pb.Hello, node *cluster.Node, key string) *session {
	c := &session{
		server: s, hello: hello, node: node, nodeID: node.ID, key: key, any: hello.Any, began: time.Now(),
		ctx: ctx, cancel: cancel, out: make(chan *pb.ServerMessage, sendQueue),
		acks: make(chan ack, maxReports), change: make(chan *cluster.Node, 1), beats: make(chan struct{}, 1), words: make(chan struct{}, 1), tells: make(chan struct{}, 1),
		calls: make(chan struct{}, MaxCalls), told: make(chan struct{}),
	}
	c.touch()
	return c
}

func (c *session) touch() {
	c.last.Store(int64(time.Since(c.server.born)))
	ring(c.words)
}

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
	err := c.admit(c.node)
	if err == nil {
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
			if err := c.admit(n); err != nil {
				c.cancel(err)
				return
			}
		case <-c.ctx.Done():
			return
		}
	}
}

// admit makes the state count the node as there, with this record; nil: with the one
// that it said last.
func (c *session) admit(n *cluster.Node) error {
	c.admits.Lock()
	defer c.admits.Unlock()
	if n == nil {
		n = c.node
	}
	said := *n // the state keeps what is registered
	if err := c.server.admit(c.ctx, &said, c.key); err != nil {
		return err
	}
	c.node = n
	c.said.Store(n.Revision)
	return nil
}

// readmit counts a node as there again that was missed, if it is heard of within a
// TTL: it needs no other session for that, and to be told nothing that it knows.
func (c *session) readmit() error {
	select {
	case <-c.words: // it may be older than the verdict
	default:
	}
	select {
	case <-c.words:
		c.server.mu.Lock()
		c.server.kickPeers() // who judges shall know
		c.server.mu.Unlock()
		return c.admit(nil)
	case <-time.After(c.server.TTL()):
		return errForgotten
	case <-c.ctx.Done():
		return c.ctx.Err()
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
// knows as it once was, or that was missed and says nothing.
var errForgotten = status.Error(codes.Aborted, "the servers do not count this node as connected: register again")

// counted says whether the state knows the node, and of it what it said here, and
// whether it counts it as one that is there.
func (c *session) counted(snap *cluster.Snapshot, ws cluster.WatchSet) (known, there bool) {
	if c.key != "" {
		if e := snap.Enrollment(ws, cluster.EnrollmentKey{Role: cluster.RoleNode, Name: c.nodeID}); e == nil || e.KeyHash != c.key {
			return false, false
		}
	}
	n := snap.Node(ws, c.nodeID)
	known = n != nil && n.Revision >= c.said.Load()
	return known, known && n.Status == cluster.NodeStatusReady
}

// desire follows what the state wants of the node and sends the differences, first
// to what the node knows from earlier sessions. It says told once that is queued.
func (c *session) desire(told func()) error {
	var of <-chan struct{} // tells one state from another
	var known *desired
	for {
		snap := c.server.cfg.Store.State().Snapshot()
		ws := cluster.WatchSet{}
		ws.Add(snap.Abandoned())
		switch counted, there := c.counted(snap, ws); {
		case !counted:
			return errForgotten
		case !there:
			if err := c.readmit(); err != nil {
				return err
			}
			continue
		}
		began := time.Now()
		first, anew := of == nil, snap.Abandoned() != of
		full := anew // after a restore say everything
		allocs := snap.AllocsByNode(ws, c.nodeID)
		if anew {
			of, known = snap.Abandoned(), &desired{timeline: snap.Timeline(nil), jobs: map[jobVersion]*jobTold{}}
		}
		if first {
			full = !known.resume(snap, allocs, c.hello)
			c.hello = nil
		}
		d := known.follow(snap, allocs)
		d.Full = full
		if anew || len(d.Allocs) > 0 || len(d.Gone) > 0 {
			for _, part := range split(d, desiredPart, known.ids()) {
				if !c.push(&pb.ServerMessage{Message: &pb.ServerMessage_Desired{Desired: part}}) {
					return c.ctx.Err()
				}
			}
		}
		if first {
			told()
		}
		took := time.Since(began)
		if err := ws.WatchCtx(c.ctx); err != nil {
			return err
		}
		// Each look at a node with many allocations costs; what changes meanwhile is
		// seen by one.
		if took > quickLook {
			select {
			case <-time.After(min(lookShare*took, maxLookPause)):
			case <-c.ctx.Done():
				return c.ctx.Err()
			}
		}
	}
}

// Pauses between looks at what a node shall run.
const (
	quickLook    = 100 * time.Microsecond // needs none
	lookShare    = 50                     // times what the look took
	maxLookPause = 100 * time.Millisecond
)

// desired is what a node was told.
type desired struct {
	timeline string
	allocs   []*cluster.Allocation // by ID
	jobs     map[jobVersion]*jobTold
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

// resume takes over what a node knows from earlier sessions: follow then gives only
// what differs. False when that says nothing of this state, which must be told whole.
func (k *desired) resume(snap *cluster.Snapshot, allocs []*cluster.Allocation, hello *pb.Hello) bool {
	if hello.Timeline == "" || hello.Timeline != k.timeline {
		return false
	}
	index := snap.Index(nil, cluster.TableAllocs)
	knows := make(map[string]uint64, len(hello.Known))
	for _, a := range hello.Known {
		if a.Index > index { // of a future that was lost
			return false
		}
		knows[a.Id] = a.Index
	}
	for _, a := range allocs {
		if knows[a.ID] == a.AllocModifyIndex {
			k.jobOf(a).told = true
			k.allocs = append(k.allocs, a)
			delete(knows, a.ID)
		}
	}
	for id := range knows { // it has changed or is gone
		a := &cluster.Allocation{ID: id}
		k.jobOf(a)
		k.allocs = append(k.allocs, a)
	}
	slices.SortFunc(k.allocs, func(a, b *cluster.Allocation) int { return cmp.Compare(a.ID, b.ID) })
	return true
}

// jobOf counts one more allocation of its job's version.
func (k *desired) jobOf(a *cluster.Allocation) *jobTold {
	v := versionOf(a)
	j := k.jobs[v]
	if j == nil {
		j = &jobTold{}
		k.jobs[v] = j
	}
	j.allocs++
	return j
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
	d := &pb.Desired{Index: snap.Index(nil, cluster.TableAllocs), Timeline: k.timeline}
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
		j := k.jobOf(a)
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
		d.Allocs = append(d.Allocs, cluster.Marshal(a.ForNode()))
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
	size, p := 0, &pb.Desired{Index: d.Index, Timeline: d.Timeline}
	next := func(b []byte) {
		if size += len(b); size > most && size > len(b) {
			parts, size, p = append(parts, p), len(b), &pb.Desired{Index: d.Index, Timeline: d.Timeline}
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
		case *pb.NodeMessage_Samples:
			snap := c.server.cfg.Store.State().Snapshot()
			own := slices.DeleteFunc(m.Samples.Samples, func(x *pb.Sample) bool {
				a := snap.Alloc(nil, x.Of)
				return a == nil || a.NodeID != c.nodeID
			})
			if err := c.server.samples.take(own, c.nodeID, true, time.Now()); err != nil {
				return err
			}
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
		if known := snap.NodeOf(a.ID); known == "" || known == c.nodeID {
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
