package swarm

import (
	"context"
	"crypto/rand"
	"errors"
	"io"
	"iter"
	mathrand "math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"

	"github.com/rxvision/rxvision/cluster"
	"github.com/rxvision/rxvision/fleet/pb"
)

// As agents have them.
const (
	helloWait    = 4 * time.Second
	quickHello   = time.Second
	maxHelloWait = 15 * time.Second
	minBackoff   = 100 * time.Millisecond
	maxBackoff   = 5 * time.Second
	steady       = 5 * time.Second
	batchWindow  = 50 * time.Millisecond
	maxBatch     = 256 // allocations in one report
	maxUnacked   = 4   // reports

	// muteCheck is how often a silenced node looks whether it may speak again.
	muteCheck = 50 * time.Millisecond
	// deviceCheck is how often an allocation looks whether its devices are free.
	deviceCheck = 50 * time.Millisecond
	// spareJobs is how many job versions a node knows without need before it forgets them.
	spareJobs = 256
)

// node is one simulated agent.
type node struct {
	swarm  *Swarm
	index  int
	record *cluster.Node
	wake   chan struct{} // capacity 1: there may be something to report

	identity []grpc.DialOption // these two are of connect's goroutine
	ttl      time.Duration     // as a server last named it; 0: none ever did
	beat     atomic.Int64      // when the oldest heartbeat without an answer was sent, nanoseconds since the swarm began; 0: there is none
	slow     time.Duration     // the slowest answer lately; of connect's goroutine

	mu       sync.Mutex
	timeline string // of what the node was told, as servers name it; "": it may lack some
	said     uint64 // revision of the last report of an allocation
	mute     bool
	allocs   map[string]*alloc
	active   map[string]*alloc // those that will change by themselves or are to be reported
	batch    map[jobVersion]bool
	holders  map[string]*alloc // device → the allocation that runs on it
	seq      uint64
	unacked  map[uint64]*sentReport
}

type jobVersion struct {
	cluster.JobKey
	version uint64
}

// alloc is what the node knows of an allocation.
type alloc struct {
	*cluster.Allocation // as the servers sent it
	batch               bool
	status              string
	started, ended      time.Time
	due                 time.Time // when status changes by itself; zero: it does not
	stopping            bool      // told to end
	gone                bool      // the servers do not know it any more
	rev, sent, acked    uint64    // of status; sent is of this stream
}

type sentReport struct {
	at   time.Time
	revs map[string]uint64
}

func newNode(s *Swarm, i int) *node {
	return &node{
		swarm: s, index: i, record: recordOf(&s.cfg, i), said: s.first, wake: make(chan struct{}, 1),
		allocs: map[string]*alloc{}, active: map[string]*alloc{}, batch: map[jobVersion]bool{},
		holders: map[string]*alloc{}, unacked: map[uint64]*sentReport{},
	}
}

func (n *node) ring() {
	select {
	case n.wake <- struct{}{}:
	default:
	}
}

func (n *node) setMute(mute bool) {
	n.mu.Lock()
	n.mute = mute
	n.mu.Unlock()
	n.ring()
}

func (n *node) muted() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.mute
}

// connect keeps a session with some server until ctx ends, as an agent does.
func (n *node) connect(ctx context.Context) {
	servers := n.swarm.cfg.Servers
	var order []int
	last, tries := -1, 0
	for ctx.Err() == nil {
		if len(order) == 0 {
			order = mathrand.Perm(len(servers))
			if order[0] == last {
				order = append(order[1:], last)
			}
		}
		last, order = order[0], order[1:]
		served, err := n.session(ctx, servers[last], tries)
		if ctx.Err() != nil {
			return
		}
		if served > 0 {
			n.swarm.reconnected.Add(1)
		}
		if served >= steady {
			tries, order = 0, nil
		}
		wait := mathrand.N(minBackoff)
		if tries > 0 {
			most := maxBackoff
			if n.ttl > 0 {
				most = max(min(most, n.ttl/2), minBackoff)
			}
			wait = min(minBackoff<<min(tries, 10), most)
			wait = wait/2 + mathrand.N(wait/2)
		}
		tries++
		n.swarm.noteError(err)
		n.swarm.cfg.Logger.Debug("no connection to a server", "node", n.record.ID, "server", servers[last], "error", err, "retry_in", wait)
		for first := true; first || n.muted(); first, wait = false, muteCheck {
			select {
			case <-time.After(wait):
			case <-ctx.Done():
				return
			}
		}
	}
}

