package sim

import (
	"maps"
	"slices"
	"time"

	"github.com/rxvision/rxvision/cluster"
)

// The wire to nodes.
const (
	nodeTTL     = 5 * time.Second
	sessionPoll = 40 * time.Millisecond
	tellEvery   = 500 * time.Millisecond // servers tell the leader whom they hear
	reportAge   = 20 * time.Millisecond  // reports of many nodes that go into one entry
	serverTries = 4
)

// stream is one connection of a node to a server: ordered, until it breaks. Then
// what is under way is lost, and both ends learn of it late, each for itself.
type stream struct {
	n        *node
	s        *server
	life     int // of the server
	broken   bool
	up, down int64         // when the last message either way arrives
	busy     bool          // a registration is under way
	record   *cluster.Node // the one to come after it
}

func (st *stream) server(do func()) {
	st.deliver(st.n.addr, st.s.addr, &st.up, st.s.alive(do))
}

func (st *stream) node(do func()) {
	st.deliver(st.s.addr, st.n.addr, &st.down, func() {
		if st.n.agentUp && st.n.stream == st { // an older stream is not listened to
			do()
		}
	})
}

func (st *stream) deliver(from, to address, last *int64, do func()) {
	w := st.n.w
	if st.broken || !w.net.open(from, to) || w.chance(1) && !w.calm {
		if !st.broken {
			w.coverage.Messages.Streams++
		}
		st.broken = true
		return
	}
	at := max(w.now+int64(w.net.latency()), *last+1)
	*last = at
	w.after(time.Duration(at-w.now), func() {
		if !st.broken {
			do()
		}
	})
}

// reset breaks the stream because its server died; the node learns of it soon.
func (st *stream) reset() {
	st.broken = true
	n := st.n
	n.w.after(n.w.upTo(300*time.Millisecond), func() {
		if n.stream == st {
			n.reconnect("connection reset")
		}
	})
}

// desired is what a server wants of a node: the difference to what it said
// before on the stream, or everything.
type desired struct {
	full   bool
	index  uint64
	allocs []*cluster.Allocation
	jobs   []*cluster.Job // of allocs, one each, nil where the state has none
	gone   []string
}

// session is a server's side of a stream.
type session struct {
	s      *server
	nodeID string
	stream *stream
	over   bool
	said   uint64           // revision of the newest record of the node that was registered here
	need   uint64           // no word before this index is applied: it would be older than what the node knows
	of     <-chan struct{}  // tells one state from another
	ws     cluster.WatchSet // fires when there may be something to say
	sent   map[string]uint64
}

// report is what a node says of its allocations.
type report struct {
	sess   *session
	seq    uint64
	allocs []*cluster.Allocation
}

// attached lists the sessions in the order of their nodes' IDs.
func (s *server) attached() []*session {
	out := make([]*session, 0, len(s.sessions))
	for _, id := range slices.Sorted(maps.Keys(s.sessions)) {
		out = append(out, s.sessions[id])
	}
	return out
}

// hello registers a node and begins its session.
func (s *server) hello(st *stream, record *cluster.Node) {
	s.heardOf[record.ID] = s.w.now
	self := func() *server { return s }
	s.w.propose(s.addr, &cluster.RegisterNode{Node: record}, serverTries, self, s.inLife(func(res cluster.Result, err error) {
		if err != nil || res.Err != nil || st.broken {
			return // the node does not wait for ever
		}
		if old := s.sessions[record.ID]; old != nil {
			old.over = true
		}
		sess := &session{s: s, nodeID: record.ID, stream: st, said: record.Revision, need: res.Index}
		s.sessions[record.ID] = sess
		st.node(func() { st.n.welcome(st) })
	}))
}

// register brings what a node has become into the log, one record of a stream after the other.
func (s *server) register(st *stream, record *cluster.Node) {
	if st.busy {
		st.record = record
		return
	}
	st.busy, st.record = true, nil
	self := func() *server { return s }
	s.w.propose(s.addr, &cluster.RegisterNode{Node: record}, serverTries, self, s.inLife(func(res cluster.Result, err error) {
		st.busy = false
		switch sess := s.sessions[record.ID]; {
		case sess == nil || sess.stream != st:
		case err != nil:
			sess.end()
		default:
			sess.said, sess.need = record.Revision, max(sess.need, res.Index)
			if st.record != nil {
				s.register(st, st.record)
			}
		}
	}))
}

// inLife drops an answer that comes after the server's death.
func (s *server) inLife(do func(cluster.Result, error)) func(cluster.Result, error) {
	life := s.life
	return func(res cluster.Result, err error) {
		if s.up && s.life == life {
			do(res, err)
		}
	}
}