var errSilent = errors.New("the server says nothing")

// session is one stream. served says how long it was of use.
func (n *node) session(ctx context.Context, server string, tries int) (served time.Duration, err error) {
	opened := func() {}
	patience := helloWait
	if n.ttl > 0 { // the servers miss it
		patience = quickHello
	} else {
		select {
		case n.swarm.opening <- struct{}{}:
			opened = sync.OnceFunc(func() { <-n.swarm.opening })
			defer opened()
		case <-ctx.Done():
			return 0, ctx.Err()
		}
	}
	ctx, cancel := context.WithCancelCause(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel(nil)
	conn, err := n.swarm.conn(ctx, n, server)
	if err != nil {
		return 0, err
	}
	watch := time.AfterFunc(min(patience<<min(tries, 10), maxHelloWait), func() { cancel(errSilent) })
	defer watch.Stop()
	client := pb.NewFleetClient(conn)
	stream, err := client.Attach(ctx)
	if err != nil {
		return 0, err
	}
	hello := &pb.Hello{Protocol: 1, Node: cluster.Marshal(n.record), Session: rand.Text(), Any: tries >= len(n.swarm.cfg.Servers)}
	hello.Timeline, hello.Known = n.knows()
	if err := stream.Send(&pb.NodeMessage{Message: &pb.NodeMessage_Hello{Hello: hello}}); err != nil && !errors.Is(err, io.EOF) {
		return 0, err
	}
	n.newStream()
	var since time.Time
	defer func() {
		n.answered()
		if !since.IsZero() {
			served = time.Since(since)
			n.swarm.attached.Add(-1)
		}
	}()
	var ttl time.Duration
	ttls := make(chan time.Duration, 1)
	for {
		m, err := stream.Recv()
		watch.Stop()
		if err != nil {
			return 0, errors.Join(context.Cause(ctx), err)
		}
		switch m := m.Message.(type) {
		case *pb.ServerMessage_Welcome:
			if m.Welcome.TtlMs <= 0 {
				return 0, errors.New("the server names no TTL")
			}
			first := ttl == 0
			ttl = time.Duration(m.Welcome.TtlMs) * time.Millisecond
			n.ttl = ttl
			select {
			case <-ttls:
			default:
			}
			ttls <- ttl
			if first {
				wg.Go(func() { cancel(n.send(ctx, stream, ttls)) })
			}
		case *pb.ServerMessage_Desired:
			if err := n.desire(m.Desired); err != nil {
				return 0, err
			}
			if since.IsZero() {
				since = time.Now()
				n.swarm.attached.Add(1)
				opened()
			}
		case *pb.ServerMessage_Heartbeat:
			n.answered()
		case *pb.ServerMessage_Ack:
			n.ack(m.Ack.Seq)
		case *pb.ServerMessage_Call:
			wg.Go(func() { refuse(ctx, client, m.Call.Id) })
		}
		if ttl == 0 {
			return 0, errors.New("the server's first message is not welcome")
		}
		if !n.muted() {
			watch.Reset(min(max(ttl/2, 3*n.slow), ttl))
		}
	}
}

// answered notes how long an answer took that came, or never will.
func (n *node) answered() {
	if sent := n.beat.Swap(0); sent != 0 {
		n.slow = max(n.slow-n.slow/8, time.Since(n.swarm.began)-time.Duration(sent))
	}
}

// refuse answers a call: there is no host to ask.
func refuse(ctx context.Context, client pb.FleetClient, id string) {
	stream, err := client.Answer(ctx)
	if err != nil {
		return
	}
	e := cluster.Errorf(cluster.CodeUnsupported, "this is a simulated node: it has no logs, files, tasks or statistics")
	if stream.Send(&pb.AnswerChunk{CallId: id, Error: &pb.Error{Code: string(e.Code), Text: e.Text}}) != nil || stream.CloseSend() != nil {
		return
	}
	for err == nil {
		_, err = stream.Recv()
	}
}

// send is the stream's one sender: heartbeats and reports.
func (n *node) send(ctx context.Context, stream grpc.ClientStream, ttls <-chan time.Duration) error {
	var every time.Duration
	var beat time.Time
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case ttl := <-ttls:
			every = ttl / 4
			beat = time.Now().Add(mathrand.N(every))
		case <-timer.C:
		case <-n.wake:
			select { // what changes at about one time goes together
			case <-time.After(batchWindow):
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}
		now := time.Now()
		u, next := n.step(now)
		if n.muted() {
			timer.Reset(muteCheck)
			continue
		}
		m := &pb.NodeMessage{}
		switch {
		case u != nil:
			m.Message = &pb.NodeMessage_Allocs{Allocs: u}
			n.swarm.reports.Add(1)
			n.ring() // there may be more
		case !now.Before(beat):
			m.Message = &pb.NodeMessage_Heartbeat{Heartbeat: &pb.Heartbeat{}}
			n.beat.CompareAndSwap(0, int64(now.Sub(n.swarm.began)))
			beat = now.Add(every)
		}
		if m.Message != nil {
			if err := stream.SendMsg(m); err != nil {
				if errors.Is(err, io.EOF) { // the receiver learns why
					<-ctx.Done()
					return context.Cause(ctx)
				}
				return err
			}
		}
		wait := beat.Sub(now)
		if !next.IsZero() {
			wait = min(wait, next.Sub(now))
		}
		timer.Reset(max(wait, 0))
	}
}

// newStream makes everything unacknowledged to be sent again.
func (n *node) newStream() {
	n.mu.Lock()
	defer n.mu.Unlock()
	clear(n.unacked)
	for _, a := range n.active {
		a.sent = a.acked
	}
	n.ring()
}

// set changes an allocation's status. Hold mu.
func (n *node) set(a *alloc, status string, now time.Time) {
	count := func(status string, by int64) {
		switch status {
		case cluster.AllocClientPending:
			n.swarm.pending.Add(by)
		case cluster.AllocClientRunning:
			n.swarm.running.Add(by)
		}
	}
	count(a.status, -1)
	count(status, 1)
	a.status, a.due = status, time.Time{}
	switch status {
	case cluster.AllocClientPending:
		n.swarm.taken.Add(1)
		if n.swarm.cfg.Taken != nil {
			n.swarm.cfg.Taken(a.Allocation)
		}
		a.due = now.Add(around(n.swarm.cfg.Start))
	case cluster.AllocClientRunning:
		a.started = now
		if a.batch {
			a.due = now.Add(around(n.swarm.cfg.Work))
		}
	case cluster.AllocClientComplete:
		a.ended = now
		n.swarm.completed.Add(1)
		for id := range a.devices() {
			if n.holders[id] == a {
				delete(n.holders, id)
			}
		}
	}
	n.change(a)
}

// over says whether nothing of it runs any more.
func (a *alloc) over() bool { return a.status == cluster.AllocClientComplete }

// devices are the IDs of the whole devices that the allocation was given.
func (a *alloc) devices() iter.Seq[string] {
	return func(yield func(string) bool) {
		if a.AllocatedResources == nil {
			return
		}
		for _, t := range a.AllocatedResources.Tasks {
			for _, d := range t.Devices {
				if d.Shared() {
					continue // others may have the rest
				}
				for _, id := range d.DeviceIDs {
					if !yield(id) {
						return
					}
				}
			}
		}
	}
}