// heartbeat answers a node's sign of life, unless the state does not count it as there.
func (s *server) heartbeat(st *stream, nodeID string) {
	sess := s.sessions[nodeID]
	if sess == nil || sess.stream != st {
		return
	}
	s.heardOf[nodeID] = s.w.now
	if s.applied >= sess.need && !sess.counted(s.state.Snapshot(), nil) {
		sess.end()
		return
	}
	st.node(func() { st.n.heardAt = st.n.w.now })
}

// end tells the node to register again.
func (sess *session) end() {
	sess.over = true
	if sess.s.sessions[sess.nodeID] == sess {
		delete(sess.s.sessions, sess.nodeID)
	}
	st := sess.stream
	st.node(func() { st.n.reconnect("the servers do not count this node") })
}

func (sess *session) counted(snap *cluster.Snapshot, ws cluster.WatchSet) bool {
	n := snap.Node(ws, sess.nodeID)
	return n != nil && n.Status == cluster.NodeStatusReady && n.Revision >= sess.said
}

func (s *server) pollSessions() {
	for _, sess := range s.attached() {
		sess.poll()
	}
}

// poll says what has changed for the node.
func (sess *session) poll() {
	s := sess.s
	if sess.over || s.applied < sess.need || !sess.fired() {
		return
	}
	snap := s.state.Snapshot()
	sess.ws = cluster.WatchSet{}
	sess.ws.Add(snap.Abandoned())
	if !sess.counted(snap, sess.ws) {
		sess.end()
		return
	}
	d := &desired{full: sess.of != snap.Abandoned(), index: s.applied}
	if d.full {
		sess.of, sess.sent = snap.Abandoned(), map[string]uint64{}
	}
	now := map[string]bool{}
	for _, a := range snap.AllocsByNode(sess.ws, sess.nodeID) {
		now[a.ID] = true
		if sess.sent[a.ID] != a.AllocModifyIndex {
			sess.sent[a.ID] = a.AllocModifyIndex
			d.allocs = append(d.allocs, a)
			d.jobs = append(d.jobs, snap.JobVersion(nil, a.JobKey(), a.JobVersion))
		}
	}
	for _, id := range slices.Sorted(maps.Keys(sess.sent)) {
		if !now[id] {
			d.gone = append(d.gone, id)
			delete(sess.sent, id)
		}
	}
	if d.full || len(d.allocs)+len(d.gone) > 0 {
		sess.stream.node(func() { sess.stream.n.desire(d) })
	}
}

func (sess *session) fired() bool {
	if sess.ws == nil {
		return true
	}
	for ch := range sess.ws {
		select {
		case <-ch:
			return true
		default:
		}
	}
	return false
}

// report takes a node's status; it goes into the log with that of others.
func (s *server) report(st *stream, nodeID string, seq uint64, allocs []*cluster.Allocation) {
	sess := s.sessions[nodeID]
	if sess == nil || sess.stream != st {
		return
	}
	s.heardOf[nodeID] = s.w.now
	snap := s.state.Snapshot()
	r := report{sess: sess, seq: seq}
	for _, a := range allocs { // a node speaks for its own allocations only
		if known := snap.Alloc(nil, a.ID); known != nil && known.NodeID == nodeID {
			r.allocs = append(r.allocs, a)
		}
	}
	if s.reports = append(s.reports, r); !s.reporting {
		s.reporting = true
		s.after(reportAge, s.commitReports)
	}
}

// commitReports commits what has come, one entry after the other.
func (s *server) commitReports() {
	reports := s.reports
	s.reports, s.reporting = nil, false
	cmd := &cluster.UpdateAllocs{}
	for _, r := range reports {
		cmd.Allocs = append(cmd.Allocs, r.allocs...)
	}
	done := func(_ cluster.Result, err error) {
		if s.reporting = len(s.reports) > 0; s.reporting {
			s.after(0, s.commitReports)
		}
		for _, r := range reports {
			st, seq := r.sess.stream, r.seq
			if err != nil {
				r.sess.end()
			} else {
				st.node(func() { st.n.acknowledged(seq) })
			}
		}
	}
	if len(cmd.Allocs) == 0 {
		done(cluster.Result{}, nil)
		return
	}
	s.reporting = true
	s.w.propose(s.addr, cmd, serverTries, func() *server { return s }, s.inLife(done))
}

// tellLeader passes on which nodes were heard of here.
func (s *server) tellLeader() {
	if s.role == leader {
		if s.reign != nil {
			s.reign.hear(maps.Clone(s.heardOf))
		}
		return
	}
	if s.leader < 0 {
		return
	}
	to, heard := s.w.servers[s.leader], maps.Clone(s.heardOf)
	s.w.net.send(s.addr, to.addr, to.alive(func() {
		if to.reign != nil {
			to.reign.hear(heard)
		}
	}))
}

// hear takes over when nodes were last heard of.
func (r *reign) hear(heard map[string]int64) {
	for id, at := range heard { // each for itself: the order does not matter
		r.heard[id] = max(r.heard[id], at)
	}
}