// start runs an allocation. What the servers have given up, since the node was
// silent for too long, may still hold its devices: then it waits, as agents let it.
// Any other holder is a conflict. Hold mu.
func (n *node) start(a *alloc, now time.Time) {
	for id := range a.devices() {
		if h := n.holders[id]; h != nil && (h.gone || h.ClientTerminal()) {
			a.due = now.Add(deviceCheck)
			return
		}
	}
	for id := range a.devices() {
		if h := n.holders[id]; h != nil {
			n.swarm.conflict(Conflict{At: now, Node: n.record.ID, Device: id, Holder: h.ID, Alloc: a.ID})
		}
		n.holders[id] = a
	}
	n.set(a, cluster.AllocClientRunning, now)
}

// stop ends an allocation, at once or after a while. Hold mu.
func (n *node) stop(a *alloc, now time.Time) {
	switch {
	case a.over() || a.stopping:
	case a.status == cluster.AllocClientPending || n.swarm.cfg.Stop == 0:
		n.set(a, cluster.AllocClientComplete, now)
	default:
		a.stopping, a.due = true, now.Add(around(n.swarm.cfg.Stop))
		n.active[a.ID] = a
		n.ring()
	}
}

// change has an allocation reported. Hold mu.
func (n *node) change(a *alloc) {
	a.rev++
	n.active[a.ID] = a
	n.ring()
}

// step lets time do its work and takes a report to send, nil when there is none or
// too many are under way. next is when time has work again.
func (n *node) step(now time.Time) (u *pb.AllocUpdates, next time.Time) {
	n.mu.Lock()
	defer n.mu.Unlock()
	room := len(n.unacked) < maxUnacked && !n.mute
	for id, a := range n.active {
		if !a.due.IsZero() && !now.Before(a.due) {
			if a.status == cluster.AllocClientPending {
				n.start(a, now)
			} else {
				n.set(a, cluster.AllocClientComplete, now)
			}
		}
		if a.gone && a.over() { // nobody waits for a word of it
			delete(n.allocs, id)
			delete(n.active, id)
			continue
		}
		if !a.due.IsZero() && (next.IsZero() || a.due.Before(next)) {
			next = a.due
		}
		if a.due.IsZero() && a.rev == a.acked {
			delete(n.active, id)
		}
		if room && a.sent < a.rev && (u == nil || len(u.Allocs) < maxBatch) {
			if u == nil {
				n.seq++
				u = &pb.AllocUpdates{Seq: n.seq}
				n.unacked[n.seq] = &sentReport{at: now, revs: map[string]uint64{}}
			}
			a.sent = a.rev
			n.unacked[n.seq].revs[id] = a.rev
			u.Allocs = append(u.Allocs, cluster.Marshal(n.report(a)))
		}
	}
	return u, next
}

// ack notes that a report is stored.
func (n *node) ack(seq uint64) {
	n.mu.Lock()
	defer n.mu.Unlock()
	r := n.unacked[seq]
	if r == nil {
		return
	}
	delete(n.unacked, seq)
	n.swarm.acked.Add(1)
	n.swarm.latency.add(time.Since(r.at))
	for id, rev := range r.revs {
		if a := n.allocs[id]; a != nil {
			a.acked = max(a.acked, rev)
		}
	}
	n.ring()
}

// report says of an allocation what an agent would. Hold mu.
func (n *node) report(a *alloc) *cluster.Allocation {
	n.said++
	out := &cluster.Allocation{
		Revision: n.said,
		ID:       a.ID, Namespace: a.Namespace, JobID: a.JobID, NodeID: n.record.ID, Epoch: a.Epoch,
		ClientStatus: a.status, TaskStates: map[string]*cluster.TaskState{},
	}
	if a.DeploymentID != "" && a.status == cluster.AllocClientRunning {
		healthy := true
		out.DeploymentStatus = &cluster.AllocDeploymentStatus{Healthy: &healthy, Timestamp: cluster.TimeOf(a.started)}
	}
	if a.AllocatedResources == nil {
		return out
	}
	created := time.Unix(0, a.CreateTime)
	for name := range a.AllocatedResources.Tasks {
		t := &cluster.TaskState{State: cluster.TaskStatePending, StartedAt: cluster.TimeOf(a.started), FinishedAt: cluster.TimeOf(a.ended)}
		event := func(at time.Time, kind, text string) {
			t.Events = append(t.Events, &cluster.TaskEvent{Type: kind, Time: at.UnixNano(), DisplayMessage: text, Details: map[string]string{}})
		}
		event(created, "Received", "Task received by client")
		event(created, "Task Setup", "Building Task Directory")
		if !a.started.IsZero() {
			t.State = cluster.TaskStateRunning
			event(a.started, "Started", "Task started by client")
		}
		if !a.ended.IsZero() {
			t.State = cluster.TaskStateDead
			event(a.ended, "Terminated", "Exit Code: 0")
		}
		out.TaskStates[name] = t
	}
	return out
}

// knows is what a hello says that the node needs not be told again.
func (n *node) knows() (timeline string, known []*pb.KnownAlloc) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.timeline == "" {
		return "", nil
	}
	for id, a := range n.allocs {
		if !a.gone {
			known = append(known, &pb.KnownAlloc{Id: id, Index: a.AllocModifyIndex})
		}
	}
	return n.timeline, known
}

// desire takes over what the servers want of the node.
func (n *node) desire(d *pb.Desired) error {
	now := time.Now()
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, b := range d.Jobs {
		j := new(cluster.Job)
		if err := cluster.Unmarshal(b, j); err != nil {
			return err
		}
		n.batch[jobVersion{j.Key(), j.Version}] = j.Finite()
	}
	named := map[string]bool{}
	for _, id := range d.All {
		named[id] = true
	}
	for _, b := range d.Allocs {
		said := new(cluster.Allocation)
		if err := cluster.Unmarshal(b, said); err != nil {
			return err
		}
		named[said.ID] = true
		n.want(said, now)
	}
	for _, id := range d.Gone {
		n.forget(id, now)
	}
	if d.Full {
		for id := range n.allocs {
			if !named[id] {
				n.forget(id, now)
			}
		}
		n.timeline = d.Timeline
	} else if d.Timeline != n.timeline { // the first parts of something full
		n.timeline = ""
	}
	if (d.Full || d.Gone != nil) && len(n.batch) > 2*len(n.allocs)+spareJobs { // the last part of it
		n.dropJobs()
	}
	return nil
}

// dropJobs forgets the job versions that no allocation needs. Hold mu.
func (n *node) dropJobs() {
	used := map[jobVersion]bool{}
	for _, a := range n.allocs {
		v := jobVersion{a.JobKey(), a.JobVersion}
		used[v] = n.batch[v]
	}
	n.batch = used
}

// want takes one allocation over. Hold mu.
func (n *node) want(said *cluster.Allocation, now time.Time) {
	a := n.allocs[said.ID]
	switch {
	case a == nil && said.ClientTerminal():
		return // it is over
	case a == nil:
		a = &alloc{Allocation: said, batch: n.batch[jobVersion{said.JobKey(), said.JobVersion}]}
		n.allocs[said.ID] = a
		n.set(a, cluster.AllocClientPending, now)
	case said.Epoch < a.Epoch:
		return
	default:
		if a.Allocation = said; said.ClientStatus != a.status {
			n.change(a) // the servers know less, or gave it up
		}
	}
	if a.gone = false; said.Terminal() {
		n.stop(a, now)
	}
}

// forget ends an allocation that the servers do not know. Hold mu.
func (n *node) forget(id string, now time.Time) {
	a := n.allocs[id]
	if a == nil {
		return
	}
	a.gone = true
	n.stop(a, now)
	n.active[id] = a
}
